"""A tiny run's network and optimizer without its loop, saved and found again: what tests of checkpoints need."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dist_train.config import Settings
from dist_train.data.shards import file_sha256
from dist_train.model.gpt import build
from dist_train.runtime.parallel import Replica
from dist_train.runtime.process import Process
from dist_train.training.checkpoint import Progress, learning_of
from dist_train.training.checkpoint_writer import CheckpointWriter
from dist_train.training.loss import LastKLoss
from dist_train.training.optimizer import build_optimizer
from dist_train.training.resume import Resumed, resume

FINGERPRINT = "the data's"
TENSOR_FILES = ["model.safetensors", "optimizer.safetensors"]
FILES = [*TENSOR_FILES, "state.json", "manifest.json"]


@dataclass
class TinyRun:
    """Network and optimizer, at a step that their values follow from."""

    settings: Settings
    replica: Replica
    optimizer: torch.optim.Optimizer
    step: int = 0

    def advance(self) -> None:
        """Update every weight by a gradient that only the step decides."""
        generator = torch.Generator().manual_seed(self.step)
        for parameter in self.replica.network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.replica.update(self.optimizer, grad_clip=None)
        self.replica.average.update(self.step)
        self.step += 1

    def save(self, writer: CheckpointWriter, is_last: bool = False) -> None:
        settings = self.settings.model_dump(mode="json")
        progress = Progress(
            step=self.step, tokens=0, supervised_tokens=0, flops=0, data_fingerprint=FINGERPRINT, settings=settings
        )
        writer.wait()
        writer.copy(self.replica, self.optimizer)
        writer.write(progress, is_last)

    def resume(self, folder: Path) -> Resumed | None:
        resumed = resume(folder, self.settings, FINGERPRINT, self.replica, self.optimizer)
        self.step = resumed.progress.step if resumed else 0
        return resumed

    def tensors(self) -> list[torch.Tensor]:
        """Return copies of all that a step changes, in order."""
        learning = learning_of(self.replica, self.optimizer)
        tensors = (*self.replica.weights().values(), *(learning[name] for name in sorted(learning)))
        return [tensor.detach().clone() for tensor in tensors]


def start(settings: Settings) -> TinyRun:
    """Return a run at step 0, always the same."""
    device = torch.device("cpu")
    network = build(settings.model, n_vocab=257, seed=0, device=device)
    replica = Replica(network, LastKLoss(network), Process(0, 1, device), settings.runtime, settings.optim.ema_decay)
    return TinyRun(settings, replica, build_optimizer(network, settings.optim))


def save_steps(settings: Settings, folder: Path, steps: int, keep: int = 2) -> None:
    """Save steps 1 … `steps` of a run into `folder`."""
    run = start(settings)
    with CheckpointWriter(folder, keep) as writer:
        writer.open(run.replica, run.optimizer)
        for _ in range(steps):
            run.advance()
            run.save(writer)


def save_forever(settings: Settings, folder: Path, saved: Connection) -> None:
    """Save step after step, and send the number of each that is known to be on disk. Ends by a kill alone."""
    run = start(settings)
    with CheckpointWriter(folder, keep=2) as writer:
        writer.open(run.replica, run.optimizer)
        while True:
            run.advance()
            run.save(writer)  # which waits for the one before
            saved.send(run.step - 1)


def at_step(settings: Settings, step: int) -> list[torch.Tensor]:
    """Return the tensors of a run at `step` that was never saved."""
    run = start(settings)
    for _ in range(step):
        run.advance()
    return run.tensors()


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Tell whether two runs are in the same state to the last bit."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


# ---- damage ----------------------------------------------------------------------------------------------------------


def vouch(folder: Path) -> None:
    """Have the manifest of a checkpoint say that its files are as they should be."""
    hashes = {name: file_sha256(folder / name) for name in FILES if name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"sha256": hashes}))


def edit_json(change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Return what changes a JSON file's values."""

    def write(path: Path) -> None:
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return write


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Return what changes a safetensors file's tensors."""

    def write(path: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return write


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
