"""Pieces of a corpus to tokens, in order, by as many processes as are asked for."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from hashlib import blake2b
from itertools import chain, islice
from threading import Thread
from typing import NamedTuple

import numpy as np

from dist_train.config import DataSettings
from dist_train.data.documents import Document, Piece
from dist_train.data.shards import token_dtype
from dist_train.data.tokenizer import encode_document, load_tokenizer
from dist_train.errors import ProcessLostError


class Encoded(NamedTuple):
    """The tokens of one piece."""

    tokens: np.ndarray
    """[n] of the shards' type, document after document."""
    lengths: np.ndarray
    """Tokens of each document, end-of-text included, int64 [documents]."""
    is_val: np.ndarray
    """Whether the document is held out, bool [documents]."""
    continues: bool
    """The first document goes on with the last one of the piece before."""
    unreadable: tuple[tuple[int, str], ...]
    """Of each document that could not be read, how many others stand before it, and where it is and why."""
    size: float
    """`Piece.size` of what was read."""

    def first(self, documents: int | None, tokens: int | None) -> "Encoded":
        """Return at most so many of its documents and tokens; None is no bound, and the last document may be cut."""
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

    def __call__(self, piece: Piece) -> Encoded:
        """Read a piece and encode its documents. Raises `UserError` where no document of the source can be read."""
        documents: list[Document] = []
        arrays: list[np.ndarray] = []
        unreadable = []
        for document in piece.read():
            if isinstance(document, Document):
                try:
                    arrays.append(encode_document(self._encoding, document.text, document.continues))
                    documents.append(document)
                except ValueError as error:
                    unreadable.append((len(documents), f"{document.id} cannot be tokenized: {error}"))
            else:
                unreadable.append((len(documents), str(document)))
        return Encoded(
            tokens=np.concatenate([np.empty(0, self._dtype), *arrays], dtype=self._dtype, casting="unsafe"),
            lengths=np.array([len(array) for array in arrays], dtype=np.int64),
            is_val=np.array([_is_val(document.id, self._val_fraction) for document in documents], dtype=bool),
            continues=bool(documents) and documents[0].continues,
            unreadable=tuple(unreadable),
            size=piece.size,
        )


def _is_val(document_id: str, val_fraction: float) -> bool:
    """Say whether a document is held out, by its id alone: neither order nor how much is prepared changes it."""
    key = document_id.encode(errors="surrogatepass")  # file names need not be Unicode
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") / 2**64 < val_fraction


def encode(pieces: Iterable[Piece], settings: DataSettings) -> Generator[Encoded, None, None]:
    """Yield the tokens of `pieces` in their order, made by `data.workers` processes, or in this one for a single piece.

    Raises `UserError` for what cannot be read, `ProcessLostError` if a worker is killed.
    """
    pieces = iter(pieces)
    first = list(islice(pieces, 2))
    pieces = chain(first, pieces)
    workers, encoder = count_workers(settings), Encoder(settings)
    if workers == 1 or len(first) < 2:
        yield from map(encoder, pieces)
        return
    # Spawned: a forked worker would keep the pipes of its siblings open, and the threads of this process half alive.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder,)) as pool:
        ahead: deque[Future[Encoded]] = deque()
        try:
            for piece in pieces:
                ahead.append(pool.submit(_encode, piece))
                if len(ahead) > 2 * workers:  # enough that a slow piece holds nobody up, few enough for the memory
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool:
            raise ProcessLostError(
                "a worker of prepare was killed, perhaps for want of memory; the same command goes on where it was, "
                "with fewer processes by --data.workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def count_workers(settings: DataSettings) -> int:
    """Return `data.workers`, by default one for each CPU that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return settings.workers or usable


# ---- in a worker -----------------------------------------------------------------------------------------------------

_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that writes
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the writing process to end, however it ends, and follow it: the executor's queues never would."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(piece: Piece) -> Encoded:
    return _encoder(piece)
