"""A grid of runs from its YAML file: which settings vary, and the settings of every cell. Imports no torch."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from dist_train.config import Settings
from dist_train.config_file import load_settings
from dist_train.errors import UserError
from dist_train.setting_types import Section
from dist_train.yaml_file import read_yaml

_Changes = dict[str, Any]
_Product = Annotated[dict[str, list[Any]], Field(min_length=1)]


class GridFile(Section):
    """What stands in a grid's file."""

    base: Path
    """The settings that all runs start from: a file, relative to this one."""
    out_dir: Path
    """Folder of the report, and of the run folders below it."""
    settings: _Changes = Field(default_factory=dict)
    """`section.key: value` for all runs."""
    axes: dict[str, Annotated[dict[str, _Changes], Field(min_length=1)]] = Field(default_factory=dict)
    """`axis: {name: {section.key: value, …}, …}`: names for settings that vary together."""
    grid: _Product | Annotated[list[_Product], Field(min_length=1)]
    """`section.key: [value, …]` or `axis: [name, …]`: one run for every combination, the last key varying fastest. A
    list of such grids is all of their runs."""
    measure: list[str] = Field(default_factory=list)
    """What else is measured of each run, beside what it recorded: suites as `evaluate` has them, and `attention`."""

    @property
    def products(self) -> list[dict[str, list[Any]]]:
        """All grids."""
        return self.grid if isinstance(self.grid, list) else [self.grid]

    @model_validator(mode="after")
    def _fits_together(self) -> "GridFile":
        for product in self.products:
            for key, values in product.items():
                if not values or len(set(map(_text, values))) < len(values):
                    raise ValueError(f"{key} needs values, each of them once (got {values})")
                unknown = [value for value in values if key in self.axes and value not in self.axes[key]]
                if unknown:
                    raise ValueError(f"{key} has no {unknown[0]!r}; axes.{key} has {', '.join(self.axes[key])}")
            if missing := self.axes.keys() - product.keys():
                raise ValueError(f"a grid lacks the axis {min(missing)}; every grid says which of its names it takes")
            changed = [*self.settings, *itertools.chain(*self.keys_changed_by(product))]
            if twice := sorted({key for key in changed if changed.count(key) > 1}):
                raise ValueError(
                    f"{', '.join(twice)} stands in settings and in grid, or twice in one; keep one of them"
                )
            if "run.out_dir" in changed:
                raise ValueError("run.out_dir cannot be set: every run gets its own folder below out_dir")
        return self

    def keys_changed_by(self, product: Mapping[str, Sequence[Any]]) -> Iterator[set[str]]:
        """Yield which settings each key of a grid varies."""
        for key, values in product.items():
            yield {changed for value in values for changed in self.changes(key, value)}

    def changes(self, key: str, value: Any) -> _Changes:
        """Return the settings that `value` of a key of the grid stands for."""
        return self.axes[key][value] if key in self.axes else {key: value}


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    varying: dict[str, Any]
    """What makes it this run, for every key that varies anywhere in the grid: `{"corpus": "web", "run.seed": 2}`."""
    settings: Settings

    @property
    def folder(self) -> Path:
        """The run's folder, named after what varies."""
        return self.settings.run.out_dir


@dataclass(frozen=True)
class Grid:
    """All runs of a grid, in the order of its file."""

    out_dir: Path
    cells: list[Cell]
    measure: list[str]
    """What else is measured of each run, as in its file."""
    touched: dict[str, set[str]]
    """Which settings each key of the grid varies: an axis all that stand below its names."""


def load_grid(path: Path, overrides: Sequence[str] = ()) -> Grid:
    """Read a grid's file, then `--section.key=value` overrides for all of its runs.

    Raises `UserError` that names every mistake of the file, or else of all the runs' settings, in one line.
    """
    file = _read(path)
    touched: dict[str, set[str]] = {}
    for product in file.products:
        for key, keys in zip(product, file.keys_changed_by(product), strict=True):
            touched[key] = touched.get(key, set()) | keys
    for override in overrides:
        key = override.removeprefix("--").partition("=")[0]
        if key in {"run.out_dir"}.union(*touched.values()):
            raise UserError(f"{override}: {path} decides about {key}; change it there")
    fixed = [*itertools.starmap(_override, file.settings.items()), *overrides]
    cells, mistakes = [], []
    for product in file.products:
        for values in itertools.product(*product.values()):
            try:
                cells.append(_cell(path, file, fixed, list(touched), dict(zip(product, values, strict=True))))
            except UserError as error:
                mistakes.append(str(error))
    if mistakes:
        raise UserError(f"{path}: {'; '.join(dict.fromkeys(mistakes))}")
    if len({cell.folder for cell in cells}) < len(cells):
        raise UserError(f"{path}: two runs would share a folder; give grid values that differ in letters or digits")
    return Grid(file.out_dir, cells, file.measure, touched)


def _cell(path: Path, file: GridFile, fixed: list[str], varying: list[str], chosen: dict[str, Any]) -> Cell:
    changes: _Changes = {}
    for key, value in chosen.items():
        changes |= file.changes(key, value)
    changes["run.out_dir"] = str(file.out_dir / cell_name(chosen))
    settings = load_settings(path.parent / file.base, fixed + list(itertools.starmap(_override, changes.items())))
    # Another grid of the file may vary what this one leaves as it is.
    resolved = settings.by_key()
    return Cell({key: chosen[key] if key in chosen else resolved[key] for key in varying}, settings)


def cell_name(varying: Mapping[str, Any]) -> str:
    """Return e.g. `last_k=1,seed=2`."""
    pairs = [f"{name}={_text(value)}" for name, value in zip(short_keys(varying), varying.values(), strict=True)]
    return re.sub(r"[^\w.+=,-]", "_", ",".join(pairs))


def described(varying: Mapping[str, Any]) -> str:
    """Return e.g. `corpus book, dropout 0.1`."""
    return ", ".join(f"{key} {value}" for key, value in zip(short_keys(varying), varying.values(), strict=True))


def short_keys(keys: Iterable[str]) -> list[str]:
    """Return `section.key` without its section wherever the key alone tells it apart."""
    last_parts = [key.rpartition(".")[2] for key in keys]
    return [last if last_parts.count(last) == 1 else key for key, last in zip(keys, last_parts, strict=True)]


def _read(path: Path) -> GridFile:
    try:
        return GridFile.model_validate_json(json.dumps(read_yaml(path)))
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(map(_describe, error.errors()))}") from None


def _describe(mistake: Any) -> str:
    """Say what is wrong where. Takes one of pydantic's error records."""
    where, message = ".".join(map(str, mistake["loc"])), mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "extra_forbidden":
        message = f"unknown key; a grid has {', '.join(GridFile.model_fields)}"
    return f"{where}: {message}".removeprefix(": ")


def _override(key: str, value: Any) -> str:
    return f"--{key}={_text(value)}"


def _text(value: Any) -> str:
    """Write a value as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)
