"""What processes do together: they agree, they end together, and name the one that is lost."""

import json
import os
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys, time
import torch
from dist_train.sections import RuntimeSettings
from dist_train.errors import DistTrainError, StoppedError, StorageError
from dist_train.runtime.process import start_process
seen = {}
%s
try:
    with start_process(RuntimeSettings(device="cpu", timeout_seconds=%f)) as process:
        rank = process.rank
        %s
except DistTrainError as error:
    seen["error"] = [type(error).__name__, error.exit_status, error.said_by, str(error)]
print(json.dumps(seen))
"""


def run_processes(count: int, work: str, timeout_seconds: float = 60.0, before: str = "") -> list[dict]:
    """Return what each of `count` processes has seen when it has done `before`, joined the others, and done `work`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    script = SCRIPT % (before, timeout_seconds, work.strip().replace("\n", "\n        "))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    return [json.loads(output) if output else {} for output in outputs]


def test_processes_agree_or_say_who_differs_in_what() -> None:
    work = """
seen["gathered"] = process.gather({"rank": rank, "long": "x" * 1000 * rank})
seen["highest"] = process.highest(rank * 5)
seen["same"] = process.disagreement({"a": 1, "b": [2.5, None]})
seen["other"] = process.disagreement({"a": 1, "b": "one" if rank < 2 else "two"})
seen["done"] = process.on_main(lambda: process.rank + 7)
seen["listens at"] = os.environ["GLOO_SOCKET_IFNAME"]
"""
    first, second, third = run_processes(3, work)
    assert first["gathered"] == [{"rank": rank, "long": "x" * 1000 * rank} for rank in range(3)]
    assert (first["highest"], first["same"], first["done"]) == (10, None, 7)
    assert first["listens at"] in ("lo", "lo0")
    assert first["other"] == "rank 2 has b='two' (not 'one'), unlike rank 0"
    assert second == third == {**first, "done": None}


def test_an_error_of_the_first_process_ends_all_by_its_status() -> None:
    work = """
def full():
    raise StorageError("the disk is full")
process.on_main(full)
"""
    first, second = run_processes(2, work)
    assert first["error"] == ["StorageError", 4, 0, "the disk is full"]
    assert second["error"][1:] == [4, 0, "rank 0 says why"]


@pytest.mark.parametrize(("error", "status"), [("StorageError", 4), ("StoppedError", 75)])
def test_an_error_of_any_process_ends_all_by_its_status_and_is_said_once(error: str, status: int) -> None:
    work = f"""
def fail():
    if rank == 1:
        raise {error}("not here")
process.together(fail)
"""
    first, second = run_processes(2, work)
    assert second["error"] == [error, status, 1, "not here"]
    assert first["error"] == ["_EndedElsewhereError", status, 1, "rank 1 says why"]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_gone_is_named_by_one_of_those_that_are_left(lost: int) -> None:
    work = f"""
process.gather("all are connected")
if rank == {lost}:
    os._exit(9)
process.sum(torch.zeros(1))
"""
    seen = run_processes(3, work)
    assert seen.pop(lost) == {}
    errors = [each["error"] for each in seen]
    assert {(name, status) for name, status, _, _ in errors} == {("ProcessLostError", 5)}
    assert all(f"lost rank {lost}: gone" in text for _, _, _, text in errors)
    if lost != 0:  # who serves the store is gone otherwise, and the others cannot tell who is the first of them
        assert [said_by for _, _, said_by, _ in errors] == [0, 0]


def test_a_process_that_dies_while_all_connect_is_waited_for_no_longer_than_the_timeout() -> None:
    dies_while_connecting = """
import torch.distributed as dist
connect, connected = dist.new_group, []
def connect_or_die(**options):
    connected.append(options)
    if os.environ["RANK"] == "1" and len(connected) == 2:
        os._exit(9)
    return connect(**options)
dist.new_group = connect_or_die
"""
    first, second, third = run_processes(3, "process.sum(torch.zeros(1))", 3.0, before=dies_while_connecting)
    assert second == {}
    for seen in (first, third):
        assert seen["error"][:2] == ["ProcessLostError", 5]
        assert "cannot reach the others" in seen["error"][3]


def test_a_process_that_hangs_is_named_within_the_timeout() -> None:
    work = """
if rank == 1:
    time.sleep(8)
    os._exit(9)
started = time.monotonic()
try:
    process.highest(3)
finally:
    seen["seconds"] = time.monotonic() - started
"""
    first, second, third = run_processes(3, work, timeout_seconds=2.0)
    assert second == {}
    for seen in (first, third):
        assert "lost rank 1: gone, or not there within runtime.timeout_seconds=2" in seen["error"][3]
        assert seen["seconds"] < 7
