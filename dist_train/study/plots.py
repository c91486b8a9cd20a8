"""Plots of finished or running runs, computed from their folders alone."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none may be there
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dist_train.study.grid import cell_name
from dist_train.study.measures import Row, read_metrics, smooth, trend_window

# Okabe and Ito's palette, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
_COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# Where more lines end beside each other than this, a legend names them instead.
_MAX_DIRECT_LABELS = 6


def plot_loss(run: Path) -> Path:
    """Draw a run's training loss, raw and smoothed, with its held-out losses on top; return the picture's path."""
    train, evals = read_metrics(run, "train"), read_metrics(run, "eval")
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    if train:
        steps, losses = (np.array([line[key] for line in train]) for key in ("step", "loss"))
        window = trend_window(len(losses))
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
    _tidy(axes)
    axes.legend(frameon=False)
    target = run / "plots" / "loss.png"
    target.parent.mkdir(exist_ok=True)
    return _save(figure, target)


def plot_comparison(rows: Sequence[Row], target: Path) -> Path:
    """Draw held-out losses by step, a line for each setting: the mean over seeds, in a band from lowest to highest."""
    groups: dict[str, list[Path]] = {}
    for row in rows:
        name = cell_name({key: value for key, value in row["settings"].items() if key != "run.seed"})
        groups.setdefault(name, []).append(Path(row["folder"]))
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    for axes, key, what in (
        (panels[0], "final_token_loss", "the final token"),
        (panels[1], "all_token_loss", "all tokens"),
    ):
        for number, (name, runs) in enumerate(groups.items()):
            _draw_band(axes, runs, key, name, _COLORS[number % len(_COLORS)])
        axes.set(xlabel="updates", title=f"held out, {what}")
        _tidy(axes)
        if len(groups) <= _MAX_DIRECT_LABELS:
            _label_ends(axes)
        else:
            axes.legend(frameon=False)
    panels[0].set_ylabel("loss (nats per token)")
    n_seeds = max(map(len, groups.values()))
    band = f": mean of {n_seeds} seeds, band from the lowest to the highest" if n_seeds > 1 else ""
    figure.suptitle(f"{target.parent.name}{band}")
    return _save(figure, target)


def _draw_band(axes: Axes, runs: Sequence[Path], key: str, name: str, color: str) -> None:
    """Draw one held-out loss of runs that differ in their seed."""
    # The untrained network is the same for all, and would press what they differ in into the picture's lower edge.
    curves = [{e["step"]: e[key] for e in read_metrics(run, "eval") if e["step"] > 0} for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    losses = np.array([[curve[step] for step in steps] for curve in curves])
    axes.plot(steps, losses.mean(axis=0), color=color, marker="o", markersize=3.5, linewidth=1.8, label=name)
    axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.2, linewidth=0)


def _label_ends(axes: Axes) -> None:
    """Write each line's label behind its end, moved apart where ends are close."""
    low, high = axes.get_ylim()
    position = -np.inf
    for line in sorted(axes.get_lines(), key=lambda line: float(np.asarray(line.get_ydata())[-1])):
        x, y = (float(np.asarray(data)[-1]) for data in line.get_data())
        position = max(y, position + 0.045 * (high - low))
        axes.annotate(
            str(line.get_label()),
            (x, position),
            xytext=(7, 0),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
            annotation_clip=False,
        )


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, target: Path) -> Path:
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target
