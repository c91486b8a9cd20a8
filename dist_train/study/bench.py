"""Speed and memory of a training step, side by side with the plain way to do it."""

import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dist_train.config import Settings
from dist_train.data.manifest import open_tokens
from dist_train.data.tokenizer import load_tokenizer
from dist_train.model.gpt import build
from dist_train.runtime.process import Process, peak_flops, start_process, synchronize
from dist_train.storage import write_results
from dist_train.study.dropout import attention_drop_rate
from dist_train.study.memory import added_bytes, resident_bytes
from dist_train.study.plain import VARIANTS, variant_flops
from dist_train.training.assembly import Learner, build_learner, require_data
from dist_train.training.trainer import update

# Blocks of the variants alternate, A B C A B C …, so that a machine which slows down meanwhile slows all of them.
_BLOCKS = 5


@dataclass
class Contender:
    """One way to make a training step, with weights of its own, and what was measured of it."""

    learner: Learner
    flops: int
    """Executed per step, over all processes."""
    next_step: int = 0
    added_bytes: int | None = None
    block_seconds: list[float] = field(default_factory=list)
    """Mean seconds per step of each timed block."""
    waited_fractions: list[float] = field(default_factory=list)
    """Share of each timed block that went into waiting for data."""

    def advance(self, steps: int) -> float:
        """Make whole updates, data and optimizer included, and return the mean seconds of one."""
        device = self.learner.process.device
        synchronize(device)
        started = time.perf_counter()
        for step in range(self.next_step, self.next_step + steps):
            update(self.learner, step)
        self.next_step += steps
        synchronize(device)
        return (time.perf_counter() - started) / steps

    def time_block(self, steps: int) -> None:
        """Time `steps` updates, after one that brings this variant's weights back into the caches."""
        # That one also takes the batch that was read while the others ran, which no real run finds waiting.
        self.advance(1)
        waited_seconds = self.learner.batches.wait_seconds
        seconds = self.advance(steps)
        self.block_seconds.append(seconds)
        self.waited_fractions.append((self.learner.batches.wait_seconds - waited_seconds) / (seconds * steps))

    @property
    def step_seconds(self) -> float:
        """Seconds per step: the median over blocks."""
        return statistics.median(self.block_seconds)


def bench(settings: Settings, budget_seconds: float = 45.0) -> Path:
    """Time the variants of a training step for about `budget_seconds`; return the `bench.json` that says how they did.

    A block has two steps at least, however long they take. Raises `DistTrainError`.
    """
    with start_process(settings.runtime) as process:
        process.on_main(lambda: require_data(settings))
        contenders = _contenders(settings, process)
        _race(list(contenders.values()), process, budget_seconds)
        results = _results(settings, process, contenders)
        path = settings.run.out_dir / "bench.json"
        if process.is_main:
            write_results(path, results)
            Console().print(_table(results))
            print(f"bench.json  {path}")
        for contender in contenders.values():
            contender.learner.batches.close()
    return path


def _contenders(settings: Settings, process: Process) -> dict[str, Contender]:
    """Return the variants, all from the same weights and on the same batches."""
    n_vocab, data = load_tokenizer(settings.data.tokenizer).n_vocab, open_tokens(settings.data)
    contenders = {}
    for name, change in VARIANTS.items():
        network = build(settings.model, n_vocab, settings.run.derive_seed("weights"), process.device)
        flops = variant_flops(network, settings.train.global_batch_size, settings.last_k)[name]
        contenders[name] = Contender(build_learner(settings, process, data, n_vocab, change(network)), flops)
    return contenders


def _race(contenders: list[Contender], process: Process, budget_seconds: float) -> None:
    """Warm up, measure memory, then time interleaved blocks."""
    with Console(quiet=not process.is_main).status("warming up"):
        for contender in contenders:
            contender.advance(1)  # compiles, and allocates the optimizer's state
        for contender in contenders:
            contender.added_bytes = added_bytes(partial(contender.advance, 1), process.device)
        seconds = torch.tensor([sum(contender.advance(1) for contender in contenders)])
    # The mean over processes, because all of them have to make the same number of steps.
    round_seconds = process.patient_sum(seconds).item() / process.world_size
    steps = max(1, int(budget_seconds / (_BLOCKS * round_seconds)) - 1)
    for _ in track(range(_BLOCKS), "timing blocks", transient=True, disable=not process.is_main):
        for contender in contenders:
            contender.time_block(steps)


# ---- results ---------------------------------------------------------------------------------------------------------


def _results(settings: Settings, process: Process, contenders: dict[str, Contender]) -> dict[str, Any]:
    """Return what `bench.json` holds; what cannot be known here is None."""
    trainer, device = contenders["trainer"], process.device
    is_cuda = device.type == "cuda"
    return {
        "config": settings.model_dump(mode="json"),
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "torch": torch.__version__,
        "variants": {name: _variant(contender) for name, contender in contenders.items()},
        "ratios": {
            f"{name}_over_trainer": contender.step_seconds / trainer.step_seconds
            for name, contender in contenders.items()
            if contender is not trainer
        },
        **_drop_rates(trainer.learner),
        "loader_wait_fraction": statistics.median(trainer.waited_fractions),
        "precision": str(trainer.learner.replica.precision).removeprefix("torch."),
        "world_size": process.world_size,
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "cpu_threads_per_process": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _variant(contender: Contender) -> dict[str, Any]:
    learner, seconds = contender.learner, contender.step_seconds
    settings, replica, process = learner.settings, learner.replica, learner.process
    sequences, peak = settings.train.global_batch_size, peak_flops(process.device, replica.precision)
    added, resident = contender.added_bytes, resident_bytes(replica.network, learner.optimizer)
    return {
        "step_seconds": seconds,
        "tokens_per_second": sequences * settings.model.block_size / seconds,
        "supervised_tokens_per_second": sequences * settings.last_k / seconds,
        "mfu": contender.flops / seconds / (peak * process.world_size) if peak else None,
        "peak_memory_bytes": None if added is None else resident + added,
        "resident_memory_bytes": resident,
        "flops_per_step": contender.flops,
        "block_seconds": contender.block_seconds,
    }


def _drop_rates(learner: Learner) -> dict[str, float]:
    """Return the attention dropout that was counted where all positions ask, and where the last k do."""
    settings, process = learner.settings, learner.process
    process.seed_dropout(settings.run.derive_seed("attention drop rate"))
    with learner.replica.autocast():
        return {
            "attention_drop_rate": attention_drop_rate(settings.model, settings.model.block_size, process.device),
            "last_block_attention_drop_rate": attention_drop_rate(settings.model, settings.last_k, process.device),
        }


def _table(results: dict[str, Any]) -> Table:
    """Return the variants beside each other."""
    title = f"a training step on {results['device']}, {results['precision']}: medians of {_BLOCKS} blocks"
    table = Table("variant", title=title, caption=_caption(results), box=SIMPLE_HEAD, collapse_padding=True)
    for heading in ("ms per step", "× trainer", "tokens/s", "supervised/s", "MFU", "peak MiB"):
        table.add_column(heading, justify="right")
    for name, row in results["variants"].items():
        mfu, memory = row["mfu"], row["peak_memory_bytes"]
        table.add_row(
            name,
            f"{row['step_seconds'] * 1e3:,.1f}",
            f"{results['ratios'].get(f'{name}_over_trainer', 1):.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['supervised_tokens_per_second']:,.1f}",
            "–" if mfu is None else f"{mfu:.1%}",
            "–" if memory is None else f"{memory / 2**20:,.0f}",
        )
    return table


def _caption(results: dict[str, Any]) -> str:
    return (
        f"attention dropped {results['attention_drop_rate']:.3f} of its weights, "
        f"{results['last_block_attention_drop_rate']:.3f} in the last block; "
        f"{results['loader_wait_fraction']:.2%} of the trainer's time went into waiting for data"
    )
