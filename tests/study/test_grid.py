"""A grid of runs: what its file means."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.errors import UserError
from dist_train.sections import SampleSettings
from dist_train.study.grid import load_grid
from tests.conftest import ROOT

DEFAULT_PROMPT = SampleSettings().prompt

GridFile = Callable[..., Path]

OBJECTIVES = {"final": {"loss.last_k": 1}, "to final": {"loss.curriculum": "shrink", "sample.prompt": "Once"}}


def test_a_grid_is_every_combination_in_its_order(grid_file: GridFile, tmp_path: Path) -> None:
    grid = load_grid(grid_file(), ["--log.interval=2"])
    names = ["seed=1,last_k=1", "seed=1,last_k=all", "seed=2,last_k=1", "seed=2,last_k=all"]
    assert [cell.folder for cell in grid.cells] == [tmp_path / "study" / name for name in names]
    assert grid.cells[1].varying == {"run.seed": 1, "loss.last_k": "all"}
    assert [(cell.settings.run.seed, cell.settings.last_k) for cell in grid.cells] == [(1, 1), (1, 16), (2, 1), (2, 16)]
    assert all(cell.settings.log.interval == 2 for cell in grid.cells)


def test_an_axis_names_settings_that_vary_together(grid_file: GridFile) -> None:
    grid = load_grid(grid_file(axes={"objective": OBJECTIVES}, grid={"run.seed": [7], "objective": list(OBJECTIVES)}))
    final, shrinking = grid.cells
    assert final.varying == {"run.seed": 7, "objective": "final"}
    assert (final.settings.loss.curriculum, final.settings.sample.prompt) == (None, DEFAULT_PROMPT)
    assert (shrinking.settings.loss.curriculum, shrinking.settings.sample.prompt) == ("shrink", "Once")
    assert shrinking.folder.name == "seed=7,objective=to_final"
    assert grid.touched == {"run.seed": {"run.seed"}, "objective": {"loss.last_k", "loss.curriculum", "sample.prompt"}}


def test_grids_in_a_list_are_all_of_their_runs_described_alike(grid_file: GridFile) -> None:
    grids = [{"run.seed": [1, 2]}, {"model.dropout": [0.0], "run.seed": [1]}]
    cells = load_grid(grid_file(grid=grids)).cells
    assert [cell.varying for cell in cells] == [
        {"run.seed": 1, "model.dropout": 0.1},
        {"run.seed": 2, "model.dropout": 0.1},
        {"run.seed": 1, "model.dropout": 0.0},
    ]
    assert [cell.folder.name for cell in cells] == ["seed=1", "seed=2", "dropout=0.0,seed=1"]


def test_a_key_keeps_its_section_where_it_needs_one(grid_file: GridFile) -> None:
    varying = {"eval.interval": [2, 3], "log.interval": [1], "optim.grad_clip": [None], "data.path": ["a/b"]}
    grid = load_grid(grid_file(grid=varying, settings={"data.source": "files"}))
    assert grid.cells[0].folder.name == "eval.interval=2,log.interval=1,grad_clip=null,path=a_b"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"grids": {}}, "grids: unknown key; a grid has base, out_dir, settings, axes, grid, measure"),
        ({"out_dir": None}, "out_dir: Field required"),
        ({"grid": {}}, "grid."),
        ({"grid": []}, "grid."),
        ({"grid": {"loss.last_k": 1}}, "loss.last_k: "),
        ({"grid": {"loss.last_k": []}}, "loss.last_k needs values"),
        ({"grid": {"loss.last_k": [1, 1]}}, "each of them once"),
        ({"grid": {"run.out_dir": ["a"]}}, "run.out_dir cannot be set"),
        ({"grid": {"train.max_iters": [1, 2]}}, "train.max_iters stands in settings and in grid"),
        ({"grid": {"loss.last_k": [1, 99]}}, "loss.last_k=99 is more than model.block_size=16"),
        ({"grid": {"loss.last_q": [1, 2]}}, "loss.last_q: unknown key; did you mean last_k?"),
        ({"grid": {"last_k": [1, 2]}}, "cannot read '--last_k=1'"),
        ({"grid": {"sample.prompt": ["a/b", "a_b"]}}, "would share a folder"),
        ({"grid": [{"run.seed": [1]}, {"run.seed": [2, 1]}]}, "would share a folder"),
        ({"axes": {"objective": OBJECTIVES}}, "a grid lacks the axis objective"),
        (
            {"axes": {"objective": OBJECTIVES}, "grid": {"objective": ["al"]}},
            "objective has no 'al'; axes.objective has",
        ),
        (
            {"axes": {"objective": OBJECTIVES}, "grid": {"objective": ["final"], "loss.last_k": [2]}},
            "loss.last_k stands in settings and in grid, or twice in one",
        ),
        ({"base": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_a_mistake_in_a_grid_is_one_line(grid_file: GridFile, changes: dict[str, Any], expected: str) -> None:
    path = grid_file(**changes)
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        load_grid(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("override", ["--loss.last_k=3", "--run.out_dir=elsewhere"])
def test_the_command_line_cannot_undo_what_varies(grid_file: GridFile, override: str) -> None:
    with pytest.raises(UserError, match="change it there"):
        load_grid(grid_file(), [override])


@pytest.mark.parametrize(("name", "block_size"), [("study_small", 32), ("study_model5", 256)])
def test_the_ready_made_grids_have_what_every_claim_compares(name: str, block_size: int) -> None:
    grid = load_grid(ROOT / f"configs/{name}.yaml")
    runs = [cell.settings for cell in grid.cells]
    assert {1, block_size} <= {run.last_k for run in runs}
    assert {"shrink", "grow", None} <= {
        run.loss.curriculum for run in runs if not isinstance(run.loss.curriculum, tuple)
    }
    assert len({run.data.source for run in runs}) == 2
    assert {run.model.dropout for run in runs} == {0.0, 0.1}
    assert len({run.run.seed for run in runs}) >= 3
    assert {"held-out", "text", "attention"} <= set(grid.measure)
    # Without two parts of a batch there is no noise scale on one GPU or CPU.
    assert all(run.train.micro_batch_size and run.train.micro_batch_size < run.train.global_batch_size for run in runs)
