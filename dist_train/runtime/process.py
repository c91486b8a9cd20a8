"""Which process this is, on which device, and the few things that all processes do together.

One process is the same program: without torchrun the world has size 1 and every collective is the identity.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_train.config import RuntimeSettings
from dist_train.errors import ProcessLostError, UserError

T = TypeVar("T")

# Longer than any evaluation or save. A process that dies meanwhile is noticed all the same, as its connection closes;
# a machine that loses power is not.
_PATIENCE = timedelta(days=7)

# Peak dense bf16 (fp16 where there is no bf16) matrix FLOP/s without sparsity, from NVIDIA's datasheets.
_PEAK_FLOPS = {
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


@dataclass(frozen=True)
class Process:
    """One of `world_size` processes that train together, and its device."""

    rank: int
    world_size: int
    device: torch.device
    is_grouped: bool = False
    """Whether gradients are averaged over a group: of all processes, or of this one to measure what that costs."""
    patient_group: Any = None
    """CPU group without a practical timeout, for waits whose length nobody can know."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the record."""
        return self.rank == 0

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Add up `numbers` over all processes, in place, and return them."""
        if self.world_size > 1:
            dist.all_reduce(numbers)
        return numbers

    def patient_sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Like `sum` for CPU tensors, but waits for the slowest process as long as it takes."""
        if self.world_size > 1:
            dist.all_reduce(numbers, group=self.patient_group)
        return numbers

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do `work` on the first process while the others wait as long as it takes; they get None."""
        result = work() if self.is_main else None
        self.patient_sum(torch.zeros(1))
        return result

    def agree(self, facts: dict[str, str]) -> None:
        """Raise `UserError` on all processes if any differs from the first in one of `facts`, naming rank and fact."""
        if self.world_size == 1:
            return
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, facts, group=self.patient_group)
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs[name] != value:
                    raise UserError(
                        f"rank {rank} has other {name} than rank 0 ({theirs[name][:16]}, not {value[:16]}); "
                        f"start all processes with the same command on the same files"
                    )

    def seed_dropout(self, seed: int) -> None:
        """Start the device's default generator anew: dropout draws from it, and has no other way in."""
        torch.manual_seed(seed)


@contextmanager
def start_process(settings: RuntimeSettings, keeps_freed_memory: bool = True) -> Iterator[Process]:
    """Join the processes that torchrun started, or be the only one; leave them at the end.

    On a CPU, memory that is freed is kept for the next tensor, to the process's end.

    Raises `UserError` if the device is not there, `ProcessLostError` if the others are not.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = _device(settings.device, int(os.environ.get("LOCAL_RANK", 0)), world_size)
    if settings.deterministic:
        # cuBLAS asks for this before its first call; see torch.use_deterministic_algorithms.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu" and keeps_freed_memory:
        _keep_freed_memory()
    if world_size == 1:
        yield Process(rank, world_size, device)
        return
    try:
        dist.init_process_group(
            _backend(device),
            timeout=timedelta(seconds=settings.timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
        patient_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except ValueError as error:
        raise UserError(
            f"RANK and WORLD_SIZE are set, but not all that torchrun sets ({error}); use torchrun"
        ) from None
    except dist.DistError as error:
        raise ProcessLostError(f"rank {rank} cannot reach the others: {error}; see that all were started") from error
    try:
        with naming_lost_peers(rank):
            yield Process(rank, world_size, device, is_grouped=True, patient_group=patient_group)
            # All leave together: a process that closes its connections early looks lost to the others.
            dist.barrier(group=patient_group)
    except BaseException:
        # gloo's threads have to end before the interpreter does, or it aborts. NCCL's group is left to the process's
        # end: destroying it is a collective, to which the others may never come.
        dist.destroy_process_group(patient_group if device.type == "cuda" else None)
        raise
    dist.destroy_process_group()


@contextmanager
def group_of_one(process: Process) -> Iterator[Process]:
    """Have the only process average gradients with itself, so that what data parallelism costs can be measured."""
    dist.init_process_group(_backend(process.device), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield replace(process, is_grouped=True)
    finally:
        dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


@contextmanager
def naming_lost_peers(rank: int) -> Iterator[None]:
    """Turn the many errors that a broken collective ends in into `ProcessLostError`."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises bare RuntimeErrors that only their text tells from a bug.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error) and "onnection closed" not in str(error):
            raise
        raise ProcessLostError(
            f"rank {rank} lost another process, or waited for it longer than runtime.timeout_seconds; "
            f"see what the others say, the same command goes on from the last checkpoint"
        ) from error


def _keep_freed_memory() -> None:
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


def _device(wanted: str, local_rank: int, world_size: int) -> torch.device:
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
    # Whole words: an L40 is no L4.
    words = set(re.split(r"[\s-]", torch.cuda.get_device_name(device)))
    return next((flops for name, flops in _PEAK_FLOPS.items() if set(name.split()) <= words), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: on the GPU where there is one, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock read next means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
