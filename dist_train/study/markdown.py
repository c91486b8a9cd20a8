"""The report in text: `report.md`, and on the console."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dist_train.storage import write_atomically
from dist_train.study.charts import Figure
from dist_train.study.learning import BUDGETS
from dist_train.study.statistics import Mean

Lines = list[list[str]]
"""A table: a heading and rows of text."""

_FILE_COLUMNS = 120

_HOW_JUDGED = (
    "Pairs of runs differ in one thing and share their seed; intervals are Student's, 95 %, over pairs. A claim is "
    "decided where its interval leaves no difference out: 0 or, for a ratio, 1. All seeds are judged on the same "
    "held-out windows, whose choice is not in the intervals; and of twenty claims that are not so, one is decided by "
    "chance."
)


def write_markdown(report: dict[str, Any], figures: dict[str, Figure], folder: Path) -> Path:
    """Write what the report says into `folder/report.md`, with the figures beside it; return its path."""
    made = report["made"]
    parts = [
        f"# {report['title']}",
        f"{made['runs']} runs, {made['training_seconds'] / 60:.1f} minutes of training on {made['device']} with torch "
        f"{made['torch']}, {made['date']}.",
        "## Claims",
        _HOW_JUDGED,
        _table(_claim_lines(report["claims"])),
        "## What is traded for what",
        f"Means over seeds, in brackets the 95 % interval. {report['trade_off']['where']}".strip(),
        _table(_trade_off_lines(report["trade_off"])),
        "## Held-out losses at equal cost",
        "Seconds are of this machine, without evaluating and saving.",
        _table(_equal_lines(report["equal"])),
        "## What it takes to reach a loss",
        "The lowest that all objectives reach, and the lowest that two of them do, in tenths of a nat.",
        _table(_needed_lines(report["needed"])),
        "## Figures",
        *(part for figure in figures.values() for part in _figure(figure, folder)),
    ]
    path = folder / "report.md"
    write_atomically(path, "\n\n".join(parts) + "\n")
    return path


def print_report(report: dict[str, Any]) -> None:
    """Print what is traded for what, and every claim with its verdict."""
    console = Console(highlight=False)
    if not console.is_terminal:  # what goes into a file need not fit into 80 columns
        console.width = _FILE_COLUMNS
    trade_off = report["trade_off"]
    title = f"means over seeds, {trade_off['where']}" if trade_off["where"] else "means over seeds"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, title_justify="left")
    for place, name in enumerate(["", *trade_off["columns"]]):
        table.add_column(name, justify="right" if place else "left")
    for row in trade_off["rows"]:
        # Without intervals, for which a terminal has no room beside each other.
        values = ("–" if value is None else number(value["value"]) for value in row["values"])
        table.add_row(f"{row['property']} ({row['unit']})", *values)
    console.print(table)
    for verdict, claim, where, effect, interval, unit in _claim_lines(report["claims"])[1:]:
        text = f"[bold]{verdict}[/bold]: {claim}{f' ({where})' if where else ''}"
        if effect:
            text += f"\n    {effect} {unit}; 95 % interval {interval}"
        console.print(text, soft_wrap=True)


def _figure(figure: Figure, folder: Path) -> list[str]:
    pictures = " ".join(f"![{panel.alt}]({panel.light.relative_to(folder)})" for panel in figure.panels)
    return [f"### {figure.title}", pictures, figure.caption]


def _claim_lines(claims: Sequence[dict[str, Any]]) -> Lines:
    return [["verdict", "claim", "where", "effect", "95 % interval", "of what"]] + [
        [
            claim["verdict"],
            claim["claim"],
            claim["where"],
            "" if claim["effect"] is None else number(claim["effect"]),
            _interval(*claim["interval"]) if claim["repetitions"] else "",
            f"{claim['unit']}; {claim['note']}" if claim["note"] else claim["unit"],
        ]
        for claim in claims
    ]


def _trade_off_lines(trade_off: dict[str, Any]) -> Lines:
    return [["", *trade_off["columns"]]] + [
        [f"{row['property']} ({row['unit']})", *map(_mean, row["values"])] for row in trade_off["rows"]
    ]


def _equal_lines(equal: Sequence[dict[str, Any]]) -> Lines:
    return [["at equal", "where", "objective", "final-token loss", "all-token loss"]] + [
        [
            f"{row['budget']} ({number(row['at'])})",
            row["where"],
            row["group"],
            _mean(row["final_token_loss"]),
            _mean(row["all_token_loss"]),
        ]
        for row in equal
    ]


def _needed_lines(needed: Sequence[dict[str, Any]]) -> Lines:
    return [["held-out loss", "where", "objective", *BUDGETS]] + [
        [
            f"{row['loss'].replace('_', ' ')} of {number(row['target'])}",
            row["where"],
            row["group"],
            *("not reached" if row[budget] is None else _mean(row[budget]) for budget in BUDGETS),
        ]
        for row in needed
    ]


def _mean(mean: Mean | None) -> str:
    if mean is None:
        return "–"
    if mean["low"] is None:
        return number(mean["value"])
    return f"{number(mean['value'])} ({_interval(mean['low'], mean['high'])})"


def _interval(low: float | None, high: float | None) -> str:
    return "needs two seeds" if low is None or high is None else f"{number(low)} … {number(high)}"


def number(value: float) -> str:
    """Return four digits of a number, with a thousands separator or a power of ten where it is large."""
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _table(lines: Lines) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    separated = [escaped[0], ["---"] * len(escaped[0]), *escaped[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in separated)
