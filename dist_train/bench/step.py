"""Speed and memory of a training step, side by side with other ways to make it."""

import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dist_train.bench.contender import Apart, Contender, Way, with_changes
from dist_train.bench.plain import VARIANTS
from dist_train.config import Settings
from dist_train.runtime.process import Process, group_of_one, start_process
from dist_train.runtime.shares import micro_batch_size
from dist_train.storage import write_results
from dist_train.training.assembly import require_data

_MOST_BLOCKS, _FEWEST_BLOCKS = 15, 3
# Long enough that the clock, and what a step finds in the caches, do not count.
_BLOCK_SECONDS = 1.0

_MEANINGS = {
    "trainer": "as dist_train trains",
    "plain": "logits of all positions, torch's own dropout, glibc's own ways, not compiled",
    "plain_compiled": "the same, compiled as a whole",
    "head_sliced": "as dist_train trains, but the last block at all positions",
    "no_dropout": "as dist_train trains, without dropout",
    "data_parallel": "as dist_train trains, averaging gradients with itself",
    "one_process": "one process alone with its share of the batch, the others at rest",
}


def bench(settings: Settings, budget_seconds: float = 150.0) -> Path:
    """Time ways to make a training step for about `budget_seconds`; return the `bench.json` that says how they did.

    Alone, a process compares with the plain way, and with what dropout and data parallelism cost. Several compare with
    one of them: what do more processes cost? There are three blocks at least, however long they take.
    Of a curriculum it is the step at `loss.last_k` that is timed. Raises `DistTrainError`.
    """
    settings = with_changes(settings, "loss", curriculum=None)
    with start_process(settings.runtime) as process:
        micro_batch_size(settings.train, process.world_size)  # refuses what cannot be divided, before anything is done
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
def _contenders(settings: Settings, process: Process) -> Iterator[dict[str, Contender | Apart]]:
    """Yield the variants, all from the same weights and on the same batches."""
    with ExitStack() as closing:

        def enter(name: str, contender: Contender | Apart) -> None:
            found[name] = contender
            closing.callback(contender.close)

        found: dict[str, Contender | Apart] = {}
        enter("trainer", Contender(Way("trainer", settings), process))
        if process.world_size > 1:
            share = settings.train.global_batch_size // process.world_size
            alone = Way("trainer", with_changes(settings, "train", global_batch_size=share))
            enter("one_process", Contender(alone, Process(0, 1, process.device)))
        else:
            enter("plain", Apart(Way("plain", with_changes(settings, "runtime", compile=False))))
            if settings.runtime.compile:
                enter("plain_compiled", Apart(Way("plain", settings)))
            enter("head_sliced", Contender(Way("head_sliced", settings), process))
            if settings.model.dropout:
                no_dropout = Way("trainer", with_changes(settings, "model", dropout=0.0))
                enter("no_dropout", Contender(no_dropout, process))
            if process.device.type != "mps":  # which no group can be of
                grouped = closing.enter_context(group_of_one(process))
                enter("data_parallel", Contender(Way("trainer", settings), grouped))
        yield found


def _race(contenders: dict[str, Contender | Apart], process: Process, budget_seconds: float) -> None:
    """Warm up, measure memory, then time blocks.

    They alternate, A B C A B C …, so that a machine which slows down meanwhile slows all of them.
    """

    def in_turn(description: str, work: str, *arguments: Any, of: list[str] = list(contenders)) -> None:  # noqa: B006
        for name in track(of, description, transient=True, disable=not process.is_main):
            if name == "one_process":
                process.on_main(lambda: contenders["one_process"].do(work, *arguments))
            else:
                contenders[name].do(work, *arguments)

    in_turn("warming up", "advance", 1)  # compiles, and allocates the optimizer's state
    in_turn("measuring memory", "measure_memory", of=[name for name in contenders if name in VARIANTS])
    started = time.perf_counter()
    in_turn("timing", "time_block", 1)
    # Of the first process, because all have to make the same number of steps.
    round_seconds = process.patient_sum(torch.tensor((time.perf_counter() - started) * process.is_main)).item()
    steps = max(1, round(_BLOCK_SECONDS * len(contenders) / round_seconds))
    if steps > 1:  # else that was a block already
        in_turn("timing", "forget_blocks")
    rounds = int(budget_seconds / (round_seconds * (steps + (steps > 1))))
    for block in range(steps == 1, max(_FEWEST_BLOCKS, min(_MOST_BLOCKS, rounds))):
        in_turn(f"timing, block {block + 1}", "time_block", steps)


# ---- results ---------------------------------------------------------------------------------------------------------


def _results(settings: Settings, process: Process, contenders: dict[str, Contender | Apart]) -> dict[str, Any]:
    """Return what `bench.json` holds; what cannot be known here is None."""
    device, trainer = process.device, contenders["trainer"]
    measured = {name: each.do("measured") for name, each in contenders.items() if process.is_main or each is trainer}
    return {
        "config": settings.model_dump(mode="json"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "variants": measured,
        "ratios": {
            f"{name}_over_trainer": _ratio(variant, measured["trainer"])
            for name, variant in measured.items()
            if name != "trainer"
        },
        **trainer.do("looked_at_closely"),
        "world_size": process.world_size,
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "cpu_threads_per_process": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _ratio(variant: dict[str, Any], trainer: dict[str, Any]) -> float:
    """Return how many times as long a variant's steps take: the median over pairs of neighbouring blocks."""
    return statistics.median(
        ours / theirs for ours, theirs in zip(variant["block_seconds"], trainer["block_seconds"], strict=True)
    )


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
