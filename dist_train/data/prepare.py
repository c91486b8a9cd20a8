"""Documents to tokens to shards and a manifest."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tiktoken import Encoding

from dist_train.config import DataSettings
from dist_train.data.corpora import Corpus, Document, open_corpus
from dist_train.data.manifest import Manifest, Split, require_match, source_identity
from dist_train.data.shards import ShardWriter, token_dtype
from dist_train.data.tokenizer import encode_document, end_of_text, fingerprint, load_tokenizer
from dist_train.errors import StorageError, UserError


class Prepared(NamedTuple):
    manifest: Manifest
    is_new: bool


def prepare(settings: DataSettings) -> Prepared:
    """Tokenize `data.source` into shards in `data.dir`, unless they are there already.

    The folder appears complete or not at all: work happens beside it and is renamed at the end.
    Raises `UserError` for settings or documents that are wrong, `StorageError` where writing fails.
    """
    existing = Manifest.read(settings.dir)
    if existing:
        require_match(existing, settings)
        return Prepared(existing, is_new=False)
    try:
        if settings.dir.exists() and (not settings.dir.is_dir() or any(settings.dir.iterdir())):
            raise UserError(
                f"data.dir: {settings.dir} holds what `prepare` did not write; "
                f"train on it if it is shards, or choose another --data.dir"
            )
        settings.dir.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{settings.dir.name}.partial-", dir=settings.dir.parent))
        try:
            manifest = _write_shards(settings, open_corpus(settings), work)
            manifest.write(work)
            work.chmod(0o755)
            return _put_in_place(work, manifest, settings)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"cannot write {settings.dir}: {error.strerror or error}; free or choose a place") from error


def _put_in_place(work: Path, manifest: Manifest, settings: DataSettings) -> Prepared:
    """Give the finished folder its name, unless another process has prepared the same data meanwhile."""
    try:
        os.replace(work, settings.dir)
    except OSError:
        existing = Manifest.read(settings.dir)
        if existing is None:
            raise
        require_match(existing, settings)
        return Prepared(existing, is_new=False)
    return Prepared(manifest, is_new=True)


def _write_shards(settings: DataSettings, corpus: Corpus, folder: Path) -> Manifest:
    """Write every document's tokens to the split it belongs to and return what was written."""
    encoding = load_tokenizer(settings.tokenizer)
    dtype = token_dtype(encoding.n_vocab)
    documents = {"train": 0, "val": 0}
    with (
        _ProgressBar(settings.max_documents) as progress,
        ShardWriter(folder, "train", dtype, settings.shard_tokens) as train,
        ShardWriter(folder, "val", dtype, settings.shard_tokens) as val,
    ):
        writers = {"train": train, "val": val}
        for document in corpus.documents:
            tokens = _encode(encoding, document)
            parts = (
                _cut_end(tokens, settings.val_fraction)
                if corpus.is_single_text
                else {_split_of(document.id, settings.val_fraction): tokens}
            )
            for split, part in parts.items():
                writers[split].append(part)
                documents[split] += 1
            progress.advance(len(tokens))
    totals = {name: sum(shard.tokens for shard in writer.shards) for name, writer in writers.items()}
    for name, tokens_written in totals.items():
        if not tokens_written:
            raise UserError(
                f"data.source: of {sum(documents.values())} documents none is in the {name} part; "
                f"read more, or change data.val_fraction={settings.val_fraction}"
            )
    splits = {name: Split(totals[name], documents[name], tuple(writers[name].shards)) for name in writers}
    tokenizer = {
        "name": settings.tokenizer,
        "n_vocab": encoding.n_vocab,
        "end_of_text": end_of_text(encoding),
        "fingerprint": fingerprint(encoding),
    }
    return Manifest(tokenizer, {**source_identity(settings), "revision": corpus.revision}, **splits)


def _encode(encoding: Encoding, document: Document) -> np.ndarray:
    try:
        return encode_document(encoding, document.text)
    except ValueError as error:
        raise UserError(f"data.source: cannot tokenize the document {document.id}: {error}; remove it") from None


def _split_of(document_id: str, val_fraction: float) -> str:
    """Say where a document belongs, by its id alone: neither order nor how much is prepared changes it."""
    key = document_id.encode(errors="surrogatepass")  # file names need not be Unicode
    uniform = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
    return "val" if uniform < val_fraction else "train"


def _cut_end(tokens: np.ndarray, val_fraction: float) -> dict[str, np.ndarray]:
    """Split one text's tokens [n]; the held-out end starts with end-of-text like every document."""
    cut = len(tokens) - int(len(tokens) * val_fraction)
    return {"train": tokens[:cut], "val": np.concatenate([tokens[:1], tokens[cut:]])}


class _ProgressBar:
    """A progress bar that counts documents and tokens, and says how fast."""

    def __init__(self, max_documents: int | None) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("preparing"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} documents  {task.fields[tokens]:,} tokens"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,  # or it leaves an empty line in every log
            transient=True,
        )
        self._task = self._bar.add_task("", total=max_documents, tokens=0)
        self._tokens = 0

    def __enter__(self) -> "_ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, tokens: int) -> None:
        self._tokens += tokens
        self._bar.update(self._task, advance=1, tokens=self._tokens)
