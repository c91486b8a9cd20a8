"""Figures of losses: over updates with their noise, over what they cost, and by position."""

from collections.abc import Sequence
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Canvas

from dist_train.study.charts import (
    Draft,
    Panel,
    among,
    decimal,
    draw_band,
    name_lines,
    series,
    smooth,
    tidy,
    trend_window,
)
from dist_train.study.curves import Group, main_places
from dist_train.study.learning import BUDGETS

# ---- losses: the training loss of each update, and the same loss held out --------------------------------------------


def losses(groups: Sequence[Group]) -> Draft:
    """Draw what each objective is trained on, update by update with its noise, and the same loss held out."""
    shown = [group for those in main_places(groups).values() for group in those]
    limits = _loss_limits(shown)
    panels = [
        Panel(
            f"losses-{number}",
            f"Training loss of each update, its mean, and held-out loss of {group.name}",
            partial(_draw_losses, group=group, limits=limits),
        )
        for number, group in enumerate(shown)
    ]
    return Draft(
        _noise_title(shown),
        "Pale: the training loss of one seed's updates; the line through it: its moving mean; dots: the same loss on "
        "held-out text.",
        panels,
    )


def _loss_limits(groups: Sequence[Group]) -> tuple[float, float]:
    """Return common limits for the losses, without first updates and single wild ones that would press the rest."""
    of_groups = [np.array([line["loss"] for line in group.train[0]]) for group in groups]
    lowest = min(float(each.min()) for each in (*of_groups, *(group.held_out("loss") for group in groups)))
    highest = max(float(np.quantile(each[len(each) // 20 :], 0.99)) for each in of_groups)
    return lowest - 0.05 * (highest - lowest), highest


def _draw_losses(canvas: Canvas, group: Group, limits: tuple[float, float]) -> None:
    axes, color = canvas.subplots(), series(group.number)["color"]
    steps, losses = (np.array([line[key] for line in group.train[0]]) for key in ("step", "loss"))
    axes.plot(steps, losses, color=color, alpha=0.35, linewidth=0.6)
    (trend,) = axes.plot(steps, smooth(losses, trend_window(len(losses))), color=color, linewidth=1.8, label="train")
    held_out = draw_band(
        axes,
        group.spent["updates"],
        group.held_out("loss"),
        "held out",
        group.number,
        color=plt.rcParams["text.color"],
        linestyle="--",
        linewidth=1,
    )
    axes.set(xlabel="updates", ylabel="loss it is trained on (nats per token)", title=group.name, ylim=limits)
    tidy(axes)
    name_lines(axes, [trend, held_out])


def _noise_title(groups: Sequence[Group]) -> str:
    where, those = next(iter(main_places(groups).items()))
    noise = {group.objective: float(group.measure("train_loss_noise").mean()) for group in those if group.is_steady}
    if len(noise) < 2:
        return f"The training loss of “{those[0].objective}” and the same loss on held-out text"
    calm, noisy = min(noise, key=noise.__getitem__), max(noise, key=noise.__getitem__)
    times = f"{noise[noisy] / noise[calm]:.1f} times"
    return f"The training loss of “{noisy}” is {times} as noisy as that of “{calm}”{among(where)}"


# ---- equal: held-out losses over what they cost ----------------------------------------------------------------------


def equal(groups: Sequence[Group]) -> Draft:
    """Draw both held-out losses over each budget, a line for each objective."""
    panels = [
        Panel(
            f"equal-{number}-{budget.replace(' ', '-')}",
            f"Held-out losses over {budget}, a line for each objective{among(where)}",
            partial(_draw_equal, groups=those, budget=budget),
            inches=(4.6, 5.2),
        )
        for number, (where, those) in enumerate(main_places(groups).items())
        for budget in BUDGETS
    ]
    return Draft(
        _equal_title(groups),
        "Held-out losses over what was spent on them, on logarithmic axes: the mean over seeds, in a band from lowest "
        "to highest. Seconds are of this machine.",
        panels,
    )


def _equal_title(groups: Sequence[Group]) -> str:
    where, those = next(iter(main_places(groups).items()))
    ends = {group.objective: float(group.held_out("all_token_loss")[:, -1].mean()) for group in those}
    best, worst = min(ends, key=ends.__getitem__), max(ends, key=ends.__getitem__)
    title = f"All-token loss after the last update: {ends[best]:.2f} nats for “{best}”"
    return (title + f", {ends[worst]:.2f} for “{worst}”" if worst != best else title) + among(where)


def _draw_equal(canvas: Canvas, groups: Sequence[Group], budget: str) -> None:
    rows = canvas.subplots(2, 1, sharex=True)
    for axes, key, what in zip(
        rows, ("all_token_loss", "final_token_loss"), ("all tokens", "final token"), strict=True
    ):
        losses = [group.held_out(key) for group in groups]
        lines = [
            draw_band(axes, group.spent[budget], of_group, group.objective, group.number)
            for group, of_group in zip(groups, losses, strict=True)
        ]
        axes.set(xscale="log", ylabel=f"held-out, {what} (nats)", ylim=_where_it_slows(losses))
        tidy(axes)
        name_lines(axes, lines)
    rows[0].set_title(f"over {budget}{among(groups[0].where)}")
    rows[1].set_xlabel(budget)


def _where_it_slows(losses: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return limits for falling `losses` [seeds, evaluations]: the first fall is the same for all and fills a plot."""
    start, end = max(float(each.max()) for each in losses), min(float(each.min()) for each in losses)
    worst_end = max(float(each[:, -1].max()) for each in losses)
    top = min(start, worst_end + max(worst_end - end, 0.35 * (start - end)))
    return end - 0.05 * (top - end), top


# ---- positions: the held-out loss of each position -------------------------------------------------------------------


def positions(groups: Sequence[Group]) -> Draft | None:
    """Draw the last held-out loss of every position, a line for each objective."""
    places = main_places([group for group in groups if group.final_loss_by_position() is not None])
    if not places:
        return None
    panels = [
        Panel(
            f"positions-{number}",
            f"Held-out loss by position in the window, a line for each objective{among(where)}",
            partial(_draw_positions, groups=those),
        )
        for number, (where, those) in enumerate(places.items())
    ]
    gains = {
        group.objective: float(found.mean() - found[:, -1].mean())
        for group in next(iter(places.values()))
        if (found := group.final_loss_by_position()) is not None
    }
    most = max(gains, key=gains.__getitem__)
    # Any network gains from context; one that learned the final position alone should gain more.
    title = f"After “{most}” the last position is {decimal(gains[most])} nats better than the mean of all"
    return Draft(
        title + among(next(iter(places))),
        "Held-out loss by position after the last update: mean and range over seeds.",
        panels,
    )


def _draw_positions(canvas: Canvas, groups: Sequence[Group]) -> None:
    axes = canvas.subplots()
    lines = []
    for group in groups:
        found = group.final_loss_by_position()
        assert found is not None
        place = np.arange(1, found.shape[1] + 1)
        lines.append(draw_band(axes, place, found, group.objective, group.number, marker="", linewidth=1.4))
    axes.set(
        xlabel="position in the window", ylabel="held-out loss (nats)", title=groups[0].where or "loss by position"
    )
    tidy(axes)
    name_lines(axes, lines)
