"""Shards and manifests damaged in every way: the tokens that were written, or one line and status 2."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.data.batches import read_windows
from dist_train.data.manifest import open_tokens
from dist_train.sections import DataSettings
from tests.conftest import ROOT
from tests.data.shard_files import llm_c_shard, write_llm_c
from tests.faults.conftest import cases
from tests.faults.launched import wait_until
from tests.faults.tokens import load, prepare_book

FUZZED = "fuzzed shards: loaded, or status 2 in one line"
MOST_MILLISECONDS = 5000
N_VOCAB = 257

Figure = Callable[..., None]


@st.composite
def damages(draw: st.DrawFn, content: bytes) -> bytes:
    """Return `content` cut, longer, with other bytes or another number in its header, or something else altogether."""
    kind = draw(st.sampled_from(["cut", "longer", "other bytes", "other number", "anything"]))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if kind == "longer":
        return content + draw(st.binary(min_size=1, max_size=9))
    if kind == "anything":
        return draw(st.binary(max_size=1100))
    changed = bytearray(content)
    if kind == "other bytes":
        for _ in range(draw(st.integers(1, 3))):
            changed[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    else:
        at = draw(st.integers(0, min(255, len(content) // 4 - 1)) | st.integers(0, min(2, len(content) // 4 - 1)))
        changed[4 * at : 4 * at + 4] = struct.pack("<i", draw(st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 40)))
    return bytes(changed)


TOKENS = list(range(30))
# What a file of shards may begin as: of llm.c in both widths, and nanoGPT's.
SHARDS = {
    "uint16": llm_c_shard(TOKENS),
    "uint32": llm_c_shard(TOKENS, 20240801, 7, "I"),
    "headerless": struct.pack("<30H", *TOKENS),
}


def test_shards_of_others_are_read_as_the_bytes_they_are_or_refused(tmp_path: Path, figure: Figure) -> None:
    n_cases = cases(20, 400)
    figure(FUZZED, n_cases)

    @settings(max_examples=n_cases, deadline=MOST_MILLISECONDS)
    @given(content=st.sampled_from(list(SHARDS.values())).flatmap(damages), headerless=st.booleans())
    def holds(content: bytes, headerless: bool) -> None:
        for name in ("train.bin", "val.bin"):
            (tmp_path / name).write_bytes(content)
        (tmp_path / ".verified.json").unlink(missing_ok=True)  # the clock of old kernels ticks more slowly than this
        shard_format = "headerless" if headerless else "llm.c"
        found = load(DataSettings(dir=tmp_path, shard_format=shard_format))  # type: ignore[arg-type]
        begins = list(struct.unpack("<iii", content[:12].ljust(12, b"\0")))
        dtypes = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
        if headerless:
            is_good = len(content) % 2 == 0 and len(content) > 0 and tuple(begins[:2]) not in dtypes
            expected = np.frombuffer(content, "<u2") if is_good else None
        else:
            dtype = dtypes.get((begins[0], begins[1]))
            is_good = dtype is not None and begins[2] > 0 and len(content) == 1024 + begins[2] * int(dtype[2])
            expected = np.frombuffer(content[1024:], dtype) if is_good else None
        assert found == (None if expected is None else (expected.tolist(), expected.tolist()))

    holds()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    """Settings and folder of prepared data that nobody has touched."""
    return prepare_book(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def copied(prepared: DataSettings, tmp_path: Path) -> DataSettings:
    """A copy of prepared data to do harm to."""
    shutil.copytree(prepared.dir, tmp_path / "data")
    return prepared.model_copy(update={"dir": tmp_path / "data"})


def test_prepared_shards_are_the_tokens_that_were_written_or_refused(
    prepared: DataSettings, copied: DataSettings, figure: Figure
) -> None:
    n_cases = cases(12, 250)
    figure(FUZZED, n_cases)
    good = {path.name: path.read_bytes() for path in prepared.dir.glob("*.bin")}

    @settings(max_examples=n_cases, deadline=MOST_MILLISECONDS)
    @given(name=st.sampled_from(sorted(good)), data=st.data())
    def holds(name: str, data: st.DataObject) -> None:
        content = data.draw(damages(good[name]))
        (copied.dir / name).write_bytes(content)
        (copied.dir / ".verified.json").unlink(missing_ok=True)
        is_same = content == good[name]
        assert load(copied) == (load(prepared) if is_same else None)
        (copied.dir / name).write_bytes(good[name])

    holds()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\x1b[2J\n"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def manifests(draw: st.DrawFn, good: str) -> bytes:
    """Return a manifest of which one value is another or missing, or whose text is damaged."""
    if draw(st.booleans()):
        return draw(damages(good.encode()))
    values = json.loads(good)
    holder, key = draw(st.sampled_from(list(places(values))))
    if draw(st.booleans()):
        holder[key] = draw(JSON)
    else:
        del holder[key]
    return json.dumps(values).encode()


def places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every dictionary or list inside of `values` with each of its keys or positions."""
    keys = list(values) if isinstance(values, dict) else list(range(len(values))) if isinstance(values, list) else []
    for key in keys:
        yield values, key
        yield from places(values[key])


def test_with_any_manifest_the_tokens_are_those_that_were_written_or_refused(
    prepared: DataSettings, copied: DataSettings, figure: Figure
) -> None:
    n_cases = cases(15, 300)
    figure(FUZZED, n_cases)
    good, written = (prepared.dir / "manifest.json").read_text(), load(prepared)

    @settings(max_examples=n_cases, deadline=MOST_MILLISECONDS)
    @given(content=manifests(good))
    def holds(content: bytes) -> None:
        (copied.dir / "manifest.json").write_bytes(content)
        assert load(copied) in (None, written)

    holds()


def test_shards_that_are_as_they_should_be_are_accepted(tmp_path: Path, figure: Figure) -> None:
    n_cases = cases(3, 50)
    figure(FUZZED, n_cases)
    letters = {"uint16": "H", "uint32": "I", "headerless": "H"}

    @settings(max_examples=n_cases, deadline=MOST_MILLISECONDS)
    @given(
        kind=st.sampled_from(list(letters)),
        train=st.lists(st.integers(0, N_VOCAB - 1), min_size=9, max_size=60),
        val=st.lists(st.integers(0, N_VOCAB - 1), min_size=1, max_size=9),
    )
    def holds(kind: str, train: list[int], val: list[int]) -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        for name, tokens in (("train.bin", train), ("val.bin", val)):
            if kind == "headerless":
                (tmp_path / name).write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))
            else:
                write_llm_c(tmp_path / name, tokens, wide=kind == "uint32")
        found = DataSettings(dir=tmp_path, shard_format="headerless" if kind == "headerless" else "llm.c")
        assert load(found) == (train, val)
        windows = read_windows(open_tokens(found).train, np.array([0]), len(train) - 1, N_VOCAB)
        assert windows[0].tolist() == train

    holds()


# ---- during a run ----------------------------------------------------------------------------------------------------


def test_a_run_whose_shard_is_cut_short_ends_in_status_2_and_one_line(
    copied: DataSettings, tiny_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    of_data = {"source": "files", "path": copied.path, "dir": copied.dir, "shard_tokens": copied.shard_tokens}
    changes = {f"data.{name}": value for name, value in of_data.items()}
    endless = {"train.max_iters": 10**6, "log.interval": 1, "eval.interval": 10**6, "checkpoint.interval": 10**6}
    command = [sys.executable, "-m", "dist_train", "train", *tiny_arguments({**changes, **endless})]
    lines, shard = tmp_path / "run" / "metrics.jsonl", copied.dir / "train_000000.bin"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        try:
            wait_until(lambda: run.poll() is not None or (lines.exists() and '"train"' in lines.read_text()))
            os.truncate(shard, 1024)
            _, complaints = run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 2
    errors = [line for line in complaints.splitlines() if line.startswith("error: ")]
    assert errors == complaints.splitlines()[-1:]
    assert f"{shard} was changed during the run, it now holds 1024 bytes instead of 1324; " in errors[0]
