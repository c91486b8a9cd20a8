"""Token shards on disk: llm.c's `.bin` format and nanoGPT's headerless one. The only file that knows their bytes.

llm.c: 256 little-endian int32 of header ([0] magic, [1] version, [2] token count, the rest 0), then the tokens;
uint16 with magic 20240520 and version 1, or, for larger vocabularies, uint32 with magic 20240801 and version 7.
"""

import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from dist_train.errors import UserError

HEADER_BYTES = 256 * 4
_MAGIC = {2: (20240520, 1), 4: (20240801, 7)}  # bytes per token -> magic number, version
_MOST_TOKENS = 2**31 - 1  # what the header's int32 can count


def token_dtype(n_vocab: int) -> np.dtype:
    """Return the narrowest of the format's types that holds ids below `n_vocab`."""
    return np.dtype("<u2") if n_vocab <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True)
class Shard:
    """One finished file: its name inside its folder, its tokens and the hash of all of its bytes."""

    file: str
    tokens: int
    sha256: str


class ShardWriter:
    """Append tokens to `<split>_000000.bin`, `<split>_000001.bin`, … of `shard_tokens` each; a context manager.

    Goes on from `shards`, which are finished, and the first `open_tokens` of one more; what is on disk beyond is lost.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype,
        shard_tokens: int,
        shards: Sequence[Shard] = (),
        open_tokens: int = 0,
    ) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.shard_tokens = min(shard_tokens, _MOST_TOKENS)
        self.shards = list(shards)
        self.open_tokens = open_tokens
        """Tokens in the shard that is not finished."""
        self._file = self._reopen() if open_tokens else None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        elif self._file:
            self._file.close()

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return sum(shard.tokens for shard in self.shards) + self.open_tokens

    def append(self, tokens: np.ndarray) -> None:
        """Write `tokens` [n] of any unsigned type, going on in a new shard wherever one is full."""
        while len(tokens):
            if self._file is None:
                self._file = self._path.open("w+b")
                self._file.write(bytes(HEADER_BYTES))
            part, tokens = np.split(tokens, [self.shard_tokens - self.open_tokens])
            self._file.write(part.astype(self.dtype, copy=False).data)
            self.open_tokens += len(part)
            if self.open_tokens == self.shard_tokens:
                self._finish()

    def sync(self) -> None:
        """Bring what was appended onto the disk."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}_{len(self.shards):06d}.bin"

    def _reopen(self) -> BinaryIO:
        size = HEADER_BYTES + self.open_tokens * self.dtype.itemsize
        if not self._path.exists() or self._path.stat().st_size < size:
            raise UserError(f"{self._path} holds less than was written to it; delete {self.folder} and prepare again")
        file = self._path.open("r+b")
        file.truncate(size)
        file.seek(0, os.SEEK_END)
        return file

    def _finish(self) -> None:
        """Complete the open shard: its count is known only now, and its hash covers the header."""
        if self._file is None:
            return
        header = np.zeros(256, dtype="<i4")
        header[:3] = *_MAGIC[self.dtype.itemsize], self.open_tokens
        self._file.seek(0)
        self._file.write(header.data)
        self.sync()
        self._file.close()
        self.shards.append(Shard(self._path.name, self.open_tokens, file_sha256(self._path)))
        self._file, self.open_tokens = None, 0


def file_sha256(path: Path) -> str:
    """Return the hash of a file's bytes in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def map_shard(path: Path, headerless: bool = False) -> np.ndarray:
    """Memory-map one shard read-only and return its tokens [n], uint16 or uint32.

    Raises `UserError` naming the file if it cannot be read, or if its header and its size do not agree.
    """
    try:
        size = path.stat().st_size
        start, count, dtype = _layout(path, size, headerless)
        if count <= 0 or size != start + count * dtype.itemsize:
            raise UserError(
                f"{path} holds {size} bytes where {start} + {count} × {dtype.itemsize} belong; "
                f"fetch it again, or prepare the data again"
            )
        # A plain view: np.memmap's own slicing costs microseconds per window in Python.
        return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(count,)).view(np.ndarray)
    except OSError as error:
        # Each map keeps a file descriptor (Python's mmap duplicates it), so a thousand shards may be too many.
        remedy = "raise `ulimit -n`" if error.errno == errno.EMFILE else "fetch it again, or prepare the data again"
        raise UserError(f"cannot read the shard {path}: {error.strerror}; {remedy}") from None


def _layout(path: Path, size: int, headerless: bool) -> tuple[int, int, np.dtype]:
    """Return at which byte the tokens start, how many there should be, and their type."""
    header = np.fromfile(path, dtype="<i4", count=256)
    widths = {magic: width for width, magic in _MAGIC.items()}
    width = widths.get(tuple(header[:2].tolist())) if len(header) == 256 else None
    if headerless and width is not None:
        raise UserError(f"{path} has llm.c's header, which would be read as tokens; set data.shard_format: llm.c")
    if headerless:
        return 0, size // 2, np.dtype("<u2")
    if width is None:
        raise UserError(
            f"{path} has no llm.c header; if it is nanoGPT's bare format, set data.shard_format: headerless"
        )
    return HEADER_BYTES, int(header[2]), np.dtype(f"<u{width}")


class TokenStream:
    """Several shards of one type as one sequence of tokens, none of them in memory."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._dtype = shards[0].dtype
        assert all(shard.dtype == self._dtype for shard in shards)
        self._shards = [shard.data for shard in shards]
        self._ends = np.cumsum([len(shard) for shard in shards])
        self._begins = np.concatenate([[0], self._ends[:-1]])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the `length` tokens from each of `starts` [B] as int64 [B, length]; a window may cross shards."""
        shards = np.searchsorted(self._ends, starts, side="right")
        offsets = starts - self._begins[shards]
        # Slices of memoryviews joined as bytes take half the time of slices of numpy arrays, and the same however
        # many shards a batch is spread over: 64 windows of 257 in about 25 µs.
        parts: list[memoryview] = []
        for shard, offset in zip(shards.tolist(), offsets.tolist(), strict=True):
            parts.append(self._shards[shard][offset : offset + length])
            missing = length - len(parts[-1])
            while missing:
                shard += 1
                parts.append(self._shards[shard][:missing])
                missing -= len(parts[-1])
        tokens = np.frombuffer(b"".join(parts), dtype=self._dtype)
        return tokens.astype(np.int64).reshape(len(starts), length)
