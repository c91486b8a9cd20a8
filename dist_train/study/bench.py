"""Speed and memory of a training step, side by side with other ways to make it."""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from dist_train.model.gpt import GPT, build
from dist_train.runtime.process import Process, group_of_one, peak_flops, start_process, synchronize
from dist_train.storage import write_results
from dist_train.study.dropout import attention_drop_rate
from dist_train.study.memory import added_bytes, resident_bytes
from dist_train.study.plain import VARIANTS, variant_flops
from dist_train.training.assembly import Learner, build_learner, require_data
from dist_train.training.meter import Meter, Update
from dist_train.training.run_folder import RunFolder
from dist_train.training.telemetry import NullRecord, Record
from dist_train.training.trainer import update

# Blocks of the variants alternate, A B C A B C …, so that a machine which slows down meanwhile slows all of them.
_MOST_BLOCKS, _FEWEST_BLOCKS = 15, 3
# Long enough that the clock, and what a step finds in the caches, do not count.
_BLOCK_SECONDS = 1.0

_MEANINGS = {
    "trainer": "as dist_train trains",
    "plain": "logits of all positions, torch's own dropout, not compiled",
    "plain_compiled": "the same, compiled as a whole",
    "head_sliced": "the head alone at the last k positions, the last block at all",
    "no_dropout": "as dist_train trains, without dropout",
    "data_parallel": "as dist_train trains, averaging gradients with itself",
    "one_process": "one process alone with its share of the batch, the others at rest",
}


@dataclass
class Contender:
    """One way to make a training step, with weights of its own, and what was measured of it."""

    learner: Learner
    flops: int
    """Executed per step, over all processes."""
    is_alone: bool = False
    """The first process makes the steps, and the others wait."""
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
        # That one also takes the batch that was read while the others ran, which no real run finds waiting. A block of
        # a single step is one that takes so long that neither counts.
        if steps > 1:
            self.advance(1)
        waited_seconds = self.learner.batches.wait_seconds
        seconds = self.advance(steps)
        self.block_seconds.append(seconds)
        self.waited_fractions.append((self.learner.batches.wait_seconds - waited_seconds) / (seconds * steps))

    @property
    def step_seconds(self) -> float:
        """Seconds per step: the median over blocks."""
        return statistics.median(self.block_seconds)

    def times(self, other: "Contender") -> float:
        """Return how many times as long as the other's its steps take: the median over pairs of neighbouring blocks."""
        return statistics.median(
            ours / theirs for ours, theirs in zip(self.block_seconds, other.block_seconds, strict=True)
        )


def bench(settings: Settings, budget_seconds: float = 190.0) -> Path:
    """Time ways to make a training step for about `budget_seconds`; return the `bench.json` that says how they did.

    Alone, a process compares with the plain way, and with what dropout and data parallelism cost. Several compare with
    one of them: what do more processes cost? There are three blocks at least, however long they take.
    Raises `DistTrainError`.
    """
    with start_process(settings.runtime) as process:
        process.on_main(lambda: require_data(settings))
        with _contenders(settings, process) as contenders:
            _race(contenders, process, budget_seconds)
            results = _results(settings, process, contenders)
        path = settings.run.out_dir / "bench.json"
        if process.is_main:
            write_results(path, results)
            Console().print(_table(results))
            print(f"bench.json  {path}")
    return path


@contextmanager
def _contenders(settings: Settings, process: Process) -> Iterator[dict[str, Contender]]:
    """Yield the variants, all from the same weights and on the same batches."""
    data, n_vocab = open_tokens(settings.data), load_tokenizer(settings.data.tokenizer).n_vocab

    def build_one(way: str, settings: Settings, process: Process = process) -> Contender:
        network = build(settings.model, n_vocab, settings.run.derive_seed("weights"), process.device)
        flops = variant_flops(network, settings.train.global_batch_size, settings.last_k)[way]
        objective = VARIANTS[way](network)
        if way == "plain" and settings.runtime.compile:
            # As a whole, as is usual.
            objective, settings = torch.compile(objective), _with(settings, "runtime", compile=False)  # type: ignore[assignment]
        return Contender(build_learner(settings, process, data, network, objective), flops)

    with ExitStack() as closing:
        found = {"trainer": build_one("trainer", settings)}
        if process.world_size > 1:
            share = settings.train.global_batch_size // process.world_size
            found["one_process"] = build_one(
                "trainer", _with(settings, "train", global_batch_size=share), Process(0, 1, process.device)
            )
            found["one_process"].is_alone = True
        else:
            found["plain"] = build_one("plain", _with(settings, "runtime", compile=False))
            if settings.runtime.compile:
                found["plain_compiled"] = build_one("plain", settings)
            found["head_sliced"] = build_one("head_sliced", settings)
            if settings.model.dropout:
                found["no_dropout"] = build_one("trainer", _with(settings, "model", dropout=0.0))
            if process.device.type != "mps":  # which no group can be of
                group = closing.enter_context(group_of_one(process))
                found["data_parallel"] = build_one("trainer", settings, group)
        for each in found.values():
            closing.callback(each.learner.batches.close)
        yield found


def _with(settings: Settings, section: str, **changes: object) -> Settings:
    changed = getattr(settings, section).model_copy(update=changes)
    return settings.model_copy(update={section: changed})


def _race(contenders: dict[str, Contender], process: Process, budget_seconds: float) -> None:
    """Warm up, measure memory, then time interleaved blocks."""
    everyone = list(contenders.values())

    def in_turn(work: Callable[[Contender], object], chosen: list[Contender], description: str) -> None:
        for contender in track(chosen, description, transient=True, disable=not process.is_main):
            if contender.is_alone:
                process.on_main(partial(work, contender))
            else:
                work(contender)

    def measure_memory(contender: Contender) -> None:
        contender.added_bytes = added_bytes(partial(contender.advance, 1), process.device)

    in_turn(lambda contender: contender.advance(1), everyone, "warming up")  # compiles, makes the optimizer's state
    in_turn(measure_memory, [each for name, each in contenders.items() if name in VARIANTS], "measuring memory")
    started = time.perf_counter()
    in_turn(lambda contender: contender.time_block(1), everyone, "timing")
    # Of the first process, because all have to make the same number of steps.
    round_seconds = process.patient_sum(torch.tensor((time.perf_counter() - started) * process.is_main)).item()
    steps = max(1, round(_BLOCK_SECONDS * len(everyone) / round_seconds))
    if steps > 1:  # else that was a block already
        for contender in everyone:
            contender.block_seconds.clear()
            contender.waited_fractions.clear()
    rounds = int(budget_seconds / (round_seconds * (steps + (steps > 1))))
    for block in range(len(everyone[0].block_seconds), max(_FEWEST_BLOCKS, min(_MOST_BLOCKS, rounds))):
        in_turn(lambda contender: contender.time_block(steps), everyone, f"timing, block {block + 1}")


# ---- results ---------------------------------------------------------------------------------------------------------


def _results(settings: Settings, process: Process, contenders: dict[str, Contender]) -> dict[str, Any]:
    """Return what `bench.json` holds; what cannot be known here is None."""
    device, trainer = process.device, contenders["trainer"]
    is_cuda = device.type == "cuda"
    measured = {name: each for name, each in contenders.items() if each.block_seconds}
    return {
        "config": settings.model_dump(mode="json"),
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "torch": torch.__version__,
        "variants": {name: _variant(contender) for name, contender in measured.items()},
        "ratios": {
            f"{name}_over_trainer": contender.times(trainer)
            for name, contender in measured.items()
            if contender is not trainer
        },
        **_drop_rates(trainer.learner),
        "loader_wait_fraction": statistics.median(trainer.waited_fractions),
        "logging_fraction": _logging_seconds(trainer.learner) / trainer.step_seconds,
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


def _logging_seconds(learner: Learner) -> float:
    """Return the seconds that writing its record adds to an update: a train line to disk, TensorBoard and console."""
    settings, process, network = learner.settings, learner.process, learner.replica.network
    assert isinstance(network, GPT)
    meter = Meter(settings, network.token_embedding.num_embeddings, process, learner.replica.precision)
    steps = settings.log.interval
    one = torch.ones((), device=process.device)
    with tempfile.TemporaryDirectory() as folder:
        record = Record(RunFolder(Path(folder)), 0, steps) if process.is_main else NullRecord()
        with record:
            synchronize(process.device)
            started = time.perf_counter()
            for step in range(1, steps + 1):
                meter.add(step, Update(one, 1, one, 0.0))
                record.advance(step)
            record.train(meter.flush())
            return (time.perf_counter() - started) / steps


def _drop_rates(learner: Learner) -> dict[str, float]:
    """Return the attention dropout that was counted where all positions ask, and where the last k do."""
    settings, process = learner.settings, learner.process
    process.seed_dropout(settings.run.derive_seed("attention drop rate"))
    with learner.replica.inference():
        return {
            "attention_drop_rate": attention_drop_rate(settings.model, settings.model.block_size, process.device),
            "last_block_attention_drop_rate": attention_drop_rate(settings.model, settings.last_k, process.device),
        }


def _table(results: dict[str, Any]) -> Table:
    """Return the variants beside each other."""
    blocks = len(results["variants"]["trainer"]["block_seconds"])
    processes = f", {results['world_size']} processes" if results["world_size"] > 1 else ""
    title = f"a training step on {results['device']}, {results['precision']}{processes}: medians of {blocks} blocks"
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
    meanings = [f"{name}: {_MEANINGS[name]}" for name in results["variants"]]
    return "\n".join(
        [
            *meanings,
            f"attention dropped {results['attention_drop_rate']:.3f} of its weights, "
            f"{results['last_block_attention_drop_rate']:.3f} in the last block",
            f"of the trainer's time {results['loader_wait_fraction']:.2%} went into waiting for data; "
            f"its record takes {results['logging_fraction']:.2%}",
        ]
    )
