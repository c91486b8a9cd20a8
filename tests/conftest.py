"""What many tests share: a tiny run's settings, and the commands as a user starts them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from safetensors.torch import load_file

from dist_train.config import Settings
from dist_train.config_file import load_settings
from dist_train.runtime.stop import SIGNALS

# Other tests run beside these on few cores: how long one example takes says nothing.
hypothesis.settings.register_profile(
    "dist_train", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("dist_train")

# Who runs the tests under nohup bequeaths that it is ignored, also to the processes that tests send it to.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

Started = subprocess.Popen[str]

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"

# A network that trains a step in milliseconds, on real text, the same on every run and number of processes.
TINY = {
    "data.source": "python-docs",
    "data.tokenizer": "bytes",
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 32,
    "model.block_size": 16,
    "train.max_iters": 12,
    "train.global_batch_size": 8,
    "eval.interval": 4,
    "eval.batches": 2,
    "checkpoint.interval": 4,
    "log.interval": 3,
    "sample.max_new_tokens": 8,
    "runtime.device": "cpu",
    "runtime.precision": "fp32",
    "optim.grad_clip": 1.0,
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are one process, whoever started pytest."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """A run that was asked to stop goes on listening to its process's end, which a test's is not."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of prepared bytes of the embedded book for all tests of a process."""
    from dist_train.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data") / "shards"
    config = folder.parent / "data.yaml"
    config.write_text(f"data: {{source: python-docs, tokenizer: bytes, dir: {folder}}}")
    prepare(load_settings(config).data)
    return folder


@pytest.fixture
def tiny_arguments(tmp_path: Path, data_dir: Path) -> Callable[..., list[str]]:
    """Return the command line's CONFIG and overrides of a tiny run: `tiny_arguments({"loss.last_k": "all"})`."""

    def arguments(changes: dict[str, Any] | None = None) -> list[str]:
        config = tmp_path / "tiny.yaml"
        config.write_text("# all from the command line\n")
        values = {**TINY, "data.dir": data_dir, "run.out_dir": tmp_path / "run", **(changes or {})}
        return [str(config), *(f"--{key}={value}" for key, value in values.items())]

    return arguments


@pytest.fixture
def tiny(tiny_arguments: Callable[..., list[str]]) -> Callable[..., Settings]:
    """Return the settings of a tiny run: `tiny({"loss.last_k": "all"})`."""

    def settings(changes: dict[str, Any] | None = None) -> Settings:
        config, *overrides = tiny_arguments(changes)
        return load_settings(Path(config), overrides)

    return settings


def run_command(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m dist_train …` from the project's root with one thread, as tests run beside each other."""
    return _run([sys.executable, "-m", "dist_train", *arguments], environment)


def run_torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --standalone --nproc_per_node=N -m dist_train …` from the project's root."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return _run([*launcher, "-m", "dist_train", *arguments])


def _run(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    # torch is not told how many threads the machine has: the sum's order, and so its last bit, would hang on it.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **(environment or {})}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=180)


def free_port() -> int:
    """Return a port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_together(
    arguments_of_rank: Sequence[Sequence[str]],
    environment: dict[str, str] | None = None,
    folders: Sequence[Path] | None = None,
    program: Sequence[str] = ("-m", "dist_train"),
) -> list[Started]:
    """Start `train` in processes joined by hand, as nodes would be, without a launcher; each in one of `folders`."""
    port = free_port()
    count = str(len(arguments_of_rank))
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    address = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *program, "train", *arguments],
            cwd=folders[rank] if folders else ROOT,
            env={**variables, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, arguments in enumerate(arguments_of_rank)
    ]


def finish(started: list[Started]) -> tuple[list[int], list[str]]:
    """Return the exit statuses of processes and what they said on standard error."""
    errors = [process.communicate(timeout=120)[1] for process in started]
    return [process.returncode for process in started], errors


def train_together(arguments: Sequence[str], processes: int = 2, environment: dict[str, str] | None = None) -> None:
    """Train in so many processes joined by hand, all of which succeed."""
    statuses, errors = finish(start_together([arguments] * processes, environment))
    assert statuses == [0] * processes, errors


def wait_for(condition: Callable[[], object], process: Started) -> None:
    """Wait until what a process does shows, as long as it lives."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(run: Path) -> list[float]:
    """Return the training losses of a run, in order."""
    return [line["loss"] for line in metrics(run, "train")]


def weights(run: Path, step: int = 12) -> dict[str, torch.Tensor]:
    """Return all that a run's checkpoint holds of network and optimizer."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def assert_same_weights(one: Path, other: Path) -> None:
    """See that two runs end in the same bits, the optimizer's too."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
