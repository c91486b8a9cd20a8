"""Data that is meant to do harm: nothing of it is executed, nothing outside of its folder is read or written."""

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train.data.description import describe_once
from dist_train.data.manifest import Manifest, open_tokens
from dist_train.errors import UserError
from dist_train.sections import DataSettings
from tests.conftest import run_command
from tests.faults.tokens import load, prepare_book, require_one_line

HOSTILE = "hostile files: nothing executed, nothing read from outside"
FIRST = "train_000000.bin"

Figure = Callable[..., None]


@pytest.fixture(autouse=True)
def _waiting_fails() -> Iterator[None]:
    """Waiting at a pipe, or reading a device without end, is an error of the test and not its end."""

    def stop(*_: object) -> None:
        raise TimeoutError("still waiting or reading")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.fixture
def data(tmp_path: Path) -> DataSettings:
    return prepare_book(tmp_path)


def name_it(data: Path, name: str) -> None:
    """Have the manifest call its first shard `name`: a file that, were it read, would hold the right bytes."""
    values = json.loads((data / "manifest.json").read_text())
    values["train"]["shards"][0]["file"] = name
    (data / "manifest.json").write_text(json.dumps(values))


def lead_out(data: Path, name: str) -> None:
    """Put a link in the place of a file, to a copy of it outside."""
    os.replace(data / name, data.parent / "outside")
    (data / name).symlink_to(data.parent / "outside")


def lead_out_folder(data: Path) -> None:
    (data / "sub").symlink_to(data.parent)
    name_it(data, "sub/outside.bin")


def forget_manifest(data: Path) -> Path:
    (data / "manifest.json").unlink()
    return data


def put(data: Path, name: str, make: Callable[[Path], object]) -> None:
    (data / name).unlink(missing_ok=True)
    make(data / name)


class Payload:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


def pickled_array(path: Path, data: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([Payload(data.parent / "executed")] * 600, dtype=object), allow_pickle=True)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "the folder above": (lambda data: name_it(data, "../outside.bin"), "not the name of a file"),
    "an absolute path": (lambda data: name_it(data, str(data.parent / "outside.bin")), "not the name of a file"),
    "a folder that is a link": (lead_out_folder, "not the name of a file"),
    "the folder itself": (lambda data: name_it(data, ".."), "not the name of a file"),
    "a name with a zero byte": (lambda data: name_it(data, f"{FIRST}\0"), "not the name of a file"),
    "a name that writes lines": (lambda data: name_it(data, "a\nerror: b\x1b[2J"), "not the name of a file"),
    "a shard that is a link": (lambda data: lead_out(data, FIRST), "symbolic link"),
    "a manifest that is a link": (lambda data: lead_out(data, "manifest.json"), "symbolic link"),
    "a link to a device": (lambda data: put(data, FIRST, lambda path: path.symlink_to("/dev/zero")), "symbolic link"),
    "a pipe for a shard": (lambda data: put(data, FIRST, os.mkfifo), "no regular file"),
    "a pipe for a manifest": (lambda data: put(data, "manifest.json", os.mkfifo), "not a regular file"),
    "a folder for a shard": (lambda data: put(data, FIRST, os.mkdir), "no regular file"),
    "a manifest of 1 GB": (lambda data: os.truncate(data / "manifest.json", 10**9), "larger than"),
    "a manifest nested 100,000 deep": (
        lambda data: (data / "manifest.json").write_text("[" * 100_000 + "]" * 100_000),
        "nested too deeply",
    ),
    "a pickle for a shard": (lambda data: pickled_array(data / FIRST, data), "no llm.c header"),
    "a pickle for a manifest": (
        lambda data: (data / "manifest.json").write_bytes(pickle.dumps(Payload(data.parent / "executed"))),
        "damaged",
    ),
    "links without a manifest": (lambda data: lead_out(forget_manifest(data), FIRST), "symbolic link"),
    "lines in a name without a manifest": (
        lambda data: os.replace(data / FIRST, forget_manifest(data) / "train\nerror.bin"),
        "not the name of a file",
    ),
}


@pytest.mark.parametrize(("harm", "reason"), REFUSED.values(), ids=REFUSED)
def test_hostile_data_is_refused_in_one_line(
    data: DataSettings, harm: Callable[[Path], object], reason: str, figure: Figure
) -> None:
    figure(HOSTILE)
    shutil.copyfile(data.dir / FIRST, data.dir.parent / "outside.bin")
    harm(data.dir)
    with pytest.raises(UserError, match=reason) as caught:
        open_tokens(data)
    require_one_line(caught.value)
    assert not (data.dir.parent / "executed").exists()


def test_pickles_and_pipes_where_notes_are_kept_are_ignored(data: DataSettings, figure: Figure) -> None:
    figure(HOSTILE)
    written = load(data)
    payload = pickle.dumps(Payload(data.dir.parent / "executed"))
    harms: tuple[Callable[[Path], object], ...] = (os.mkfifo, lambda path: path.write_bytes(payload))
    manifest = Manifest.read(data.dir)
    assert manifest
    for harm in harms:
        for name in (".verified.json", "corpus.json"):
            put(data.dir, name, harm)
        assert load(data) == written
        assert describe_once(data.dir, manifest)["train"]["tokens"] == manifest.train.tokens
    assert not (data.dir.parent / "executed").exists()


def test_nothing_outside_is_written_to(data: DataSettings, figure: Figure) -> None:
    figure(HOSTILE)
    outside = data.dir.parent / "outside.txt"
    outside.write_text("mine")
    (data.dir / "corpus.json").unlink()
    for name in (".verified.json", "..verified.json.new", ".corpus.json.new"):
        put(data.dir, name, lambda path: path.symlink_to(outside))
    manifest = Manifest.read(data.dir)
    assert manifest
    describe_once(data.dir, manifest)
    assert load(data)
    assert outside.read_text() == "mine"


def test_the_command_ends_in_status_2_and_one_line(
    data: DataSettings, tiny_arguments: Callable[..., list[str]], figure: Figure
) -> None:
    figure(HOSTILE)
    lead_out(data.dir, FIRST)
    changes = {"data.source": "files", "data.path": data.path, "data.dir": data.dir, "data.shard_tokens": 150}
    ended = run_command("train", *tiny_arguments(changes))
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"error: {data.dir / FIRST} is a symbolic link")
