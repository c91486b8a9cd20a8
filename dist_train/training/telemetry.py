"""The record of a run: JSON lines, what shows them, console, status. The first process writes it; elsewhere: null."""

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from dist_train.config import Settings
from dist_train.errors import StorageError
from dist_train.training.console import Display
from dist_train.training.run_folder import RunFolder
from dist_train.training.writers import open_writers

# How writers call each number in a train line.
_TRAIN_SCALARS = {
    "train/loss": "loss",
    "train/lr": "lr",
    "train/grad_norm": "grad_norm",
    "train/noise_scale": "noise_scale",
    "perf/tokens_per_second": "tokens_per_second",
    "perf/supervised_tokens_per_second": "supervised_tokens_per_second",
    "perf/mfu": "mfu",
}


class NullRecord:
    """What the other processes write: nothing."""

    failure: StorageError | None = None
    """What kept something from being written. The run then ends, when it has saved what it can."""

    def __enter__(self) -> "NullRecord":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""

    def advance(self, step: int) -> None:
        """Show that `step` updates are done, or at least asked for: a GPU may still be at them."""

    def doing(self, what: str) -> None:
        """Show what takes the time now, beside the bar."""

    def train(self, lines: list[dict[str, Any]]) -> None:
        """Write the lines of some finished updates, as the README's run folder describes them."""

    def evaluation(self, step: int, result: dict[str, Any]) -> None:
        """Write held-out losses after `step` updates."""

    def impossible(self, step: int, what: str, ranks: list[int], samples: list[list[int]]) -> None:
        """Write which samples, first to last on each of `ranks`, made a loss or gradient that cannot be."""

    def sample(self, step: int, text: str) -> None:
        """Write generated text."""

    def sync(self) -> None:
        """Have the disk itself hold all lines so far: a checkpoint must not outlive the lines of its steps."""


def _noting_failure(write: Callable[..., None]) -> Callable[..., None]:
    """Have a method of `Record` keep an error of the disk as `failure`: all processes have to end by it together."""

    @functools.wraps(write)
    def noted(record: "Record", *arguments: Any) -> None:
        try:
            write(record, *arguments)
        except OSError as error:
            where = record.folder.root
            record.failure = StorageError(
                f"cannot write {where}: {error.strerror}; free space, the same command goes on"
            )

    return noted


def _exit_status(error: BaseException | None) -> int:
    if error is None:
        return 0
    return getattr(error, "exit_status", 130 if isinstance(error, KeyboardInterrupt) else 1)


def _leave_to_main_thread(arguments: threading.ExceptHookArgs) -> None:
    """Keep a thread of TensorBoard's or rich's from printing its traceback where disk or terminal fail.

    Whoever uses them next meets the same error, and says it in a line.
    """
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)


class Record(NullRecord):
    """Writes everything there is to see into the run folder, and the most of it to the console."""

    def __init__(self, folder: RunFolder, settings: Settings, start_step: int) -> None:
        self.folder, self._step, self._max_iters = folder, start_step, settings.train.max_iters
        folder.keep_metrics_until(start_step if start_step else -1)
        self._metrics = folder.metrics.open("a", encoding="utf-8")
        self._writers = open_writers(folder, settings, start_step)
        self._display = Display(start_step, self._max_iters)
        self._threads_errors = threading.excepthook

    def __enter__(self) -> "Record":
        threading.excepthook = _leave_to_main_thread
        self.folder.write_status("running", self._step)
        self._display.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # On a full disk the error that is under way says so already.
        with contextlib.suppress(OSError):
            self._metrics.close()
        with contextlib.suppress(OSError):
            self.folder.write_end(self._step, _exit_status(error))
        self._display.stop()
        self._writers.close(_exit_status(error))
        threading.excepthook = self._threads_errors

    def say(self, text: str) -> None:
        self._display.say(text)

    def advance(self, step: int) -> None:
        self._display.advance(step)

    def doing(self, what: str) -> None:
        self._display.doing(what)

    @_noting_failure
    def sync(self) -> None:
        self._metrics.flush()
        os.fsync(self._metrics.fileno())

    @_noting_failure
    def train(self, lines: list[dict[str, Any]]) -> None:
        """Record updates, a line each."""
        if not lines:
            return
        for line in lines:
            self._write({"kind": "train", **line})
            self._writers.scalars(line["step"], {name: line[key] for name, key in _TRAIN_SCALARS.items()})
        self._writers.scalars(line["step"], {"perf/peak_memory_gib": line["peak_memory_bytes"] / 2**30})
        self._metrics.flush()
        self._step = line["step"]
        mean = sum(each["loss"] for each in lines) / len(lines)
        self.doing(f"loss {mean:.3f}  {line['tokens_per_second']:,.0f} tokens/s")

    @_noting_failure
    def evaluation(self, step: int, result: dict[str, Any]) -> None:
        """Record held-out losses after `step` updates."""
        self._write({"kind": "eval", "step": step, "split": "val", **result})
        self._metrics.flush()
        self.folder.write_status("running", self._step)
        losses = ("loss", "final_token_loss", "all_token_loss")
        self._writers.scalars(step, {f"val/{name}": result[name] for name in losses})
        self.say(
            f"step {step:>6}/{self._max_iters}  held-out loss: final token {result['final_token_loss']:.4f}, "
            f"all tokens {result['all_token_loss']:.4f}  ({result['seconds']:.1f} s)"
        )

    @_noting_failure
    def impossible(self, step: int, what: str, ranks: list[int], samples: list[list[int]]) -> None:
        self._write({"kind": "impossible", "step": step, "what": what, "ranks": ranks, "samples": samples})
        self._metrics.flush()

    @_noting_failure
    def sample(self, step: int, text: str) -> None:
        self.folder.sample(step).write_text(text + "\n", encoding="utf-8")
        self._writers.text(step, "sample", f"```\n{text}\n```")

    def _write(self, line: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
