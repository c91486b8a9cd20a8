"""A run saved and found again: safetensors and JSON, nothing pickled, complete or not there at all."""

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_train.config import Settings
from dist_train.data.shards import file_sha256
from dist_train.errors import StorageError, UserError
from dist_train.runtime.parallel import Replica
from dist_train.storage import sync

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"

# Changing these goes on with the same run; anything else makes another one. The data is compared by its hash.
_MAY_CHANGE = re.compile(
    r"(eval|checkpoint|log|sample|runtime)\..*|run\.out_dir|train\.(max_iters|micro_batch_size)|data\.(dir|path)"
)


@dataclass(frozen=True)
class Progress:
    """How far a run is, and what it was run with."""

    step: int
    tokens: int
    supervised_tokens: int
    data_fingerprint: str
    settings: dict[str, Any]


def save(folder: Path, keep: int, replica: Replica, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Write `step-<number>` into `folder`, delete all but the newest `keep`, and return the new one.

    Written aside, synced and renamed: a kill at any moment leaves whole checkpoints alone. Raises `StorageError`.
    """
    target = folder / f"step-{progress.step:06d}"
    aside = folder / f".{target.name}.partial"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in replica.network.state_dict().items()},
            aside / "model.safetensors",
        )
        save_file(_optimizer_tensors(replica.network, optimizer), aside / "optimizer.safetensors")
        state = {**vars(progress), "grad_scaler": replica.scaler.state_dict()}
        (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        hashes = {path.name: file_sha256(path) for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2) + "\n", encoding="utf-8")
        for path in (*aside.iterdir(), aside):
            sync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        sync(folder)
        for old in _superseded(folder, progress.step, keep):
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot save {target}: {error}; free space there, the same command then goes on") from error
    return target


def find_newest(folder: Path) -> Path | None:
    """Return the newest checkpoint whose every file has its manifest's hash; warn of newer ones that do not.

    None if there is no checkpoint. Raises `UserError` if there are, but all are damaged.
    """
    found = _all(folder)
    for path in found:
        problem = _problem(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is damaged (%s); looking for the one before it", path, problem)
    if found:
        raise UserError(
            f"all checkpoints in {folder} are damaged; restore one, or start another run with --run.out_dir"
        )
    return None


def load(
    path: Path, settings: Settings, data_fingerprint: str, replica: Replica, optimizer: torch.optim.Optimizer
) -> Progress:
    """Bring network, optimizer and scaler to the state saved at `path`, and return how far the run was.

    Raises `UserError` naming every setting that makes it another run, or if the data is not the same.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        scaler = state.pop("grad_scaler")
        progress = Progress(**state)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is of another version ({error}); start another run with --run.out_dir") from None
    differing = list(_differences(progress.settings, settings.model_dump(mode="json")))
    if differing:
        raise UserError(
            f"{path} was made with other settings: {'; '.join(differing)}; "
            f"set them back, or start another run with --run.out_dir"
        )
    if progress.data_fingerprint != data_fingerprint:
        raise UserError(
            f"{path} was trained on other data than {settings.data.dir} holds; "
            f"bring that data back, or start another run with --run.out_dir"
        )
    replica.network.load_state_dict(load_file(path / "model.safetensors"))
    _restore_optimizer(replica.network, optimizer, load_file(path / "optimizer.safetensors"))
    if scaler:
        replica.scaler.load_state_dict(scaler)
    return progress


def _all(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, newest first; anything not called step-<digits> is not ours."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step, reverse=True)


def _superseded(folder: Path, step: int, keep: int) -> list[Path]:
    """Return the checkpoints older than the newest `keep` up to `step`, and later ones, which the run has left behind.

    Those were damaged, or it would have gone on from them: counted among the newest they would push out good ones.
    """
    found = _all(folder)
    ahead = [path for path in found if _step(path) > step]
    return ahead + found[len(ahead) + keep :]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _problem(path: Path) -> str | None:
    try:
        hashes = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        damaged = [name for name, sha256 in hashes.items() if file_sha256(path / name) != sha256]
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(damaged)} changed" if damaged else None


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    old, new = (
        {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}
        for settings in (saved, wanted)
    )
    # A setting that one side does not know, from another version of the code, is a difference too.
    return [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in {**old, **new}
        if (key not in old or key not in new or old[key] != new[key]) and not _MAY_CHANGE.fullmatch(key)
    ]


def _optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors called `<state>.<parameter>`: names survive a change of order."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    return {
        f"{kind}.{names[parameter]}": tensor.contiguous().cpu()
        for parameter, state in optimizer.state.items()
        for kind, tensor in state.items()
    }


def _restore_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    names = {parameter: name for name, parameter in network.named_parameters()}
    kinds = {key.partition(".")[0] for key in tensors}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {kind: tensors[f"{kind}.{names[parameter]}"] for kind in kinds}
        for index, parameter in enumerate(ordered)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
