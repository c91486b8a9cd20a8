"""A checkpoint is whole or not there; a damaged one is noticed and the one before it used."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_train.config import Settings
from dist_train.data.shards import file_sha256
from dist_train.errors import StorageError, UserError
from dist_train.training.checkpoint import find_newest
from dist_train.training.trainer import train

Tiny = Callable[..., Settings]


@pytest.fixture
def checkpoints(tiny: Tiny) -> Path:
    return train(tiny({"train.max_iters": 8})).checkpoints


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_noticed_and_the_one_before_used(
    file: str, damage: str, checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoints / "step-000008" / file
    if damage == "flip":
        flip(path)
    elif damage == "truncate":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        # A manifest cut by its last newline alone still says everything.
        expected = "step-000008" if (file, damage) == ("manifest.json", "truncate") else "step-000004"
        assert find_newest(checkpoints) == checkpoints / expected
    assert ("step-000008 is damaged" in caplog.text) == (expected == "step-000004")


def test_what_a_kill_leaves_behind_is_no_checkpoint_and_nothing_foreign_is_deleted(
    checkpoints: Path, tiny: Tiny
) -> None:
    (checkpoints / ".step-000009.partial").mkdir()
    for name in ("step-best", "notes"):
        (checkpoints / name).mkdir()
    assert find_newest(checkpoints) == checkpoints / "step-000008"
    train(tiny({"train.max_iters": 16}))
    kept = {path.name for path in checkpoints.iterdir()}
    assert kept >= {"step-best", "notes", "step-000012", "step-000016"}
    assert "step-000004" not in kept


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_ahead_pushes_no_good_one_out(keep: int, tiny: Tiny, tmp_path: Path) -> None:
    checkpoints = train(tiny({"checkpoint.keep": 3})).checkpoints
    flip(checkpoints / "step-000012" / "model.safetensors")
    flip(checkpoints / "step-000008" / "model.safetensors")
    train(tiny({"checkpoint.keep": keep, "train.max_iters": 6}))
    expected = {"step-000006", "step-000004"} if keep == 2 else {"step-000006"}
    assert {path.name for path in checkpoints.iterdir()} == expected


def test_damage_to_all_is_refused_and_nothing_lost(checkpoints: Path, tiny: Tiny) -> None:
    for path in checkpoints.iterdir():
        flip(path / "model.safetensors")
    record = (checkpoints.parent / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        train(tiny())
    assert (checkpoints.parent / "metrics.jsonl").read_text() == record


def test_a_checkpoint_of_another_version_is_refused_by_name(checkpoints: Path, tiny: Tiny) -> None:
    folder = checkpoints / "step-000008"
    state = json.loads((folder / "state.json").read_text())
    state["settings"]["model"]["norm_epsilon"] = state["settings"]["model"].pop("norm_eps")
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["state.json"] = file_sha256(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"model\.norm_epsilon was 1e-05, is None; model\.norm_eps was None, is 1e-05"):
        train(tiny({"train.max_iters": 9}))


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert find_newest(tmp_path / "nowhere") is None


def test_a_folder_that_cannot_be_written_ends_in_status_4(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*; choose another --run\.out_dir") as caught:
        train(tiny({"run.out_dir": tmp_path / "file" / "run"}))
    assert caught.value.exit_status == 4


def test_nothing_is_pickled(checkpoints: Path) -> None:
    for path in checkpoints.rglob("*"):
        if path.is_file():
            assert path.suffix in (".safetensors", ".json")
