"""What each command does, and what the command line has to know of it. Heavy imports happen inside the commands."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_train import command_options as known
from dist_train.config import Settings
from dist_train.config_file import load_settings
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.study.grid import Grid


def _prepare(settings: Settings, dry_run: bool) -> None:
    """documents to token shards and a manifest"""
    from rich.console import Console

    from dist_train.data.description import describe_once, description_table
    from dist_train.data.plan import plan
    from dist_train.data.prepare import prepare

    if dry_run:
        for verb, what in plan(settings.data).items():
            print(f"would {verb:<8}{what}")
        return
    manifest, is_new = prepare(settings.data)
    print(f"{settings.data.dir} " + ("is prepared" if is_new else "was prepared already"))
    Console().print(description_table(describe_once(settings.data.dir, manifest)))


def _train(settings: Settings, dry_run: bool, **options: Any) -> None:
    """train a network in one process; under a launcher with all that it started"""
    given = {name: value for name, value in options.items() if value is not None}
    if dry_run:
        return _estimate(settings, **given)
    if given:
        raise UserError(f"--{next(iter(given))} goes with --dry-run; see --help")
    from dist_train.runtime.stop import hold_back

    hold_back()  # until the run listens, after a second of imports
    from dist_train.training.trainer import train

    folder = train(settings)
    if int(os.environ.get("RANK", 0)):
        return
    from dist_train.study.plots import plot_loss, publish_figures

    picture = plot_loss(folder.root)
    publish_figures(folder.root)
    sample = folder.last_sample()
    if sample:
        print(f"\n{sample.read_text(encoding='utf-8').rstrip()}\n")
    print(f"run folder   {folder.root}")
    print(f"loss plot    {picture}")
    if sample:
        print(f"sample text  {sample}")
    print(f"more text    {sys.executable} -m dist_train generate {folder.root} --interactive")
    print(f"tensorboard  {sys.executable} -m tensorboard.main --host localhost --logdir {folder.root.parent}")


def _estimate(settings: Settings, processes: int = 1, **options: Any) -> None:
    from dist_train.training.estimate import estimate

    for what, amount in estimate(settings, processes, **options).items():
        print(f"{what:<9}{amount}")


def _launch(loaded: tuple[Settings, list[str]], **options: Any) -> int:
    """train with N processes on this machine, or on each of several; started again when one is lost"""
    from dist_train.runtime.launch import LaunchOptions, launch

    settings, arguments = loaded

    def note_end(status: int) -> None:
        from dist_train.training.run_folder import RunFolder  # torch is imported by now

        RunFolder(settings.run.out_dir).note_end(status)

    given = {name: value for name, value in options.items() if value is not None}
    return launch(settings, arguments, LaunchOptions(**given), note_end)


def _load_for_launch(path: Path, overrides: Sequence[str]) -> tuple[Settings, list[str]]:
    """Return the settings, read here so that a mistake in them starts nothing, and what the processes are given."""
    return load_settings(path, overrides), [str(path), *overrides]


def _bench(settings: Settings) -> None:
    """time a training step and measure its memory, side by side with the plain way to do it"""
    # Before torch is imported: its profiler, which measures memory on a CPU, else warns of what was allocated before.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dist_train.bench.step import bench

    bench(settings)


def _bench_data(settings: Settings) -> None:
    """time preparing and reading data, side by side with the usual ways to do both"""
    from dist_train.bench.data import bench_data

    bench_data(settings)


def _compare(grid: "Grid", processes: str) -> None:
    """train every run of a grid of settings that has not finished yet, and report on all of them"""
    from dist_train.study.compare import run_cells
    from dist_train.study.report import write_report

    run_cells(grid, processes)
    write_report(grid)


def _load_grid(path: Path, overrides: Sequence[str]) -> "Grid":
    from dist_train.study.grid import load_grid

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # A second process group under one torchrun meets the first one's addresses (torch 2.13, gloo).
        raise UserError("compare starts the processes of its runs; start it without torchrun, with --processes=N")
    return load_grid(path, overrides)


def _evaluate(run: Path, suite: list[str], device: str) -> None:
    """measure held-out losses and tasks with the newest checkpoint of a finished or running run"""
    from dist_train.study.evaluate import run_evaluate

    run_evaluate(run, suite, device)


def _inspect(run: Path, device: str) -> None:
    """show where the final position of a run's network looks, and its loss by position"""
    from dist_train.study.inspect import run_inspect

    run_inspect(run, device)


def _load_run(run: Path, overrides: Sequence[str]) -> Path:
    if overrides:
        raise UserError(f"cannot read {overrides[0]!r}: a run keeps its own settings; see --help for what can be asked")
    return run


def _generate(network: Path, **options: Any) -> None:
    """continue a text with what a run, one of its checkpoints or an exported folder has learned"""
    from dist_train.study.generate import GenerateOptions, run_generate

    run_generate(network, GenerateOptions(**options))


def _export(folder: Path, saved: Path) -> None:
    """write a run's newest checkpoint, or one given by its folder, as a folder that Hugging Face's libraries load"""
    from dist_train.study.export import export

    step = export(saved, folder)
    print(f"{folder} has the network as it is after {step} updates; AutoModelForCausalLM.from_pretrained loads it")


class Command(NamedTuple):
    """A command, and how it is called."""

    run: Callable[..., int | None]
    """Does the work; returns the exit status where that is not 0 and has been explained."""
    load: Callable[[Path, Sequence[str]], Any] = load_settings
    """Reads CONFIG and the overrides into what `run` takes."""
    config_help: str = "a YAML file of settings, as in configs/"
    usage: str = "CONFIG"
    metavar: str = "CONFIG"
    notes: str | None = None
    """What --help ends with, where it is not the table of settings."""
    options: dict[str, dict[str, Any]] = {}  # noqa: RUF012 - nobody changes it
    """What `run` takes by name, and what argparse has to know of it. Those without dashes come before CONFIG."""


COMMANDS = {
    "prepare": Command(
        _prepare,
        usage="CONFIG [--dry-run]",
        options=known.PREPARE,
    ),
    "train": Command(
        _train,
        usage="CONFIG [--dry-run [--processes=N] [--gpu=NAME] [--mfu=SHARE]]",
        options=known.TRAIN,
    ),
    "launch": Command(
        _launch,
        _load_for_launch,
        usage="N CONFIG [--nodes=2 --head=HOST:PORT --job=NAME]",
        options=known.LAUNCH,
    ),
    "compare": Command(
        _compare,
        _load_grid,
        "a YAML file of a grid: `base` (a file of settings), `out_dir`, `settings` for all runs, and `grid` with the "
        "values of those that vary, as in configs/study_small.yaml",
        usage="CONFIG [--processes=N]",
        options=known.COMPARE,
    ),
    "evaluate": Command(
        _evaluate,
        _load_run,
        known.RUN,
        usage="RUN [--suite NAME[=PATH] ...] [--device DEVICE]",
        metavar="RUN",
        options=known.EVALUATE,
    ),
    "inspect": Command(
        _inspect,
        _load_run,
        known.RUN,
        usage="RUN [--device DEVICE]",
        metavar="RUN",
        options=known.DEVICE,
    ),
    "generate": Command(
        _generate,
        _load_run,
        f"{known.RUN}, or of one checkpoint in it, a folder that `export` wrote, or GPT-2's: gpt2, gpt2-medium, "
        "gpt2-large, gpt2-xl",
        usage="RUN [--prompt TEXT ...] [--interactive] [--temperature T] [--top-k K] [--top-p P] ...",
        metavar="RUN",
        notes=known.GENERATE_NOTES,
        options=known.GENERATE,
    ),
    "export": Command(
        _export,
        _load_run,
        "the folder to write, which may not be there yet, or is empty",
        usage="RUN DIR",
        metavar="DIR",
        options=known.EXPORT,
    ),
    "bench": Command(_bench),
    "bench-data": Command(_bench_data),
}
