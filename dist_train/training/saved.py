"""Weights that a run has saved, without the run: its data may be gone, its device another."""

import json
from dataclasses import dataclass
from pathlib import Path

import tiktoken
from pydantic import ValidationError
from torch import Tensor

from dist_train.config import Settings
from dist_train.data.tokenizer import load_tokenizer
from dist_train.errors import UserError
from dist_train.model.pretrained import Weights, like
from dist_train.training.checkpoint import MODEL, STATE, Checkpoint, DamagedError
from dist_train.training.resume import newest_that_holds
from dist_train.training.run_folder import RunFolder


@dataclass(frozen=True)
class Saved:
    """A checkpoint's weights, and what they were trained with."""

    checkpoint: Checkpoint
    settings: Settings
    encoding: tiktoken.Encoding
    tensors: dict[str, Tensor]
    """The weights, by our names."""

    def weights(self, where: str) -> Weights:
        """Return the weights for another run to start from; the user knows them as `where`."""
        return Weights(where, self.settings.model, self.encoding.n_vocab, self.tensors.__getitem__)


def is_saved(path: Path) -> bool:
    """Tell whether `path` looks like the folder of a run or of a checkpoint."""
    return RunFolder(path).checkpoints.is_dir() or (path / STATE).is_file()


def open_saved(path: Path) -> Saved:
    """Read the checkpoint in the folder `path`, or the newest one that holds of the run there.

    Raises `UserError` if there is none that holds, or if it is of another version.
    """
    if not is_saved(path):
        raise UserError(f"{path} is no folder of a run, nor of a checkpoint; give one that `train` wrote")
    if not (path / STATE).is_file():
        return newest_that_holds(RunFolder(path).checkpoints, _read)
    try:
        return _read(Checkpoint(path.resolve()))
    except DamagedError as problem:
        raise UserError(f"checkpoint {path} is damaged ({problem}); use another") from None


def _read(checkpoint: Checkpoint) -> Saved:
    try:
        # Through JSON, where strict types allow a list for a tuple.
        settings = Settings.model_validate_json(json.dumps(checkpoint.state.settings))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{checkpoint.path} is of another version of dist_train ({where}: {first['msg']}); use that one"
        ) from None
    encoding = load_tokenizer(settings.data.tokenizer)
    tensors = checkpoint.tensors(MODEL, like(settings.model, encoding.n_vocab))
    return Saved(checkpoint, settings, encoding, tensors)
