"""Plots of finished or running runs, computed from their folders alone."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none may be there
import matplotlib.pyplot as plt
import numpy as np

from dist_train.errors import UserError

# Okabe and Ito's palette, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


def read_metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind in a run's `metrics.jsonl`. Raises `UserError` if the folder holds no run."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{run} is no run folder ({error.strerror}: metrics.jsonl); give one that `train` wrote"
        ) from None
    return [values for line in lines if (values := json.loads(line)).get("kind") == kind]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred moving mean of `values` [n]; at the ends over what there is of the window."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def plot_loss(run: Path) -> Path:
    """Draw a run's training loss, raw and smoothed, with its held-out losses on top; return the picture's path."""
    train, evals = read_metrics(run, "train"), read_metrics(run, "eval")
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    if train:
        steps, losses = (np.array([line[key] for line in train]) for key in ("step", "loss"))
        window = max(5, len(losses) // 40)
        axes.plot(steps, losses, color=GREY, alpha=0.45, linewidth=0.7, label="train, each update")
        axes.plot(steps, smooth(losses, window), color=GREY, linewidth=2, label=f"train, mean of {window} updates")
    for key, name, color, marker in (
        ("final_token_loss", "held out, final token", BLUE, "o"),
        ("all_token_loss", "held out, all tokens", ORANGE, "s"),
    ):
        axes.plot(
            [e["step"] for e in evals], [e[key] for e in evals], color=color, marker=marker, markersize=4, label=name
        )
    last_k = train[-1]["last_k"] if train else None
    what = "the final token" if last_k == 1 else f"the last {last_k} tokens of each sequence"
    axes.set(xlabel="updates", ylabel="loss (nats per token)", title=f"{run.name}: trained on {what}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    target = run / "plots" / "loss.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target
