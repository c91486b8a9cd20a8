"""What updates measured: kept on the device until someone looks, so that no step waits for its numbers."""

import functools
import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_train.config import Settings
from dist_train.model.cost import step_flops
from dist_train.runtime.device import peak_flops, peak_memory_bytes
from dist_train.runtime.parallel import Replica
from dist_train.runtime.process import Process
from dist_train.runtime.shares import measured_part
from dist_train.training.loss import impossibility
from dist_train.training.noise_scale import NoiseMeans, estimate, including


class Update(NamedTuple):
    """What one update of the weights measured, as scalars still on the device."""

    loss_sum: Tensor
    """In nats, over this process's `supervised` tokens."""
    supervised: int
    grad_norm: Tensor
    """Over all processes, before clipping."""
    learning_rate: float
    last_k: int
    part_square_norm: Tensor | None = None
    """What `Replica.take_part_square_norm` returned."""


class Impossible(NamedTuple):
    """An update whose loss or gradient training cannot go on from; it was not made."""

    step: int
    what: str
    remedy: str
    is_mine: bool
    """Whether this process's own loss is what is wrong."""


class Meter:
    """Collects loss sums and counts of the updates since the last `flush`, and the totals of the run."""

    def __init__(self, settings: Settings, n_rows: int, process: Process, replica: Replica) -> None:
        self.tokens = self.supervised_tokens = 0
        """Input tokens and supervised tokens of all finished updates on all processes."""
        self.flops = 0
        """Executed in them, in matrix products."""
        self.noise_means: NoiseMeans | None = None
        """Of the gradient, up to the last update that told of it."""
        self._batch_size = settings.train.global_batch_size
        self._part_size = measured_part(settings.train, process.world_size, replica.is_copy)
        self._tokens_per_step = settings.train.global_batch_size * settings.model.block_size
        # The head multiplies by all rows of the embedding, those that pad the vocabulary too.
        self._flops_of = functools.cache(
            functools.partial(
                step_flops,
                settings.model,
                n_rows,
                settings.train.global_batch_size,
                recomputes=settings.runtime.recompute_blocks,
            )
        )
        peak = peak_flops(process.device, replica.precision)
        self._peak_flops = peak * process.world_size if peak else None
        self._process = process
        self._scales_gradients = replica.precision == torch.float16
        self._pending: list[tuple[int, Update]] = []
        self._started = time.perf_counter()

    def add(self, step: int, update: Update) -> None:
        """Take in the update that finished `step`."""
        self._pending.append((step, update))

    def flush(self) -> tuple[list[dict[str, Any]], Impossible | None]:
        """Return the `train` lines of the updates since the last flush, the same on all processes, and start anew.

        Lines end before the first impossible update, which comes with them. Waits for the device. Seconds are the mean
        over these updates.
        """
        if not self._pending:
            return [], None
        pending, self._pending = self._pending, []
        loss_sums, counts, grad_norms = zip(*(update[:3] for _, update in pending), strict=True)
        # One reduction and one transfer for all of these updates.
        parts = torch.stack([_or_nan(update.part_square_norm, like=update.grad_norm) for _, update in pending])
        own = torch.stack([torch.stack(loss_sums), loss_sums[0].new_tensor(counts), parts])
        sums = self._process.sum(own).tolist()
        norms = torch.stack(grad_norms).tolist()
        seconds = (time.perf_counter() - self._started) / len(pending)
        lines: list[dict[str, Any]] = []
        for (step, update), loss_sum, count, part, norm in zip(pending, *sums, norms, strict=True):
            if found := impossibility(loss_sum / count) or self._impossible_gradient(norm):
                is_mine = not math.isfinite(loss_sums[len(lines)].item())
                return lines, Impossible(step, *found, is_mine)
            line = self._line(step, update, loss_sum / count, round(count), norm, seconds)
            lines.append(line | self._noise(update.last_k, norm, part / self._process.world_size))
        self.restart_clock()
        return lines, None

    def _impossible_gradient(self, norm: float) -> tuple[str, str] | None:
        # float16's scaler leaves an update out whose gradient overflowed, and tries a smaller scale.
        if math.isfinite(norm) or self._scales_gradients:
            return None
        return f"the gradient is {norm}", "lower optim.learning_rate or clip earlier"

    def _line(
        self, step: int, update: Update, loss: float, supervised: int, norm: float, seconds: float
    ) -> dict[str, Any]:
        flops = self._flops_of(update.last_k)
        self.tokens += self._tokens_per_step
        self.supervised_tokens += supervised
        self.flops += flops
        is_skipped = not math.isfinite(norm)
        return {
            "step": step,
            "loss": loss,
            "lr": update.learning_rate,
            "grad_norm": None if is_skipped else norm,
            "skipped": is_skipped,
            "last_k": update.last_k,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "flops": self.flops,
            "step_seconds": seconds,
            "tokens_per_second": self._tokens_per_step / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "mfu": flops / seconds / self._peak_flops if self._peak_flops else None,
            "peak_memory_bytes": peak_memory_bytes(self._process.device),
        }

    def _noise(self, last_k: int, norm: float, part_square_norm: float) -> dict[str, float | None]:
        """Return what an update tells of the gradient's noise, and what all have told; None where it tells nothing."""
        found = estimate(norm * norm, self._batch_size, part_square_norm, self._part_size)
        if found is None:
            return {"gradient_signal": None, "gradient_noise": None, "noise_scale": None}
        self.noise_means = including(self.noise_means, found, last_k)
        scale = self.noise_means.noise_scale
        return {"gradient_signal": found.signal, "gradient_noise": found.noise, "noise_scale": scale}

    def restart_clock(self) -> None:
        """Time updates from now on: what came before, evaluating or saving, is none of theirs."""
        self._started = time.perf_counter()


def _or_nan(number: Tensor | None, like: Tensor) -> Tensor:
    return torch.full_like(like, math.nan) if number is None else number
