"""A problem whose gradient noise is known: a line through noisy points, and updates that leave it where it is."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_train.config import Settings
from dist_train.runtime.parallel import Replica
from dist_train.runtime.process import Process
from dist_train.training.assembly import Learner
from dist_train.training.meter import Meter
from dist_train.training.trainer import update

N_INPUTS, BATCH = 10, 48
# A point is x ~ N(0, I) and y = w·x + N(0, 1) with a vector w of length 1. At weights of 0 the gradient of ½ (0 − y)²
# is −y x: its mean is −w, and its covariance (1 + |w|²) I + w wᵀ, by the fourth moments of the normal distribution.
SIGNAL = 1.0
NOISE = 2.0 * N_INPUTS + 1.0


class Regression(nn.Module):
    """The sum of ½ (prediction − y)² over a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(N_INPUTS, 1, bias=False)
        nn.init.zeros_(self.line.weight)

    def forward(self, x_BI: Tensor, y_B: Tensor, last_k: int) -> Tensor:
        return (self.line(x_BI).squeeze(1) - y_B).square().sum() / 2


class Points:
    """A process's share of points that are new with every step, in the place of windows of tokens."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x_BI = torch.randn(BATCH, N_INPUTS, generator=generator)
        y_B = x_BI[:, 0] + torch.randn(BATCH, generator=generator)
        rank, world_size = self._process.rank, self._process.world_size
        return x_BI.chunk(world_size)[rank], y_B.chunk(world_size)[rank]


def train_lines(process: Process, micro_batch: int | None, updates: int) -> list[dict[str, Any]]:
    """Return the `train` lines of so many updates."""
    settings = Settings.model_validate(
        {
            "run": {"out_dir": Path("never-written")},
            "data": {"source": "python-docs", "dir": Path("never-read")},
            "train": {"global_batch_size": BATCH, "micro_batch_size": micro_batch},
            "optim": {"learning_rate": 1e-30, "min_lr": 0.0},
            "runtime": {"device": "cpu", "precision": "fp32"},
        }
    )
    problem, no_text = Regression(), {"windows": None, "batches": Points(process)}
    learner = Learner(
        settings=settings,
        process=process,
        replica=Replica(problem, problem, process, settings.runtime),
        optimizer=torch.optim.SGD(problem.parameters(), fused=True),
        **cast("Any", no_text),
    )
    meter = Meter(settings, 1, process, learner.replica)
    for step in range(updates):
        meter.add(step + 1, update(learner, step))
    lines, impossible = meter.flush()
    assert impossible is None
    return lines
