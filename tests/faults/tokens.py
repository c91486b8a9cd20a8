"""Prepared data to do harm to, and what may come of it: the tokens that were written, or one line."""

from pathlib import Path

import numpy as np

from dist_train.data.manifest import open_tokens
from dist_train.data.prepare import prepare
from dist_train.data.shards import TokenStream
from dist_train.errors import UserError
from dist_train.sections import DataSettings


def prepare_book(folder: Path) -> DataSettings:
    """Prepare a small book in `folder`, in several shards of bytes, and return its settings."""
    (folder / "book.txt").write_text("a book of letters " * 20)
    book = str(folder / "book.txt")
    data = DataSettings(source="files", path=book, tokenizer="bytes", dir=folder / "data", shard_tokens=150)
    prepare(data)
    return data


def all_tokens(stream: TokenStream) -> list[int]:
    return stream.windows(np.array([0]), len(stream))[0].tolist()


def load(data: DataSettings) -> tuple[list[int], list[int]] | None:
    """Return the tokens of both splits, or None where they were refused as they should be."""
    try:
        found = open_tokens(data)
        return all_tokens(found.train), all_tokens(found.val)
    except UserError as error:
        require_one_line(error)
        return None


def require_one_line(error: UserError) -> None:
    assert error.exit_status == 2
    assert str(error).isprintable()
    assert len(str(error)) < 1000
    assert "; " in str(error)  # what to do
