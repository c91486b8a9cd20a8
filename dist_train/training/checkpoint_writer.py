"""Checkpoints written beside the training: a step waits for a copy in memory, the disk is a thread's affair."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dist_train.errors import StorageError
from dist_train.runtime.parallel import Replica
from dist_train.storage import require_space, sync
from dist_train.training.checkpoint import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    Progress,
    checkpoints_in,
    learning_like,
    learning_of,
    step_of,
)
from dist_train.training.snapshot import Snapshot

log = logging.getLogger(__name__)

# Room for headers, state and manifest, and for what the run's record grows by until then.
_BESIDE_THE_TENSORS_BYTES = 8 << 20


class CheckpointWriter:
    """Saves a run into `folder` and keeps the newest `keep` checkpoints. Only the first process's is opened.

    To save is to `wait` for the write before, to `copy` on all processes, and to `write`.

    A context that ends when everything is written. Nothing but `step-<digits>` and what a kill left of one is deleted.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._snapshots: dict[str, Snapshot] = {}
        self._grad_scaler: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._write: Future[None] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()
        elif self.failure not in (None, error):
            log.warning("%s", self.failure)

    def open(self, replica: Replica, optimizer: torch.optim.Optimizer) -> None:
        """Remove what a kill left of a save, and raise `StorageError` unless there is room for the first one."""
        self._snapshots = {
            MODEL: Snapshot(replica.weights()),
            OPTIMIZER: Snapshot(learning_like(replica, optimizer)),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                if re.fullmatch(r"\.step-[0-9]+\.partial", path.name) and not path.is_symlink():
                    shutil.rmtree(path)
        except OSError as error:
            raise StorageError(f"cannot write {self._folder}: {error}; choose another --run.out_dir") from error
        require_space(self._folder, self._needed_bytes)
        # The first copy would wait while the kernel brings in a page at a time: four times as long as the others.
        self._write = self._thread.submit(self._clear)

    @property
    def failure(self) -> StorageError | None:
        """What the last write ended in, if it has ended and badly. Waits for nothing."""
        error = self._write.exception() if self._write and self._write.done() else None
        return error if isinstance(error, StorageError) else None

    def wait(self) -> None:
        """Return when nothing is being written any more. Raises `StorageError` if the last write failed."""
        if self._write:
            self._write.result()

    def copy(self, replica: Replica, optimizer: torch.optim.Optimizer) -> None:
        """Copy what is to be saved; return as soon as network and optimizer may change. On all processes together.

        To be called when nothing is being written.
        """
        if self._snapshots and not optimizer.state:
            # float16 has left out every update so far: the optimizer has yet to make its state, of zeros.
            self._snapshots[OPTIMIZER].clear()
        for file, tensors in ((MODEL, replica.weights()), (OPTIMIZER, learning_of(replica, optimizer))):
            for name in sorted(tensors):  # one order for all: a resumed optimizer's is that of the file's reader
                whole = replica.gather(tensors[name])
                if self._snapshots:
                    self._snapshots[file].copy(name, whole)
        if replica.device_type == "cuda":
            torch.cuda.synchronize()
        self._grad_scaler = replica.scaler.state_dict()

    def write(self, progress: Progress, is_last: bool = False) -> None:
        """Have what was copied written as `step-<number>` and older ones deleted, beside the training.

        Unless this is the last one of the run, this write also fails if it leaves no room for the next: right after a
        save nothing is lost by stopping.
        """
        state = {**progress.model_dump(mode="json"), "grad_scaler": self._grad_scaler}
        needed_bytes = 0 if is_last else self._needed_bytes
        self._write = self._thread.submit(self._finish, progress.step, state, needed_bytes)

    @property
    def _needed_bytes(self) -> int:
        """Room that a checkpoint takes while it is written: the ones before it are deleted behind it."""
        return sum(snapshot.n_bytes for snapshot in self._snapshots.values()) + _BESIDE_THE_TENSORS_BYTES

    def _clear(self) -> None:
        for snapshot in self._snapshots.values():
            snapshot.clear()

    def _finish(self, step: int, state: dict[str, Any], needed_bytes: int) -> None:
        target = self._folder / f"step-{step:06d}"
        try:
            _write_checkpoint(target, self._snapshots, state)
            for old in superseded(self._folder, step, self._keep):
                shutil.rmtree(old)
        except OSError as error:
            raise StorageError(
                f"cannot save {target}: {error}; free space, or move away what is in its place, and start again"
            ) from error
        require_space(self._folder, needed_bytes)


def superseded(folder: Path, step: int, keep: int) -> list[Path]:
    """Return the checkpoints older than the newest `keep` up to `step`, and later ones, which the run has left behind.

    Those were damaged, or it would have gone on from them: counted among the newest they would push out good ones.
    """
    found = [path for path in checkpoints_in(folder) if path.is_dir() and not path.is_symlink()]
    ahead = [path for path in found if step_of(path) > step]
    return ahead + found[len(ahead) + keep :]


def _write_checkpoint(target: Path, snapshots: Mapping[str, Snapshot], state: dict[str, Any]) -> None:
    """Write a checkpoint aside, sync and rename it: a kill at any moment leaves whole checkpoints alone."""
    aside = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        hashes = {name: _write_hashed(aside / name, snapshot.chunks()) for name, snapshot in snapshots.items()}
        hashes[STATE] = _write_hashed(aside / STATE, [_json(state)])
        _write_hashed(aside / MANIFEST, [_json({"sha256": hashes})])
        sync(aside)
        shutil.rmtree(target, ignore_errors=True)  # a damaged one, or the run would have gone on from it
        os.replace(aside, target)
        sync(target.parent)
    except OSError:
        # What else is written on a full disk, the record of this failure above all, needs the room.
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _write_hashed(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write and sync a file, and return the sha256 of what was written: from memory, not from what the disk says."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
