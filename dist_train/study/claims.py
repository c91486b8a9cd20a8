"""The recipe's claims as measurements: pairs of runs that differ in one thing, and what all pairs say together."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dist_train.study.grid import Cell, described
from dist_train.study.learning import Curve
from dist_train.study.measures import Measures
from dist_train.study.objectives import FINAL
from dist_train.study.statistics import student_interval


class Measured(NamedTuple):
    """A run of a grid, and what was measured of it."""

    cell: Cell
    objective: str
    measures: Measures
    curve: Curve


Effect = Callable[[Measured, Measured], float | None]
"""By how much the first of two runs is above the second; None where one of them does not say."""

# Settings in which the runs of a pair may differ, by the thing that is compared.
OBJECTIVE, CORPUS, DROPOUT = ("loss.",), ("data.",), ("model.dropout",)
_ALWAYS_APART = ("run.out_dir",)
# How far from a claimed size, as a logarithm, still counts as that size: half to twice of it.
_NEAR = math.log(2)


@dataclass(frozen=True)
class Claim:
    """Something that the recipe says, and what would show it."""

    id: str
    text: str
    is_pair: Callable[[Measured, Measured], bool]
    apart: tuple[str, ...]
    """In which settings the two runs of a pair may differ; in all others, the seed too, they are equal."""
    effect: Effect
    unit: str
    figure: str
    """The key of the figure that shows it."""
    expected: float = 1.0
    """On which side of no difference the claim has the effect; for a `value`, what it has it at."""
    is_ratio: bool = False
    """The effect is a ratio's logarithm: ratios are symmetric there, and their noise more nearly normal."""
    is_value: bool = False
    """The claim says how large the effect is, not on which side."""
    note: str = ""


def judge(claim: Claim, runs: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return what the runs say of a claim, once for each setting of everything that is not compared.

    A claim is decided where the 95 % interval of the mean over pairs, which differ in their seed, leaves no difference
    out; one about a size is supported where all of the interval is near that size, and contradicted where it leaves
    that size out. Without pairs it is not measured.
    """
    found: dict[str, list[float]] = {}
    unknown: set[str] = set()
    for first, second in _pairs(claim, runs):
        effect, where = claim.effect(first, second), _where(first.cell, second.cell)
        if effect is None:
            unknown.add(where)
        else:
            found.setdefault(where, []).append(effect)
    about = {"id": claim.id, "claim": claim.text, "unit": claim.unit, "figure": claim.figure, "note": claim.note}
    if not found:
        nothing = {"where": "", "effect": None, "interval": [None, None], "repetitions": 0, "verdict": "not measured"}
        return [{**about, **nothing}]
    rows = [{**about, "where": where, **_verdict(claim, effects)} for where, effects in found.items()]
    for row in rows:
        if row["where"] in unknown:
            # Which pairs cannot say is no chance: a noise scale is unknown where it is large.
            row["verdict"] = "undecided"
            row["note"] = "; ".join(filter(None, [claim.note, "some pairs cannot say"]))
    return rows


def _pairs(claim: Claim, runs: Sequence[Measured]) -> Iterator[tuple[Measured, Measured]]:
    for first in runs:
        for second in runs:
            if first is not second and claim.is_pair(first, second) and _differ_only_in(first, second, claim.apart):
                yield first, second


def _differ_only_in(first: Measured, second: Measured, apart: tuple[str, ...]) -> bool:
    ours, theirs = (run.cell.settings.by_key() for run in (first, second))
    return all(key.startswith((*apart, *_ALWAYS_APART)) for key, value in ours.items() if value != theirs[key])


def _where(first: Cell, second: Cell) -> str:
    """Say what the two have in common of all that varies, but for the seed."""
    shared = {key: value for key, value in first.varying.items() if second.varying[key] == value}
    return described({key: value for key, value in shared.items() if key != "run.seed"})


def _verdict(claim: Claim, effects: list[float]) -> dict[str, Any]:
    mean, interval = sum(effects) / len(effects), student_interval(effects)
    undo = math.exp if claim.is_ratio else float
    return {
        "effect": undo(mean),
        "interval": [undo(end) for end in interval] if interval else [None, None],
        "repetitions": len(effects),
        "verdict": _word(claim, mean, interval),
    }


def _word(claim: Claim, mean: float, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "undecided"
    low, high = interval
    if claim.is_value:
        # A wide interval holds any size, and supports none.
        is_near = max(high - claim.expected, claim.expected - low) <= _NEAR
        return "supported" if is_near else "undecided" if low <= claim.expected <= high else "contradicted"
    if low <= 0 <= high:
        return "undecided"
    return "supported" if mean * claim.expected > 0 else "contradicted"


# ---- pairs -----------------------------------------------------------------------------------------------------------


def against(first: str, second: str) -> Callable[[Measured, Measured], bool]:
    """Tell pairs of two objectives."""
    return lambda one, other: (one.objective, other.objective) == (first, second)


def on_the_richer_corpus(one: Measured, other: Measured) -> bool:
    """Tell final-token runs of which the first has the more heterogeneous corpus."""
    ours, theirs = (run.measures.get("corpus_entropy_bits") for run in (one, other))
    return one.objective == other.objective == FINAL and ours is not None and theirs is not None and ours > theirs


def with_dropout(one: Measured, other: Measured) -> bool:
    """Tell runs of which the first has more dropout."""
    return one.cell.settings.model.dropout > other.cell.settings.model.dropout


# ---- effects ---------------------------------------------------------------------------------------------------------


def difference(name: str) -> Effect:
    """Return the difference of a measure."""

    def effect(one: Measured, other: Measured) -> float | None:
        ours, theirs = one.measures.get(name), other.measures.get(name)
        return None if ours is None or theirs is None else ours - theirs

    return effect


def ratio(name: str) -> Effect:
    """Return the logarithm of the ratio of a measure."""

    def effect(one: Measured, other: Measured) -> float | None:
        ours, theirs = one.measures.get(name), other.measures.get(name)
        return math.log(ours / theirs) if ours and theirs and ours / theirs > 0 else None

    return effect


def at_equal(budget: str, loss: str) -> Effect:
    """Return the difference of a held-out loss when both have spent what the cheaper one has at its end."""

    def effect(one: Measured, other: Measured) -> float:
        amount = min(float(run.curve.spent[budget][-1]) for run in (one, other))
        return one.curve.at(budget, amount, loss) - other.curve.at(budget, amount, loss)

    return effect


def to_reach(budget: str, loss: str) -> Effect:
    """Return the logarithm of the ratio of what it takes to come down to the lowest loss that both reach."""

    def effect(one: Measured, other: Measured) -> float | None:
        target = max(float(run.curve.losses[loss].min()) for run in (one, other))
        ours, theirs = (run.curve.needed(budget, loss, target) for run in (one, other))
        return math.log(ours / theirs) if ours and theirs else None

    return effect
