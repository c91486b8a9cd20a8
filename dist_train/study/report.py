"""The report on a grid of runs, computed from their folders: on the console, as JSON and Markdown, and as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dist_train.errors import StorageError
from dist_train.storage import write_atomically
from dist_train.study.grid import Grid, short_keys
from dist_train.study.measures import Row, claims, measure
from dist_train.study.plots import plot_comparison, plot_loss

# A measure's heading and how its number is written.
_MEASURES = {
    "final_token_loss": ("final token", "{:.4f}"),
    "all_token_loss": ("all tokens", "{:.4f}"),
    "train_loss_noise": ("noise", "{:.4f}"),
    "step_seconds": ("s/update", "{:.4f}"),
    "tokens": ("tokens", "{:,}"),
    "supervised_tokens": ("supervised", "{:,}"),
}


def write_report(grid: Grid) -> Path:
    """Write `report.json`, `report.md` and `compare.png` into the grid's folder, and print what they say.

    Raises `UserError` if a run is missing, `StorageError` if the folder cannot be written.
    """
    rows = [
        {"settings": cell.varying, "folder": str(cell.folder), "measures": measure(cell.folder)} for cell in grid.cells
    ]
    report = {"claims": claims(rows), "cells": rows}
    try:
        grid.out_dir.mkdir(parents=True, exist_ok=True)
        for cell in grid.cells:
            plot_loss(cell.folder)
        picture = plot_comparison(rows, grid.out_dir / "compare.png")
        write_atomically(grid.out_dir / "report.json", json.dumps(report, indent=2) + "\n")
        write_atomically(grid.out_dir / "report.md", _markdown(grid.out_dir.name, report, picture))
    except OSError as error:
        raise StorageError(f"out_dir: cannot write {grid.out_dir} ({error.strerror}); choose another") from error
    _print(report)
    for name in ("report.md", "report.json", "compare.png"):
        print(f"{name:<12} {grid.out_dir / name}")
    return grid.out_dir / "report.json"


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    heading, *lines = _cell_table(report["cells"])
    title = "held-out losses after the last update, and what they cost"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title)
    for name in heading:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for verdict, claim, effect, interval, unit in _claim_table(report["claims"])[1:]:
        console.print(
            f"[bold]{verdict}[/bold]: {claim}\n    {effect} {unit}; 95 % interval {interval}\n", soft_wrap=True
        )


# ---- tables: a heading and rows of text ------------------------------------------------------------------------------


def _cell_table(rows: Sequence[Row]) -> list[list[str]]:
    heading = [*short_keys(rows[0]["settings"]), *(name for name, _ in _MEASURES.values())]
    return [heading] + [
        [
            *map(str, row["settings"].values()),
            *(form.format(row["measures"][key]) for key, (_, form) in _MEASURES.items()),
        ]
        for row in rows
    ]


def _claim_table(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [["verdict", "claim", "effect", "95 % interval", "unit"]] + [
        [claim["verdict"], claim["claim"], f"{claim['effect']:.4f}", _interval(*claim["interval"]), claim["unit"]]
        for claim in found
    ]


def _interval(low: float | None, high: float | None) -> str:
    return "needs two seeds" if low is None or high is None else f"{low:.4f} … {high:.4f}"


def _markdown(title: str, report: dict[str, Any], picture: Path) -> str:
    def table(lines: list[list[str]]) -> str:
        separated = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
        return "\n".join(f"| {' | '.join(line)} |" for line in separated)

    parts = [f"# {title}"]
    if report["claims"]:
        parts += [
            "## Claims",
            "Intervals are Student's, over seeds. A claim is decided where its interval excludes a difference of 0 or, "
            "for a ratio, 1.",
            table(_claim_table(report["claims"])),
        ]
    parts += [
        "## Held-out losses",
        f"![Held-out losses by step]({picture.name})",
        "## Runs",
        "Held-out losses on the final token and on all tokens are in nats per token, after the last update. Noise is "
        "the standard deviation of the updates' training losses about their trend.",
        table(_cell_table(report["cells"])),
    ]
    return "\n\n".join(parts) + "\n"
