"""A grid's runs are made and measured once, and the report follows from their folders."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import Settings
from dist_train.errors import UserError
from dist_train.study import compare
from dist_train.study.compare import is_finished, run_cells
from dist_train.study.evaluate import read_suite
from dist_train.study.grid import Cell, Grid, load_grid
from dist_train.study.learning import read_curve, read_metrics
from dist_train.study.report import write_report
from tests.conftest import run_command


@pytest.fixture
def small_grid(grid_file: Callable[..., Path]) -> Path:
    """Return a file of four runs that are measured in every way."""
    own = json.loads(grid_file().read_text())["settings"]
    settings = {**own, "train.micro_batch_size": 4, "eval.early": True}
    return grid_file(measure=["held-out", "text", "attention"], settings=settings)


def test_a_grid_is_run_once_and_reported_from_its_folders(
    small_grid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = load_grid(small_grid)
    run_cells(grid)
    report = json.loads(write_report(grid).read_text())
    assert [row["folder"] for row in report["cells"]] == [str(cell.folder) for cell in grid.cells]
    assert [row["settings"] for row in report["cells"]] == [cell.varying for cell in grid.cells]
    assert [row["objective"] for row in report["cells"]] == ["final token", "all tokens"] * 2
    for row in report["cells"]:
        check_measures(Path(row["folder"]), row["measures"])
    check_claims(report["claims"])
    check_equal_budgets(report)
    check_needed(report)
    assert report["made"]["runs"] == 4
    for name in ("report.html", "report.md"):
        assert report["claims"][0]["claim"] in (grid.out_dir / name).read_text(), name
    assert "final-token training" in capsys.readouterr().out
    assert all(list((cell.folder / "tensorboard").glob("*.figures")) for cell in grid.cells)

    assert done_again(grid, monkeypatch) == []
    (grid.cells[1].folder / "run_status.json").write_text('{"status": "running"}')
    (grid.cells[3].folder / "run_status.json").write_text("torn")
    assert done_again(grid, monkeypatch) == [grid.cells[1].folder, grid.cells[3].folder]
    assert len(done_again(load_grid(small_grid, ["--eval.interval=3"]), monkeypatch)) == 4


def check_measures(run: Path, measures: dict[str, Any]) -> None:
    last = read_metrics(run, "eval")[-1]
    assert measures["updates"] == last["step"] == 12
    assert measures["tokens"] == 12 * 8 * 16
    suite = read_suite(run, "held-out")
    assert suite is not None
    assert measures["all_token_loss"] == suite["held_out"]["all_token_loss"]["value"]
    assert measures["held-out.gap.all_token_loss"] == suite["gap"]["all_token_loss"]["value"]
    known = {"noise_scale", "text.model.spaces_per_character", "text.human.bits_per_character", "corpus_entropy_bits"}
    known |= {"attention.layer 2.entropy_bits", "train_loss_noise", "update_flops", "position_gap"}
    assert known <= measures.keys()
    assert all(value is None or math.isfinite(value) for value in measures.values())


def check_claims(claims: list[dict[str, Any]]) -> None:
    measured = {claim["id"]: claim for claim in claims if claim["repetitions"]}
    for claim in measured.values():
        assert claim["interval"][0] <= claim["effect"] <= claim["interval"][1]
    assert {"higher", "noisier", "slower", "spaces", "glued", "incoherent", "cheaper", "poorer-FLOPs-all"} <= set(
        measured
    )
    assert {claim["verdict"] for claim in claims if not claim["repetitions"]} == {"not measured"}


def check_equal_budgets(report: dict[str, Any]) -> None:
    losses = {(row["budget"], row["group"]): row["all_token_loss"]["value"] for row in report["equal"]}
    assert len(losses) == 4 * 2
    # At equal updates both are at their end; at equal supervised tokens all-token training is at its first update.
    for objective in ("final token", "all tokens"):
        folders = [Path(c["folder"]) for c in report["cells"] if c["objective"] == objective]
        ends = [read_metrics(folder, "eval")[-1]["all_token_loss"] for folder in folders]
        assert losses["updates", objective] == pytest.approx(sum(ends) / 2)
    assert losses["supervised tokens", "all tokens"] > losses["updates", "all tokens"]


def check_needed(report: dict[str, Any]) -> None:
    for loss in ("final_token_loss", "all_token_loss"):
        rows = [row for row in report["needed"] if row["loss"] == loss]
        for row in (row for row in rows if row["target"] == rows[0]["target"]):
            folders = [Path(c["folder"]) for c in report["cells"] if c["objective"] == row["group"]]
            updates = [read_curve(folder).needed("updates", loss, row["target"]) for folder in folders]
            assert row["updates"]["value"] == pytest.approx(sum(filter(None, updates)) / 2)
            assert None not in updates, "the highest of the losses is one that all reach"
        assert any(row["FLOPs"] for row in rows if row["target"] == rows[-1]["target"])


def done_again(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the folders of the runs that `run_cells` would train, having seen that nothing is measured again."""
    trained: list[Path] = []
    kept = {path: path.stat().st_mtime_ns for path in grid.out_dir.glob("*/evaluation/*.json")}
    with monkeypatch.context() as patch:
        patch.setattr(compare, "train", lambda settings: trained.append(settings.run.out_dir))
        run_cells(grid)
    assert kept == {path: path.stat().st_mtime_ns for path in grid.out_dir.glob("*/evaluation/*.json")}
    return trained


def test_a_run_that_is_not_there_is_not_finished_and_cannot_be_reported(tiny: Callable[..., Settings]) -> None:
    cell = Cell({"run.seed": 1}, tiny())
    assert not is_finished(cell)
    with pytest.raises(UserError, match="is no run folder"):
        write_report(Grid(cell.folder.parent, [cell], [], {"run.seed": {"run.seed"}}))


def test_runs_of_several_processes_report_what_those_of_one_do(grid_file: Callable[..., Path], tmp_path: Path) -> None:
    settings = {**json.loads(grid_file().read_text())["settings"], "model.dropout": 0.0}
    small = {"grid": {"loss.last_k": [1]}, "settings": settings}
    alone = load_grid(grid_file(**small, out_dir=str(tmp_path / "alone")))
    run_cells(alone)
    path = grid_file(**small, out_dir=str(tmp_path / "together"))
    result = run_command("compare", str(path), "--processes=2")
    assert (result.returncode, result.stderr) == (0, "")
    ours, theirs = (read_metrics(cell.folder, "eval") for cell in (*load_grid(path).cells, *alone.cells))
    for one, other in zip(ours, theirs, strict=True):
        assert one["all_token_loss"] == pytest.approx(other["all_token_loss"], rel=1e-4)
    environment = json.loads((load_grid(path).cells[0].folder / "environment.json").read_text())
    assert environment["world_size"] == 2


def test_a_run_that_its_processes_cannot_end_ends_the_command_with_their_status(
    grid_file: Callable[..., Path], tmp_path: Path
) -> None:
    path, fault = grid_file(grid={"loss.last_k": [1]}), {"DIST_TRAIN_FAULT": "nan:1:6"}
    result = run_command("compare", str(path), "--processes=2", environment=fault)
    assert result.returncode == 3
    reason, word = result.stderr.splitlines()
    assert "the loss is nan of step 7" in reason
    assert word == "error: last_k=1 ended before its end, for the reason above; the same command goes on with it"


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "environment", "expected"),
    [
        ({"grids": 1}, {}, "grids: unknown key"),
        ({"measure": ["wit"]}, {}, "there is no 'wit'"),
        ({"measure": ["lambada=nowhere.jsonl"]}, {}, "nowhere.jsonl"),
        ({}, {"RANK": "0", "WORLD_SIZE": "2"}, "start it without torchrun"),
        ({"settings": {"train.global_batch_size": 7}}, {}, "7 cannot be divided among 2 processes; use 6 or 8"),
    ],
)
def test_a_mistake_ends_the_command_with_one_line_and_status_2(
    grid_file: Callable[..., Path], changes: dict[str, Any], environment: dict[str, str], expected: str
) -> None:
    result = run_command("compare", str(grid_file(**changes)), "--processes=2", environment=environment)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
