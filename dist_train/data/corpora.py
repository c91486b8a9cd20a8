"""Where documents come from. Each source is one function that returns a `Corpus`, read lazily and in a fixed order."""

import ast
import hashlib
import importlib.metadata
import json
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from dist_train.data.documents import Corpus, Document, gather
from dist_train.data.files import open_files
from dist_train.data.hub import open_fineweb
from dist_train.sections import DataSettings


def open_corpus(settings: DataSettings) -> Corpus:
    """Return the corpus that `data.source` names, all of it: bounds are applied to its tokens.

    Raises `UserError` where the source cannot be read; for some sources only while reading.
    """
    sources: dict[str, Callable[[DataSettings], Corpus]] = {
        "python-docs": _python_docs,
        "python-web": _python_web,
        "files": open_files,
        "fineweb": open_fineweb,
        "fineweb-edu": open_fineweb,
    }
    return sources[settings.source](settings)


# ---- embedded: real text that every Python has -----------------------------------------------------------------------


def _python_docs(settings: DataSettings) -> Corpus:
    """The language reference that ships with every CPython as `pydoc_data.topics`, as one text."""
    from pydoc_data.topics import topics

    # Topics repeat each other (`specialnames` holds all of `customization`): each paragraph counts once,
    # or the held-out end of the text would be known from training.
    # Without the newlines around it, because the last one of a topic has one more.
    paragraphs = dict.fromkeys(part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n"))
    text = "\n\n".join(paragraphs)
    pieces = gather([Document("pydoc_data.topics", text)])
    return Corpus(pieces, is_single_text=True, revision=sys.version.split()[0])


def _python_web(settings: DataSettings) -> Corpus:
    """READMEs of what is installed and docstrings of the standard library: many authors, many styles."""
    readmes = _readmes()
    version = [sys.version, *(document.id for document in readmes)]
    return Corpus(
        gather(chain(readmes, _docstrings(Path(sysconfig.get_path("stdlib"))))),
        revision=hashlib.sha256(json.dumps(version).encode()).hexdigest()[:16],
    )


def _readmes() -> list[Document]:
    found = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        text = str(metadata.get_payload()) if metadata else ""  # type: ignore[attr-defined]
        if len(text) > 200:
            found[f"{metadata['Name']}-{metadata['Version']}"] = text
    return [Document(f"readme:{name}", found[name]) for name in sorted(found)]


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
