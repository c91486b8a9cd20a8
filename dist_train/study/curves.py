"""What the runs of a report measured over time: read once from their folders, seeds beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.study.grid import described
from dist_train.study.learning import read_curve, read_metrics

Row = dict[str, Any]
"""A run in a report: its `settings` that vary, `folder`, `objective` and `measures`."""


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but their seed."""

    objective: str
    number: int
    """Of the objective among all of the report's: the same colour and marker everywhere."""
    where: str
    """The other settings that vary, as `corpus book, dropout 0.1`; empty if none do."""
    cells: Sequence[Row]

    @property
    def name(self) -> str:
        """What a panel of this group alone is called."""
        return f"{self.objective} ({self.where})" if self.where else self.objective

    @property
    def corpus(self) -> str:
        """What the report calls the corpus, where it has several."""
        return ", ".join(str(value) for key, value in _rest(self.cells[0]).items() if _is_corpus(key))

    @property
    def runs(self) -> list[Path]:
        """One folder for each seed."""
        return [Path(cell["folder"]) for cell in self.cells]

    @cached_property
    def train(self) -> list[list[dict[str, Any]]]:
        """For each run the lines of its updates."""
        return [read_metrics(run, "train") for run in self.runs]

    @cached_property
    def evals(self) -> list[list[dict[str, Any]]]:
        """For each run the lines of its evaluations, but for that of the untrained network."""
        return [[line for line in read_metrics(run, "eval") if line["step"] > 0] for run in self.runs]

    def held_out(self, key: str) -> np.ndarray:
        """Return a held-out loss [runs, evaluations], over the evaluations that all runs have."""
        n = min(map(len, self.evals))
        return np.array([[line[key] for line in of_run[:n]] for of_run in self.evals])

    @cached_property
    def spent(self) -> dict[str, np.ndarray]:
        """By budget, how much the runs had used at those evaluations [evaluations], in the mean."""
        spent, n = [read_curve(run).spent for run in self.runs], min(map(len, self.evals))
        return {budget: np.mean([of_run[budget][:n] for of_run in spent], axis=0) for budget in spent[0]}

    def measure(self, name: str) -> np.ndarray:
        """Return a measure [runs]; NaN where it is not known."""
        found = [cell["measures"].get(name) for cell in self.cells]
        return np.array([np.nan if value is None else value for value in found], dtype=float)

    @property
    def is_steady(self) -> bool:
        """Whether the loss saw the same number of positions in all updates: there was no curriculum."""
        return len({line["last_k"] for of_run in self.train for line in of_run}) == 1

    def final_loss_by_position(self) -> np.ndarray | None:
        """Return the last evaluations' losses [runs, T], or None if a run did not measure them."""
        last = [of_run[-1].get("loss_by_position") for of_run in self.evals if of_run]
        return np.array(last) if last and all(last) else None


def groups_of(cells: Sequence[Row]) -> list[Group]:
    """Return a report's runs, those together that differ in their seed alone, in the report's order."""
    objectives = list(dict.fromkeys(cell["objective"] for cell in cells))
    together: dict[tuple[str, str], list[Row]] = {}
    for cell in cells:
        together.setdefault((described(_rest(cell)), cell["objective"]), []).append(cell)
    return [Group(objective, objectives.index(objective), where, runs) for (where, objective), runs in together.items()]


def by_place(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Return the groups of each `where`: what differs among those is the objective alone."""
    places: dict[str, list[Group]] = {}
    for group in groups:
        places.setdefault(group.where, []).append(group)
    return places


def main_places(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Return the `where` with the most objectives, and what differs from it in the corpus alone: figures stay few."""
    places = by_place(groups)
    if not places:
        return {}
    main = _beside_corpus(max(places.values(), key=len)[0])
    return {where: those for where, those in places.items() if _beside_corpus(those[0]) == main}


def _rest(cell: Row) -> dict[str, Any]:
    """Return the settings that vary but for the seed and what the loss sees, which may be an axis of any name."""
    return {
        key: value
        for key, value in cell["settings"].items()
        if key not in ("run.seed", "objective") and not key.startswith("loss.") and value != cell["objective"]
    }


def _is_corpus(key: str) -> bool:
    return key.startswith("data.") or key == "corpus"


def _beside_corpus(group: Group) -> dict[str, Any]:
    return {key: value for key, value in _rest(group.cells[0]).items() if not _is_corpus(key)}
