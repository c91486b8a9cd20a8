"""A grid of runs: what its file means, that no run is made twice, and that the report follows from the folders."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train.config import Settings
from dist_train.errors import UserError
from dist_train.study import compare
from dist_train.study.compare import is_finished, run_cells
from dist_train.study.grid import Cell, Grid, load_grid
from dist_train.study.measures import claims, loss_noise, measure, read_metrics, student_interval
from dist_train.study.report import write_report
from tests.conftest import ROOT, TINY, run_command


@pytest.fixture
def grid_file(tmp_path: Path, data_dir: Path) -> Callable[..., Path]:
    """Return a file of a tiny grid, with changes to its keys."""

    def write(**changes: Any) -> Path:
        (tmp_path / "tiny.yaml").write_text("# all from the grid\n")
        values = {
            "base": "tiny.yaml",
            "out_dir": str(tmp_path / "study"),
            "settings": {**TINY, "data.dir": str(data_dir)},
            "grid": {"run.seed": [1, 2], "loss.last_k": [1, "all"]},
            **changes,
        }
        path = tmp_path / "grid.yaml"
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return path

    return write


def test_a_grid_is_every_combination_in_its_order(grid_file: Callable[..., Path], tmp_path: Path) -> None:
    grid = load_grid(grid_file(), ["--log.interval=2"])
    names = ["seed=1,last_k=1", "seed=1,last_k=all", "seed=2,last_k=1", "seed=2,last_k=all"]
    assert [cell.folder for cell in grid.cells] == [tmp_path / "study" / name for name in names]
    assert grid.cells[1].varying == {"run.seed": 1, "loss.last_k": "all"}
    assert [(cell.settings.run.seed, cell.settings.last_k) for cell in grid.cells] == [(1, 1), (1, 16), (2, 1), (2, 16)]
    assert all(cell.settings.log.interval == 2 for cell in grid.cells)


def test_a_key_keeps_its_section_where_it_needs_one(grid_file: Callable[..., Path]) -> None:
    varying = {"eval.interval": [2, 3], "log.interval": [1], "optim.grad_clip": [None], "data.path": ["a/b"]}
    grid = load_grid(grid_file(grid=varying, settings={"data.source": "files"}))
    assert grid.cells[0].folder.name == "eval.interval=2,log.interval=1,grad_clip=null,path=a_b"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"grids": {}}, "grids: unknown key; a grid has base, out_dir, settings, grid"),
        ({"out_dir": None}, "out_dir: Field required"),
        ({"grid": {}}, "grid: "),
        ({"grid": {"loss.last_k": 1}}, "grid.loss.last_k: "),
        ({"grid": {"loss.last_k": []}}, "loss.last_k needs values"),
        ({"grid": {"loss.last_k": [1, 1]}}, "each of them once"),
        ({"grid": {"run.out_dir": ["a"]}}, "run.out_dir cannot be set"),
        ({"grid": {"train.max_iters": [1, 2]}}, "train.max_iters stands in settings and in grid"),
        ({"grid": {"loss.last_k": [1, 99]}}, "loss.last_k=99 is more than model.block_size=16"),
        ({"grid": {"loss.last_q": [1, 2]}}, "loss.last_q: unknown key; did you mean last_k?"),
        ({"grid": {"last_k": [1, 2]}}, "cannot read '--last_k=1'"),
        ({"grid": {"sample.prompt": ["a/b", "a_b"]}}, "would share a folder"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_a_mistake_in_a_grid_is_one_line(
    grid_file: Callable[..., Path], changes: dict[str, Any], expected: str
) -> None:
    path = grid_file(**changes)
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        load_grid(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("override", ["--loss.last_k=3", "--run.out_dir=elsewhere"])
def test_the_command_line_cannot_undo_what_varies(grid_file: Callable[..., Path], override: str) -> None:
    with pytest.raises(UserError, match="change it there"):
        load_grid(grid_file(), [override])


def test_a_grid_is_run_once_and_reported_from_its_folders(
    grid_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = load_grid(grid_file())
    run_cells(grid)
    report = json.loads(write_report(grid).read_text())
    assert [row["folder"] for row in report["cells"]] == [str(cell.folder) for cell in grid.cells]
    assert [row["settings"] for row in report["cells"]] == [cell.varying for cell in grid.cells]
    for row in report["cells"]:
        last = read_metrics(Path(row["folder"]), "eval")[-1]
        assert row["measures"]["all_token_loss"] == last["all_token_loss"]
        assert row["measures"]["tokens"] == 12 * 8 * 16
    assert [claim["repetitions"] for claim in report["claims"]] == [2, 2]
    for claim in report["claims"]:
        assert claim["interval"][0] <= claim["effect"] <= claim["interval"][1]
    markdown = (grid.out_dir / "report.md").read_text()
    assert "compare.png" in markdown
    assert report["claims"][0]["claim"] in markdown
    assert (grid.out_dir / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "final-token training" in capsys.readouterr().out

    assert trained_again(grid, monkeypatch) == []
    (grid.cells[1].folder / "run_status.json").write_text('{"status": "running"}')
    (grid.cells[3].folder / "run_status.json").write_text("torn")
    assert trained_again(grid, monkeypatch) == [grid.cells[1].folder, grid.cells[3].folder]
    longer = load_grid(grid_file(), ["--eval.interval=3"])
    assert len(trained_again(longer, monkeypatch)) == 4


def trained_again(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the folders of the runs that `run_cells` would train."""
    trained: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(compare, "train", lambda settings: trained.append(settings.run.out_dir))
        run_cells(grid)
    return trained


def test_a_run_that_is_not_there_is_not_finished_and_cannot_be_reported(tiny: Callable[..., Settings]) -> None:
    cell = Cell({"run.seed": 1}, tiny())
    assert not is_finished(cell)
    with pytest.raises(UserError, match="is no run folder"):
        write_report(Grid(cell.folder.parent, [cell]))
    cell.folder.mkdir()
    (cell.folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no finished updates"):
        measure(cell.folder)


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n{"kind": "train"}\n{"kind": "eval", "st')
    assert read_metrics(tmp_path, "eval") == [{"kind": "eval", "step": 0}]


# ---- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.7062), (3, 4.30265), (6, 2.57058), (31, 2.04227)])
def test_the_interval_is_students(n: int, quantile: float) -> None:
    values = np.random.default_rng(n).normal(size=n)
    interval = student_interval(list(values))
    assert interval is not None
    half = quantile * values.std(ddof=1) / np.sqrt(n)
    np.testing.assert_allclose(interval, [values.mean() - half, values.mean() + half], rtol=1e-4, atol=1e-4)


def row(last_k: int, seed: int, loss: float, seconds: float, **others: Any) -> dict[str, Any]:
    measures = {"last_k": last_k, "all_token_loss": loss, "step_seconds": seconds}
    totals = {"tokens": 1600, "supervised_tokens": 100 * last_k}
    settings = {"loss.last_k": last_k, "run.seed": seed, **others}
    return {"settings": settings, "folder": f"{last_k}-{seed}", "measures": {**measures, **totals}}


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    return [claim["verdict"] for claim in claims(rows)]


def test_claims_pair_runs_of_one_seed() -> None:
    # Seeds differ far more than objectives do: only pairs show the difference.
    final = [row(1, seed, 3.0 + seed + 0.01 * (seed % 2), 0.5 * seed) for seed in (1, 2, 3)]
    every = [row(16, seed, 2.9 + seed, 1.0 * seed) for seed in (3, 1, 2)]
    between = [row(8, seed, 9.0, 9.0) for seed in (1, 2, 3)]
    higher, cheaper = claims(final + between + every)
    assert (higher["verdict"], cheaper["verdict"]) == ("supported", "supported")
    assert higher["effect"] == pytest.approx(0.1 + 0.02 / 3)
    assert higher["interval"][0] < higher["effect"] < higher["interval"][1]
    assert (cheaper["effect"], cheaper["interval"]) == (pytest.approx(0.5), pytest.approx([0.5, 0.5]))


def test_claims_may_be_contradicted_undecided_or_without_runs() -> None:
    final, every = [row(1, s, 2.0 + s / 100, 2.0) for s in (1, 2)], [row(16, s, 3.0, 1.0) for s in (1, 2)]
    assert verdicts(final + every) == ["contradicted", "contradicted"]
    noisy = [row(16, 1, 1.0, 1.0), row(16, 2, 3.0, 4.0)]
    assert verdicts(final + noisy) == ["undecided", "undecided"]
    single = claims([final[0], every[0]])
    assert [claim["interval"] for claim in single] == [[None, None]] * 2
    assert {claim["verdict"] for claim in single} == {"undecided"}
    assert claims(final) == []


def test_claims_are_made_for_each_of_the_other_settings() -> None:
    rows = [row(k, s, 3.0, 1.0, **{"model.n_layer": n}) for k in (1, 16) for s in (1, 2) for n in (2, 4)]
    texts = [claim["claim"] for claim in claims(rows)]
    assert len(texts) == 4
    assert sum("(n_layer=4)" in text for text in texts) == 2


def test_loss_noise_is_what_goes_up_and_down_not_what_falls() -> None:
    steps = np.arange(2000)
    trend = 2 + 3 * np.exp(-steps / 300)
    noise = np.random.default_rng(1).normal(scale=0.2, size=len(steps))
    assert loss_noise(trend + noise) == pytest.approx(0.2, rel=0.06)
    assert loss_noise(trend) < 0.002
    assert loss_noise(np.array([3.0])) == 0


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_ready_made_grid_compares_three_objectives() -> None:
    grid = load_grid(ROOT / "configs/study_small.yaml")
    assert {cell.settings.last_k for cell in grid.cells} == {1, 8, 32}
    assert len(grid.cells) == 9


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "grids: unknown key"), ({"RANK": "0", "WORLD_SIZE": "2"}, "start it without torchrun")],
)
def test_a_mistake_ends_the_command_with_one_line_and_status_2(
    grid_file: Callable[..., Path], environment: dict[str, str], expected: str
) -> None:
    result = run_command("compare", str(grid_file(grids=1)), environment=environment)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
