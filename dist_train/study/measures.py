"""What runs say in numbers, computed from their folders alone: measures of each, and claims about all of them."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.errors import UserError
from dist_train.study.grid import cell_name

Row = dict[str, Any]
"""A run in a report: `settings` that vary, `folder`, `measures`."""


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
    return [values for line in lines if (values := json.loads(line)).get("kind") == kind]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred moving mean of `values` [n]; at the ends over what there is of the window."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def trend_window(n_updates: int) -> int:
    """Return over how many updates a run's loss is smoothed."""
    return max(5, n_updates // 40)


def loss_noise(losses: np.ndarray) -> float:
    """Return the standard deviation of the updates' losses [n] about their smoothed trend, in nats.

    Over the second half of the run: in the first the trend falls faster than the moving mean can follow.
    """
    window = trend_window(len(losses))
    residuals = (losses - smooth(losses, window))[len(losses) // 2 :]
    # The moving mean contains the loss itself, which makes the residual smaller by this factor for white noise.
    return float(residuals.std() / math.sqrt(1 - 1 / window))


def measure(run: Path) -> dict[str, float]:
    """Return a run's measures: its last held-out losses, its noise, its cost. Raises `UserError` if it has none yet."""
    train, evals = read_metrics(run, "train"), read_metrics(run, "eval")
    if not train or not evals:
        raise UserError(f"{run} has no finished updates to measure; train it first")
    last, held_out = train[-1], evals[-1]
    return {
        "step": held_out["step"],
        "last_k": last["last_k"],
        "final_token_loss": held_out["final_token_loss"],
        "all_token_loss": held_out["all_token_loss"],
        "train_loss_noise": loss_noise(np.array([line["loss"] for line in train])),
        # The median, because other programs on the machine make some updates slow.
        "step_seconds": float(np.median([line["step_seconds"] for line in train])),
        "tokens": last["tokens"],
        "supervised_tokens": last["supervised_tokens"],
    }


# ---- claims ----------------------------------------------------------------------------------------------------------


def claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what the runs say about final-token against all-token training, once for each setting of the others.

    Pairs runs that differ in `last_k` alone; seeds are the repetitions. Without such pairs there is nothing to say.
    """
    pairs: dict[str, list[tuple[Row, Row]]] = {}
    for final in rows:
        for every in rows:
            is_pair = final["measures"]["last_k"] == 1 and _sees_all(every["measures"])
            if is_pair and _without(final, "loss.last_k") == _without(every, "loss.last_k"):
                where = cell_name(_without(final, "loss.last_k", "run.seed"))
                pairs.setdefault(f" ({where})" if where else "", []).append((final["measures"], every["measures"]))
    return [claim for where, paired in pairs.items() for claim in _claims_of(where, paired)]


def _claims_of(where: str, pairs: list[tuple[Row, Row]]) -> list[dict[str, Any]]:
    losses = [final["all_token_loss"] - every["all_token_loss"] for final, every in pairs]
    # Ratios are symmetric, and their noise more nearly normal, in logarithms.
    log_ratios = [math.log(final["step_seconds"] / every["step_seconds"]) for final, every in pairs]
    higher = "final-token training reaches a higher held-out all-token loss at equal steps than all-token training"
    cheaper = "final-token training is cheaper per step than all-token training"
    return [
        _claim(higher + where, losses, "nats per token, final-token minus all-token", expected_sign=1),
        _claim(
            cheaper + where, log_ratios, "step seconds, final-token over all-token", expected_sign=-1, undo=math.exp
        ),
    ]


def _claim(
    text: str, effects: list[float], unit: str, expected_sign: int, undo: Callable[[float], float] = float
) -> dict[str, Any]:
    """Judge a claim by whether the interval of its mean effect lies on one side of 0; `undo` gives the unit back."""
    mean, interval = float(np.mean(effects)), student_interval(effects)
    is_decided = interval is not None and (interval[0] > 0 or interval[1] < 0)
    verdict = "undecided"
    if is_decided:
        verdict = "supported" if mean * expected_sign > 0 else "contradicted"
    return {
        "claim": text,
        "effect": undo(mean),
        "interval": [undo(end) for end in interval] if interval else [None, None],
        "unit": unit,
        "verdict": verdict,
        "repetitions": len(effects),
    }


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of repeated `values` (Student 1908), or None for a single one."""
    n = len(values)
    if n < 2:
        return None
    # With t = √ν·tan(a) Student's density is proportional to cos(a)^(ν-1), which is easily summed up and inverted.
    angles = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angles) ** (n - 2)
    within = np.cumsum((density[1:] + density[:-1]) / 2)
    quantile = math.sqrt(n - 1) * math.tan(np.interp(0.95, within / within[-1], angles[1:]))
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def _sees_all(measures: dict[str, float]) -> bool:
    return measures["supervised_tokens"] == measures["tokens"]


def _without(row: Row, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row["settings"].items() if key not in keys}
