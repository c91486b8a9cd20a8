"""The report on a grid of runs, computed from their folders: `report.json`, and from it pages, tables and pictures."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dist_train.errors import StorageError
from dist_train.storage import write_results
from dist_train.study.claims import Measured
from dist_train.study.figures import figures
from dist_train.study.grid import Cell, Grid, described
from dist_train.study.learning import BUDGETS, LOSSES, read_curve
from dist_train.study.markdown import print_report, write_markdown
from dist_train.study.measures import measure
from dist_train.study.objectives import objective_of
from dist_train.study.page import write_page
from dist_train.study.plots import plot_loss, publish_figures
from dist_train.study.recipe import claims
from dist_train.study.statistics import Mean, student_mean

Groups = Mapping[tuple[str, str], Sequence[Measured]]
"""Runs that differ in their seed alone, by where they are (all else that varies) and what their loss sees."""

# The recipe's adjectives: of each property its measure and unit.
_TRADE_OFF = [
    ("held-out loss of the final token", "final_token_loss", "nats per token"),
    ("held-out loss of all tokens", "all_token_loss", "nats per token"),
    ("learning speed at the end", "train_loss_slope", "nats per 100 updates"),
    ("noise of the training loss", "train_loss_noise", "nats"),
    ("supervised tokens per update", "supervised_per_update", "tokens"),
    ("sequences for a clear gradient", "noise_scale", "sequences"),
    ("gap between held-out and training text", "held-out.gap.all_token_loss", "nats per token"),
    ("spaces in its text", "text.model.spaces_per_character", "per character"),
    ("words that the training text does not have", "text.model.unknown_words", "share of those of 3 letters or more"),
    ("known words glued together", "text.model.glued_words", "share"),
    ("coherence of its text", "text.model.bits_per_character", "bits per character, less is better"),
    ("accuracy at LAMBADA's last words", "lambada.full_window.accuracy", "share"),
    ("time of an update", "step_seconds", "seconds"),
    ("arithmetic of an update", "update_flops", "FLOPs"),
]


def write_report(grid: Grid) -> Path:
    """Write `report.json`, `report.html`, `report.md` and figures into the grid's folder, and print what they say.

    Raises `UserError` if a run is missing, `StorageError` if the folder cannot be written.
    """
    report = build_report(grid)
    try:
        grid.out_dir.mkdir(parents=True, exist_ok=True)
        for cell in grid.cells:
            plot_loss(cell.folder)
            publish_figures(cell.folder)
        write_results(grid.out_dir / "report.json", report)
        drawn = figures(report, grid.out_dir / "figures")
        page = write_page(report, drawn, grid.out_dir)
        write_markdown(report, drawn, grid.out_dir)
    except OSError as error:
        raise StorageError(f"out_dir: cannot write {grid.out_dir} ({error.strerror}); choose another") from error
    print_report(report)
    for path in (page, grid.out_dir / "report.md", grid.out_dir / "report.json"):
        print(f"{path.name:<12} {path}")
    return grid.out_dir / "report.json"


def build_report(grid: Grid) -> dict[str, Any]:
    """Return what `report.json` holds. Raises `UserError` if a run is missing."""
    runs = [_measured(cell) for cell in grid.cells]
    groups: dict[tuple[str, str], list[Measured]] = {}
    for run in runs:
        groups.setdefault((_where(grid, run), run.objective), []).append(run)
    return {
        "title": grid.out_dir.name,
        "claims": claims(runs),
        "cells": [_row(run) for run in runs],
        "equal": list(_at_equal_budgets(groups)),
        "needed": list(_to_reach_losses(groups)),
        "trade_off": _trade_off(groups),
        "made": _made(runs),
    }


def _measured(cell: Cell) -> Measured:
    curve = read_curve(cell.folder)
    return Measured(cell, objective_of(cell.settings), measure(cell.folder, cell.settings, curve), curve)


def _row(run: Measured) -> dict[str, Any]:
    return {
        "settings": run.cell.varying,
        "folder": str(run.cell.folder),
        "objective": run.objective,
        "measures": run.measures,
    }


def _where(grid: Grid, run: Measured) -> str:
    """Say what a run is of all that varies, but for its seed and what its loss sees."""
    return described(
        {
            key: value
            for key, value in run.cell.varying.items()
            if not all(touched.startswith(("loss.", "run.seed")) for touched in grid.touched[key])
        }
    )


def _by_place(groups: Groups) -> Iterator[tuple[str, dict[str, Sequence[Measured]]]]:
    """Yield each place with its runs by what their loss sees."""
    for place in dict.fromkeys(place for place, _ in groups):
        yield place, {objective: runs for (each, objective), runs in groups.items() if each == place}


def _at_equal_budgets(groups: Groups) -> Iterator[dict[str, Any]]:
    """Yield each group's losses when it has spent what the cheapest group of the same place has at its end."""
    for place, here in _by_place(groups):
        for budget in BUDGETS:
            amount = min(float(run.curve.spent[budget][-1]) for runs in here.values() for run in runs)
            for objective, runs in here.items():
                yield {
                    "budget": budget,
                    "group": objective,
                    "where": place,
                    "at": amount,
                    **{loss: _mean([run.curve.at(budget, amount, loss) for run in runs]) for loss in LOSSES},
                }


def _to_reach_losses(groups: Groups) -> Iterator[dict[str, Any]]:
    """Yield what each group spends to come down to a loss: the lowest that all of its place reach, and two of them.

    Both in tenths of a nat. A group reaches what all of its seeds do; it has None for what it does not.
    """
    for place, here in _by_place(groups):
        for loss in LOSSES:
            ends = sorted(max(float(run.curve.losses[loss].min()) for run in runs) for runs in here.values())
            targets = dict.fromkeys(math.ceil(10 * end) / 10 for end in (ends[-1], ends[:2][-1]))
            for target in targets:
                for objective, runs in here.items():
                    spent = {budget: [run.curve.needed(budget, loss, target) for run in runs] for budget in BUDGETS}
                    yield {
                        "loss": loss,
                        "target": target,
                        "where": place,
                        "group": objective,
                        **{budget: None if None in amounts else _mean(amounts) for budget, amounts in spent.items()},
                    }


def _trade_off(groups: Groups) -> dict[str, Any]:
    """Return the numbers behind the recipe's adjectives, where the grid compares the most objectives."""
    place, here = max(_by_place(groups), key=lambda each: len(each[1]))
    rows = [
        {
            "property": name,
            "unit": unit,
            "values": [_mean([run.measures.get(key) for run in runs]) for runs in here.values()],
        }
        for name, key, unit in _TRADE_OFF
    ]
    return {"where": place, "columns": list(here), "rows": [row for row in rows if any(row["values"])]}


def _mean(values: Sequence[float | None]) -> Mean | None:
    """Return the mean over seeds; None where nothing was measured."""
    known = [value for value in values if value is not None]
    return student_mean(known) if known else None


def _made(runs: Sequence[Measured]) -> dict[str, Any]:
    environment = json.loads((runs[0].cell.folder / "environment.json").read_text(encoding="utf-8"))
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "runs": len(runs),
        "training_seconds": sum(run.measures["training_seconds"] or 0 for run in runs),
        "command": " ".join(["python -m dist_train", *environment["command"][1:]]),
        "device": environment["device"],
        "cpu": f"{environment['cpu_count']} CPUs, {environment['platform']}",
        "torch": environment["packages"]["torch"],
    }
