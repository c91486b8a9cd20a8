"""A run brought to where a former one stopped: from its newest checkpoint that holds, with settings that fit."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dist_train.config import Settings
from dist_train.config_help import default_of, may_change
from dist_train.errors import UserError, one_line
from dist_train.runtime.parallel import Replica
from dist_train.training.checkpoint import (
    MODEL,
    OPTIMIZER,
    OWN,
    Checkpoint,
    DamagedError,
    Progress,
    ScalerState,
    checkpoints_in,
    learning_like,
)
from dist_train.training.curriculum import last_k_at
from dist_train.training.optimizer import learning_rate, restore_state, state_like

log = logging.getLogger(__name__)

T = TypeVar("T")

Changes = dict[str, tuple[Any, Any]]
"""By `section.key`: what it was, and what it is."""


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    path: Path
    """The checkpoint."""
    progress: Progress
    changed: list[str]
    """What differs from the settings it was made with, one text for each key: `train.max_iters 100 -> 200`."""


def resume(
    folder: Path, settings: Settings, data_fingerprint: str, replica: Replica, optimizer: torch.optim.Optimizer
) -> Resumed | None:
    """Bring network, optimizer and scaler to the newest checkpoint in `folder` that holds; None if there is none.

    Warns of newer ones that are damaged. Raises `UserError` if all are, if settings make it another run, naming every
    one of them, or if the data is another. Whatever is wrong, nothing of the network has changed then.
    """
    found = checkpoints_in(folder)
    for path in found:
        try:
            checkpoint = Checkpoint(path)
            changed = _accept(checkpoint, settings, data_fingerprint)
            weights = checkpoint.tensors(MODEL, replica.weights())
            learning = checkpoint.tensors(OPTIMIZER, learning_like(replica, optimizer))
        except DamagedError as problem:
            _warn_of_damage(path, problem)
            continue
        _restore(replica, optimizer, weights, learning)
        if isinstance(checkpoint.state.grad_scaler, ScalerState):
            replica.scaler.load_state_dict(checkpoint.state.grad_scaler.model_dump(by_alias=True))
        return Resumed(path, checkpoint.state, changed)
    if found:
        raise _all_damaged(folder)
    return None


def newest_weights(folder: Path, network: nn.Module) -> Checkpoint:
    """Give `network` the weights of the newest checkpoint in `folder` that holds, and return it.

    Raises `UserError` if there is none.
    """

    def load(checkpoint: Checkpoint) -> Checkpoint:
        network.load_state_dict(checkpoint.tensors(MODEL, network.state_dict()))
        return checkpoint

    return newest_that_holds(folder, load)


def newest_that_holds(folder: Path, read: Callable[[Checkpoint], T]) -> T:
    """Return what `read` makes of the newest checkpoint in `folder` of which it does not raise `DamagedError`.

    Warns of newer ones. Raises `UserError` if there is none.
    """
    found = checkpoints_in(folder)
    for path in found:
        try:
            return read(Checkpoint(path))
        except DamagedError as problem:
            _warn_of_damage(path, problem)
    raise _all_damaged(folder) if found else UserError(f"{folder} has no checkpoint yet; wait for one, or train on")


def _warn_of_damage(path: Path, problem: DamagedError) -> None:
    log.warning("%s", one_line(f"checkpoint {path} is damaged ({problem}); looking for the one before it"))


def _all_damaged(folder: Path) -> UserError:
    return UserError(f"all checkpoints in {folder} are damaged; restore one, or start another run with --run.out_dir")


def differences(saved: Mapping[str, Any], wanted: Settings) -> tuple[Changes, Changes]:
    """Return in which keys `wanted` differs from `saved`, which is by section: first those that may, then the rest.

    A setting that one side does not know, from another version of the code, is one of the rest, unless it is new and
    has its default: that is what was done before it was there.
    """
    old = {f"{section}.{key}": value for section, keys in saved.items() for key, value in keys.items()}
    new = wanted.by_key()
    allowed: Changes = {}
    refused: Changes = {}
    for key in {**old, **new}:
        if key not in old and new[key] == default_of(key):
            continue
        if key not in old or key not in new:
            refused[key] = (old.get(key), new.get(key))
        elif old[key] != new[key]:
            (allowed if may_change(key) else refused)[key] = (old[key], new[key])
    return allowed, refused


def _accept(checkpoint: Checkpoint, settings: Settings, data_fingerprint: str) -> list[str]:
    """Return the settings that differ and may, in words; raise `UserError` for those that may not, or other data."""
    allowed, refused = differences(checkpoint.state.settings, settings)
    if refused:
        listed = "; ".join(f"{key} was {_shown(was)}, is {_shown(now)}" for key, (was, now) in refused.items())
        raise UserError(
            f"{checkpoint.path} was made with other settings: {listed}; "
            f"set them back, or start another run with --run.out_dir"
        )
    if checkpoint.state.data_fingerprint != data_fingerprint:
        raise UserError(
            f"{checkpoint.path} was trained on other data than {settings.data.dir} holds; "
            f"bring that data back, or start another run with --run.out_dir"
        )
    return [
        f"{key} {_shown(was)} -> {_shown(now)}{_jump(key, was, settings, checkpoint.state.step)}"
        for key, (was, now) in allowed.items()
    ]


def _jump(key: str, was: Any, settings: Settings, step: int) -> str:
    """Say what changes at once for the next update where `train.max_iters`, the end of schedules, does."""
    if key != "train.max_iters" or not isinstance(was, int):
        return ""
    former = settings.model_copy(update={"train": settings.train.model_copy(update={"max_iters": was})})
    (rate_was, last_k_was), (rate, last_k) = (
        (learning_rate(step, each.optim, each.train.max_iters), last_k_at(step, each)) for each in (former, settings)
    )
    jumps = [f"the learning rate of update {step + 1} is {rate:.3g}, not {rate_was:.3g}"] if rate != rate_was else []
    jumps += [f"last_k of update {step + 1} is {last_k}, not {last_k_was}"] if last_k != last_k_was else []
    return f" ({'; '.join(jumps)})" if jumps else ""


def _shown(value: Any) -> str:
    """Return a value as JSON and YAML have it, from a file that anybody may have written: in one line, and cut."""
    return f"{json.dumps(value):.80}"


@torch.no_grad()
def _restore(
    replica: Replica, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], learning: dict[str, Tensor]
) -> None:
    """Give network, average and optimizer what a checkpoint has of them."""
    for name, target in replica.weights().items():
        target.copy_(replica.cut(weights[name], like=target))
    for name, target in replica.average.parameters.items():
        target.copy_(replica.cut(learning.pop(OWN + name), like=target))
    like = state_like(replica.network, optimizer)
    restore_state(replica.network, optimizer, {key: replica.cut(whole, like[key]) for key, whole in learning.items()})
