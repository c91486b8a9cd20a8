"""Where a run's numbers and samples are shown beside its own record: TensorBoard's files, and Weights & Biases."""

import contextlib
import html
import importlib.metadata
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from dist_train.config import Settings
from dist_train.errors import UserError, one_line
from dist_train.training.run_folder import RunFolder

log = logging.getLogger(__name__)


class Writer(Protocol):
    """A place that shows a run. All of its methods may fail."""

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Show numbers by name, as they are after `step` updates; steps never go back."""

    def text(self, step: int, name: str, text: str) -> None:
        """Show text, line for line."""

    def close(self, exit_status: int) -> None:
        """Write what is still to be written, of a run that has ended so."""


class Writers:
    """All writers of a run. One that fails is left out from then on, with a warning, and the run goes on."""

    def __init__(self, openings: dict[str, Callable[[], Writer]]) -> None:
        """Open writers, each by what a warning calls it."""
        self._writers: dict[str, Writer] = {}
        for name, opened in openings.items():
            with self._may_fail(name):
                self._writers[name] = opened()

    def scalars(self, step: int, scalars: dict[str, float | None]) -> None:
        """Show numbers, without those that are None."""
        known = {name: value for name, value in scalars.items() if value is not None}
        self._all(lambda writer: writer.scalars(step, known))

    def text(self, step: int, name: str, text: str) -> None:
        """Show text."""
        self._all(lambda writer: writer.text(step, name, text))

    def close(self, exit_status: int) -> None:
        """Close all."""
        self._all(lambda writer: writer.close(exit_status))

    def _all(self, work: Callable[[Writer], None]) -> None:
        for name, writer in list(self._writers.items()):
            with self._may_fail(name):
                work(writer)

    @contextlib.contextmanager
    def _may_fail(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # their threads hand on whatever they met
            self._writers.pop(name, None)
            log.warning("%s cannot be written (%s); training goes on without", name, one_line(str(error)))


def open_writers(folder: RunFolder, settings: Settings, start_step: int) -> Writers:
    """Return what shows the run that is in `folder` and goes on from `start_step`, as `log` says."""
    openings: dict[str, Callable[[], Writer]] = {
        "TensorBoard's files": lambda: TensorBoard(folder.tensorboard, start_step)
    }
    if settings.log.wandb:
        openings["Weights & Biases"] = lambda: WeightsAndBiases(folder, settings)
    return Writers(openings)


def require_writers(settings: Settings) -> None:
    """Raise `UserError` where a package that a writer needs is not there."""
    try:
        if settings.log.wandb:
            importlib.metadata.version("wandb")  # a search for the module would also find a folder of that name
    except importlib.metadata.PackageNotFoundError:
        raise UserError("log.wandb: wandb is not there; pip install 'dist-train[wandb]', or set it to false") from None


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path, start_step: int) -> None:
        # Steps behind a resumed one would otherwise show twice.
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, f"```\n{text}\n```", step)

    def close(self, exit_status: int) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases, the same one however often it is continued."""

    def __init__(self, folder: RunFolder, settings: Settings) -> None:
        import wandb  # takes a second, and is not there for everybody

        if not folder.wandb_id.exists():
            folder.wandb_id.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dist_train"),
            name=os.environ.get("WANDB_NAME", folder.root.name),
            dir=folder.root,
            id=folder.wandb_id.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=settings.model_dump(mode="json"),
            allow_val_change=True,
            # The console is not its own to capture. What the network does not take in time stays in the folder.
            settings=wandb.Settings(console="off", quiet=True, finish_timeout=60),
        )

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self, exit_status: int) -> None:
        self._run.finish(exit_status)
