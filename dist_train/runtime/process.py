"""Which process this is, and the few things that all processes do together.

One process is the same program: without a launcher the world has size 1 and every collective is the identity.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_train.errors import DistTrainError, ProcessLostError
from dist_train.runtime.device import choose_device, keep_freed_memory
from dist_train.runtime.group import Group, backend, call_the_roll, join, leave
from dist_train.sections import RuntimeSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """One of `world_size` processes that train together, and its device."""

    rank: int
    world_size: int
    device: torch.device
    is_grouped: bool = False
    """Whether gradients are averaged over a group: of all processes, or of this one to measure what that costs."""
    group: Group | None = None
    """What connects it to the others; None where there are none."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the record."""
        return self.rank == 0

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Add up `numbers` over all processes, in place, and return them."""
        if self.group:
            dist.all_reduce(numbers)
        return numbers

    def patient_sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Like `sum` for CPU tensors, but waits for the slowest process as long as it takes."""
        if self.group:
            dist.all_reduce(numbers, group=self.group.patient)
        return numbers

    def highest(self, number: int) -> int:
        """Return the highest of all processes' numbers, on all of them, without waiting for the device."""
        if not self.group:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group.control)
        return int(numbers)

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do `work` on the first process while the others wait as long as it takes; they get None."""
        return self.together(lambda: work() if self.is_main else None)

    def together(self, work: Callable[[], T]) -> T:
        """Do `work`, and wait as long as it takes until all processes have done it. It may not wait for others itself.

        An error ends all processes with the exit status of the first of them that has one, which says why.
        """
        failure = None
        try:
            result = work()
        except Exception as error:
            failure = error
        statuses = self.gather(getattr(failure, "exit_status", 1) if failure else 0)
        first = next((rank for rank, status in enumerate(statuses) if status), None)
        if first is None:
            return result
        if failure and first == self.rank:
            if isinstance(failure, DistTrainError):
                failure.said_by = first
            raise failure
        raise _EndedElsewhereError(first, statuses[first]) from failure

    def gather(self, value: Any) -> list[Any]:
        """Return every process's `value`, in order of rank; waits as long as it takes.

        As JSON, because torch's own gathering of objects unpickles what the network brings.
        """
        if not self.group:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=self.group.patient)
        longest = int(max(sizes))
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=self.group.patient)
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def disagreement(self, facts: dict[str, Any]) -> str | None:
        """Say which process differs from the first in which of `facts` (JSON values), the same on all; or None."""
        first, *others = self.gather(facts)
        for rank, theirs in enumerate(others, start=1):
            differing = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
            if differing:
                named = ", ".join(f"{name}={theirs.get(name)!r} (not {first.get(name)!r})" for name in differing[:8])
                more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
                return f"rank {rank} has {named}{more}, unlike rank 0"
        return None

    def seed_dropout(self, seed: int) -> None:
        """Start the device's default generator anew: dropout draws from it, and has no other way in."""
        torch.manual_seed(seed)


class _EndedElsewhereError(DistTrainError):
    """Another process has ended by an error, and says which."""

    def __init__(self, rank: int, exit_status: int) -> None:
        super().__init__(f"rank {rank} says why")
        self.said_by, self.exit_status = rank, exit_status


@contextmanager
def start_process(settings: RuntimeSettings, keeps_freed_memory: bool = True) -> Iterator[Process]:
    """Join the processes that a launcher started, or be the only one; leave them at the end.

    On a CPU, memory that is freed is kept for the next tensor, to the process's end.

    Raises `UserError` if the device is not there, `ProcessLostError` if the others are not.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(settings.device, int(os.environ.get("LOCAL_RANK", 0)), world_size)
    if settings.deterministic:
        # cuBLAS asks for this before its first call; see torch.use_deterministic_algorithms.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu" and keeps_freed_memory:
        keep_freed_memory()
    if world_size == 1:
        yield Process(rank, world_size, device)
        return
    group = join(rank, world_size, device, settings.timeout_seconds)
    process = Process(rank, world_size, device, is_grouped=True, group=group)
    try:
        with naming_lost_peers(process):
            yield process
            # All leave together: a process that closes its connections early looks lost to the others.
            dist.barrier(group=group.patient)
    except BaseException:
        leave(group, device)
        raise
    dist.destroy_process_group()


@contextmanager
def group_of_one(process: Process) -> Iterator[Process]:
    """Have the only process average gradients with itself, so that what data parallelism costs can be measured."""
    dist.init_process_group(backend(process.device), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield replace(process, is_grouped=True)
    finally:
        dist.destroy_process_group()


@contextmanager
def naming_lost_peers(process: Process) -> Iterator[None]:
    """Turn the many errors that a broken collective ends in into a `ProcessLostError` that says who is missing."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises bare RuntimeErrors that only their text tells from a bug.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error) and "onnection closed" not in str(error):
            raise
        raise _lost(process) from error


def _lost(process: Process) -> ProcessLostError:
    group = process.group
    assert group is not None
    # First, so that the others' waits for this process end too, and they come to the roll call.
    leave(group, process.device)
    present, missing = call_the_roll(group, process.rank, process.world_size)
    who = f"rank {', '.join(map(str, missing))}" if missing else "the connection to another process for a moment"
    lost = ProcessLostError(
        f"rank {process.rank} lost {who}: gone, or not there within runtime.timeout_seconds={group.timeout_seconds:g}; "
        f"see what it says, the same command goes on from the last checkpoint"
    )
    lost.said_by = min(present)
    return lost
