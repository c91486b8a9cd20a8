"""What a checkpoint is on disk, and how it is read: verified first, and never trusted. Nothing is pickled."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from dist_train.errors import UserError
from dist_train.runtime.parallel import Replica
from dist_train.storage import read_regular
from dist_train.training.noise_scale import NoiseMeans
from dist_train.training.optimizer import state_like, state_of

MANIFEST, STATE, MODEL, OPTIMIZER = "manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"
FILES = (MODEL, OPTIMIZER, STATE)
"""What the manifest lists, no more and no less."""

# Far more than is ever written: a few hundred bytes, a few kilobytes, and a hundred bytes for each tensor.
_MANIFEST_AT_MOST, _STATE_AT_MOST, _HEADER_AT_MOST = 1 << 16, 1 << 22, 1 << 24

_Count = Annotated[int, Field(ge=0, lt=2**63)]


class DamagedError(Exception):
    """A checkpoint cannot be used, and why; the one before it may do."""


class _Json(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Progress(_Json):
    """How far a run is, and what it was run with."""

    step: _Count
    """Finished updates."""
    tokens: _Count
    supervised_tokens: _Count
    flops: Annotated[int, Field(ge=0)] = 0
    """Unbounded, as a large run's do not fit into 64 bits. Checkpoints before they were counted have none."""
    noise: NoiseMeans | None = None
    """What checkpoints before it was measured do not have, nor runs where it cannot be."""
    data_fingerprint: str
    settings: dict[str, dict[str, Any]]


class ScalerState(_Json):
    """What torch's GradScaler keeps, under its own names."""

    scale: PositiveFloat
    growth_factor: PositiveFloat
    backoff_factor: PositiveFloat
    growth_interval: PositiveInt
    growth_tracker: _Count = Field(alias="_growth_tracker")


class State(Progress):
    """Everything of `state.json`."""

    grad_scaler: ScalerState | Annotated[dict[str, int], Field(max_length=0)]
    """Empty unless the run trains in float16."""


class Manifest(_Json):
    """Everything of `manifest.json`."""

    sha256: dict[str, str]


class Checkpoint:
    """A checkpoint whose manifest and state are read and verified; its tensors are when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raise `DamagedError` if what lies at `path` is no checkpoint, or not the one that was written."""
        self.path = path
        if path.is_symlink() or not path.is_dir():
            raise DamagedError("not a folder")
        self._sha256 = _parse(Manifest, MANIFEST, _read(path / MANIFEST, _MANIFEST_AT_MOST)).sha256
        if sorted(self._sha256) != sorted(FILES):
            raise DamagedError(f"{MANIFEST} has to list {', '.join(FILES)}, and nothing else")
        self.state = _parse(State, STATE, self._verified(STATE, _STATE_AT_MOST))
        if self.state.step != step_of(path):
            raise DamagedError(f"{STATE} is of step {self.state.step}")

    @property
    def weights_sha256(self) -> str:
        """Tells one set of weights from another, also where a run was made anew in the same folder."""
        return self._sha256[MODEL]

    def tensors(self, name: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of one file: the names, shapes and types of `like`, and finite, or `DamagedError`.

        The file is read once and hashed, and parsed from memory: it cannot change in between, and a file cut short
        meanwhile is no bus error. That takes twice its size while it lasts.
        """
        content = self._verified(name, sum(tensor.nbytes for tensor in like.values()) + _HEADER_AT_MOST)
        try:
            tensors = safetensors.torch.load(content)
        except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
            raise DamagedError(f"{name}: {error}") from None
        if problem := _difference(tensors, like):
            raise DamagedError(f"{name}: {problem}")
        return tensors

    def _verified(self, name: str, at_most: int) -> bytes:
        content = _read(self.path / name, at_most)
        if hashlib.sha256(content).hexdigest() != self._sha256[name]:
            raise DamagedError(f"{name} changed")
        return content


def checkpoints_in(folder: Path) -> list[Path]:
    """Return what is called step-<digits> in `folder`, newest first; anything else is not ours.

    Raises `UserError` if the folder is there and cannot be read: the run must not start anew for that.
    """
    try:
        found = [path for path in folder.iterdir() if re.fullmatch(r"step-[0-9]+", path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; choose another --run.out_dir") from None
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the number in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


OWN = "weight."
"""Before the names of the network's own weights in `OPTIMIZER`, where `MODEL` has their average."""


def learning_of(replica: Replica, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what `OPTIMIZER` holds: all that a run needs beside `Replica.weights` to go on as if never stopped."""
    return state_of(replica.network, optimizer) | _own(replica)


def learning_like(replica: Replica, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return tensors of the names, shapes and types of that, also before the first update."""
    return state_like(replica.network, optimizer) | _own(replica)


def _own(replica: Replica) -> dict[str, Tensor]:
    return {OWN + name: parameter for name, parameter in replica.average.parameters.items()}


def _read(path: Path, at_most: int) -> bytes:
    try:
        return read_regular(path, at_most, follows_links=False)
    except OSError as error:
        raise DamagedError(f"{path.name}: {error.strerror}") from None


def _parse(model: type[Any], name: str, content: bytes) -> Any:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedError(f"{name}: {where} {first['msg']}") from None


def _difference(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> str | None:
    """Say what is wrong first with `tensors`, of which the names, shapes and types of `like` were expected."""
    if tensors.keys() != like.keys():
        return f"{min(tensors.keys() ^ like.keys())!r} is {'missing' if like.keys() - tensors.keys() else 'too much'}"
    for name, tensor in tensors.items():
        wanted = like[name]
        if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
            return f"{name} is {tensor.dtype} {list(tensor.shape)}, not {wanted.dtype} {list(wanted.shape)}"
        if not tensor.isfinite().all():
            return f"{name} is not finite"
    return None
