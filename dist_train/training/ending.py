"""How a run ends before its last update: on request, on a full disk, on a loss that cannot be, on weights that differ.

All processes end together and by the same status, each of which they agree on first.
"""

from enum import IntEnum
from typing import NoReturn

from dist_train.data.windows import samples_of
from dist_train.errors import LossError, ProcessLostError, StoppedError
from dist_train.runtime.stop import Stop
from dist_train.training.assembly import Run
from dist_train.training.initial_weights import bit_sums
from dist_train.training.meter import Impossible


class Ending(IntEnum):
    """Whether an update was the run's last one for now, and why. Where processes differ, the higher number counts."""

    NOT_YET = 0
    DONE = 1
    ON_REQUEST = 2
    DISK = 3


def agree_to_end(run: Run, stop: Stop) -> Ending:
    """Return, the same on all processes, whether one of them was asked to stop or cannot write any more."""
    if run.record.failure or run.saver.failure:
        mine = Ending.DISK
    else:
        mine = Ending.ON_REQUEST if stop.asked_by else Ending.NOT_YET
    return Ending(run.process.highest(mine))


def end(run: Run, ending: Ending, step: int) -> None:
    """Wait until everything is on disk. Raises `StorageError` if it is not, `StoppedError` for an end on request."""

    def finish() -> None:
        run.record.doing("saving")
        run.saver.wait()
        if run.record.failure:
            raise run.record.failure

    run.process.on_main(finish)
    if ending is Ending.ON_REQUEST:
        raise StoppedError(
            f"stopped on request after update {step}, everything is saved; the same command goes on from there"
        )


def raise_impossible(run: Run, impossible: Impossible) -> NoReturn:
    """Raise `LossError` that says which process's samples made it, on the record as a line of its own.

    If no process's own loss did, as where a gradient overflows, these are the samples of all.
    """
    step, size = impossible.step, run.settings.train.global_batch_size
    mine = samples_of(step - 1, size, run.process.rank, run.process.world_size).tolist()
    everyone = run.process.gather([impossible.is_mine, mine[0], mine[-1]])
    ranks = [rank for rank, (is_theirs, _, _) in enumerate(everyone) if is_theirs] or list(range(len(everyone)))
    samples = [everyone[rank][1:] for rank in ranks]
    run.record.impossible(step, impossible.what, ranks, samples)
    where = ", ".join(f"{first} … {last} on rank {rank}" for rank, (first, last) in zip(ranks, samples, strict=True))
    raise LossError(f"{impossible.what} of step {step} (samples {where}); {impossible.remedy}")


def require_same_weights(run: Run, step: int) -> None:
    """Raise `ProcessLostError` if a process's copy of the weights is not the first one's to the last bit.

    Averaged gradients keep equal copies equal, but do not notice those that are not: a flipped bit, say.
    """
    if run.process.world_size == 1 or not run.replica.is_copy:
        return
    sums = {f"sum of {name}": bits for name, bits in bit_sums(run.replica.network).items()}
    if differing := run.process.disagreement(sums):
        lost = ProcessLostError(
            f"the processes' weights differ after step {step}: {differing}; look for broken memory there, "
            f"the same command goes on from the last checkpoint, where they were the same"
        )
        lost.said_by = 0
        raise lost
