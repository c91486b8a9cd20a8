"""Documents to tokens to shards and a manifest."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dist_train.config import DataSettings
from dist_train.data.corpora import Corpus, open_corpus
from dist_train.data.manifest import Manifest, Split, is_prepared, require_match, source_identity
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
    if is_prepared(settings.dir):
        raise UserError(f"data.dir: {settings.dir} holds shards that something else wrote; choose another --data.dir")
    try:
        settings.dir.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{settings.dir.name}.partial-", dir=settings.dir.parent))
        try:
            manifest = _write_shards(settings, open_corpus(settings), work)
            manifest.write(work)
            work.chmod(0o755)
            os.replace(work, settings.dir)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"cannot write {settings.dir}: {error.strerror or error}; free or choose a place") from error
    return Prepared(manifest, is_new=True)


def _write_shards(settings: DataSettings, corpus: Corpus, folder: Path) -> Manifest:
    """Write every document's tokens to the split it belongs to and return what was written."""
    encoding = load_tokenizer(settings.tokenizer)
    dtype = token_dtype(encoding.n_vocab)
    documents = {"train": 0, "val": 0}
    with (
        _progress(settings.max_documents) as progress,
        ShardWriter(folder, "train", dtype, settings.shard_tokens) as train,
        ShardWriter(folder, "val", dtype, settings.shard_tokens) as val,
    ):
        writers = {"train": train, "val": val}
        for document in corpus.documents:
            tokens = encode_document(encoding, document.text)
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


def _split_of(document_id: str, val_fraction: float) -> str:
    """Say where a document belongs, by its id alone: neither order nor how much is prepared changes it."""
    uniform = int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "big") / 2**64
    return "val" if uniform < val_fraction else "train"


def _cut_end(tokens: np.ndarray, val_fraction: float) -> dict[str, np.ndarray]:
    """Split one text's tokens [n]; the held-out end starts with end-of-text like every document."""
    cut = len(tokens) - int(len(tokens) * val_fraction)
    return {"train": tokens[:cut], "val": np.concatenate([tokens[:1], tokens[cut:]])}


class _progress:
    """A progress bar that counts documents and tokens, and says how fast."""

    def __init__(self, max_documents: int | None) -> None:
        self._bar = Progress(
            TextColumn("preparing"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} documents  {task.fields[tokens]:,} tokens"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            transient=True,
        )
        self._task = self._bar.add_task("", total=max_documents, tokens=0)
        self._tokens = 0

    def __enter__(self) -> "_progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, tokens: int) -> None:
        self._tokens += tokens
        self._bar.update(self._task, advance=1, tokens=self._tokens)
