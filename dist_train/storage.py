"""Files that are there as a whole or not at all, whatever happens meanwhile. Imports nothing, so every room may."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader, a kill or a power cut sees the old content or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.new")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def sync(path: Path) -> None:
    """Have the disk itself hold a file or a folder's entries before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
