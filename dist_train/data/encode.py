"""Pieces of a corpus to tokens, in order, by as many processes as are asked for."""

import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from hashlib import blake2b
from itertools import chain, islice
from typing import NamedTuple, NoReturn

import numpy as np

from dist_train.data import documents
from dist_train.data.documents import Document, Piece, Unreadable
from dist_train.data.shards import token_dtype
from dist_train.data.tokenizer import encode_document, load_tokenizer
from dist_train.errors import ProcessLostError, UserError
from dist_train.sections import DataSettings
from dist_train.worker import start_worker

_MOST_TOKENS = 8_000_000
"""What a worker hands over at once, give or take a document: rows may be larger than a file's footer lets expect."""


class Encoded(NamedTuple):
    """The tokens of one piece, or of a part of it where that makes more than can be handed over at once."""

    tokens: np.ndarray
    """[n] of the shards' type, document after document."""
    lengths: np.ndarray
    """Tokens of each document, end-of-text included, int64 [documents]."""
    is_val: np.ndarray
    """Whether the document is held out, bool [documents]."""
    continues: bool
    """The first document goes on with the last one before this; none of the others does."""
    unreadable: tuple[tuple[int, str], ...]
    """Of each document that could not be read, how many others stand before it, and where it is and why."""
    size: float
    """`Piece.size`; 0 where more of the piece is to come."""
    goes_on_at: int | None
    """The number of the piece's first document that is not in here, None where there is none."""

    def first(self, documents: int | None, tokens: int | None) -> "Encoded":
        """Return what is within the bounds: so many documents that begin here, and tokens. None is no bound."""
        lengths = self.lengths
        if documents is not None:
            lengths = lengths[: documents + self.continues]
        if tokens is not None:
            lengths = np.diff(np.minimum(np.cumsum(lengths), tokens), prepend=0)
            lengths = lengths[lengths > 0]
        is_bounded = lengths.sum() == tokens or (documents is not None and len(lengths) == documents + self.continues)
        return self._replace(
            tokens=self.tokens[: lengths.sum()],
            lengths=lengths,
            is_val=self.is_val[: len(lengths)],
            unreadable=tuple(bad for bad in self.unreadable if bad[0] < len(lengths) or not is_bounded),
        )

    @property
    def n_documents(self) -> dict[str, int]:
        """How many documents begin here, in each split."""
        train, val = np.bincount(self.is_val[int(self.continues) :], minlength=2).tolist()
        return {"train": train, "val": val}


class Encoder:
    """Makes tokens of pieces."""

    def __init__(self, settings: DataSettings) -> None:
        self._encoding = load_tokenizer(settings.tokenizer)
        self._dtype = token_dtype(self._encoding.n_vocab)
        self._val_fraction = settings.val_fraction

    def __call__(self, piece: Piece, first: int = 0) -> Encoded:
        """Read and encode a piece, from document number `first` on. Raises `UserError` if going on makes no sense."""
        arrays = [np.empty(0, self._dtype)]
        lengths: list[int] = []
        is_val: list[bool] = []
        unreadable: list[tuple[int, str]] = []
        continues, goes_on_at, n_tokens = False, None, 0
        for number, document in enumerate(piece.read(first), start=first):
            if n_tokens >= _MOST_TOKENS:
                goes_on_at = number
                break
            if isinstance(document, Document) and len(document.text) > documents.LONGEST_BYTES:
                document = Unreadable(document.id, f"is longer than {documents.LONGEST_BYTES // 10**6} MB")
            if isinstance(document, Unreadable):
                unreadable.append((len(lengths), str(document)))
                continue
            arrays.append(encode_document(self._encoding, document.text, document.continues).astype(self._dtype))
            n_tokens += len(arrays[-1])
            if document.continues and lengths:
                lengths[-1] += len(arrays[-1])
                continue
            continues = continues or document.continues
            lengths.append(len(arrays[-1]))
            is_val.append(_is_val(document.id, self._val_fraction))
        return Encoded(
            tokens=np.concatenate(arrays),
            lengths=np.array(lengths, dtype=np.int64),
            is_val=np.array(is_val, dtype=bool),
            continues=continues,
            unreadable=tuple(unreadable),
            size=0 if goes_on_at else piece.size,
            goes_on_at=goes_on_at,
        )


def _is_val(document_id: str, val_fraction: float) -> bool:
    """Say whether a document is held out, by its id alone: neither order nor how much is prepared changes it."""
    key = document_id.encode(errors="surrogatepass")  # file names need not be Unicode
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") / 2**64 < val_fraction


def encode(pieces: Iterable[Piece], settings: DataSettings, first: int = 0) -> Generator[Encoded, None, None]:
    """Yield the tokens of `pieces` in their order, of the first one from document number `first` on.

    `data.workers` processes make them, or this one where there is a single piece.
    Raises `UserError` for what cannot be read, `ProcessLostError` if a worker is killed.
    """
    pieces = _failing_in_turn(pieces)
    ahead = list(islice(pieces, 2))
    pieces = chain(ahead, pieces)
    workers, encoder = count_workers(settings), Encoder(settings)
    if workers == 1 or len(ahead) < 2:
        for piece in pieces:
            encoded = encoder(piece, first)
            yield encoded
            while encoded.goes_on_at:
                encoded = encoder(piece, encoded.goes_on_at)
                yield encoded
            first = 0
        return
    # Spawned: a forked worker would keep the pipes of its siblings open, and the threads of this process half alive.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder,)) as pool:
        try:
            yield from _in_order(pieces, first, pool, n_ahead=2 * workers)
        except BrokenProcessPool:
            raise ProcessLostError(
                "a worker of prepare was killed, perhaps for want of memory; the same command goes on where it was, "
                "with fewer processes by --data.workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(
    pieces: Iterable[Piece], first: int, pool: ProcessPoolExecutor, n_ahead: int
) -> Generator[Encoded, None, None]:
    """Yield pieces' tokens while `n_ahead` more are worked on: a slow one holds nobody up, and memory is bounded."""
    pieces = iter(pieces)
    ahead: deque[tuple[Piece, Future[Encoded]]] = deque()
    while True:
        for piece in islice(pieces, n_ahead + 1 - len(ahead)):
            ahead.append((piece, pool.submit(_encode, piece, first)))
            first = 0
        if not ahead:
            return
        piece, future = ahead.popleft()
        encoded = future.result()
        if encoded.goes_on_at:
            ahead.appendleft((piece, pool.submit(_encode, piece, encoded.goes_on_at)))
        yield encoded


class _Failed(NamedTuple):
    """Stands where the source cannot be read any further."""

    error: UserError
    size: float = 0

    def read(self, first: int = 0) -> NoReturn:
        raise self.error


def _failing_in_turn(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield `pieces`, and what is wrong with the source when its turn comes: it may lie beyond what is asked for."""
    try:
        yield from pieces
    except UserError as error:
        yield _Failed(error)


def count_workers(settings: DataSettings) -> int:
    """Return `data.workers`, by default one for each CPU that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return settings.workers or usable


# ---- in a worker -----------------------------------------------------------------------------------------------------

_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    start_worker()


def _encode(piece: Piece, first: int) -> Encoded:
    return _encoder(piece, first)
