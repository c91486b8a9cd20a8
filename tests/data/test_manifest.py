"""Folders of shards opened for training: prepared ones, and those that other tools wrote."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_train.config import DataSettings
from dist_train.data.manifest import Manifest, is_prepared, open_tokens
from dist_train.data.prepare import prepare
from dist_train.data.shards import TokenStream
from dist_train.errors import UserError

MakeSettings = Callable[..., DataSettings]


@pytest.fixture
def settings(tmp_path: Path, data_settings: MakeSettings) -> DataSettings:
    """Prepared data of a small book, in several shards."""
    (tmp_path / "book.txt").write_text("a book of letters " * 100)
    settings = data_settings(path=tmp_path / "book.txt", shard_tokens=700)
    prepare(settings)
    return settings


def write_llm_c(path: Path, tokens: list[int], wide: bool = False) -> None:
    magic, version, letter = (20240801, 7, "I") if wide else (20240520, 1, "H")
    path.write_bytes(struct.pack(f"<256i{len(tokens)}{letter}", magic, version, len(tokens), *[0] * 253, *tokens))


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


@pytest.mark.parametrize("key", ["tokenizer", "source"])
def test_a_manifest_that_leaves_something_out_is_no_match(settings: DataSettings, key: str) -> None:
    values = json.loads((settings.dir / "manifest.json").read_text())
    (settings.dir / "manifest.json").write_text(json.dumps({**values, key: {}}))
    with pytest.raises(UserError, match=r"was prepared with .*=None"):
        open_tokens(settings)


def test_a_shard_that_is_missing_or_another_is_noticed(settings: DataSettings) -> None:
    write_llm_c(settings.dir / "train_000000.bin", [1, 2, 3])
    with pytest.raises(UserError, match=r"not those of its manifest\.json"):
        open_tokens(settings)
    (settings.dir / "train_000000.bin").unlink()
    with pytest.raises(UserError, match=r"train_000000\.bin"):
        open_tokens(settings)


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


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    write_llm_c(tmp_path / "train.bin", [1, 2])
    with pytest.raises(UserError, match="no val shards"):
        open_tokens(DataSettings(dir=tmp_path))
    with pytest.raises(UserError, match="no train shards"):
        open_tokens(DataSettings(dir=tmp_path / "nowhere"))
    assert not is_prepared(tmp_path / "nowhere")
