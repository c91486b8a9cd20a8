"""Run a grid's cells one after another: each in its own folder, none twice, interrupted ones from where they were."""

import contextlib
import json
import tempfile
from pathlib import Path

from rich.console import Console

from dist_train.config_file import load_settings
from dist_train.errors import DistTrainError, UserError
from dist_train.runtime.launch import LaunchOptions, launch
from dist_train.study.evaluate import evaluate_run, parse_suite
from dist_train.study.grid import Cell, Grid
from dist_train.study.inspect import inspect_once
from dist_train.study.task_files import read_task_file
from dist_train.training.run_folder import RunFolder
from dist_train.training.trainer import train

ATTENTION = "attention"
"""What `inspect` measures, under the name it has in a grid's `measure`."""


def run_cells(grid: Grid, processes: str = "1") -> None:
    """Train every cell of the grid that has not finished yet, and measure it. Raises `DistTrainError`.

    The same call then goes on: nothing is trained or measured twice. Each run is trained by so many `processes`, as
    `launch` understands it.
    """
    options = LaunchOptions(processes)
    suites = [parse_suite(name) for name in grid.measure if name != ATTENTION]
    for _, source in suites:
        if source is not None:
            read_task_file(source)  # refuses what cannot be read before anything is trained
    console = Console(highlight=False)
    for number, cell in enumerate(grid.cells, start=1):
        is_done = is_finished(cell)
        heading = f"run {number} of {len(grid.cells)}  {cell.folder.name}" + (": finished before" if is_done else "")
        console.print(heading, style="bold", markup=False)
        if not is_done:
            _train(cell, options)
        device = cell.settings.runtime.device
        if suites:
            evaluate_run(cell.folder, suites, device)
        if ATTENTION in grid.measure:
            inspect_once(cell.folder, device)


def _train(cell: Cell, options: LaunchOptions) -> None:
    if options.count(cell.settings.runtime.device) == 1:
        train(cell.settings)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(cell.settings.to_yaml(), encoding="utf-8")
        status = launch(cell.settings, [str(config)], options, RunFolder(cell.folder).note_end)
    if status:
        raise _RunEndedError(cell.folder, status)


class _RunEndedError(DistTrainError):
    """The processes of a run have ended before its end, and said why."""

    def __init__(self, folder: Path, exit_status: int) -> None:
        super().__init__(f"{folder.name} ended before its end, for the reason above; the same command goes on with it")
        self.exit_status = exit_status


def is_finished(cell: Cell) -> bool:
    """Tell whether the cell's folder holds a run of just these settings that came to its end."""
    folder = RunFolder(cell.folder)
    # A folder without a sensible status is not finished; what is wrong with it, if anything, `train` will say.
    with contextlib.suppress(OSError, ValueError, KeyError, UserError):
        is_done = json.loads(folder.status.read_text(encoding="utf-8"))["status"] == "done"
        return is_done and load_settings(folder.config) == cell.settings
    return False
