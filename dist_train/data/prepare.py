"""A folder of token shards with its manifest, whole or not at all: from documents, or from shards made elsewhere."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from dist_train.data.content import FILE as VERIFIED
from dist_train.data.description import FILE as DESCRIPTION
from dist_train.data.description import describe_once
from dist_train.data.from_documents import make_shards
from dist_train.data.journal import Journal
from dist_train.data.manifest import FILE as MANIFEST
from dist_train.data.manifest import (
    Manifest,
    Split,
    require_match,
    source_identity,
    tokenizer_identity,
    verify_written,
)
from dist_train.data.ready_made import fetch_shards
from dist_train.errors import StorageError, UserError
from dist_train.sections import DataSettings
from dist_train.storage import sync

log = logging.getLogger(__name__)


class Prepared(NamedTuple):
    manifest: Manifest
    is_new: bool


def prepare(settings: DataSettings) -> Prepared:
    """Make shards of `data.source` in `data.dir`, unless they are there already; an interrupted attempt is finished.

    The folder appears complete or not at all: work happens beside it and is renamed at the end.
    Raises `UserError` for settings or documents that are wrong, `StorageError` where writing fails,
    `ProcessLostError` if a worker is killed.
    """
    try:
        if existing := find_prepared(settings):
            return Prepared(existing, is_new=False)
        settings.dir.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(settings.dir):
            if existing := find_prepared(settings):  # another process has prepared it meanwhile
                return Prepared(existing, is_new=False)
            return Prepared(_prepare_aside(settings), is_new=True)
    except OSError as error:
        raise StorageError(
            f"cannot write {settings.dir}: {error.strerror or error}; free space or choose another --data.dir, "
            f"the same command then goes on"
        ) from error


def find_prepared(settings: DataSettings) -> Manifest | None:
    """Return the manifest of what is prepared in `data.dir`, or None if the place is free.

    Raises `UserError` if something else is there, or what was prepared with other settings.
    """
    found = Manifest.read(settings.dir)
    if found:
        require_match(found, settings, settings.dir)
    elif settings.dir.exists() and (not settings.dir.is_dir() or any(settings.dir.iterdir())):
        raise UserError(
            f"data.dir: {settings.dir} holds what `prepare` did not write; "
            f"train on it if it is shards, or choose another --data.dir"
        )
    elif settings.dir.name in ("", "..") or settings.dir.is_mount():
        raise UserError(f"data.dir: {settings.dir} cannot be renamed to; give a folder inside it")
    return found


def partial_folder(settings: DataSettings) -> Path:
    """Return where the shards lie until they are complete."""
    folder = settings.dir.resolve()  # a link to an empty folder stays one
    return folder.parent / f".{folder.name}.partial"


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Wait until no other process prepares `folder`. The lock of a process that was killed is free."""
    path = folder.parent / f".{folder.name}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("another process prepares %s; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _prepare_aside(settings: DataSettings) -> Manifest:
    """Work in the partial folder, from what an earlier attempt left there, and give it its name."""
    work = partial_folder(settings)
    work.mkdir(exist_ok=True)
    try:
        made = Manifest.read(work)
        if made:  # all but the name was done when the earlier attempt was killed
            require_match(made, settings, work)
        else:
            made = _take_shards(settings, work) if settings.source == "shards" else make_shards(settings, work)
            described = describe_once(work, made)
            if settings.source == "shards":  # nobody has counted their documents yet
                made = replace(
                    made,
                    train=replace(made.train, documents=described["train"]["documents"]),
                    val=replace(made.val, documents=described["val"]["documents"]),
                )
            made.write(work)
        verify_written(work, made)  # what an earlier attempt wrote may have been damaged since
        _keep_only(work, {MANIFEST, DESCRIPTION, VERIFIED, *(shard.file for shard in made.shards)})
        sync(work)
        os.replace(work, settings.dir.resolve())
        sync(work.parent)
        return made
    finally:
        if work.exists() and not _is_worth_keeping(work, settings):
            shutil.rmtree(work)


def _take_shards(settings: DataSettings, work: Path) -> Manifest:
    """Return what ready-made shards are, all of them in `work`."""
    fetched = fetch_shards(settings, work)
    splits = {
        name: Split(sum(shard.tokens for shard in shards), 0, shards)
        for name, shards in (("train", fetched.train), ("val", fetched.val))
    }
    source = {**source_identity(settings), "revision": fetched.revision}
    return Manifest(tokenizer_identity(settings.tokenizer), source, **splits)


def _is_worth_keeping(work: Path, settings: DataSettings) -> bool:
    """Tell whether another attempt could go on from here."""
    if (work / MANIFEST).exists():
        return True
    if settings.source == "shards":  # what was downloaded of them; what was linked is linked again at once
        return str(settings.path).startswith("hub:") and any(path.is_file() for path in work.rglob("*"))
    return Journal.is_in(work)


def _keep_only(folder: Path, names: set[str]) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()
