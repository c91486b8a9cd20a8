#!/usr/bin/env bash
# All GPUs of this machine, or NPROC processes.   [NPROC=8] launch/one_node.sh CONFIG [--section.key=value ...]
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
NPROC="${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
exec torchrun --standalone --nproc_per_node="$NPROC" -m dist_train train "$@"
