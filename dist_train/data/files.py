"""Local files as a corpus: `.txt` (a file is a document), `.jsonl` and `.parquet` (a row is one), by path or glob."""

import glob
import hashlib
import io
import json
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dist_train.data import documents
from dist_train.data.documents import Corpus, Document, Piece, Texts, Unreadable, gather
from dist_train.data.parquet import Rows, row_pieces
from dist_train.data.tokenizer import last_cut
from dist_train.errors import UserError
from dist_train.sections import DataSettings

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def open_files(settings: DataSettings) -> Corpus:
    """Return the corpus of the files at `data.path`, in the order of their names.

    Raises `UserError` if there is none; while reading if one is not what its name says.
    """
    assert settings.path is not None
    with _naming(Path(settings.path)):
        root, found = _find(Path(settings.path).expanduser())
        paths = sorted(path for path in found if _kind(path) and path.is_file())
    if not paths:
        raise UserError(
            f"data.path: no .txt, .jsonl (.gz, .zst) or .parquet file at {settings.path}; give a file, folder or glob"
        )
    # Below their folder, because the same name may be there many times, and the split hangs on it.
    names = [path.relative_to(root).as_posix() for path in paths]
    stats = [path.stat() for path in paths]
    version = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True)]
    return Corpus(
        _pieces(paths, names, settings.text_column),
        size=sum(stat.st_size for stat in stats),
        is_single_text=len(paths) == 1 and _kind(paths[0]) == ".txt",
        revision=hashlib.sha256(json.dumps(version).encode(errors="surrogatepass")).hexdigest()[:16],
    )


def _find(path: Path) -> tuple[Path, list[Path]]:
    """Return the folder that a file, folder or glob is about, and all that is found there."""
    if path.is_dir():
        return path, _glob(f"{glob.escape(str(path))}/**/*")
    if path.exists():  # whatever its name looks like: a [1] in it is no pattern then
        return path.parent, [path]
    root = path.parent
    while glob.has_magic(str(root)):
        root = root.parent
    return root, _glob(str(path))


def _glob(pattern: str) -> list[Path]:
    """Return what a pattern finds: also behind links, and nothing whose name begins with a dot."""
    return [Path(found) for found in glob.glob(pattern, recursive=True)]


def _kind(path: Path) -> str | None:
    """Return what a file is by its name, `.txt`, `.jsonl` or `.parquet`, or None for what is not read."""
    suffixes = path.suffixes[-2:] if path.suffix in _COMPRESSIONS else path.suffixes[-1:]
    kind = suffixes[0] if suffixes else ""
    return kind if kind == ".jsonl" or (kind in (".txt", ".parquet") and len(suffixes) == 1) else None


def _pieces(paths: list[Path], names: list[str], column: str) -> Iterator[Piece]:
    for kind, files in groupby(zip(paths, names, strict=True), key=lambda file: _kind(file[0])):
        if kind == ".txt":
            yield from gather(part for path, name in files for part in _text_parts(path, name))
            continue
        for path, name in files:
            with _naming(path):
                if kind == ".jsonl":
                    yield from _line_pieces(path, name, column)
                else:
                    for rows in row_pieces(str, str(path), name, path.stat().st_size, column):
                        yield _LocalRows(path, rows, rows.size)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file that cannot be read."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}; mend it or fetch it again") from None


# ---- .txt ------------------------------------------------------------------------------------------------------------


def _text_parts(path: Path, name: str) -> Iterator[Document | Unreadable]:
    """Yield one text as parts that fit into pieces, cut where the tokens are those of the whole."""
    try:
        with _naming(path):
            if path.stat().st_size > documents.PIECE_BYTES:
                deque(_blocks(path), maxlen=0)  # is all of it UTF-8? The shards must not end up with half of it
            document = Document(f"{name}:0", "")
            blocks = _blocks(path)
            text = next(blocks, "")
            for block in blocks:
                cut = last_cut(text)
                yield document._replace(text=text[:cut])
                document, text = document._replace(continues=True), text[cut:] + block
            yield document._replace(text=text)
    except UnicodeDecodeError:
        yield Unreadable(name, "is not UTF-8 (convert it, e.g. with iconv)")


def _blocks(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        yield from iter(lambda: file.read(documents.PIECE_BYTES), "")


# ---- .jsonl ----------------------------------------------------------------------------------------------------------


class _Lines(NamedTuple):
    """Whole lines of a file. They travel with the piece: a compressed file cannot be entered in its middle."""

    name: str
    first_line: int
    lines: bytes
    column: str
    size: float

    def read(self, first: int = 0) -> Iterator[Document | Unreadable]:
        """Yield a document for each line that is not blank, but for the `first`."""
        lines = enumerate(self.lines.split(b"\n"), start=self.first_line)
        filled = ((number, line) for number, line in lines if line and not line.isspace())
        for number, line in islice(filled, first, None):
            yield self._document(number, line)

    def _document(self, number: int, line: bytes) -> Document | Unreadable:
        where = f"{self.name}, line {number}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return Unreadable(where, "is not UTF-8")
        except (ValueError, RecursionError):
            return Unreadable(where, "is not JSON")
        if not isinstance(record, dict):
            return Unreadable(where, "is no JSON object")
        text = record.get(self.column)
        if isinstance(text, str):
            document_id = record.get("id")
            return Document(document_id if isinstance(document_id, str) else f"{self.name}:{number - 1}", text)
        keys = ", ".join(record)
        if number == 1 and text is None and self.column not in record:  # then it will be so on every other line
            raise UserError(f"{self.name} has no column {self.column!r} (it has: {keys}); set data.text_column")
        return Unreadable(where, f"has no text in column {self.column!r} (it has: {keys})")


def _line_pieces(path: Path, name: str, column: str) -> Iterator[_Lines | Texts]:
    with path.open("rb") as file:
        lines = _decompressed(file, path)
        number, position = 1, 0
        while data := lines.read(documents.PIECE_BYTES):
            data += lines.readline(documents.LONGEST_BYTES)
            is_torn = len(data) > documents.LONGEST_BYTES and not data.endswith(b"\n")
            if is_torn:
                data, rest = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
                while rest and not rest.endswith(b"\n"):
                    rest = lines.readline(documents.LONGEST_BYTES)
            yield _Lines(name, number, data, column, file.tell() - position)
            number, position = number + data.count(b"\n"), file.tell()
            if is_torn:
                longest = f"is longer than {documents.LONGEST_BYTES // 10**6} MB"
                yield Texts((Unreadable(f"{name}, line {number}", longest),), 0)
                number += 1


def _decompressed(file: BinaryIO, path: Path) -> BinaryIO:
    import pyarrow

    compression = _COMPRESSIONS.get(path.suffix)
    if compression is None:
        return file
    return io.BufferedReader(pyarrow.CompressedInputStream(file, compression), documents.PIECE_BYTES)


# ---- .parquet --------------------------------------------------------------------------------------------------------


class _LocalRows(NamedTuple):
    """Rows of a file on this machine."""

    path: Path
    rows: Rows
    size: float

    def read(self, first: int = 0) -> Iterator[Document | Unreadable]:
        """Yield the documents of all rows but the `first`. Raises `UserError` for a damaged file."""
        with _naming(self.path):
            yield from self.rows.read(first)
