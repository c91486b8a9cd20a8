"""What to do where memory is not enough, said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dist_train.config import Settings
from dist_train.errors import UserError
from dist_train.training.assembly import Run
from dist_train.training.curriculum import last_k_at

# Allocations and releases that the history goes back. Each takes 2 µs and several kilobytes, as torch 2.13 says.
_HISTORY = 20_000


@contextmanager
def naming_memory_of_parts() -> Iterator[None]:
    """Turn an allocation that fails within, while a run is assembled, into a `UserError` that says what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory before the first update: weights, gradients and the optimizer's state do not fit; "
            "`train CONFIG --dry-run` says what they take, and --runtime.parallel=fsdp has several GPUs share them"
        ) from error


@contextmanager
def naming_memory(run: Run) -> Iterator[None]:
    """Turn an allocation that fails within into a `UserError` that says how much was computed at once, and what helps.

    With `log.memory_history`, on CUDA, a file in the run folder has what was allocated then, by whom, and what before.
    """
    settings, micro_batch = run.settings, run.micro_batch
    keeps_history = settings.log.memory_history and run.process.device.type == "cuda"
    if keeps_history:
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=_HISTORY)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        snapshot = _snapshot(run.folder.out_of_memory(run.process.rank)) if keeps_history else ""
        block_size = settings.model.block_size
        raise UserError(
            f"out of memory with {micro_batch} sequences of {block_size} tokens at once on a process, "
            f"of which the loss sees the last {_most_positions(settings)}; {_lever(settings, micro_batch)}{snapshot}"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch raises a bare RuntimeError that only its text tells from a bug.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _snapshot(path: Path) -> str:
    """Write what is allocated, and say where."""
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except OSError as error:
        return f"; {path} could not be written ({error.strerror})"
    return f"; {path} shows at https://pytorch.org/memory_viz what took it"


def _most_positions(settings: Settings) -> int:
    """Return how many positions the loss sees where it sees the most."""
    curriculum = settings.loss.curriculum
    starts = [stage.from_step for stage in curriculum] if isinstance(curriculum, tuple) else []
    return max(last_k_at(step, settings) for step in (0, *starts, settings.train.max_iters - 1))


def _lever(settings: Settings, micro_batch: int) -> str:
    """Return what saves most: of a step's memory nearly all grows with the sequences that are taken at once."""
    if micro_batch > 1:
        smaller = max(size for size in range(1, micro_batch) if micro_batch % size == 0)
        return f"use --train.micro_batch_size={smaller}: the same updates, computed in smaller parts"
    if not settings.runtime.recompute_blocks:
        return "use --runtime.recompute_blocks=true: the same updates, a third more work"
    if settings.runtime.parallel == "ddp":
        return "use --runtime.parallel=fsdp on several GPUs: each keeps a part of the network"
    return "a single one does not fit: lower model.block_size, train a smaller network, or take more GPUs"
