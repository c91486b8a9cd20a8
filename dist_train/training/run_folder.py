"""The folder of a run on disk: where its parts lie, and what says which run it is and how it ended."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import dist_train
from dist_train.config import Settings
from dist_train.errors import DistTrainError, StoppedError, StorageError, UserError
from dist_train.runtime.process import Process
from dist_train.storage import write_atomically

# For so long a process that was just killed may hold what it claimed.
_PREDECESSOR_SECONDS = 2.0


class RunFolder:
    """Paths of a run folder, and the two files that say what runs there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.environment = root / "environment.json"
        self.status = root / "run_status.json"
        self.metrics = root / "metrics.jsonl"
        self.tensorboard = root / "tensorboard"
        self.checkpoints = root / "checkpoints"
        self.samples = root / "samples"
        self.plots = root / "plots"
        self.profile = root / "profile"
        self.wandb_id = root / "wandb_id.txt"

    def has_run(self) -> bool:
        """Tell whether a run has written here before."""
        return self.metrics.exists() or self.checkpoints.exists()

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other runs out of the folder within. The kernel frees what a process claimed that is gone.

        Raises `UserError` naming the process that has it, `StorageError` if the folder cannot be written.
        """
        lock, holder = FileLock(self.root / ".lock"), self.root / ".lock.json"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=_PREDECESSOR_SECONDS)
            write_atomically(holder, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        except Timeout:
            raise UserError(
                f"run.out_dir: {self.root} is in use by {_read_holder(holder)}; "
                f"wait for it, or choose another --run.out_dir"
            ) from None
        except OSError as error:
            raise self._not_writable(error) from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                holder.unlink(missing_ok=True)
            lock.release()

    def _not_writable(self, error: OSError) -> StorageError:
        return StorageError(f"run.out_dir: cannot write {self.root} ({error.strerror}); choose another --run.out_dir")

    def create(self, settings: Settings, process: Process) -> None:
        """Make the folders and write what this run is: settings as resolved, versions, devices, command line."""
        try:
            for folder in (self.tensorboard, self.checkpoints, self.samples, self.plots):
                folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, f"# As resolved for this run.\n{settings.to_yaml()}")
            write_atomically(self.environment, json.dumps(_environment(process), indent=2) + "\n")
        except OSError as error:
            raise self._not_writable(error) from error

    def write_status(self, status: str, last_step: int, exit_status: int | None = None) -> None:
        """Write `run_status.json`: running, done, failed or preempted, the exit status and the last finished update."""
        values = {"status": status, "exit_status": exit_status, "last_step": last_step, "time": _now()}
        write_atomically(self.status, json.dumps(values) + "\n")

    def write_end(self, last_step: int, exit_status: int) -> None:
        """Write `run_status.json` of a run that has ended: the exit status says whether it is done."""
        words = {0: "done", StoppedError.exit_status: "preempted"}
        self.write_status(words.get(exit_status, "failed"), last_step, exit_status)

    def note_end(self, exit_status: int) -> None:
        """Have `run_status.json` say how the run ended, where its process was killed before it could itself.

        Nothing is written where another run has the folder by now, or the disk is what failed.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, DistTrainError), self.claimed():
            values = json.loads(self.status.read_text(encoding="utf-8"))
            if values["status"] == "running":
                self.write_end(values["last_step"], exit_status)

    def last_sample(self) -> Path | None:
        """Return the file of the sample that the run ended with; an end on request takes none."""
        step = json.loads(self.status.read_text(encoding="utf-8"))["last_step"]
        path = self.sample(step)
        return path if path.exists() else None

    def sample(self, step: int) -> Path:
        """Return the file of the sample taken after `step` updates."""
        return self.samples / f"step-{step:06d}.txt"

    def out_of_memory(self, rank: int) -> Path:
        """Return the file of what filled the memory of process `rank`."""
        return self.root / f"out_of_memory-{rank}.pickle"

    def keep_metrics_until(self, step: int) -> None:
        """Drop lines of `metrics.jsonl` behind `step`: a resumed run makes those steps again."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_bytes().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                continue  # a kill tore the last line
        write_atomically(self.metrics, b"".join(kept))


def _read_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def code_hash() -> str:
    """Return a hash of the package's source: two processes with one hash run the same code, committed or not."""
    digest = hashlib.sha256()
    package = Path(dist_train.__path__[0])
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _environment(process: Process) -> dict[str, Any]:
    packages = ("torch", "numpy", "pydantic", "tiktoken", "safetensors", "tensorboard")
    is_cuda = process.device.type == "cuda"
    return {
        "started": _now(),
        "command": sys.argv,
        "commit": _commit(),
        "code_sha256": code_hash(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "world_size": process.world_size,
        "device": torch.cuda.get_device_name(process.device) if is_cuda else process.device.type,
        "cuda": torch.version.cuda,
        "cpu_count": os.cpu_count(),
        "cpu_threads_per_process": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """Return the checkout's commit, marked where files differ from it, or None outside of a checkout."""
    try:
        command = ["git", "-C", dist_train.__path__[0], "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
