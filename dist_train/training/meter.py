"""What updates measured: kept on the device until someone looks, so that no step waits for its numbers."""

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_train.config import Settings
from dist_train.errors import LossError
from dist_train.model.gpt import step_flops
from dist_train.runtime.process import Process, peak_flops, peak_memory_bytes
from dist_train.training.loss import require_possible


class Update(NamedTuple):
    """What one update of the weights measured, as scalars still on the device."""

    loss_sum: Tensor
    """In nats, over this process's `supervised` tokens."""
    supervised: int
    grad_norm: Tensor
    """Over all processes, before clipping."""
    learning_rate: float


class Meter:
    """Collects loss sums and counts of the updates since the last `flush`, and the totals of the run."""

    def __init__(self, settings: Settings, n_rows: int, process: Process, precision: torch.dtype) -> None:
        self.tokens = self.supervised_tokens = 0
        """Input tokens and supervised tokens of all finished updates on all processes."""
        self._tokens_per_step = settings.train.global_batch_size * settings.model.block_size
        # The head multiplies by all rows of the embedding, those that pad the vocabulary too.
        self._flops_per_step = step_flops(settings.model, n_rows, settings.train.global_batch_size, settings.last_k)
        peak = peak_flops(process.device, precision)
        self._peak_flops = peak * process.world_size if peak else None
        self._last_k, self._process = settings.last_k, process
        self._scales_gradients = precision == torch.float16
        self._pending: list[tuple[int, Update]] = []
        self._started = time.perf_counter()

    def add(self, step: int, update: Update) -> None:
        """Take in the update that finished `step`."""
        self._pending.append((step, update))

    def flush(self) -> list[dict[str, Any]]:
        """Return the `train` lines of the updates since the last flush, the same on all processes, and start anew.

        Waits for the device. Their seconds are the mean over these updates. Raises `LossError` for an impossible
        loss or gradient.
        """
        if not self._pending:
            return []
        steps, updates = zip(*self._pending, strict=True)
        loss_sums, counts, grad_norms, rates = zip(*updates, strict=True)
        self._pending = []
        # One reduction and one transfer for all of these updates.
        sums = self._process.sum(torch.stack([torch.stack(loss_sums), loss_sums[0].new_tensor(counts)])).tolist()
        norms = torch.stack(grad_norms).tolist()
        seconds = (time.perf_counter() - self._started) / len(steps)
        lines = []
        for step, loss_sum, count, norm, rate in zip(steps, *sums, norms, rates, strict=True):
            loss = loss_sum / count
            require_possible(loss, step)
            is_skipped = not math.isfinite(norm)
            if is_skipped and not self._scales_gradients:
                raise LossError(f"the gradient of step {step} is {norm}; lower optim.learning_rate or clip earlier")
            self.tokens += self._tokens_per_step
            self.supervised_tokens += round(count)
            lines.append(
                {
                    "step": step,
                    "loss": loss,
                    "lr": rate,
                    # float16's scaler leaves an update out whose gradient overflowed, and tries a smaller scale.
                    "grad_norm": None if is_skipped else norm,
                    "skipped": is_skipped,
                    "last_k": self._last_k,
                    "tokens": self.tokens,
                    "supervised_tokens": self.supervised_tokens,
                    "step_seconds": seconds,
                    "tokens_per_second": self._tokens_per_step / seconds,
                    "supervised_tokens_per_second": round(count) / seconds,
                    "mfu": self._flops_per_step / seconds / self._peak_flops if self._peak_flops else None,
                    "peak_memory_bytes": peak_memory_bytes(self._process.device),
                }
            )
        self.restart_clock()
        return lines

    def restart_clock(self) -> None:
        """Time updates from now on: what came before, evaluating or saving, is none of theirs."""
        self._started = time.perf_counter()
