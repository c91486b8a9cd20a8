"""The bytes of token shards, and several shards read as one sequence."""

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.data.shards import Shard, ShardWriter, TokenStream, map_shard, token_dtype
from dist_train.errors import UserError

UINT16, UINT32 = np.dtype("<u2"), np.dtype("<u4")


def write(folder: Path, tokens: np.ndarray, dtype: np.dtype = UINT16, shard_tokens: int = 1000) -> list[Shard]:
    with ShardWriter(folder, "train", dtype, shard_tokens) as writer:
        writer.append(tokens)
    return writer.shards


def llm_c_shard(tokens: list[int], magic: int = 20240520, version: int = 1, letter: str = "H") -> bytes:
    """A shard as llm.c and modded-nanogpt write it, byte by byte."""
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}{letter}", *tokens)


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "magic", "version", "letter"), [(UINT16, 20240520, 1, "H"), (UINT32, 20240801, 7, "I")]
)
def test_a_written_shard_has_llm_cs_bytes(
    tmp_path: Path, dtype: np.dtype, magic: int, version: int, letter: str
) -> None:
    tokens = [50256, 0, 65535, 17, 1]
    write(tmp_path, np.array(tokens, dtype=np.uint32), dtype)
    data = (tmp_path / "train_000000.bin").read_bytes()
    assert len(data) == 1024 + dtype.itemsize * 5
    assert struct.unpack("<256i", data[:1024]) == (magic, version, 5, *[0] * 253)
    assert struct.unpack(f"<5{letter}", data[1024:]) == tuple(tokens)
    assert data == llm_c_shard(tokens, magic, version, letter)


@given(tokens=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=60), shard_tokens=st.integers(1, 25))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[int], shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    written = write(folder, np.array(tokens, dtype=np.uint32), UINT16, shard_tokens)
    mapped = [map_shard(folder / shard.file) for shard in written]
    assert np.concatenate(mapped).tolist() == tokens
    assert [len(shard) for shard in mapped[:-1]] == [shard_tokens] * (len(mapped) - 1)
    assert all(shard.dtype == UINT16 for shard in mapped)


def test_shards_are_split_wherever_one_is_full_and_tell_their_hashes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "val", UINT16, 10) as writer:
        for part in np.split(np.arange(25, dtype=np.uint32), [1, 9, 12]):  # documents end anywhere
            writer.append(part)
    assert [(shard.file, shard.tokens) for shard in writer.shards] == [
        ("val_000000.bin", 10),
        ("val_000001.bin", 10),
        ("val_000002.bin", 5),
    ]
    for shard in writer.shards:
        assert shard.sha256 == hashlib.sha256((tmp_path / shard.file).read_bytes()).hexdigest()


def test_no_empty_shard_follows_one_that_is_just_full(tmp_path: Path) -> None:
    assert len(write(tmp_path, np.arange(20, dtype=np.uint32), shard_tokens=10)) == 2


def test_a_header_never_counts_more_than_its_int32_can(tmp_path: Path) -> None:
    assert ShardWriter(tmp_path, "train", UINT16, 10**12).shard_tokens == 2**31 - 1


def test_tokens_are_as_wide_as_the_vocabulary_needs() -> None:
    assert [token_dtype(n_vocab) for n_vocab in (257, 50257, 65536)] == [UINT16] * 3
    assert token_dtype(65537) == UINT32


# ---- mapping ---------------------------------------------------------------------------------------------------------


def test_shards_of_other_tools_load_as_they_are(tmp_path: Path) -> None:
    tokens = [50256, 1, 2, 3, 65535]
    (tmp_path / "fineweb_train_000001.bin").write_bytes(llm_c_shard(tokens))
    (tmp_path / "llama.bin").write_bytes(llm_c_shard([128000, 7], 20240801, 7, "I"))
    (tmp_path / "train.bin").write_bytes(struct.pack("<5H", *tokens))
    assert map_shard(tmp_path / "fineweb_train_000001.bin").tolist() == tokens
    assert map_shard(tmp_path / "llama.bin").tolist() == [128000, 7]
    assert map_shard(tmp_path / "train.bin", headerless=True).tolist() == tokens


def test_the_mapping_cannot_be_written_to(tmp_path: Path) -> None:
    write(tmp_path, np.arange(5, dtype=np.uint32))
    tokens = map_shard(tmp_path / "train_000000.bin")
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


GOOD = llm_c_shard([1, 2, 3])
DAMAGED = {
    "empty": b"",
    "shorter than a header": GOOD[:1000],
    "a token short": GOOD[:-2],
    "half a token short": GOOD[:-1],
    "a token too long": GOOD + b"\0\0",
    "no tokens": llm_c_shard([]),
    "negative count": struct.pack("<256i", 20240520, 1, -1, *[0] * 253),
    "wrong magic": llm_c_shard([1, 2, 3], magic=20240521),
    "wrong version": llm_c_shard([1, 2, 3], version=2),
    "width of the other magic": llm_c_shard([1, 2, 3], 20240801, 7, "H"),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "shard.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"shard\.bin"):
        map_shard(tmp_path / "shard.bin")


@pytest.mark.parametrize("data", [b"", b"\1\2\3", GOOD], ids=["empty", "odd", "with a header"])
def test_a_headerless_shard_has_a_token_in_every_two_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "shard.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"shard\.bin"):
        map_shard(tmp_path / "shard.bin", headerless=True)


@pytest.mark.parametrize("name", ["missing.bin", "."])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=tmp_path.name):
        map_shard(tmp_path / name)


def test_more_shards_than_the_system_allows_open_files_is_said_so(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    script = """
import resource, sys, pathlib
from dist_train.data.shards import map_shard
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
maps = [map_shard(pathlib.Path(sys.argv[1])) for _ in range(40)]
"""
    (tmp_path / "shard.bin").write_bytes(GOOD)
    command = [sys.executable, "-c", script, str(tmp_path / "shard.bin")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "UserError: cannot read the shard" in ended.stderr
    assert "ulimit -n" in ended.stderr


# ---- several shards as one sequence ----------------------------------------------------------------------------------


@st.composite
def windows_of_shards(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    length = draw(st.integers(1, sum(lengths)))
    starts = draw(st.lists(st.integers(0, sum(lengths) - length), max_size=6))
    return lengths, starts, length


@given(case=windows_of_shards(), dtype=st.sampled_from([UINT16, UINT32]))
def test_windows_across_shards_are_slices_of_the_concatenation(
    case: tuple[list[int], list[int], int], dtype: np.dtype
) -> None:
    lengths, starts, length = case
    tokens = (np.arange(sum(lengths)) * 7919 % 65521).astype(dtype)
    stream = TokenStream(np.split(tokens, np.cumsum(lengths)[:-1]))
    windows = stream.windows(np.array(starts, dtype=np.int64), length)
    assert len(stream) == len(tokens)
    assert windows.dtype == np.int64
    assert windows.shape == (len(starts), length)
    assert all((row == tokens[start : start + length]).all() for row, start in zip(windows, starts, strict=True))


def test_a_window_goes_from_file_to_file_to_file(tmp_path: Path) -> None:
    tokens = np.arange(1000, 1025, dtype=np.uint32)
    stream = TokenStream([map_shard(tmp_path / shard.file) for shard in write(tmp_path, tokens, shard_tokens=4)])
    assert stream.windows(np.array([3, 0]), 22).tolist() == [tokens[3:25].tolist(), tokens[:22].tolist()]


def test_a_window_past_the_end_is_an_error_and_not_other_tokens() -> None:
    stream = TokenStream([np.arange(10, dtype=UINT16), np.arange(10, dtype=UINT16)])
    with pytest.raises(IndexError):
        stream.windows(np.array([16]), 5)
