"""`report.html`: one file that shows a report anywhere, without network or scripts."""

import base64
import itertools
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from dist_train.storage import write_atomically
from dist_train.study.charts import Figure, Picture
from dist_train.study.curves import groups_of, main_places
from dist_train.study.evaluate import read_suite
from dist_train.study.grid import short_keys
from dist_train.study.learning import BUDGETS

VERDICTS = ("supported", "contradicted", "undecided", "not measured")

_MOST_SAMPLES = 3
_MOST_PROMPT_CHARACTERS = 300
"""A prompt fills the context, which may be a page long."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# Of a run's measures those that stand in the list of runs, and how they are called there.
_LISTED = {
    "final_token_loss": "final token (nats)",
    "all_token_loss": "all tokens (nats)",
    "train_loss_noise": "noise (nats)",
    "step_seconds": "s per update",
    "tokens": "tokens",
    "supervised_tokens": "supervised tokens",
}


def write_page(report: Mapping[str, Any], figures: Mapping[str, Figure], folder: Path) -> Path:
    """Write what `report.json` says, with `figures` within, into `folder/report.html`; return its path.

    Samples come from the runs' folders. Raises `OSError` if the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dist_train.study", "."),
        autoescape=True,  # samples are what a network makes of any text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    page = environment.get_template("report.html.jinja").render(
        report=report,
        figures={key: _embedded(figure, place) for place, (key, figure) in enumerate(figures.items(), start=1)},
        claims=_together(report["claims"], "id"),
        tally=_tally(report["claims"]),
        equal=_by_place(report["equal"], "budget"),
        needed=_by_place(report["needed"], "loss", "target"),
        budgets=BUDGETS,
        samples=_samples(report["cells"]),
        runs=_runs(report["cells"]),
        made=_made(report["made"]),
    )
    path = folder / "report.html"
    write_atomically(path, page)
    return path


def number(value: float) -> str:
    """Return three to four digits of a number, with a thousands separator or a power of ten where it is large."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e7:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", "−")
    text = f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:#.3g}".rstrip(".")
    return text.replace("-", "−")


# ---- what the template shows -----------------------------------------------------------------------------------------


def _embedded(figure: Figure, place: int) -> dict[str, Any]:
    panels = [_embedded_panel(picture) for picture in figure.panels]
    return {"number": place, "title": figure.title, "caption": figure.caption, "panels": panels}


def _embedded_panel(picture: Picture) -> dict[str, Any]:
    light = picture.light.read_bytes()
    width, height = struct.unpack(">II", light[16:24])  # known before it is decoded, so that nothing moves on the page
    return {
        "alt": picture.alt,
        "light": _data_uri(light),
        "dark": _data_uri(picture.dark.read_bytes()),
        "width": width,
        "height": height,
    }


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _together(rows: Any, *keys: str) -> list[list[Mapping[str, Any]]]:
    """Return neighbours together that have the same values of `keys`."""
    return [list(group) for _, group in itertools.groupby(rows, key=lambda row: [str(row[key]) for key in keys])]


def _by_place(rows: Any, *keys: str) -> dict[str, list[list[Mapping[str, Any]]]]:
    """Return by `where` its rows, those together that have the same values of `keys`."""
    places = dict.fromkeys(row["where"] for row in rows)
    return {where: _together([row for row in rows if row["where"] == where], *keys) for where in places}


def _tally(claims: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts = Counter(claim["verdict"] for claim in claims)
    return {word: counts[word] for word in VERDICTS if counts[word]}


def _samples(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first prompts, each with what a human and one network of each objective make of it."""
    places = main_places(groups_of(cells))
    groups = next(iter(places.values()), [])
    found = {group.objective: suite["samples"] for group in groups if (suite := read_suite(group.runs[0], "text"))}
    if not found:
        return []
    human = next(iter(found.values()))
    return [
        {
            "prompt": sample["prompt"][-_MOST_PROMPT_CHARACTERS:],
            "continuations": {
                "human": sample["human"],
                **{name: samples[place]["text"] for name, samples in found.items() if place < len(samples)},
            },
        }
        for place, sample in enumerate(human[:_MOST_SAMPLES])
    ]


def _runs(cells: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a heading and a row for each run."""
    if not cells:
        return [[]]
    heading = [*short_keys(cells[0]["settings"]), *_LISTED.values()]
    return [heading] + [
        [
            *map(str, cell["settings"].values()),
            *("–" if (value := cell["measures"].get(key)) is None else number(value) for key in _LISTED),
        ]
        for cell in cells
    ]


def _made(made: Mapping[str, Any]) -> dict[str, str]:
    """Return what was run, on what and for how long, as far as it is known."""
    named = {
        "runs": made.get("runs"),
        "training": f"{made['training_seconds'] / 60:.1f} minutes, evaluating and saving left out",
        "device": made.get("device"),
        "CPU": made.get("cpu"),
        "torch": made.get("torch"),
        "date": made.get("date"),
    }
    return {name: str(value) for name, value in named.items() if value}
