"""Where a run's time goes: a trace of some updates by torch's profiler, and a table of what took the most of it."""

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from dist_train.config import Settings
from dist_train.errors import one_line

log = logging.getLogger(__name__)


class NullProfile(nullcontext[None]):
    """What is recorded where nobody asked for it, and on all processes but the first: nothing."""

    def at(self, step: int) -> None:
        """Be told that `step` updates are finished, before the next one begins."""


class Profile(NullProfile):
    """Records from the moment that `from` updates are finished to the one that `to` are, and writes at once.

    So it has updates from+1 … to, each with what follows it: its line of the record, evaluation, checkpoint. In the
    trace `ProfilerStep#N` is update N, and in it lie `forward`, `loss`, `backward`, `update`, `evaluate` and `save`: a
    name takes 6 µs where nobody records. Of a run that starts or ends within the window, it has what is in it.

    Writing takes 0.1 ms per operation, which the record counts to the next updates' seconds, and in which the other
    processes wait, no longer than `runtime.timeout_seconds`: a window is for a few updates.
    """

    def __init__(
        self, folder: Path, window: tuple[int, int], start_step: int, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self._folder, self._say = folder, say
        self._from, self._to = window
        self._first = max(self._from, start_step) + 1
        self._has_gpu = device.type == "cuda"
        # The profiler otherwise announces on standard error that it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        # Shapes say which matrix product it was. Stacks and allocations would cost more than what they are to explain.
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._has_gpu],
            schedule=self._action,
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profiler.step_num = start_step  # it numbers the update being made; before the first, the one before

    def __enter__(self) -> None:
        self._profiler.start()

    def __exit__(self, *error: object) -> None:
        self._profiler.stop()  # and write, if it still records

    def at(self, step: int) -> None:
        """Start or stop recording, if this is where."""
        if step <= self._to:
            self._profiler.step()

    def _action(self, update: int) -> ProfilerAction:
        if update == self._from:
            return ProfilerAction.WARMUP  # its first moments, slowed down by the start, are thrown away
        if update == self._to:
            return ProfilerAction.RECORD_AND_SAVE
        return ProfilerAction.RECORD if self._from < update < self._to else ProfilerAction.NONE

    def _write(self, profiler: profile) -> None:
        last = min(profiler.step_num, self._to)
        # TensorBoard's plugin looks for this ending.
        trace = self._folder / f"steps-{self._first:06d}-{last:06d}.pt.trace.json.gz"
        table = trace.with_name(trace.name.replace(".pt.trace.json.gz", ".txt"))
        sort_by = "self_device_time_total" if self._has_gpu else "self_cpu_time_total"
        try:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            table.write_text(profiler.key_averages().table(sort_by=sort_by, row_limit=15), encoding="utf-8")
        except (OSError, RuntimeError) as error:  # bare, where the file that torch writes first has no room
            log.warning("the profile cannot be written (%s); training goes on without", one_line(str(error)))
        else:
            self._say(f"profile of updates {self._first} … {last}: {trace}, for https://ui.perfetto.dev; and {table}")


def open_profile(
    settings: Settings, folder: Path, start_step: int, device: torch.device, say: Callable[[str], None]
) -> NullProfile:
    """Return what records the updates of `log.profile` that a run makes from `start_step` on, if there are any."""
    window, max_iters = settings.log.profile, settings.train.max_iters
    if window is None:
        return NullProfile()
    if window[1] <= start_step or window[0] >= max_iters:
        say(f"log.profile: {list(window)} lies outside of steps {start_step} … {max_iters}; nothing is recorded")
        return NullProfile()
    return Profile(folder, window, start_step, device, say)
