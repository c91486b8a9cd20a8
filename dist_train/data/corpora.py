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
from typing import Any

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
    # Without the newlines around it, because the last one of a topic has one more.
    paragraphs = dict.fromkeys(part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n"))
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
    root, found = _find(Path(settings.path).expanduser())
    paths = sorted(path for path in found if path.suffix in readers and path.is_file())
    if not paths:
        raise UserError(f"data.path: no .txt, .jsonl or .parquet file at {settings.path}; give a file, folder or glob")

    def documents() -> Iterator[Document]:
        for path in paths:
            # Below its folder, because the same name may be there many times, and the split hangs on it.
            name = path.relative_to(root).as_posix()
            try:
                for number, text in enumerate(readers[path.suffix](path, settings.text_column)):
                    if text is not None:
                        yield Document(f"{name}:{number}", text)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error}; mend or remove it") from None

    return Corpus(documents(), is_single_text=len(paths) == 1 and paths[0].suffix == ".txt")


def _find(path: Path) -> tuple[Path, list[Path]]:
    """Return the folder that a file, folder or glob is about, and all that is found there."""
    if path.is_dir():
        return path, list(path.rglob("*"))
    if path.exists():  # whatever its name looks like: a [1] in it is no pattern then
        return path.parent, [path]
    root = path.parent
    while glob.has_magic(str(root)):
        root = root.parent
    return root, [Path(found) for found in glob.glob(str(path), recursive=True)]


# Readers yield one text for each row, None where the row has none: a row's number stays its name.


def _text_file(path: Path, column: str) -> Iterator[str | None]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; convert it, e.g. with iconv") from None


def _json_lines(path: Path, column: str) -> Iterator[str | None]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                yield None
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise UserError(f"{where} is not UTF-8; convert it, e.g. with iconv") from None
            except ValueError:
                raise UserError(f"{where} is not JSON; mend or remove it") from None
            if not isinstance(record, dict) or not isinstance(record.get(column, 0), str | None):
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(f"{where} has no text in column {column!r} (it has: {keys}); set data.text_column")
            yield record[column]


def _parquet(path: Path, column: str) -> Iterator[str | None]:
    import pyarrow

    try:
        for text, _ in _parquet_rows(path, str(path), column, column):
            yield text
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {path} as parquet: {reason}; fetch it again") from None


def _parquet_rows(file: Any, name: str, text_column: str, id_column: str) -> Iterator[tuple[str | None, str]]:
    """Yield text and id of each row of a parquet file, which is a path or an open file called `name`."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        if text_column not in names:
            raise UserError(f"{name} has no column {text_column!r} (it has: {', '.join(names)}); set data.text_column")
        for batch in parquet.iter_batches(batch_size=256, columns=[text_column, id_column]):
            texts, ids = batch.column(text_column).to_pylist(), batch.column(id_column).to_pylist()
            for text in texts:
                if not isinstance(text, str | None):
                    kind = type(text).__name__
                    raise UserError(f"{name}: column {text_column!r} holds {kind}, not text; set data.text_column")
            yield from zip(texts, ids, strict=True)


# ---- the hub ---------------------------------------------------------------------------------------------------------

_FINEWEB = "HuggingFaceFW/fineweb"


def _fineweb(settings: DataSettings) -> Corpus:
    """FineWeb (Penedo et al. 2024, ODC-By 1.0), streamed: only the documents that are read are downloaded.

    `datasets` says which files a subset has, but does not read them: a process that stops within its stream dies of
    SIGABRT on its way out, all work done (huggingface/datasets#7566, apache/arrow#45214).
    """
    try:
        from datasets import load_dataset_builder
        from huggingface_hub import HfFileSystem, get_hf_file_metadata, hf_hub_url
    except ImportError:
        raise UserError("data.source: fineweb needs the package `datasets`; pip install datasets") from None
    try:
        # One small request ahead: `datasets` tries for half a minute before it says that there is no hub.
        card = get_hf_file_metadata(hf_hub_url(_FINEWEB, "README.md", repo_type="dataset"), timeout=5)
        urls = load_dataset_builder(_FINEWEB, name=settings.subset).config.data_files["train"]
    except Exception as error:  # what the hub's client and its HTTP library raise has no base class in common
        raise _hub_error(settings, error) from None

    def documents() -> Iterator[Document]:
        for url in urls:
            try:
                with HfFileSystem().open(url) as file:
                    for text, document_id in _parquet_rows(file, url, settings.text_column, "id"):
                        if text is not None:
                            yield Document(document_id, text)
            except UserError:
                raise
            except Exception as error:
                raise _hub_error(settings, error) from None

    return Corpus(documents(), revision=card.commit_hash)


def _hub_error(settings: DataSettings, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    if "Available: " in reason:
        return UserError(f"data.subset: FineWeb has no {settings.subset!r}; {reason[reason.index('Available: ') :]}")
    return UserError(
        f"cannot stream FineWeb's {settings.subset} from the hub: {reason[:200]}; connect to the internet, or read "
        f"local files with --data.source=files --data.path=…"
    )
