"""A run's losses over what they cost: updates, supervised tokens, FLOPs, seconds."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.errors import UserError

BUDGETS = ("updates", "supervised tokens", "FLOPs", "seconds")
"""What can be made equal for runs that are compared. Seconds are of this machine, evaluating and saving left out."""
LOSSES = ("final_token_loss", "all_token_loss")


def read_metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind in a run's `metrics.jsonl`. Raises `UserError` if the folder holds no run."""
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{run} is no run folder ({error.strerror}: metrics.jsonl); give one that `train` wrote"
        ) from None
    # A line that is still being written ends without a newline, and is left to the next reader.
    lines = text.rpartition("\n")[0].splitlines()
    try:
        return [values for line in lines if (values := json.loads(line)).get("kind") == kind]
    except (ValueError, AttributeError):
        raise UserError(f"{run / 'metrics.jsonl'} has a line that is no JSON object; make the run anew") from None


@dataclass(frozen=True)
class Curve:
    """Held-out losses of a run at its evaluations, after the first update and later."""

    spent: dict[str, np.ndarray]
    """By each of `BUDGETS` [evaluations]."""
    losses: dict[str, np.ndarray]
    """Each of `LOSSES` [evaluations], in nats per token."""

    def at(self, budget: str, amount: float, loss: str) -> float:
        """Return a loss after so much was spent; between evaluations on a straight line over the logarithm."""
        return float(np.interp(math.log(amount), np.log(self.spent[budget]), self.losses[loss]))

    def needed(self, budget: str, loss: str, target: float) -> float | None:
        """Return how much was spent when a loss first came down to `target`; None if it never did."""
        values, spent = self.losses[loss], self.spent[budget]
        reached = np.flatnonzero(values <= target)
        if not len(reached):
            return None
        end = reached[0]
        if end == 0:
            return float(spent[0])
        # Straight over the logarithm, from the evaluation before.
        share = (values[end - 1] - target) / (values[end - 1] - values[end])
        return float(spent[end - 1] * (spent[end] / spent[end - 1]) ** share)


def read_curve(run: Path) -> Curve:
    """Return a run's curve. Raises `UserError` if it has not been evaluated after an update yet."""
    train = {line["step"]: line for line in read_metrics(run, "train")}
    evals = [line for line in read_metrics(run, "eval") if line["step"] in train]
    if not evals:
        raise UserError(f"{run} has no finished updates to measure; train it first")
    seconds = dict(zip(train, np.cumsum([line["step_seconds"] for line in train.values()]), strict=True))
    at = [train[line["step"]] for line in evals]
    if any("flops" not in line for line in train.values()):
        raise UserError(f"{run} was made by an earlier version, which counted no FLOPs; remove it, and make it anew")
    spent = {
        "updates": [line["step"] for line in at],
        "supervised tokens": [line["supervised_tokens"] for line in at],
        "FLOPs": [line["flops"] for line in at],
        "seconds": [seconds[line["step"]] for line in at],
    }
    return Curve(
        {budget: np.array(amounts, dtype=float) for budget, amounts in spent.items()},
        {loss: np.array([line[loss] for line in evals]) for loss in LOSSES},
    )
