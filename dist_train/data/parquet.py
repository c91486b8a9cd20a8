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

    def read(self) -> list[Document | Unreadable]:
        """Return all rows' documents. Raises what pyarrow and the file raise."""
        table = _group_rows(self.open_file, self.file, self.group, self.columns).take(self.first_row, self.n_rows)
        texts = table.column(0).to_pylist()
        ids = table.column(1).to_pylist() if len(self.columns) > 1 else [None] * len(texts)
        number = self.rows_before + self.first_row
        return [self._document(number + i, text, id_) for i, (text, id_) in enumerate(zip(texts, ids, strict=True))]

    def _document(self, row: int, text: str | None, document_id: object) -> Document | Unreadable:
        if text is None:
            return Unreadable(f"{self.name}, row {row}", "has no text")
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

    if column not in schema.names:
        raise UserError(f"{name} has no column {column!r} (it has: {', '.join(schema.names)}); set data.text_column")
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
        # Without Arrow's threads: one that still reads when Python ends aborts the process (apache/arrow#45214).
        self._start = partial(
            parquet.iter_batches, batch_size=256, row_groups=[group], columns=list(columns), use_threads=False
        )
        self._columns = columns
        self._rewind()

    def _rewind(self) -> None:
        self._batches = self._start()
        self._next_row = 0
        self._rest: Any = None
        """What the last piece left of its last batch."""

    def take(self, first: int, count: int) -> "pyarrow.Table":
        """Return `count` rows from row `first` of the group on, the columns in the order asked for."""
        import pyarrow

        if first < self._next_row:
            self._rewind()
        taken = []
        while count:
            batch = self._rest if self._rest is not None else next(self._batches)
            skipped = min(max(0, first - self._next_row), len(batch))
            part = batch.slice(skipped, count)
            self._next_row += skipped + len(part)
            self._rest = batch.slice(skipped + len(part))
            if not len(self._rest):
                self._rest = None
            if len(part):
                taken.append(part)
                count -= len(part)
        return pyarrow.Table.from_batches(taken).select(list(self._columns))
