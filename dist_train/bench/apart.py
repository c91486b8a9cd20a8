"""One way from text to tokens in a process of its own: how long that takes, and how much memory."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from dist_train.bench.shard_ways import Tokenized
from dist_train.sections import DataSettings


class Block(NamedTuple):
    """One way taken once."""

    tokens: int
    seconds: float
    """From its first line to its last."""
    process_seconds: float
    """From starting Python to its end."""
    cpu_seconds: float
    """Of all its processes, start included: what is left to compare where other programs keep the machine busy."""
    peak_bytes: int | None
    """The most that its processes held together; what they share counts once for each. None: there is no /proc."""


def run_apart(way: Callable[[DataSettings], Tokenized], data: DataSettings) -> Block:
    """Take one way in a new process and return what was measured of it. Raises what the way raises.

    So neither torch nor what an earlier block left behind counts, and starting costs what it costs a command.
    """
    started, cpu_started = time.perf_counter(), _children_cpu_seconds()
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process,
        PeakMemory(process.submit(os.getpid).result()) as memory,
    ):
        tokens, seconds = process.submit(way, data).result()
    cpu_seconds = _children_cpu_seconds() - cpu_started
    return Block(tokens, seconds, time.perf_counter() - started, cpu_seconds, memory.peak_bytes)


def _children_cpu_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


class PeakMemory:
    """Watches how much memory a process and all below it hold together; a context manager."""

    def __init__(self, pid: int, interval_seconds: float = 0.05) -> None:
        self.peak_bytes = family_bytes(pid)
        """The most so far; None where there is no /proc."""
        self._pid = pid
        self._interval_seconds = interval_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while self.peak_bytes is not None and not self._done.wait(self._interval_seconds):
            self.peak_bytes = max(self.peak_bytes, family_bytes(self._pid) or 0)


def family_bytes(root: int) -> int | None:
    """Return the resident memory of the process `root` and all below it, or None where there is no /proc."""
    children: dict[int, list[int]] = {}
    resident: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Behind the program's name, which may hold anything: state, parent, … and as the 22nd the resident pages.
            values = entry.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        pid = int(entry.parent.name)
        children.setdefault(int(values[1]), []).append(pid)
        resident[pid] = int(values[21]) * os.sysconf("SC_PAGE_SIZE")
    if not resident:
        return None
    family = [root]
    for pid in family:  # grows while it is walked
        family += children.get(pid, [])
    return sum(resident.get(pid, 0) for pid in family)
