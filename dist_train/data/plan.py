"""What `prepare` would read and write, from a look at the beginning of the source."""

import math
import shutil
import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice

from rich import filesize

from dist_train.data.corpora import open_corpus
from dist_train.data.encode import Encoder, count_workers
from dist_train.data.from_documents import require_same
from dist_train.data.journal import Journal
from dist_train.data.prepare import find_prepared, partial_folder
from dist_train.data.ready_made import find_shards
from dist_train.data.shards import HEADER_BYTES, token_dtype
from dist_train.data.tokenizer import load_tokenizer
from dist_train.sections import DataSettings


@dataclass(frozen=True)
class _Estimate:
    source_bytes: float
    tokens: float
    documents: float | None = None
    seconds: float | None = None
    is_exact: bool = True


def plan(settings: DataSettings) -> dict[str, str]:
    """Return what `prepare` would do, in words; nothing is written.

    Raises `UserError` for what `prepare` would refuse at once.
    """
    if find_prepared(settings):
        return {"nothing": f"{settings.dir} is prepared already"}
    token_bytes = token_dtype(load_tokenizer(settings.tokenizer).n_vocab).itemsize
    estimate = _of_shards(settings, token_bytes) if settings.source == "shards" else _of_documents(settings)
    about = "" if estimate.is_exact else "about "
    documents = "" if estimate.documents is None else f" in {estimate.documents:,.0f} documents"
    folder = next(parent for parent in settings.dir.absolute().parents if parent.exists())
    lines = {
        "read": f"{settings.source}, {about}{_size(estimate.source_bytes)}",
        "write": f"{settings.dir}, {about}{estimate.tokens:,.0f} tokens{documents}, "
        f"{_size(estimate.tokens * token_bytes)} ({_size(shutil.disk_usage(folder).free)} are free)",
    }
    if estimate.seconds is not None:
        workers = count_workers(settings)
        time_left = timedelta(seconds=math.ceil(estimate.seconds / workers))
        download = ", and the time of a download" if settings.source.startswith("fineweb") else ""
        lines["take"] = f"about {time_left} to tokenize with {workers} processes{download}"
    if journal := Journal.read(partial_folder(settings)):
        require_same(journal, settings, partial_folder(settings))
        lines["go on"] = f"from {journal.tokens:,} tokens that are there from an earlier attempt"
    return lines


def _of_shards(settings: DataSettings, token_bytes: int) -> _Estimate:
    found = find_shards(settings)
    sizes = [offer.size for offer in (*found.train, *found.val)]
    return _Estimate(sum(sizes), sum((size - HEADER_BYTES) // token_bytes for size in sizes))


def _of_documents(settings: DataSettings) -> _Estimate:
    """Tokenize the first piece and take the rest for its like, or all of a source whose size nobody knows."""
    corpus = open_corpus(settings)
    pieces = list(islice(corpus.pieces, 2 if corpus.size else None))
    is_all = corpus.size is None or len(pieces) < 2
    encoder = Encoder(settings)
    started = time.perf_counter()
    encoded = [encoder(piece) for piece in (pieces if is_all else pieces[:1])]
    seconds = time.perf_counter() - started
    seen = sum(piece.size for piece in encoded)
    tokens = sum(len(piece.tokens) for piece in encoded)
    n_documents = sum(sum(piece.n_documents.values()) for piece in encoded)
    size = corpus.size if corpus.size and not is_all else seen
    bounds = ((size, seen), (settings.max_tokens, tokens), (settings.max_documents, n_documents))
    # How often what was seen is read: as often as it fits into the source, or into a bound.
    times = min((bound / count for bound, count in bounds if bound and count), default=0.0)
    documents = 1 if corpus.is_single_text else times * n_documents
    return _Estimate(times * seen, times * tokens, documents, times * seconds, is_exact=is_all and times == 1)


def _size(n_bytes: float) -> str:
    return filesize.decimal(round(n_bytes))
