"""How a batch is divided: among processes, and on each of them into what is taken at once."""

from dist_train.errors import UserError
from dist_train.sections import TrainSettings


def micro_batch_size(settings: TrainSettings, world_size: int) -> int:
    """Return how many sequences one process takes at once.

    Raises `UserError` naming the nearest sizes where the batch cannot be divided.
    """
    total, at_most = settings.global_batch_size, settings.micro_batch_size
    share = total // world_size
    if total % world_size:
        nearest = [size for size in (share * world_size, (share + 1) * world_size) if size]
        raise UserError(
            f"train.global_batch_size={total} cannot be divided among {world_size} processes; "
            f"use {' or '.join(map(str, nearest))}"
        )
    size = min(at_most or share, share)
    if share % size:
        divisors = [divisor for divisor in range(1, share + 1) if share % divisor == 0]
        below = max(divisor for divisor in divisors if divisor < size)
        above = min(divisor for divisor in divisors if divisor > size)
        raise UserError(
            f"train.micro_batch_size={at_most} does not divide a process's {share} sequences; use {below} or {above}"
        )
    return size


def measured_part(settings: TrainSettings, world_size: int, has_own_gradients: bool) -> int:
    """Return of how many sequences `Replica.take_part_square_norm` is.

    A process's share where it has gradients of its own before they are added up, or else everybody's micro-batch.
    """
    if world_size > 1 and has_own_gradients:
        return settings.global_batch_size // world_size
    return micro_batch_size(settings, world_size) * world_size
