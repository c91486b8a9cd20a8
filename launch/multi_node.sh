#!/usr/bin/env bash
# The same command on every node, which see one file system. HEAD is one node's address, the same for all:
#   NNODES=2 HEAD=node0.example [NPROC=8] [PORT=29500] [JOB=name] launch/multi_node.sh CONFIG [--section.key=value ...]
set -euo pipefail
: "${NNODES:?how many nodes take part}" "${HEAD:?address of the node where all meet}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
NPROC="${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
exec torchrun --nnodes="$NNODES" --nproc_per_node="$NPROC" \
  --rdzv_backend=c10d --rdzv_endpoint="$HEAD:${PORT:-29500}" --rdzv_id="${JOB:-dist_train}" \
  -m dist_train train "$@"
