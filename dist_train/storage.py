"""Files that are there as a whole or not at all, whatever happens meanwhile. At the bottom of all rooms."""

import json
import os
from pathlib import Path
from typing import Any

from dist_train.errors import StorageError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader, a kill or a power cut sees the old content or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.new")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write what a command found out as JSON, its folder included. Raises `StorageError` if that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(results, indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another --run.out_dir") from error


def sync(path: Path) -> None:
    """Have the disk itself hold a file or a folder's entries before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
