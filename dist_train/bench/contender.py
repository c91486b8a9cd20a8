"""One way to make a training step, with weights of its own: made, timed and measured, here or in another process."""

import contextlib
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_train.bench.dropout import attention_drop_rate
from dist_train.bench.memory import added_bytes, resident_bytes
from dist_train.bench.plain import VARIANTS, variant_flops
from dist_train.config import Settings
from dist_train.data.manifest import open_tokens
from dist_train.data.tokenizer import load_tokenizer
from dist_train.errors import ProcessLostError
from dist_train.model.gpt import build
from dist_train.runtime.device import peak_flops, synchronize
from dist_train.runtime.process import Process, start_process
from dist_train.training.assembly import build_learner, windows_of
from dist_train.training.meter import Meter, Update
from dist_train.training.run_folder import RunFolder
from dist_train.training.telemetry import NullRecord, Record
from dist_train.training.trainer import update
from dist_train.worker import start_worker


class Way(NamedTuple):
    """What a contender does."""

    variant: str
    """One of `VARIANTS`."""
    settings: Settings

    @property
    def is_plain(self) -> bool:
        """Whether it is what most code does, which leaves freed memory to glibc's defaults."""
        return self.variant == "plain"


class Contender:
    """A way to make a training step on this process, and what was measured of it."""

    def __init__(self, way: Way, process: Process) -> None:
        settings, data = way.settings, open_tokens(way.settings.data)
        n_vocab = load_tokenizer(settings.data.tokenizer).n_vocab
        self._network = build(settings.model, n_vocab, settings.run.derive_seed("weights"), process.device)
        # Counted before the variant changes the network. Executed per step, over all processes.
        batch_size, recomputes = settings.train.global_batch_size, settings.runtime.recompute_blocks
        self._flops = variant_flops(self._network, batch_size, settings.last_k, recomputes)[way.variant]
        objective = VARIANTS[way.variant](self._network)
        if way.is_plain and settings.runtime.compile:
            # As a whole, as is usual; the trainer's own blocks are compiled one by one.
            objective = torch.compile(objective)  # type: ignore[assignment]
            settings = with_changes(settings, "runtime", compile=False)
        self._learner = build_learner(settings, process, data, windows_of(settings, data), self._network, objective)
        self._next_step = 0
        self._added_bytes: int | None = None
        self._block_seconds: list[float] = []
        self._waited_fractions: list[float] = []

    def do(self, name: str, *arguments: Any) -> Any:
        """Call the method `name`: here as a contender in another process does."""
        return getattr(self, name)(*arguments)

    def close(self) -> None:
        """Stop reading ahead."""
        self._learner.batches.close()

    def advance(self, steps: int) -> float:
        """Make whole updates, data and optimizer included, and return the mean seconds of one."""
        device = self._learner.process.device
        synchronize(device)
        started = time.perf_counter()
        for step in range(self._next_step, self._next_step + steps):
            update(self._learner, step)
        self._next_step += steps
        synchronize(device)
        return (time.perf_counter() - started) / steps

    def time_block(self, steps: int) -> None:
        """Time `steps` updates, after one that brings this variant's weights back into the caches."""
        # That one also takes the batch that was read while the others ran, which no real run finds waiting. A block of
        # a single step is one that takes so long that neither counts.
        if steps > 1:
            self.advance(1)
        waited_seconds = self._learner.batches.wait_seconds
        seconds = self.advance(steps)
        self._block_seconds.append(seconds)
        self._waited_fractions.append((self._learner.batches.wait_seconds - waited_seconds) / (seconds * steps))

    def forget_blocks(self) -> None:
        """Start anew: what was timed so far told how long a step takes, and no more."""
        self._block_seconds.clear()
        self._waited_fractions.clear()

    def measure_memory(self) -> None:
        """Make an update and see how far it raises memory."""
        self._added_bytes = added_bytes(partial(self.advance, 1), self._learner.process.device)

    def measured(self) -> dict[str, Any]:
        """Return what `bench.json` says of a variant; what cannot be known here is None."""
        settings, process = self._learner.settings, self._learner.process
        seconds = statistics.median(self._block_seconds)
        peak = peak_flops(process.device, self._learner.replica.precision)
        resident = resident_bytes(self._network, self._learner.optimizer)
        sequences = settings.train.global_batch_size
        return {
            "step_seconds": seconds,
            "tokens_per_second": sequences * settings.model.block_size / seconds,
            "supervised_tokens_per_second": sequences * settings.last_k / seconds,
            "mfu": self._flops / seconds / (peak * process.world_size) if peak else None,
            "peak_memory_bytes": None if self._added_bytes is None else resident + self._added_bytes,
            "resident_memory_bytes": resident,
            "flops_per_step": self._flops,
            "block_seconds": self._block_seconds,
        }

    def looked_at_closely(self) -> dict[str, Any]:
        """Return what of a whole run matters beside its steps: what is dropped, waited for and written down."""
        learner = self._learner
        settings, device = learner.settings, learner.process.device
        learner.process.seed_dropout(settings.run.derive_seed("attention drop rate"))
        with learner.replica.inference():
            dropped, dropped_in_last = (
                attention_drop_rate(settings.model, asking, device)
                for asking in (settings.model.block_size, settings.last_k)
            )
        return {
            "attention_drop_rate": dropped,
            "last_block_attention_drop_rate": dropped_in_last,
            "loader_wait_fraction": statistics.median(self._waited_fractions),
            "logging_fraction": self._logging_seconds() / statistics.median(self._block_seconds),
            "precision": str(learner.replica.precision).removeprefix("torch."),
        }

    def _logging_seconds(self) -> float:
        """Return the seconds that an update waits for its record: TensorBoard and console are written in threads."""
        settings, process = self._learner.settings, self._learner.process
        meter = Meter(settings, self._network.token_embedding.num_embeddings, process, self._learner.replica)
        one, steps = torch.ones((), device=process.device), settings.log.interval
        shown_here = with_changes(settings, "log", wandb=False)
        with (
            tempfile.TemporaryDirectory() as folder,
            Record(RunFolder(Path(folder)), shown_here, 0) if process.is_main else NullRecord() as record,
        ):
            started = time.perf_counter()
            for step in range(1, steps + 1):
                meter.add(step, Update(one, 1, one, 0.0, 1))
                record.advance(step)
            lines, _ = meter.flush()
            record.train(lines)
            return (time.perf_counter() - started) / steps


def with_changes(settings: Settings, section: str, **changes: object) -> Settings:
    """Return the settings with some of one section changed."""
    changed = getattr(settings, section).model_copy(update=changes)
    return settings.model_copy(update={section: changed})


# ---- in a process of its own -----------------------------------------------------------------------------------------


class Apart:
    """A contender in a process of its own, where memory that the others have left behind is no help to it."""

    def __init__(self, way: Way) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=start_worker)
        try:
            self._run(_enter, way)
        except BaseException:
            self.close()
            raise

    def do(self, name: str, *arguments: Any) -> Any:
        """Call the contender's method `name` and return what it does."""
        return self._run(_do, name, *arguments)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenProcessPool):
            self._pool.submit(_leave)
        self._pool.shutdown()

    def _run(self, work: Any, *arguments: Any) -> Any:
        try:
            return self._pool.submit(work, *arguments).result()
        except BrokenProcessPool:
            raise ProcessLostError(
                "a process of bench was killed, perhaps for want of memory; lower --train.global_batch_size"
            ) from None


_here = ExitStack()
_contender: Contender


def _enter(way: Way) -> None:
    global _contender
    process = _here.enter_context(start_process(way.settings.runtime, keeps_freed_memory=not way.is_plain))
    _contender = Contender(way, process)
    _here.callback(_contender.close)


def _do(name: str, *arguments: Any) -> Any:
    return _contender.do(name, *arguments)


def _leave() -> None:
    _here.close()
