"""Where documents come from. Each source is one function that returns a `Corpus`, read lazily and in a fixed order."""

import ast
import glob
import importlib.metadata
import json
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dist_train.config import DataSettings
from dist_train.errors import UserError


@dataclass(frozen=True)
class Document:
    id: str
    """Names the document wherever it is read from: the train/val split hangs on it."""
    text: str


@dataclass(frozen=True)
class Corpus:
    documents: Iterable[Document]
    is_single_text: bool = False
    """One text, such as a book: its end is held out, not some of its documents."""
    revision: str | None = None
    """Which version of the source this is, where the source has versions."""


def open_corpus(settings: DataSettings) -> Corpus:
    """Return the corpus that `data.source` names, cut to `data.max_documents`.

    Raises `UserError` where the source cannot be read; for some sources only while iterating.
    """
    sources: dict[str, Callable[[DataSettings], Corpus]] = {
        "python-docs": _python_docs,
        "python-web": _python_web,
        "files": _files,
        "fineweb": _fineweb,
    }
    corpus = sources[settings.source](settings)
    limited = islice(corpus.documents, settings.max_documents)
    return Corpus(limited, corpus.is_single_text, corpus.revision)


# ---- embedded: real text that every Python has -----------------------------------------------------------------------


def _python_docs(settings: DataSettings) -> Corpus:
    """The language reference that ships with every CPython as `pydoc_data.topics`, as one text."""
    from pydoc_data.topics import topics

    # Topics repeat each other (`specialnames` holds all of `customization`): each paragraph counts once,
    # or the held-out end of the text would be known from training.
    paragraphs = dict.fromkeys(paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n"))
    text = "\n\n".join(paragraphs)
    return Corpus([Document("pydoc_data.topics", text)], is_single_text=True, revision=sys.version.split()[0])


def _python_web(settings: DataSettings) -> Corpus:
    """READMEs of what is installed and docstrings of the standard library: many authors, many styles."""

    def documents() -> Iterator[Document]:
        yield from _readmes()
        yield from _docstrings(Path(sysconfig.get_path("stdlib")))

    return Corpus(documents())


def _readmes() -> Iterator[Document]:
    found = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        text = str(metadata.get_payload()) if metadata else ""  # type: ignore[attr-defined]
        if len(text) > 200:
            found[f"{metadata['Name']}-{metadata['Version']}"] = text
    for name in sorted(found):
        yield Document(f"readme:{name}", found[name])


def _docstrings(stdlib: Path) -> Iterator[Document]:
    """One document per module of the standard library: its docstring and those of its classes and functions."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "pydoc_data", "lib2to3", "idlelib"}
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        if skipped & set(name.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some installations ship templates and broken examples
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        text = "\n\n".join(docstring for docstring in docstrings if docstring)
        if len(text) > 200:
            yield Document(f"docstrings:{name.as_posix()}", text)


# ---- local files -----------------------------------------------------------------------------------------------------


def _files(settings: DataSettings) -> Corpus:
    """Files by path, folder or glob, in the order of their names: a `.txt` is one document, a row elsewhere is one."""
    assert settings.path is not None
    readers = {".txt": _text_file, ".jsonl": _json_lines, ".parquet": _parquet}
    pattern = Path(settings.path).expanduser()
    found = [str(path) for path in pattern.rglob("*")] if pattern.is_dir() else glob.glob(str(pattern), recursive=True)
    paths = sorted(path for path in map(Path, found) if path.suffix in readers and path.is_file())
    if not paths:
        raise UserError(f"data.path: no .txt, .jsonl or .parquet file at {settings.path}; give a file, folder or glob")

    def documents() -> Iterator[Document]:
        for path in paths:
            for number, text in enumerate(readers[path.suffix](path, settings.text_column)):
                yield Document(f"{path.name}:{number}", text)

    return Corpus(documents(), is_single_text=len(paths) == 1 and paths[0].suffix == ".txt")


def _text_file(path: Path, column: str) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; convert it, e.g. with iconv") from None


def _json_lines(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                raise UserError(f"{path}, line {number} is not JSON; mend or remove it") from None
            if not isinstance(record, dict) or not isinstance(record.get(column), str):
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(
                    f"{path}, line {number} has no text in column {column!r} (it has: {keys}); set data.text_column"
                )
            yield record[column]


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise UserError(f"{path} has no column {column!r} (it has: {names}); set data.text_column")
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path} as parquet: {error}; fetch it again") from None


# ---- the hub ---------------------------------------------------------------------------------------------------------


def _fineweb(settings: DataSettings) -> Corpus:
    """FineWeb (Penedo et al. 2024, ODC-By 1.0), streamed: only the documents that are read are downloaded."""
    try:
        import datasets
    except ImportError:
        raise UserError("data.source: fineweb needs the package `datasets`; pip install datasets") from None

    def documents() -> Iterator[Document]:
        try:
            stream = datasets.load_dataset("HuggingFaceFW/fineweb", name=settings.subset, split="train", streaming=True)
            for row in stream:
                yield Document(row["id"], row[settings.text_column])
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot stream FineWeb's {settings.subset} from the hub: {reason}; connect to the internet, or read "
                f"local files with --data.source=files --data.path=…"
            ) from None

    return Corpus(documents())
