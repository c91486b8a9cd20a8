#!/usr/bin/env bash
# One process: one GPU, or the CPU.   launch/one_gpu.sh CONFIG [--section.key=value ...]
set -euo pipefail
exec python -m dist_train train "$@"
