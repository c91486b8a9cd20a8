"""What to do where memory is not enough, said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dist_train.config import Settings
from dist_train.errors import UserError
from dist_train.training.curriculum import last_k_at


@contextmanager
def naming_memory(settings: Settings, micro_batch: int) -> Iterator[None]:
    """Turn an allocation that fails within into a `UserError` that says how much was computed at once, and what helps.

    `micro_batch` is how many sequences one process takes at once.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        block_size = settings.model.block_size
        raise UserError(
            f"out of memory with {micro_batch} sequences of {block_size} tokens at once on a process, "
            f"of which the loss sees the last {_most_positions(settings)}; {_lever(micro_batch)}"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch raises a bare RuntimeError that only its text tells from a bug.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _most_positions(settings: Settings) -> int:
    """Return how many positions the loss sees where it sees the most."""
    curriculum = settings.loss.curriculum
    starts = [stage.from_step for stage in curriculum] if isinstance(curriculum, tuple) else []
    return max(last_k_at(step, settings) for step in (0, *starts, settings.train.max_iters - 1))


def _lever(micro_batch: int) -> str:
    """Return what saves most: of a step's memory nearly all grows with the sequences that are taken at once."""
    if micro_batch == 1:
        return "a single one does not fit: lower model.block_size, or train a smaller network"
    smaller = max(size for size in range(1, micro_batch) if micro_batch % size == 0)
    return f"use --train.micro_batch_size={smaller}: the same updates, computed in smaller parts"
