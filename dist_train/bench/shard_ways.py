"""Three ways from a parquet file of texts to tokens: ours, the usual pool of processes, and a bare loop.

Each is a function of the data's settings for a process of its own, which is why nothing here imports torch.
"""

import io
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from typing import NamedTuple

import numpy as np
import tiktoken

from dist_train.data.prepare import prepare
from dist_train.data.shards import token_dtype
from dist_train.data.tokenizer import end_of_text, load_tokenizer
from dist_train.sections import DataSettings

_CHUNK_DOCUMENTS = 16
"""How many documents the pool hands over at once."""


class Tokenized(NamedTuple):
    """What one way made, and the time from its first line to its last."""

    tokens: int
    seconds: float


def ours(data: DataSettings) -> Tokenized:
    """Prepare `data`: worker processes, shards with their hashes, manifest and description."""
    started = time.perf_counter()
    with redirect_stderr(io.StringIO()):  # no progress bar within the benchmark's
        manifest = prepare(data).manifest
    return Tokenized(manifest.train.tokens + manifest.val.tokens, time.perf_counter() - started)


def pool(data: DataSettings) -> Tokenized:
    """Write shards in `data.dir` as is usual: `Pool.imap` over the documents, and a buffer that fills up.

    At its best in this form: the vocabulary is loaded once and inherited by fork, arrays come back in the shards' type,
    one copy lays them down, and nothing is checked, hashed or brought onto the disk.
    """
    started = time.perf_counter()
    encoding = _stock_encoding(data.tokenizer)
    data.dir.mkdir()
    buffer = np.empty(data.shard_tokens, token_dtype(encoding.n_vocab))
    filled, shards = 0, 0
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with multiprocessing.get_context(method).Pool(data.workers, _start_worker, (encoding,)) as processes:
        for tokens in processes.imap(_encode, _read_texts(data), _CHUNK_DOCUMENTS):
            while filled + len(tokens) > len(buffer):
                room = len(buffer) - filled
                buffer[filled:] = tokens[:room]
                buffer.tofile(data.dir / f"{shards:06d}.bin")
                tokens, filled, shards = tokens[room:], 0, shards + 1
            buffer[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    buffer[:filled].tofile(data.dir / f"{shards:06d}.bin")
    return Tokenized(shards * len(buffer) + filled, time.perf_counter() - started)


def bare(data: DataSettings) -> Tokenized:
    """Encode all documents in this process, none of them read or written while the clock runs."""
    encoding, texts = _stock_encoding(data.tokenizer), list(_read_texts(data))
    started = time.perf_counter()
    tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    return Tokenized(tokens, time.perf_counter() - started)


WAYS: dict[str, Callable[[DataSettings], Tokenized]] = {"ours": ours, "pool": pool, "bare": bare}


def _stock_encoding(name: str) -> tiktoken.Encoding:
    """Return the tokenizer as tiktoken has it, without what ours may add to its speed."""
    return tiktoken.get_encoding(name) if name in tiktoken.list_encoding_names() else load_tokenizer(name)


def _read_texts(data: DataSettings) -> Iterator[str]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(data.path) as parquet:
        for batch in parquet.iter_batches(batch_size=256, columns=[data.text_column]):
            yield from batch.column(0).to_pylist()


# ---- in a worker of the pool -----------------------------------------------------------------------------------------

_encoding: tiktoken.Encoding
_end_of_text: int


def _start_worker(encoding: tiktoken.Encoding) -> None:
    global _encoding, _end_of_text
    _encoding, _end_of_text = encoding, end_of_text(encoding)


def _encode(text: str) -> np.ndarray:
    tokens = [_end_of_text]
    tokens += _encoding.encode_ordinary(text)
    return np.array(tokens, token_dtype(_encoding.n_vocab))
