"""Saving costs a copy, a failed save is known at once, and nothing is deleted but what is ours."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dist_train.config import Settings
from dist_train.errors import StorageError
from dist_train.training import checkpoint_writer
from dist_train.training.checkpoint import checkpoints_in, learning_like, learning_of
from dist_train.training.checkpoint_writer import CheckpointWriter
from dist_train.training.snapshot import Snapshot
from tests.training.saved_run import (
    TinyRun,
    at_step,
    equal,
    flip,
    save_steps,
    start,
)

Tiny = Callable[..., Settings]


def test_what_a_kill_leaves_behind_is_no_checkpoint_and_nothing_foreign_is_deleted(
    checkpoints: Path, tiny: Tiny, tmp_path: Path
) -> None:
    (checkpoints / ".step-000003.partial").mkdir()
    (checkpoints / ".step-000003.partial" / "model.safetensors").write_text("half of it")
    (checkpoints / ".step-000009.partial").symlink_to(tmp_path)
    foreign = {"step-best", "notes", "step-٣", "step-3.bak", ".step-x.partial"}
    for name in foreign:
        (checkpoints / name).mkdir()
    assert [path.name for path in checkpoints_in(checkpoints)] == ["step-000002", "step-000001"]
    save_steps(tiny(), checkpoints, steps=4)
    kept = {path.name for path in checkpoints.iterdir()}
    assert kept == foreign | {".step-000009.partial", "step-000003", "step-000004"}
    assert (tmp_path / "checkpoints").exists()


def test_a_checkpoint_gets_its_name_when_the_disk_has_all_of_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no kill can show, as the kernel outlives it: a power cut takes what was not synced."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def recorded_replace(source: Path, target: Path) -> None:
        replace(source, target)
        done.append(f"now called {target.name}")

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    save_steps(tiny(), tmp_path / "checkpoints", steps=1)
    assert sorted(done[:3]) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert done[3:] == ["manifest.json", ".step-000001.partial", "now called step-000001", "checkpoints"]


@pytest.mark.parametrize("keep", [2, 3])
def test_a_damaged_checkpoint_ahead_pushes_no_good_one_out(keep: int, tiny: Tiny, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    save_steps(tiny(), checkpoints, steps=12, keep=9)
    flip(checkpoints / "step-000012" / "model.safetensors")
    flip(checkpoints / "step-000011" / "model.safetensors")
    save_steps(tiny(), checkpoints, steps=6, keep=keep)
    assert [path.name for path in checkpoints_in(checkpoints)] == ["step-000006", "step-000005", "step-000004"][:keep]


def test_the_optimizer_has_the_state_that_checkpoints_expect(tiny: Tiny) -> None:
    run = start(tiny())
    run.advance()
    made = learning_of(run.replica, run.optimizer)
    expected = learning_like(run.replica, run.optimizer)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in made.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()
    }


@pytest.fixture
def writing(tiny: Tiny, tmp_path: Path) -> tuple[TinyRun, CheckpointWriter]:
    """A run that is about to save its first step, and what saves it."""
    run = start(tiny())
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=2)
    writer.open(run.replica, run.optimizer)
    run.advance()
    return run, writer


def test_what_is_saved_is_the_state_when_save_returned(
    writing: tuple[TinyRun, CheckpointWriter], tiny: Tiny, tmp_path: Path
) -> None:
    run, writer = writing
    with writer:
        run.save(writer)
        run.advance()
    resumed = start(tiny())
    resumed.resume(tmp_path / "checkpoints")
    assert equal(resumed.tensors(), at_step(tiny(), 1))


def test_a_run_whose_updates_were_all_left_out_is_saved_and_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    run = start(tiny())
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.open(run.replica, run.optimizer)
        run.step = 1
        run.save(writer)
    resumed = start(tiny())
    resumed.resume(tmp_path)
    for either in (run, resumed):
        either.advance()
    assert equal(resumed.tensors(), run.tensors())


def test_a_disk_that_fills_up_is_known_at_once_and_the_last_checkpoint_intact(
    writing: tuple[TinyRun, CheckpointWriter], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, writer = writing
    run.save(writer)
    writer.wait()
    assert writer.failure is None

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer.os, "fsync", full)
    run.advance()
    run.save(writer)
    with pytest.raises(StorageError, match=r"cannot save .*step-000002.*No space left.*; free space") as caught:
        writer.wait()
    assert caught.value.exit_status == 4
    assert writer.failure is caught.value
    with pytest.raises(StorageError):
        run.save(writer)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"], "no room is kept occupied"
    assert start(tiny()).resume(tmp_path / "checkpoints")


def _has(free_bytes: int) -> Callable[[Path], shutil._ntuple_diskusage]:
    return lambda path: shutil._ntuple_diskusage(2**50, 2**50 - free_bytes, free_bytes)


def test_room_for_the_next_checkpoint_is_asked_for_before_work_is_lost(
    writing: tuple[TinyRun, CheckpointWriter], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, writer = writing
    monkeypatch.setattr(shutil, "disk_usage", _has(free_bytes=5 << 20))
    with pytest.raises(StorageError, match=r"room for 5 MiB and the next checkpoint needs 8 MiB; free space"):
        CheckpointWriter(tmp_path / "other", keep=2).open(run.replica, run.optimizer)
    run.save(writer)
    with pytest.raises(StorageError, match="needs 8 MiB"):
        writer.wait()
    assert start(tiny()).resume(tmp_path / "checkpoints"), "the save itself is whole"


def test_the_last_checkpoint_needs_no_room_behind_it(
    writing: tuple[TinyRun, CheckpointWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, writer = writing
    monkeypatch.setattr(shutil, "disk_usage", _has(free_bytes=5 << 20))
    with writer:
        run.save(writer, is_last=True)
    assert writer.failure is None


def test_a_failed_write_does_not_hide_what_ended_the_run(
    writing: tuple[TinyRun, CheckpointWriter], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, writer = writing
    monkeypatch.setattr(shutil, "disk_usage", _has(free_bytes=0))

    def save_and_be_interrupted() -> None:
        with writer:
            run.save(writer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_and_be_interrupted()
    assert "needs 8 MiB" in caplog.text


def test_a_folder_that_cannot_be_written_ends_in_status_4(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = start(tiny())
    with pytest.raises(StorageError, match=r"cannot write .*; choose another --run\.out_dir") as caught:
        CheckpointWriter(tmp_path / "file" / "checkpoints", keep=2).open(run.replica, run.optimizer)
    assert caught.value.exit_status == 4


@pytest.mark.parametrize("order", [1, -1])
def test_a_snapshot_is_the_file_that_safetensors_reads(order: int) -> None:
    values = {"a": torch.rand(3).half(), "b": torch.rand(2, 5), "c": torch.rand(()).double(), "d": torch.rand(0, 4)}
    values = dict(list({**values, 'é"\n': torch.rand(7).bfloat16(), "e": torch.rand(6, 4).T}.items())[::order])
    snapshot = Snapshot(values)
    for name, value in values.items():
        snapshot.copy(name, value)
    content = b"".join(snapshot.chunks())
    assert len(content) == snapshot.n_bytes
    read = safetensors.torch.load(content)
    assert read.keys() == values.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in values.items())
