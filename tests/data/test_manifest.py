"""Folders of shards opened for training: prepared ones, and those that other tools wrote."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train.data.manifest import Manifest, is_prepared, open_tokens
from dist_train.data.prepare import prepare
from dist_train.data.shards import TokenStream
from dist_train.errors import UserError
from dist_train.sections import DataSettings
from tests.data.shard_files import wait_for_clock_tick, write_llm_c

MakeSettings = Callable[..., DataSettings]


@pytest.fixture
def settings(tmp_path: Path, data_settings: MakeSettings) -> DataSettings:
    """Prepared data of a small book, in several shards."""
    (tmp_path / "book.txt").write_text("a book of letters " * 100)
    settings = data_settings(path=tmp_path / "book.txt", shard_tokens=700)
    prepare(settings)
    return settings


def rewrite(settings: DataSettings, **changes: Any) -> None:
    """Write other values into the manifest."""
    path = settings.dir / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def all_tokens(stream: TokenStream) -> list[int]:
    return stream.windows(np.array([0]), len(stream))[0].tolist()


# ---- prepared --------------------------------------------------------------------------------------------------------


def test_prepared_data_opens_as_one_stream_per_split(settings: DataSettings) -> None:
    data = open_tokens(settings)
    text = b"a book of letters " * 100
    cut = 1801 - 180
    assert all_tokens(data.train) == [256, *text[: cut - 1]]
    assert all_tokens(data.val) == [256, *text[cut - 1 :]]


def test_a_manifest_reads_back_as_it_was_written(settings: DataSettings, tmp_path: Path) -> None:
    manifest = Manifest.read(settings.dir)
    assert manifest is not None
    assert len(manifest.train.shards) == 3
    (tmp_path / "copy").mkdir()
    manifest.write(tmp_path / "copy")
    assert Manifest.read(tmp_path / "copy") == manifest


def test_the_fingerprint_tells_other_data_apart(
    settings: DataSettings, tmp_path: Path, data_settings: MakeSettings
) -> None:
    (tmp_path / "book.txt").write_text("a book of numbers " * 100)  # as long as the other
    other = settings.model_copy(update={"dir": tmp_path / "other"})
    prepare(other)
    assert open_tokens(settings).fingerprint == open_tokens(settings).fingerprint != open_tokens(other).fingerprint


def test_the_fingerprint_of_foreign_shards_is_their_content(tmp_path: Path) -> None:
    tokens = list(range(60_000)) * 4  # more than any look at both ends would see
    write_llm_c(tmp_path / "train.bin", tokens)
    write_llm_c(tmp_path / "val.bin", [1])
    before = open_tokens(DataSettings(dir=tmp_path)).fingerprint
    tokens[120_000] += 1
    wait_for_clock_tick(tmp_path)
    write_llm_c(tmp_path / "train.bin", tokens)
    changed = open_tokens(DataSettings(dir=tmp_path)).fingerprint
    tokens[120_000] -= 1
    wait_for_clock_tick(tmp_path)
    write_llm_c(tmp_path / "train.bin", tokens)
    assert before == open_tokens(DataSettings(dir=tmp_path)).fingerprint != changed


def test_prepared_shards_are_read_as_prepare_writes_them(settings: DataSettings) -> None:
    headerless = settings.model_copy(update={"shard_format": "headerless"})
    assert all_tokens(open_tokens(headerless).val) == all_tokens(open_tokens(settings).val)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"train": 1}', '{"tokenizer": 1, "source": {}}', '{"train": {"tokens": 1}}']
)
def test_a_damaged_manifest_is_named(settings: DataSettings, content: str) -> None:
    (settings.dir / "manifest.json").write_text(content)
    for use in (prepare, open_tokens):
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            use(settings)


def test_a_manifest_that_leaves_something_out_is_no_match(settings: DataSettings) -> None:
    rewrite(settings, source={})
    with pytest.raises(UserError, match=r"was prepared with .*=None"):
        open_tokens(settings)


def test_a_long_value_of_a_manifest_is_shown_in_part(settings: DataSettings) -> None:
    rewrite(settings, source={"source": "x\n" * 10**6})
    with pytest.raises(UserError, match=r"was prepared with source='x\\nx") as caught:
        open_tokens(settings)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


BYTES = {"name": "bytes", "fingerprint": "", "n_vocab": 257, "end_of_text": 256}
GOOD = {"file": "a.bin", "tokens": 5, "sha256": "0" * 64}
INCONSISTENT = {
    "tokens that do not add up": ({"train": {"tokens": 6, "documents": 1, "shards": [GOOD]}}, "train has 6 tokens and"),
    "a shard of both splits": (
        {split: {"tokens": 5, "documents": 1, "shards": [GOOD]} for split in ("train", "val")},
        r"a\.bin is named twice",
    ),
    "a count that is no integer": ({"train": {"tokens": 5.0, "documents": 1, "shards": [GOOD]}}, r"train\.tokens: "),
    "a count that is true": ({"train": {"tokens": True, "documents": 1, "shards": [GOOD]}}, r"train\.tokens: "),
    "a shard of no tokens": (
        {"train": {"tokens": 0, "documents": 1, "shards": [{**GOOD, "tokens": 0}]}},
        r"train\.shards\.0\.tokens: ",
    ),
    "a hash that is none": (
        {"train": {"tokens": 5, "documents": 1, "shards": [{**GOOD, "sha256": "1\n2"}]}},
        r"train\.shards\.0\.sha256: ",
    ),
    "a tokenizer without ids": ({"tokenizer": {"name": "bytes"}}, "tokenizer has no n_vocab"),
    "more ids than memory": ({"tokenizer": {**BYTES, "n_vocab": 10**15}}, "tokenizer has no n_vocab"),
    "an end outside of the vocabulary": ({"tokenizer": {**BYTES, "end_of_text": 257}}, "tokenizer has no n_vocab"),
}


@pytest.mark.parametrize(("changes", "reason"), INCONSISTENT.values(), ids=INCONSISTENT)
def test_a_manifest_that_cannot_be_true_is_damaged(
    settings: DataSettings, changes: dict[str, Any], reason: str
) -> None:
    rewrite(settings, **changes)
    with pytest.raises(UserError, match=rf"manifest\.json is damaged \({reason}") as caught:
        open_tokens(settings)
    assert "\n" not in str(caught.value)


def test_a_manifest_may_say_more_than_we_know(settings: DataSettings) -> None:
    train = json.loads((settings.dir / "manifest.json").read_text())["train"]
    before = open_tokens(settings).fingerprint
    rewrite(settings, later="version", train={**train, "shards": [{**shard, "new": 1} for shard in train["shards"]]})
    assert open_tokens(settings).fingerprint == before


@pytest.mark.parametrize("change", ["a token", "the header", "its size", "another count"])
def test_a_shard_that_is_not_the_manifests_is_named(settings: DataSettings, change: str) -> None:
    path = settings.dir / "train_000001.bin"
    data = bytearray(path.read_bytes())
    wait_for_clock_tick(settings.dir)
    if change == "another count":
        write_llm_c(path, [1, 2, 3])
    elif change == "its size":
        os.truncate(path, len(data) - 2)
    else:
        data[{"a token": 2000, "the header": 1000}[change]] ^= 1
        path.write_bytes(data)
    with pytest.raises(UserError, match=r"train_000001\.bin (is not the shard that manifest\.json|holds \d+ bytes)"):
        open_tokens(settings)


def test_a_shard_that_is_missing_is_named(settings: DataSettings) -> None:
    (settings.dir / "train_000000.bin").unlink()
    with pytest.raises(UserError, match=r"train_000000\.bin"):
        open_tokens(settings)


def test_data_of_an_earlier_version_keeps_its_fingerprint_and_its_checkpoints(settings: DataSettings) -> None:
    (settings.dir / ".verified.json").unlink()  # which that did not write
    manifest = json.loads((settings.dir / "manifest.json").read_text())
    identity = json.dumps([*manifest["train"]["shards"], *manifest["val"]["shards"]])
    for _ in range(2):
        assert open_tokens(settings).fingerprint == hashlib.sha256(identity.encode()).hexdigest()
    assert (settings.dir / ".verified.json").exists()


# ---- written by other tools ------------------------------------------------------------------------------------------


def test_folders_of_llm_c_open_as_they_are(tmp_path: Path) -> None:
    write_llm_c(tmp_path / "fineweb_train_000002.bin", [4, 5])
    write_llm_c(tmp_path / "fineweb_train_000001.bin", [1, 2, 3])
    write_llm_c(tmp_path / "fineweb_val_000000.bin", [50256, 9])
    assert is_prepared(tmp_path)
    data = open_tokens(DataSettings(dir=tmp_path))
    assert all_tokens(data.train) == [1, 2, 3, 4, 5]
    assert all_tokens(data.val) == [50256, 9]


def test_folders_of_nanogpt_open_with_shard_format_headerless(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(struct.pack("<4H", 1, 2, 3, 50256))
    (tmp_path / "val.bin").write_bytes(struct.pack("<2H", 7, 50256))
    data = open_tokens(DataSettings(dir=tmp_path, shard_format="headerless"))
    assert all_tokens(data.train) == [1, 2, 3, 50256]
    assert all_tokens(data.val) == [7, 50256]
    with pytest.raises(UserError, match=r"train\.bin has no llm\.c header.*headerless"):
        open_tokens(DataSettings(dir=tmp_path))


def test_llm_cs_header_is_never_read_as_tokens(tmp_path: Path) -> None:
    write_llm_c(tmp_path / "train.bin", [1, 2])
    write_llm_c(tmp_path / "val.bin", [3, 4])
    with pytest.raises(UserError, match=r"train\.bin has llm\.c's header"):
        open_tokens(DataSettings(dir=tmp_path, shard_format="headerless"))


def test_shards_of_two_widths_are_not_mixed(tmp_path: Path) -> None:
    write_llm_c(tmp_path / "a_train.bin", [1, 2])
    write_llm_c(tmp_path / "b_train.bin", [1, 2], wide=True)
    write_llm_c(tmp_path / "a_val.bin", [3, 4])
    with pytest.raises(UserError, match="uint16 and uint32"):
        open_tokens(DataSettings(dir=tmp_path))


def test_a_shard_of_both_splits_is_refused(tmp_path: Path) -> None:
    for name in ("interval_train.bin", "val.bin"):
        write_llm_c(tmp_path / name, [1, 2])
    with pytest.raises(UserError, match=r"interval_train\.bin is named for both splits; rename it"):
        open_tokens(DataSettings(dir=tmp_path))


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    write_llm_c(tmp_path / "train.bin", [1, 2])
    with pytest.raises(UserError, match="no val shards"):
        open_tokens(DataSettings(dir=tmp_path))
    with pytest.raises(UserError, match="no train shards"):
        open_tokens(DataSettings(dir=tmp_path / "nowhere"))
    assert not is_prepared(tmp_path / "nowhere")
