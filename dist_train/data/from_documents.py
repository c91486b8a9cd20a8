"""Documents to shards, in order, gone on with where an interruption left them."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from dist_train.data import documents
from dist_train.data.corpora import open_corpus
from dist_train.data.documents import Corpus
from dist_train.data.encode import Encoded, encode
from dist_train.data.journal import Journal
from dist_train.data.manifest import Manifest, Split, first_difference, source_identity, tokenizer_identity
from dist_train.data.progress import ProgressDisplay
from dist_train.data.shards import OpenShard, ShardWriter, token_dtype
from dist_train.errors import UserError
from dist_train.sections import DataSettings

COMMIT_SECONDS = 5.0
"""Work that is done again after an interruption, at most. Each commit waits for the disk."""

Writers = dict[str, ShardWriter]


def make_shards(settings: DataSettings, folder: Path) -> Manifest:
    """Write every document's tokens to the split it belongs to, and return what was written.

    The bytes depend on the documents alone: not on the number of workers, and not on interruptions.
    """
    journal = Journal.read(folder)
    if journal:
        require_same(journal, settings, folder)
        settings = settings.model_copy(update={"revision": journal.source["revision"]})  # the hub's newest may differ
    corpus = open_corpus(settings)
    if journal is None:
        source = {**source_identity(settings), "revision": corpus.revision}
        journal = Journal(source, tokenizer_identity(settings.tokenizer), documents.PIECE_BYTES)
    elif journal.source["revision"] != corpus.revision:
        raise UserError(f"data.source: it has changed since the work in {folder} was begun; delete that folder")
    # Where the end of a single text begins is known when all of it is tokens.
    streams = ("text",) if corpus.is_single_text else ("train", "val")
    with _writers(streams, journal, folder) as writers:
        if not journal.is_complete:
            _write_documents(settings, corpus, journal, writers, folder)
    if corpus.is_single_text:
        writers = _hold_out_end(writers["text"], settings, journal, folder)
    return _manifest(journal, writers)


def require_same(journal: Journal, settings: DataSettings, folder: Path) -> None:
    """Raise `UserError` naming what keeps unfinished work from being finished with these settings."""
    difference = first_difference(journal.source, journal.tokenizer, settings)
    if not difference and journal.piece_bytes != documents.PIECE_BYTES:
        difference = "another version of this program"
    if difference:
        raise UserError(
            f"data.dir: the unfinished work in {folder} was begun with {difference}; "
            f"choose another --data.dir or delete that folder"
        )


@contextmanager
def _writers(names: tuple[str, ...], journal: Journal, folder: Path) -> Iterator[Writers]:
    """Yield writers of streams of tokens, each where the journal says that it was."""
    dtype, shard_tokens = token_dtype(journal.tokenizer["n_vocab"]), journal.source["shard_tokens"]
    writers = {name: ShardWriter(folder, name, dtype, shard_tokens, *journal.written(name)) for name in names}
    with ExitStack() as stack:
        for writer in writers.values():
            stack.enter_context(writer)
        yield writers


def _write_documents(settings: DataSettings, corpus: Corpus, journal: Journal, writers: Writers, folder: Path) -> None:
    """Write the documents that the journal does not have yet, up to the settings' bounds."""
    pieces = islice(corpus.pieces, journal.pieces, None)
    committed = time.monotonic()
    with (
        closing(encode(pieces, settings, journal.begun_piece)) as encoded,
        ProgressDisplay(_fraction_done(settings, corpus, journal), journal.tokens) as display,
    ):
        for piece in encoded:
            part = piece.first(
                _left(settings.max_documents, journal.n_documents),
                _left(settings.max_tokens, journal.tokens),
            )
            if part.unreadable and settings.on_bad_document == "stop":
                raise UserError(f"{part.unreadable[0][1]}; mend or remove it, or set data.on_bad_document: skip")
            _append(part, writers)
            journal.add(part)
            display.show(journal.n_documents, journal.tokens, _fraction_done(settings, corpus, journal))
            if len(part.tokens) < len(piece.tokens) or journal.tokens == settings.max_tokens:
                break
            if time.monotonic() - committed > COMMIT_SECONDS:
                journal.commit(folder, writers)
                committed = time.monotonic()
    _require_documents(settings, journal, writers)
    journal.is_complete = True
    journal.commit(folder, writers)


def _left(bound: int | None, used: int) -> int | None:
    return None if bound is None else bound - used


def _fraction_done(settings: DataSettings, corpus: Corpus, journal: Journal) -> float | None:
    """Return how much of the work is done: of the source, or of the first bound that will be met."""
    bounds = (
        (journal.size, corpus.size),
        (journal.n_documents, settings.max_documents),
        (journal.tokens, settings.max_tokens),
    )
    return max((done / bound for done, bound in bounds if bound), default=None)


def _append(part: Encoded, writers: Writers) -> None:
    if "text" in writers:
        writers["text"].append(part.tokens)
    else:
        is_val = np.repeat(part.is_val, part.lengths)
        writers["train"].append(part.tokens[~is_val])
        writers["val"].append(part.tokens[is_val])


def _require_documents(settings: DataSettings, journal: Journal, writers: Writers) -> None:
    """Raise `UserError` if a split is empty, and say why."""
    unread = f", {journal.unreadable} cannot be read ({journal.first_unreadable[0]})" if journal.unreadable else ""
    if journal.tokens <= journal.n_documents:  # nothing, or end-of-text alone
        raise UserError(f"data.source: there is no text in it{unread}; give another")
    for name, writer in writers.items():
        if not writer.tokens:
            raise UserError(
                f"data.source: of {journal.n_documents} documents{unread} none is in the {name} part; "
                f"read more, or change data.val_fraction={settings.val_fraction}"
            )


def _hold_out_end(text: ShardWriter, settings: DataSettings, journal: Journal, folder: Path) -> Writers:
    """Split a single text's tokens; the held-out end starts with end-of-text like every document."""
    cut = text.tokens - int(text.tokens * settings.val_fraction)
    journal.shards, journal.documents = {}, {"train": 1, "val": 1}
    with _writers(("train", "val"), journal, folder) as writers:
        writers["val"].append(np.array([journal.tokenizer["end_of_text"]], dtype=text.dtype))
        position = 0
        for shard in text.shards:
            tokens = OpenShard(folder / shard.file).tokens
            writers["train"].append(tokens[: max(0, cut - position)])
            writers["val"].append(tokens[max(0, cut - position) :])
            position += len(tokens)
    return writers


def _manifest(journal: Journal, writers: Writers) -> Manifest:
    splits = {
        name: Split(writer.tokens, journal.documents[name], tuple(writer.shards)) for name, writer in writers.items()
    }
    source = {**journal.source, "unreadable": journal.unreadable, "first_unreadable": journal.first_unreadable}
    return Manifest(journal.tokenizer, source, **splits)
