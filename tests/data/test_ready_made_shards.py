"""Shards that others made, from a stand-in for the hub and from a local folder."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train.config_file import load_settings
from dist_train.data import ready_made
from dist_train.data.manifest import open_tokens
from dist_train.data.prepare import prepare
from dist_train.data.ready_made import fetch_shards
from dist_train.data.shards import ShardWriter
from dist_train.errors import StorageError, UserError
from dist_train.sections import DataSettings
from tests.data.hub_server import Hub, Repository, environment, start

NEWEST, TAGGED = "b" * 40, "c" * 40
CHUNK_BYTES = 1 << 12
TOKENS = 10_000
TRAIN = [f"fineweb_train_{number:06d}.bin" for number in (1, 2, 3)]
VAL = "fineweb_val_000000.bin"


def shard(seed: int, folder: Path, tokens: int = TOKENS, n_vocab: int = 257) -> bytes:
    """Return a file in llm.c's format."""
    with ShardWriter(folder, f"made{seed}", np.dtype("<u2"), tokens) as writer:
        writer.append(np.random.default_rng(seed).integers(0, n_vocab, tokens))
    return (folder / f"made{seed}_000000.bin").read_bytes()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("made")
    return {name: shard(seed, folder) for seed, name in enumerate([*TRAIN, VAL])}


@pytest.fixture(scope="module")
def server(shards: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    train, val = shards[TRAIN[0]], shards[VAL]
    large = shard(9, tmp_path_factory.mktemp("large"), n_vocab=1000)
    repositories = {
        "kjj0/fineweb10B-gpt2": Repository(
            {NEWEST: {"README.md": b"shards", **shards}, TAGGED: {TRAIN[0]: train, VAL: val}},
            {"main": NEWEST, "v1": TAGGED},
        ),
        **{
            f"others/{name}": Repository({NEWEST: files}, {"main": NEWEST})
            for name, files in {
                "folders": {"deep/er/a_train.bin": train, "b_train.bin": train, "deep/a_val.bin": val},
                "doubled": {"a/train.bin": train, "b/train.bin": train, "val.bin": val},
                "no-val": {"README.md": b"shards", TRAIN[0]: train},
                "vocabulary": {TRAIN[0]: large, VAL: val},
                "short": {TRAIN[0]: train[:-2], VAL: val},
                "cut": {TRAIN[0]: train, VAL: val},
                "again": shards,
            }.items()
        },
    }
    with Hub(repositories) as running:
        yield running


FETCH = f"""
import json, os, pathlib, sys, time, urllib.request
from dist_train.sections import DataSettings
from dist_train.data import hub, ready_made
from dist_train.errors import UserError

ready_made._CHUNK_BYTES = {CHUNK_BYTES}

def order(orders):
    body = json.dumps(orders).encode()
    url = os.environ["HF_ENDPOINT"] + "/faults"
    urllib.request.urlopen(urllib.request.Request(url, body, method="POST")).close()

def fetch(folder, repository="kjj0/fineweb10B-gpt2", **changes):
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    settings = DataSettings(source="shards", path="hub:" + repository, tokenizer="bytes", dir="unused", **changes)
    fetched = ready_made.fetch_shards(settings, folder)
    return {{
        "revision": fetched.revision,
        "train": [vars(shard) for shard in fetched.train],
        "val": [vars(shard) for shard in fetched.val],
        "there": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")),
    }}

def mistake(*arguments, **changes):
    try:
        fetch(*arguments, **changes)
    except UserError as error:
        return str(error)
""".replace('dir="unused"', 'dir=pathlib.Path("unused")')

MANY = (
    FETCH
    + """
time.sleep = lambda seconds: None
TRAIN = sys.argv[1:]
answers = {
    "all": fetch("all"),
    "first": fetch("again", "others/again"),
    "again": fetch("again", "others/again"),
    "of 2": fetch("of 2", max_tokens=10_001),
    "of 1": fetch("of 1", max_tokens=10_000),
    "tag": fetch("tag", revision="v1"),
    "folders": fetch("folders", "others/folders"),
    "doubled": mistake("doubled", "others/doubled"),
    "no val": mistake("no val", "others/no-val"),
    "vocabulary": mistake("vocabulary", "others/vocabulary"),
    "short": mistake("short", "others/short"),
    "unknown": mistake("unknown", "nobody/nothing"),
    "no name": mistake("no name", "a/b/c"),
    "unknown revision": mistake("unknown", revision="v2"),
}
# The first answers are of the lists' starts; the connection is then cut, and the hub in trouble for longer than its
# client puts up with.
order({name: ["fine", "torn", *["500"] * 7, "torn", "429"] for name in TRAIN})
answers["trouble"] = fetch("trouble")
order({TRAIN[0]: ["wrong"]})
answers["wrong once"] = fetch("wrong once")
order({TRAIN[0]: ["wrong"] * 12})
answers["wrong"] = mistake("wrong")
order({TRAIN[0]: []})
hub._PATIENCE_SECONDS = 0
order({TRAIN[0]: ["fine", *["500"] * 6]})
answers["away"] = mistake("away")
answers["back"] = fetch("away")
print(json.dumps(answers))
"""
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def answers(server: Hub, work: Path) -> dict[str, Any]:
    """What one process fetched from the hub, each time into a folder of its own in `work`."""
    process = start(["-c", MANY, *TRAIN], environment(server.url, work / "hf"), work)
    printed, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    assert complaints == ""
    return json.loads(printed)


def expected(shards: dict[str, bytes], train: list[str], revision: str = NEWEST) -> dict[str, Any]:
    entries = {
        name: {"file": name, "tokens": TOKENS, "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in shards.items()
    }
    return {
        "revision": revision,
        "train": [entries[name] for name in train],
        "val": [entries[VAL]],
        "there": [*train, VAL],
    }


def test_what_arrives_is_what_the_hub_has(answers: dict[str, Any], shards: dict[str, bytes], work: Path) -> None:
    assert answers["all"] == expected(shards, TRAIN)
    assert {path.name: path.read_bytes() for path in (work / "all").iterdir()} == shards


def test_max_tokens_chooses_the_first_train_shards_that_hold_them(
    answers: dict[str, Any], shards: dict[str, bytes]
) -> None:
    assert answers["of 2"] == expected(shards, TRAIN[:2])
    assert answers["of 1"] == expected(shards, TRAIN[:1])


def test_a_revision_is_fetched_and_said_as_the_commit_it_is(answers: dict[str, Any], shards: dict[str, bytes]) -> None:
    assert answers["tag"] == expected(shards, TRAIN[:1], revision=TAGGED)


def test_shards_are_not_fetched_twice(answers: dict[str, Any], shards: dict[str, bytes], server: Hub) -> None:
    assert answers["again"] == answers["first"] == expected(shards, TRAIN)
    for name, data in shards.items():
        assert sum(read.n_bytes for read in server.reads(f"{name}") if "others/again" in read.path) == len(data)


def test_cut_connections_a_hub_in_trouble_and_wrong_bytes_change_nothing(
    answers: dict[str, Any], shards: dict[str, bytes]
) -> None:
    assert answers["trouble"] == answers["wrong once"] == answers["back"] == expected(shards, TRAIN)


def test_a_hub_that_stays_away_ends_in_a_line_that_says_how_to_go_on(answers: dict[str, Any]) -> None:
    assert answers["away"].startswith(f"cannot read {TRAIN[0]} from the hub: Server error '500")
    assert answers["away"].endswith("give the same command again, it goes on where it was")


def test_nothing_of_a_repository_lands_outside_of_the_folder(answers: dict[str, Any]) -> None:
    assert answers["folders"]["there"] == ["a_train.bin", "a_val.bin", "b_train.bin"]
    assert answers["doubled"].startswith("data.path: there are several train.bin,")
    assert ready_made.Offer("hf://datasets/a/b@c/../../train.bin", 0).name == "train.bin"


def test_wrong_bytes_that_stay_wrong_are_an_error_and_do_not_stay(answers: dict[str, Any], work: Path) -> None:
    assert f"{TRAIN[0]} arrived twice with other bytes than the hub lists" in answers["wrong"]
    assert not (work / "wrong" / TRAIN[0]).exists()


def test_mistakes_are_one_line_that_names_them(answers: dict[str, Any]) -> None:
    starts = {
        "no val": f"data.path: hub:others/no-val has no *val*.bin, it has: README.md, {TRAIN[0]};",
        "vocabulary": f"vocabulary/{TRAIN[0]} has token id 421 at offset 0,",
        "short": f"short/{TRAIN[0]} holds {1024 + 2 * TOKENS - 2} bytes where 1024 + {TOKENS} × 2 belong;",
        "unknown": "data.path: the hub shows no dataset repository 'nobody/nothing';",
        "no name": "data.path: the hub shows no dataset repository 'a/b/c';",
        "unknown revision": "data.revision: kjj0/fineweb10B-gpt2 has no 'v2';",
    }
    for name, begins in starts.items():
        assert answers[name].startswith(begins)
        assert "\n" not in answers[name]


def test_after_a_kill_the_same_command_goes_on_where_it_was(
    server: Hub, shards: dict[str, bytes], tmp_path: Path
) -> None:
    script = FETCH + "print(json.dumps(fetch('fetched', 'others/cut')))"
    variables = environment(server.url, tmp_path / "hf")
    server.hanging.clear()
    server.faults[TRAIN[0]] = ["fine", "fine", "fine", "hang"]
    killed = start(["-c", script], variables, tmp_path)
    assert server.hanging.wait(60)
    killed.kill()
    killed.communicate()
    assert (tmp_path / "fetched" / f"{TRAIN[0]}.part").stat().st_size == 3 * CHUNK_BYTES

    ended = start(["-c", script], variables, tmp_path)
    printed, complaints = ended.communicate(timeout=60)
    assert ended.returncode == 0, complaints
    assert json.loads(printed) == expected(shards, TRAIN[:1])
    assert (tmp_path / "fetched" / TRAIN[0]).read_bytes() == shards[TRAIN[0]]
    reads = [read for read in server.reads(TRAIN[0]) if "others/cut" in read.path]
    assert sum(read.n_bytes for read in reads) == len(shards[TRAIN[0]])


def test_no_hub_is_one_line_within_seconds(tmp_path: Path) -> None:
    ended = start(["-c", FETCH + "print(mistake('none'))"], environment("http://127.0.0.1:1", tmp_path), tmp_path)
    printed, complaints = ended.communicate(timeout=10)
    assert complaints == ""
    assert printed.startswith("cannot reach kjj0/fineweb10B-gpt2 on the hub: ")
    assert printed.count("\n") == 1


def test_the_command_prepares_them_for_training(server: Hub, shards: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "shards.yaml").write_text(
        "data: {source: shards, path: 'hub:kjj0/fineweb10B-gpt2', tokenizer: bytes, max_tokens: 15000, dir: out}"
    )
    ended = start(["-m", "dist_train", "prepare", "shards.yaml"], environment(server.url, tmp_path / "hf"), tmp_path)
    _, complaints = ended.communicate(timeout=60)
    assert ended.returncode == 0, complaints
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["revision"] == NEWEST
    assert [entry["file"] for entry in manifest["train"]["shards"]] == TRAIN[:2]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.bin")} == {
        name: shards[name] for name in (*TRAIN[:2], VAL)
    }
    settings = load_settings(tmp_path / "shards.yaml", [f"--data.dir={tmp_path / 'out'}"]).data
    assert len(open_tokens(settings).train) == 2 * TOKENS


# ---- from a local folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path, shards: dict[str, bytes]) -> Path:
    folder = tmp_path / "made"
    folder.mkdir()
    for name, data in shards.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def take(tmp_path: Path) -> Callable[..., ready_made.Fetched]:
    def take_from(path: Path, **changes: Any) -> ready_made.Fetched:
        settings = {"tokenizer": "bytes", "dir": tmp_path / "unused", **changes}
        (tmp_path / "taken").mkdir(exist_ok=True)
        return fetch_shards(DataSettings(source="shards", path=str(path), **settings), tmp_path / "taken")

    return take_from


def test_local_shards_are_linked_wherever_the_command_runs(
    made: Path, take: Callable[..., ready_made.Fetched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fetched = take(Path("made"))
    assert fetched.revision is None
    assert [shard.file for shard in (*fetched.train, *fetched.val)] == [*TRAIN, VAL]
    for entry in (*fetched.train, *fetched.val):
        link = tmp_path / "taken" / entry.file
        assert link.samefile(made / entry.file)
        assert not link.is_symlink()
        assert entry.sha256 == hashlib.sha256(link.read_bytes()).hexdigest()
        assert entry.tokens == TOKENS
    assert take(Path("made")) == fetched  # as after an interruption


def test_a_local_folder_may_hold_links_to_files_of_other_names(
    made: Path, take: Callable[..., ready_made.Fetched], tmp_path: Path
) -> None:
    for name in (*TRAIN, VAL):
        (made / name).rename(tmp_path / f"blob{name[-5]}{name[8]}")
        (made / name).symlink_to(tmp_path / f"blob{name[-5]}{name[8]}")
    assert [shard.file for shard in take(made).train] == TRAIN
    assert not any((tmp_path / "taken" / name).is_symlink() for name in (*TRAIN, VAL))


def test_local_shards_are_copied_where_there_are_no_hard_links(
    made: Path, take: Callable[..., ready_made.Fetched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, path: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert take(made) == take(made)
    for name in (*TRAIN, VAL):
        assert (tmp_path / "taken" / name).read_bytes() == (made / name).read_bytes()
        assert not (tmp_path / "taken" / name).samefile(made / name)


def test_local_shards_that_are_wrong_leave_nothing_behind(made: Path, tmp_path: Path) -> None:
    settings = DataSettings(source="shards", path=str(made), tokenizer="bytes", dir=tmp_path / "data")
    good = (made / VAL).read_bytes()
    (made / VAL).write_bytes(good[:-2])
    with pytest.raises(UserError, match=VAL):
        prepare(settings)
    assert {path.name for path in tmp_path.iterdir()} == {"made"}
    (made / VAL).write_bytes(good)
    prepare(settings)
    assert len(open_tokens(settings).train) == 3 * TOKENS


def test_local_shards_are_bounded_and_checked_as_the_hubs_are(
    made: Path, take: Callable[..., ready_made.Fetched], tmp_path: Path
) -> None:
    assert len(take(made, max_tokens=2 * TOKENS).train) == 2
    (made / TRAIN[2]).write_bytes(bytes(5000))
    with pytest.raises(UserError, match=rf"{TRAIN[2]} has no llm\.c header"):
        take(made)
    (made / VAL).unlink()
    with pytest.raises(UserError, match=r"has no \*val\*\.bin, it has: fineweb_train_000001\.bin, "):
        take(made)
    with pytest.raises(UserError, match=r"data\.path: there is no folder"):
        take(tmp_path / "nowhere")


def test_a_disk_that_is_too_small_is_said_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = type("Usage", (), {"free": 2_000_000_000})
    monkeypatch.setattr(ready_made.shutil, "disk_usage", lambda folder: disk)
    offers = [ready_made.Offer("hf://datasets/a/b@c/train_0.bin", 1_500_000_000)] * 2
    with pytest.raises(StorageError, match=r"need 3\.0 GB more where .* has 2\.0 GB free"):
        ready_made._require_space(offers, tmp_path)
