"""How a run ends before its time: saved where it was asked to, together, and by one line that says why."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from dist_train.config import Settings
from dist_train.errors import LossError, StoppedError, UserError
from dist_train.runtime.stop import Stop
from dist_train.training import evaluation, trainer
from dist_train.training.run_folder import RunFolder
from dist_train.training.trainer import train
from tests.conftest import (
    ROOT,
    assert_same_weights,
    finish,
    losses,
    metrics,
    start_together,
    train_together,
    wait_for,
    weights,
)

Tiny = Callable[..., Settings]
Arguments = Callable[..., list[str]]
NEVER = {"eval.interval": 10**6, "checkpoint.interval": 10**6, "train.max_iters": 10**6}


def status_of(run: Path) -> tuple[str, int, int]:
    values = json.loads((run / "run_status.json").read_text())
    return values["status"], values["exit_status"], values["last_step"]


# ---- on request ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_that_very_update_and_goes_on_from_it(
    number: signal.Signals, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny({"run.out_dir": tmp_path / "whole"}))
    real, calls, note, noted = trainer._accumulate_gradients, [], Stop.note, Event()

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), number)
            assert noted.wait(timeout=60)  # a thread notes requests, an update later where the machine is busy
        return real(*arguments)  # type: ignore[arg-type]

    def take_note(stop: Stop, number: int) -> None:
        note(stop, number)
        noted.set()

    monkeypatch.setattr(trainer, "_accumulate_gradients", interrupted)
    monkeypatch.setattr(Stop, "note", take_note)
    with pytest.raises(StoppedError, match="after update 7, everything is saved") as caught:
        train(tiny({"run.out_dir": tmp_path / "cut"}))
    assert caught.value.exit_status == 75
    assert status_of(tmp_path / "cut") == ("preempted", 75, 7)
    monkeypatch.undo()
    train(tiny({"run.out_dir": tmp_path / "cut"}))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_one_process_that_is_asked_stops_all_of_them(tiny_arguments: Arguments, tmp_path: Path) -> None:
    started = start_together([tiny_arguments({**NEVER, "log.interval": 1})] * 2)
    wait_for((tmp_path / "run/metrics.jsonl").exists, started[0])
    wait_for(lambda: metrics(tmp_path / "run", "train"), started[0])
    started[1].send_signal(signal.SIGUSR1)
    statuses, errors = finish(started)
    assert statuses == [75, 75], errors
    word, exit_status, last_step = status_of(tmp_path / "run")
    assert (word, exit_status) == ("preempted", 75)
    assert errors[0].startswith(f"error: stopped on request after update {last_step}, everything is saved")
    assert errors[0].count("\n") == 1
    assert errors[1] == ""
    assert weights(tmp_path / "run", last_step)


def test_a_run_that_was_asked_to_stop_may_end_right_there(tiny_arguments: Arguments, tmp_path: Path) -> None:
    """With no sample to show, as there was no time to take one."""
    (process,) = start_together([tiny_arguments(NEVER)])
    wait_for((tmp_path / "run/metrics.jsonl").exists, process)
    wait_for(lambda: metrics(tmp_path / "run", "train"), process)
    process.send_signal(signal.SIGTERM)
    assert finish([process])[0] == [75]
    last_step = status_of(tmp_path / "run")[2]
    (again,) = start_together([tiny_arguments({**NEVER, "train.max_iters": last_step})])
    assert finish([again]) == ([0], [""])


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tiny_arguments: Arguments, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dist_train", "train", *tiny_arguments({"train.max_iters": 200})]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline()
        process.stdout.close()
        assert (process.wait(), process.stderr.read() if process.stderr else "") == (0, "")
    assert len(losses(tmp_path / "run")) == 200
    assert status_of(tmp_path / "run") == ("done", 0, 200)


def test_a_closed_terminal_is_a_request_to_stop(tiny_arguments: Arguments, tmp_path: Path) -> None:
    master, terminal = os.openpty()
    command = [sys.executable, "-m", "dist_train", "train", *tiny_arguments(NEVER)]

    def heed_hangups() -> None:  # who runs the tests under nohup bequeaths that they are ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal, text=True, preexec_fn=heed_hangups
    ) as process:
        os.close(terminal)
        wait_for((tmp_path / "run/metrics.jsonl").exists, process)
        wait_for(lambda: metrics(tmp_path / "run", "train"), process)
        os.close(master)  # whatever is written from now on fails
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=120) == 75
    assert status_of(tmp_path / "run")[:2] == ("preempted", 75)


# ---- a loss that cannot be, weights that differ ----------------------------------------------------------------------


def test_a_loss_that_is_no_number_on_one_process_stops_all_before_the_update_and_names_its_samples(
    tiny_arguments: Arguments, tmp_path: Path
) -> None:
    still = {"checkpoint.interval": 5, "log.interval": 100}
    started = start_together([tiny_arguments(still)] * 2, {"DIST_TRAIN_FAULT": "nan:1:6"})
    statuses, errors = finish(started)
    assert statuses == [3, 3], errors
    assert errors[0].count("\n") == 1
    assert "the loss is nan of step 7 (samples 52 … 55 on rank 1)" in errors[0]
    assert errors[1] == ""
    (line,) = metrics(tmp_path / "run", "impossible")
    assert (line["step"], line["ranks"], line["samples"]) == (7, [1], [[52, 55]])
    assert status_of(tmp_path / "run") == ("failed", 3, 6)
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-000005"]
    assert len(losses(tmp_path / "run")) == 6


# Like `python -m dist_train`, on a machine with less memory.
_WITH_2_GIB = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from dist_train.__main__ import main
sys.exit(main())
"""


def test_too_little_memory_is_said_with_what_helps(tiny_arguments: Arguments, tmp_path: Path) -> None:
    large = {"loss.last_k": 4, "train.global_batch_size": 1 << 15, "eval.batches": 1, "log.memory_history": True}
    statuses, (errors,) = finish(start_together([tiny_arguments(large)], program=["-c", _WITH_2_GIB]))
    assert statuses == [2], errors
    assert errors.startswith("error: out of memory with 32768 sequences of 16 tokens at once on a process")
    assert "the loss sees the last 4; use --train.micro_batch_size=16384" in errors
    assert errors.count("\n") == 1
    assert status_of(tmp_path / "run") == ("failed", 2, 0)


def test_a_network_that_does_not_fit_is_named_before_the_first_update(tiny_arguments: Arguments) -> None:
    statuses, (errors,) = finish(start_together([tiny_arguments({"model.n_embd": 8192})], program=["-c", _WITH_2_GIB]))
    assert statuses == [2], errors
    assert errors.startswith("error: out of memory before the first update")
    assert errors.count("\n") == 1


# Like `python -m dist_train`, but gloo's threads take their time to forget a reduction that is done.
_FORGETS_SLOWLY = """
import sys, time
from dist_train.__main__ import main
from dist_train.runtime import parallel

class Forgotten:
    def __del__(self):
        time.sleep(2)

def add_up(part_norm, bucket, real=parallel._add_up):
    forgotten = Forgotten()
    return real(part_norm, bucket).then(lambda done: (done.value(), forgotten)[0])

parallel._add_up = add_up
sys.exit(main())
"""


def test_processes_that_end_early_do_not_wait_for_what_a_reduction_leaves_behind(
    tiny_arguments: Arguments, tmp_path: Path
) -> None:
    """Or gloo's threads would ask an interpreter that is ending for its lock, and abort the process."""
    arguments = tiny_arguments({**NEVER, "log.interval": 1})
    started = start_together([arguments] * 2, {"DIST_TRAIN_FAULT": "nan:1:0"}, program=["-c", _FORGETS_SLOWLY])
    statuses, errors = finish(started)
    assert statuses == [3, 3], errors
    assert errors[0].count("\n") == 1
    assert errors[1] == ""


def test_no_update_follows_a_gradient_that_is_no_number(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nobody has looked at the norm yet: the updates between it and the look leave the weights alone."""
    seen: list[torch.Tensor] = []
    real = trainer.update

    def watched(run: trainer.Learner, step: int) -> trainer.Update:
        result = real(run, step)
        seen.append(torch.cat([parameter.detach().flatten() for parameter in run.replica.network.parameters()]))
        return result

    monkeypatch.setattr(trainer, "update", watched)
    monkeypatch.setenv("DIST_TRAIN_FAULT", "nan:0:2")
    with pytest.raises(LossError, match="of step 3"):
        train(tiny({"log.interval": 100, "eval.interval": 100, "checkpoint.interval": 6}))
    assert len(seen) == 6
    assert not torch.equal(seen[0], seen[1])
    assert all(torch.equal(weights, seen[1]) for weights in seen[2:])


def test_a_copy_of_the_weights_that_differs_is_found_at_the_next_checkpoint_and_named(
    tiny_arguments: Arguments, tmp_path: Path
) -> None:
    started = start_together([tiny_arguments()] * 2, {"DIST_TRAIN_FAULT": "flip:1:5"})
    statuses, errors = finish(started)
    assert statuses == [5, 5], errors
    assert "weights differ after step 8: rank 1 has sum of token_embedding.weight=" in errors[0]
    assert errors[1] == ""
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-000004"]


def test_a_held_out_loss_that_is_no_number_ends_with_status_3(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a position that training does not look at."""
    real = evaluation.losses_BT

    def broken(*arguments: Any) -> torch.Tensor:
        losses_BT = real(*arguments)
        losses_BT[:, 0] = math.nan
        return losses_BT

    monkeypatch.setattr(evaluation, "losses_BT", broken)
    with pytest.raises(LossError, match="held out after step 0, the loss is nan"):
        train(tiny())
    assert status_of(tmp_path / "run")[:2] == ("failed", 3)


# ---- others that differ, are gone, hang or take long -----------------------------------------------------------------


@pytest.mark.parametrize(("key", "values"), [("optim.learning_rate", (1e-3, 2e-3)), ("model.n_embd", (32, 64))])
def test_processes_with_different_settings_are_told_which_before_step_1(
    key: str, values: tuple[float, float], tiny_arguments: Arguments, tmp_path: Path
) -> None:
    statuses, errors = finish(start_together([tiny_arguments({key: value}) for value in values]))
    assert statuses == [2, 2], errors
    assert f"rank 1 has {key}={values[1]} (not {values[0]}), unlike rank 0" in errors[0]
    assert errors[1] == ""  # what all find, one says
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("other", ["data", "checkpoint"])
def test_processes_that_find_other_files_by_the_same_names_are_told_which(
    other: str, tiny: Tiny, tiny_arguments: Arguments, tmp_path: Path, data_dir: Path
) -> None:
    """As on nodes whose file systems are not one."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        shutil.copytree(data_dir, node / "shards")
    if other == "data":
        content = bytearray((nodes[1] / "shards/train_000000.bin").read_bytes())
        content[5000] ^= 1
        (nodes[1] / "shards/train_000000.bin").write_bytes(content)
        for path in nodes[0].rglob("manifest.json"), nodes[1].rglob("manifest.json"):
            next(path).unlink()  # without it, shards are foreign: nobody says what their content should be
    else:
        train(tiny({"run.out_dir": nodes[0] / "run", "train.max_iters": 4}))
    statuses, errors = finish(
        start_together([tiny_arguments({"data.dir": "shards", "run.out_dir": "run"})] * 2, folders=nodes)
    )
    assert statuses == [2, 2], errors
    assert f"rank 1 has {other}=" in errors[0]
    assert errors[1] == ""


def test_a_process_whose_peer_is_killed_names_it_and_ends_with_status_5(
    tiny_arguments: Arguments, tmp_path: Path
) -> None:
    started = start_together([tiny_arguments({"train.max_iters": 100_000})] * 2)
    wait_for(lambda: any((tmp_path / "run/checkpoints").glob("step-*")), started[0])
    started[1].kill()
    statuses, errors = finish(started)
    assert statuses == [5, -signal.SIGKILL], errors
    assert errors[0].startswith("error: rank 0 lost rank 1: gone")
    assert errors[0].count("\n") == 1
    assert status_of(tmp_path / "run")[:2] == ("failed", 5)


def test_a_process_that_hangs_is_named_and_not_waited_for_longer_than_the_timeout(
    tiny_arguments: Arguments, tmp_path: Path
) -> None:
    first, second = start_together([tiny_arguments({**NEVER, "runtime.timeout_seconds": 3})] * 2)
    wait_for((tmp_path / "run/metrics.jsonl").exists, first)
    wait_for(lambda: metrics(tmp_path / "run", "train"), first)
    second.send_signal(signal.SIGSTOP)
    try:
        (status,), (errors,) = finish([first])
    finally:
        second.kill()
        finish([second])
    assert status == 5, errors
    assert "rank 0 lost rank 1: gone, or not there within runtime.timeout_seconds=3" in errors


def test_an_evaluation_may_take_longer_than_the_timeout(tiny_arguments: Arguments, tmp_path: Path) -> None:
    slow = {"train.max_iters": 1, "eval.batches": 2500, "train.micro_batch_size": 4, "runtime.timeout_seconds": 1}
    train_together(tiny_arguments(slow))
    assert all(line["seconds"] > 1.5 for line in metrics(tmp_path / "run", "eval"))


# ---- one run, one folder ---------------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_told_which_process_has_it(tiny: Tiny, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").claimed(), pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        train(tiny())
    train(tiny())
