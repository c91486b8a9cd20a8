"""The bytes of token shards, and several shards read as one sequence."""

import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.data.manifest import open_tokens
from dist_train.data.shards import OpenShard, Shard, ShardWriter, TokenStream, token_dtype
from dist_train.errors import UserError
from dist_train.sections import DataSettings
from tests.data.shard_files import llm_c_shard, open_stream, wait_for_clock_tick, write_llm_c

UINT16, UINT32 = np.dtype("<u2"), np.dtype("<u4")


def write(folder: Path, tokens: np.ndarray, dtype: np.dtype = UINT16, shard_tokens: int = 1000) -> list[Shard]:
    with ShardWriter(folder, "train", dtype, shard_tokens) as writer:
        writer.append(tokens)
    return writer.shards


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
    mapped = [OpenShard(folder / shard.file).tokens for shard in written]
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
    assert OpenShard(tmp_path / "fineweb_train_000001.bin").tokens.tolist() == tokens
    assert OpenShard(tmp_path / "llama.bin").tokens.tolist() == [128000, 7]
    assert OpenShard(tmp_path / "train.bin", headerless=True).tokens.tolist() == tokens


def test_the_mapping_cannot_be_written_to(tmp_path: Path) -> None:
    write(tmp_path, np.arange(5, dtype=np.uint32))
    tokens = OpenShard(tmp_path / "train_000000.bin").tokens
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
        OpenShard(tmp_path / "shard.bin")


@pytest.mark.parametrize("data", [b"", b"\1\2\3", GOOD], ids=["empty", "odd", "with a header"])
def test_a_headerless_shard_has_a_token_in_every_two_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "shard.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"shard\.bin"):
        OpenShard(tmp_path / "shard.bin", headerless=True)


@pytest.mark.parametrize("name", ["missing.bin", "."])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=tmp_path.name):
        OpenShard(tmp_path / name)


def test_more_shards_than_the_system_allows_open_files_is_said_so(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    script = """
import resource, sys, pathlib
from dist_train.data.shards import OpenShard
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
maps = [OpenShard(pathlib.Path(sys.argv[1])) for _ in range(40)]
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
    tmp_path_factory: pytest.TempPathFactory, case: tuple[list[int], list[int], int], dtype: np.dtype
) -> None:
    lengths, starts, length = case
    tokens = (np.arange(sum(lengths)) * 7919 % 65521).astype(dtype)
    stream = open_stream(tmp_path_factory.mktemp("parts"), np.split(tokens, np.cumsum(lengths)[:-1]))
    windows = stream.windows(np.array(starts, dtype=np.int64), length)
    assert len(stream) == len(tokens)
    assert windows.dtype == np.int64
    assert windows.shape == (len(starts), length)
    assert all((row == tokens[start : start + length]).all() for row, start in zip(windows, starts, strict=True))


def test_a_window_goes_from_file_to_file_to_file(tmp_path: Path) -> None:
    tokens = np.arange(1000, 1025, dtype=np.uint32)
    stream = TokenStream([OpenShard(tmp_path / shard.file) for shard in write(tmp_path, tokens, shard_tokens=4)])
    assert stream.windows(np.array([3, 0]), 22).tolist() == [tokens[3:25].tolist(), tokens[:22].tolist()]


def test_a_window_past_the_end_is_an_error_and_not_other_tokens(tmp_path: Path) -> None:
    stream = open_stream(tmp_path, [np.arange(10, dtype=UINT16), np.arange(10, dtype=UINT16)])
    with pytest.raises(IndexError):
        stream.windows(np.array([16]), 5)


def test_a_token_is_located_in_its_file(tmp_path: Path) -> None:
    stream = open_stream(tmp_path, np.split(np.arange(20, dtype=UINT16), [3, 4]))
    places = [(path.name, offset) for path, offset in map(stream.locate, (0, 2, 3, 4, 19))]
    names = [f"part_{number:06d}.bin" for number in (0, 0, 1, 2, 2)]
    assert places == list(zip(names, (0, 2, 0, 0, 15), strict=True))


# ---- changed during the run ------------------------------------------------------------------------------------------


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    """Three shards of 4096 tokens, as `open_tokens` hands them out."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, name in enumerate(("a_train.bin", "b_train.bin", "c_train.bin")):
        write_llm_c(folder / name, list(range(number * 4096, (number + 1) * 4096)))
    write_llm_c(folder / "val.bin", [1, 2, 3])
    return open_tokens(DataSettings(dir=folder)).train


def first_tokens(stream: TokenStream, shard: int) -> list[int]:
    return stream.windows(np.array([shard * 4096]), 3)[0].tolist()


@pytest.mark.parametrize("size", [0, 1024, 1026, 1024 + 2 * 4095])
def test_a_shard_that_is_cut_short_during_the_run_is_named_and_kills_nothing(
    stream: TokenStream, tmp_path: Path, size: int
) -> None:
    path = tmp_path / "shards" / "b_train.bin"
    assert first_tokens(stream, 1) == [4096, 4097, 4098]
    os.truncate(path, size)
    for start in (4096, 4094):  # the second begins in the shard before it
        with pytest.raises(
            UserError, match=rf"b_train\.bin .* now holds {size} bytes instead of 9216; bring"
        ) as caught:
            stream.windows(np.array([start]), 5)
        assert "\n" not in str(caught.value)
    assert first_tokens(stream, 0) == [0, 1, 2]
    assert first_tokens(stream, 2) == [8192, 8193, 8194]


def test_a_shard_that_is_written_to_during_the_run_is_named_every_time(stream: TokenStream, tmp_path: Path) -> None:
    path = tmp_path / "shards" / "b_train.bin"
    times = path.stat()
    wait_for_clock_tick(path.parent)
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if it had not been
    for _ in range(2):
        with pytest.raises(UserError, match=r"b_train\.bin was changed during the run, it has other content; bring"):
            first_tokens(stream, 1)


def test_a_shard_that_grows_during_the_run_is_named(stream: TokenStream, tmp_path: Path) -> None:
    with (tmp_path / "shards" / "a_train.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(UserError, match=r"a_train\.bin .* now holds 9218 bytes instead of 9216"):
        first_tokens(stream, 0)


def test_a_shard_that_is_touched_linked_or_written_anew_with_the_same_bytes_goes_on(
    stream: TokenStream, tmp_path: Path
) -> None:
    path = tmp_path / "shards" / "b_train.bin"
    changes = (
        lambda: os.utime(path, ns=(1, 1)),
        lambda: os.link(path, tmp_path / "second name.bin"),
        lambda: path.write_bytes(path.read_bytes()),
    )
    for change in changes:
        wait_for_clock_tick(path.parent)
        change()
        assert first_tokens(stream, 1) == [4096, 4097, 4098]
    wait_for_clock_tick(path.parent)
    path.write_bytes(bytes(9216))
    with pytest.raises(UserError, match="has other content"):
        first_tokens(stream, 1)


def test_a_shard_that_is_replaced_or_removed_during_the_run_is_read_as_it_was(
    stream: TokenStream, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    (folder / "a_train.bin").unlink()
    write_llm_c(folder / "new.bin", [7])
    os.replace(folder / "new.bin", folder / "b_train.bin")
    assert first_tokens(stream, 0) == [0, 1, 2]
    assert first_tokens(stream, 1) == [4096, 4097, 4098]
    assert len(OpenShard(folder / "b_train.bin")) == 1


def test_a_shard_that_is_cut_short_in_one_pass_over_it_is_named(tmp_path: Path) -> None:
    write_llm_c(tmp_path / "shard.bin", list(range(4096)))
    shard = OpenShard(tmp_path / "shard.bin")
    assert shard.read(4090, 100).tolist() == list(range(4090, 4096))
    os.truncate(tmp_path / "shard.bin", 3000)
    with pytest.raises(UserError, match=r"shard\.bin was changed"):
        shard.read(0, 4096)


def test_a_shard_that_is_done_with_holds_no_file_open(tmp_path: Path) -> None:
    write_llm_c(tmp_path / "shard.bin", [1, 2, 3])
    open_before = len(list(Path("/dev/fd").iterdir()))
    tokens = OpenShard(tmp_path / "shard.bin").tokens
    assert tokens.tolist() == [1, 2, 3]
    del tokens
    assert len(list(Path("/dev/fd").iterdir())) == open_before
