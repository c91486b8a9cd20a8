"""A checkpoint is whole or not there; a damaged one is noticed and the one before it used."""

import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config import Settings
from dist_train.errors import UserError
from dist_train.training.checkpoint import Checkpoint, DamagedError, checkpoints_in
from dist_train.training.checkpoint_writer import CheckpointWriter
from dist_train.training.trainer import train
from tests.training.saved_run import (
    FILES,
    TENSOR_FILES,
    at_step,
    edit_json,
    edit_tensors,
    equal,
    flip,
    start,
    vouch,
)

Tiny = Callable[..., Settings]


def edit(folder: Path, name: str, change: Callable[[Path], object]) -> None:
    """Change a file of a checkpoint and have the manifest vouch for it."""
    change(folder / name)
    vouch(folder)


def assert_fallback(tiny: Tiny, checkpoints: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Resume, and see that step 2 was called damaged in one line and step 1 used, to the bit; return the line."""
    run = start(tiny())
    with caplog.at_level(logging.WARNING):
        resumed = run.resume(checkpoints)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "step-000002 is damaged" in line
    assert line.isprintable()
    assert resumed
    assert resumed.path == checkpoints / "step-000001"
    assert equal(run.tensors(), at_step(tiny(), 1))
    return line


def test_what_was_saved_is_what_goes_on(checkpoints: Path, tiny: Tiny) -> None:
    run = start(tiny())
    run.resume(checkpoints)
    assert run.step == 2
    run.advance()
    assert equal(run.tensors(), at_step(tiny(), 3))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_noticed_and_the_one_before_used(
    file: str, damage: str, checkpoints: Path, tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoints / "step-000002" / file
    if damage == "flip":
        flip(path)
    elif damage == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    line = assert_fallback(tiny, checkpoints, caplog)
    # A flipped bit of the manifest may be one of a file's hash.
    assert file in line or (file, damage) == ("manifest.json", "flip")


def _link_to_copy(path: Path) -> None:
    path.rename(path.with_name(f"real-{path.name}"))
    path.symlink_to(path.with_name(f"real-{path.name}"))


def _replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("replace", [_link_to_copy, _replace_by_pipe])
def test_links_and_pipes_are_not_read(
    file: str, replace: Callable[[Path], None], checkpoints: Path, tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    replace(checkpoints / "step-000002" / file)
    assert file in assert_fallback(tiny, checkpoints, caplog)


def test_a_linked_checkpoint_is_neither_read_nor_deleted(
    checkpoints: Path, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoints / "step-000002").rename(tmp_path / "elsewhere")
    (checkpoints / "step-000002").symlink_to(tmp_path / "elsewhere")
    assert "(not a folder)" in assert_fallback(tiny, checkpoints, caplog)
    run = start(tiny())
    run.resume(checkpoints)
    with CheckpointWriter(checkpoints, keep=2) as writer:
        writer.open(run.replica, run.optimizer)
        run.step = 3
        for _ in range(3):
            run.advance()
            run.save(writer)
    assert (checkpoints / "step-000002").is_symlink()
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == set(FILES)


NESTED = '{"sha256":' * 100_000


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        NESTED,
        '{"sha256": []}',
        '{"sha256": {}}',
        '{"sha256": {"model.safetensors": 1, "optimizer.safetensors": 2, "state.json": 3}}',
        '{"sha256": {"model.safetensors": "0", "optimizer.safetensors": "0"}}',
        '{"sha256": {"../step-000001/model.safetensors": "0", "optimizer.safetensors": "0", "state.json": "0"}}',
        '{"sha256": {"/etc/passwd": "0", "optimizer.safetensors": "0", "state.json": "0", "model.safetensors": "0"}}',
        '{"sha256": {"model.safetensors": "0", "optimizer.safetensors": "0", "state.json": "0"}, "more": 1}',
        '{"sha256": {"a\\nb\\u001b[2J": 1}}',
        " " * 70_000 + '{"sha256": {}}',
    ],
)
def test_a_manifest_names_exactly_the_three_files(
    manifest: str, checkpoints: Path, tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoints / "step-000002" / "manifest.json").write_text(manifest)
    assert "manifest.json" in assert_fallback(tiny, checkpoints, caplog)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(step=1),
        lambda state: state.update(step=-2),
        lambda state: state.update(step=True),
        lambda state: state.update(step=2.0),
        lambda state: state.update(step="2"),
        lambda state: state.update(tokens=10**400),
        lambda state: state.update(supervised_tokens=None),
        lambda state: state.update(data_fingerprint=[]),
        lambda state: state.update(settings=[]),
        lambda state: state.update(settings={"train": 1}),
        lambda state: state.update(grad_scaler={"scale": 1.0}),
        lambda state: state.update(grad_scaler=None),
        lambda state: state.update({"a\nb": 1}),
        lambda state: state.pop("tokens"),
    ],
)
def test_a_state_of_wrong_types_is_damaged(
    change: Callable[[Any], object], checkpoints: Path, tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    edit(checkpoints / "step-000002", "state.json", edit_json(change))
    assert "state.json" in assert_fallback(tiny, checkpoints, caplog)


def _nest(path: Path) -> None:
    text = path.read_text().rstrip().removesuffix("}")
    path.write_text(text + ', "settings": ' + '{"a":' * 50_000 + "1" + "}" * 50_001)


class _Pickled:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (os.system, ("exit 1",))


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return min(name for name in tensors if tensors[name].dim() > 0)


@pytest.mark.parametrize("file", TENSOR_FILES)
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 64),
        lambda path: path.write_bytes(b"\x08\0\0\0\0\0\0\0" + b"[" * 8),
        lambda path: path.write_bytes(pickle.dumps(_Pickled())),
        lambda path: torch.save({"weight": torch.zeros(2)}, path),
        edit_tensors(lambda tensors: tensors.pop(_first(tensors))),
        edit_tensors(lambda tensors: tensors.update(more=torch.zeros(1))),
        edit_tensors(lambda tensors: tensors.update({_first(tensors): tensors[_first(tensors)][:1].clone()})),
        edit_tensors(lambda tensors: tensors.update({_first(tensors): tensors[_first(tensors)].double()})),
        edit_tensors(lambda tensors: tensors[_first(tensors)].view(-1)[-1:].fill_(float("nan"))),
        edit_tensors(lambda tensors: tensors[_first(tensors)].view(-1)[:1].fill_(float("inf"))),
    ],
)
def test_tensors_that_the_network_does_not_have_are_damaged_whatever_the_manifest_says(
    file: str, write: Callable[[Path], object], checkpoints: Path, tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    edit(checkpoints / "step-000002", file, write)
    assert file in assert_fallback(tiny, checkpoints, caplog)


def test_deep_nesting_is_damage(checkpoints: Path, tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    edit(checkpoints / "step-000002", "state.json", _nest)
    assert "state.json" in assert_fallback(tiny, checkpoints, caplog)


def test_where_all_are_damaged_the_run_is_refused_and_the_network_left_as_it_was(checkpoints: Path, tiny: Tiny) -> None:
    for path in checkpoints.iterdir():
        edit(path, "optimizer.safetensors", edit_tensors(lambda tensors: tensors.pop(_first(tensors))))
    run = start(tiny())
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        run.resume(checkpoints)
    assert equal(run.tensors(), at_step(tiny(), 0))


def test_damage_to_all_loses_nothing_of_the_record(tiny: Tiny) -> None:
    folder = train(tiny({"train.max_iters": 4}))
    flip(folder.checkpoints / "step-000004" / "model.safetensors")
    record = folder.metrics.read_text()
    with pytest.raises(UserError, match="are damaged"):
        train(tiny())
    assert folder.metrics.read_text() == record


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert checkpoints_in(tmp_path / "nowhere") == []


def test_a_folder_that_is_none_does_not_start_the_run_anew(checkpoints: Path, tiny: Tiny) -> None:
    shutil.rmtree(checkpoints)
    checkpoints.write_text("")
    with pytest.raises(UserError, match="cannot read"):
        start(tiny()).resume(checkpoints)


def test_a_checkpoint_under_another_name_is_damaged(checkpoints: Path) -> None:
    (checkpoints / "step-000001").rename(checkpoints / "step-000003")
    with pytest.raises(DamagedError, match="is of step 1"):
        Checkpoint(checkpoints / "step-000003")


# ---- nothing pickled -------------------------------------------------------------------------------------------------


def test_nothing_in_the_package_unpickles() -> None:
    package = Path(__file__).parents[2] / "dist_train"
    unsafe = re.compile(
        r"import (pickle|marshal|shelve|dill)\b|(?<!safetensors\.)torch\.load\(|allow_pickle|yaml\.\w*load|Unpickler"
    )
    found = [
        f"{path.name}: {line.strip()}"
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if unsafe.search(line)
    ]
    assert found == []


def test_nothing_is_pickled(checkpoints: Path) -> None:
    for path in checkpoints.rglob("*"):
        if path.is_file():
            assert path.suffix in (".safetensors", ".json")
