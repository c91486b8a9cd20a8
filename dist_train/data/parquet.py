"""Pieces of parquet files, local or on the hub: each worker reads its own rows and decodes nothing else."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from dist_train.data import documents
from dist_train.data.documents import Document, Unreadable
from dist_train.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

OpenFile = Callable[[str], Any]
"""Returns what pyarrow reads a file from: its path, or an open file. Named by its module, so that pieces travel."""


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one row group."""

    open_file: OpenFile
    file: str
    name: str
    """What documents and errors call the file."""
    columns: tuple[str, ...]
    """The column with the text, and `id` where there is one."""
    group: int
    first_row: int
    """Counted from the group's start, as `n_rows`."""
    n_rows: int
    rows_before: int
    """Rows of the file ahead of this group."""
    size: float

    def read(self, first: int = 0) -> Iterator[Document | Unreadable]:
        """Yield the documents of all rows but the `first`. Raises what pyarrow and the file raise."""
        row = self.rows_before + self.first_row + first
        rows = _group_rows(self.open_file, self.file, self.group, self.columns)
        for batch in rows.batches(self.first_row + first, self.n_rows - first):
            texts = _strings(batch.column(self.columns[0]))
            ids = _strings(batch.column(self.columns[1])) if len(self.columns) > 1 else [None] * len(texts)
            for text, document_id in zip(texts, ids, strict=True):
                yield self._document(row, text, document_id)
                row += 1

    def _document(self, row: int, text: str | bytes | None, document_id: object) -> Document | Unreadable:
        if not isinstance(text, str):
            return Unreadable(f"{self.name}, row {row}", "has no text" if text is None else "is not UTF-8")
        return Document(document_id if isinstance(document_id, str) else f"{self.name}:{row}", text)


def row_pieces(open_file: OpenFile, file: str, name: str, size: float, column: str) -> Iterator[Rows]:
    """Yield the pieces of one parquet file of `size` bytes, from its footer alone.

    Raises `UserError` if it has no such column or that is no text, and what pyarrow and the file raise.
    """
    footer = _open(open_file, file).metadata
    columns = _columns(_open(open_file, file).schema_arrow, name, column)
    rows_before = 0
    for group in range(footer.num_row_groups):
        n_rows = footer.row_group(group).num_rows
        pieces = max(1, round(_text_bytes(footer.row_group(group), column) / documents.PIECE_BYTES))
        per_piece = math.ceil(n_rows / pieces)
        for first in range(0, n_rows, max(1, per_piece)):
            count = min(per_piece, n_rows - first)
            yield Rows(open_file, file, name, columns, group, first, count, rows_before, size * count / footer.num_rows)
        rows_before += n_rows


def forget_open_files() -> None:
    """Close the file that this process keeps open from piece to piece; reading again opens it anew."""
    _group_rows.cache_clear()
    _open.cache_clear()


def _columns(schema: "pyarrow.Schema", name: str, column: str) -> tuple[str, ...]:
    from pyarrow import types

    if schema.names.count(column) != 1:
        count = "several columns" if column in schema.names else "no column"
        raise UserError(f"{name} has {count} {column!r} (it has: {', '.join(schema.names)}); set data.text_column")
    kind = schema.field(column).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value) or types.is_null(value)):
        raise UserError(f"{name}: column {column!r} holds {kind}, not text; set data.text_column")
    return (column, "id") if "id" in schema.names and column != "id" else (column,)


def _text_bytes(group: Any, column: str) -> int:
    chunks = (group.column(i) for i in range(group.num_columns))
    return next(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


@lru_cache(maxsize=1)
def _open(open_file: OpenFile, file: str) -> "pyarrow.parquet.ParquetFile":
    """Open a file once for all pieces that come one after the other: some footers are megabytes."""
    import pyarrow.parquet

    source = open_file(file)
    # A local file through a small buffer, because column chunks may be gigabytes; what is far away with one request
    # for all columns of a row group. fsspec's reading ahead brought up to twice as much.
    is_local = isinstance(source, str)
    return pyarrow.parquet.ParquetFile(source, pre_buffer=not is_local, buffer_size=(1 << 20) if is_local else 0)


@lru_cache(maxsize=1)
def _group_rows(open_file: OpenFile, file: str, group: int, columns: tuple[str, ...]) -> "_GroupRows":
    return _GroupRows(_open(open_file, file), group, columns)


class _GroupRows:
    """One row group, read forwards: pieces of a very large one cost no more together than reading it once."""

    def __init__(self, parquet: "pyarrow.parquet.ParquetFile", group: int, columns: tuple[str, ...]) -> None:
        footer = parquet.metadata.row_group(group)
        # Few rows at a time where they are large. Without Arrow's threads: one that still reads when Python ends aborts
        # the process (apache/arrow#45214).
        rows = min(256, max(1, documents.PIECE_BYTES * footer.num_rows // max(1, _text_bytes(footer, columns[0]))))
        self._start = partial(
            parquet.iter_batches, batch_size=rows, row_groups=[group], columns=list(columns), use_threads=False
        )
        self._rewind()

    def _rewind(self) -> None:
        self._batches = self._start()
        self._batch: Any = ()
        self._batch_start = 0

    def batches(self, first: int, count: int) -> "Iterator[pyarrow.RecordBatch]":
        """Yield `count` rows from row `first` of the group on."""
        if first < self._batch_start:
            self._rewind()
        while count > 0:
            end = self._batch_start + len(self._batch)
            if first >= end:
                self._batch_start, self._batch = end, next(self._batches)
                continue
            part = self._batch.slice(first - self._batch_start, count)
            yield part
            first, count = first + len(part), count - len(part)


def _strings(column: Any) -> list[str | bytes | None]:
    """Return a column's texts, and the bytes of those that are none: pyarrow looks at them only here."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values = column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column
        return [_decoded(value) for value in values.cast(pyarrow.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value
