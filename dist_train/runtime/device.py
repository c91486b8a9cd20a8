"""The device that a process computes on: which one, how fast it could be, how much memory it has held."""

import contextlib
import ctypes
import re
import sys

import torch

from dist_train.errors import UserError

# Peak dense bf16 (fp16 where there is no bf16) matrix FLOP/s without sparsity, from NVIDIA's datasheets.
PEAK_FLOPS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
}

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have glibc keep memory that is freed, for as long as the process lives.

    By default it gives large blocks back at once, and the kernel clears each page again when the next tensor touches
    it: 0.2 million page faults and a fifth of the seconds of a small batch's step of Model 5. What is kept is cut into
    pieces: 5 to 30 % more stays resident. Huge pages (THP_MEM_ALLOC_ENABLE) made some steps faster still and others
    slower, as the kernel found them or had to make room.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        keep = ctypes.CDLL(None).mallopt
        keep(_M_MMAP_MAX, 0)
        keep(_M_TRIM_THRESHOLD, 2**31 - 1)


def choose_device(wanted: str, local_rank: int, world_size: int) -> torch.device:
    """Return the device `wanted` (`runtime.device`) for one of a machine's processes. Raises `UserError` without it."""
    # Processes cannot add up gradients on MPS: neither NCCL nor gloo knows it.
    has_mps = torch.backends.mps.is_available() and world_size == 1
    available = {"cuda": torch.cuda.is_available(), "mps": has_mps, "cpu": True}
    kind = next(kind for kind, there in available.items() if there) if wanted == "auto" else wanted
    if not available[kind]:
        raise UserError(
            f"runtime.device: there is no {kind} here for {world_size} process(es); use --runtime.device=auto"
        )
    if kind != "cuda":
        return torch.device(kind)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"runtime.device: process {local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}; "
            f"start as many processes with --nproc_per_node"
        )
    return torch.device("cuda", local_rank)


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Return the device's peak FLOP/s in 16-bit matrix products, or None where it is not known or not what runs."""
    if device.type != "cuda" or precision == torch.float32:
        return None
    known = known_gpu(torch.cuda.get_device_name(device))
    return PEAK_FLOPS[known] if known else None


def known_gpu(name: str) -> str | None:
    """Return which of `PEAK_FLOPS` a GPU is that calls itself `name`."""
    # Whole words: an L40 is no L4.
    words = set(re.split(r"[\s-]", name))
    return next((known for known in PEAK_FLOPS if set(known.split()) <= words), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: on the GPU where there is one, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock read next means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
