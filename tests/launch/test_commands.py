"""What the launch files start is what our own command line understands, and they end as it ends."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from dist_train.__main__ import main
from dist_train.commands import COMMANDS
from dist_train.config import Settings
from dist_train.errors import LossError, StoppedError, StorageError, UserError
from dist_train.runtime.launch import LaunchOptions
from tests.conftest import ROOT, TINY, free_port, losses
from tests.launch.files import LAUNCH, documents, skypilot

CONFIG = "configs/quickstart.yaml"
Read = Callable[[list[str]], tuple[Settings, LaunchOptions]]
# Ended for good: the next attempt would find the same.
FINAL = {error.exit_status for error in (UserError, LossError, StorageError)}
SAVED = StoppedError.exit_status


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """Return what our command line makes of `python -m dist_train launch …`; a user's error is a failure."""
    read: list[tuple[Settings, LaunchOptions]] = []

    def launch(loaded: tuple[Settings, list[str]], **options: Any) -> None:
        read.append((loaded[0], LaunchOptions(**{name: value for name, value in options.items() if value is not None})))

    monkeypatch.setitem(COMMANDS, "launch", COMMANDS["launch"]._replace(run=launch))

    def of(arguments: list[str]) -> tuple[Settings, LaunchOptions]:
        assert arguments[:3] == ["python", "-m", "dist_train"]
        assert main(arguments[3:]) == 0
        return read.pop()

    return of


class Ran(NamedTuple):
    """How a script ended, and which of the programs beside it it called, each with its arguments."""

    status: int
    errors: str
    calls: list[list[str]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Ran]:
    """Run a script where `python`, `srun` and `scontrol` only note how they were called; `python` ends by `status`."""
    programs, noted = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    note = f"#!/bin/sh\nprintf '%s\\t' \"${{0##*/}}\" \"$@\" >>'{noted}'; echo >>'{noted}'\n"
    # As srun does: its own options come first, then the command that it starts on every node.
    srun = 'while [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n'
    scontrol = '[ "$1" = requeue ] || printf "node0\\nnode1\\n"\n'
    for name, does in {"python": 'exit "$STATUS"\n', "srun": srun, "scontrol": scontrol}.items():
        (programs / name).write_text(note + does)
        (programs / name).chmod(0o755)

    def ran(command: list[str | Path], environment: Mapping[str, str] = {}, status: int = 0) -> Ran:
        variables = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "STATUS": str(status), **environment}
        result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=30)
        calls = noted.read_text().splitlines() if noted.exists() else []
        return Ran(result.returncode, result.stderr, [call.rstrip("\t").split("\t") for call in calls])

    return ran


def test_one_gpu_trains_with_what_it_is_given() -> None:
    """The real part runs, as far as to the mistake in its settings."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(LAUNCH / "one_gpu.sh"), CONFIG, "--loss.last_k=0"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == UserError.exit_status
    assert "loss.last_k" in result.stderr


@pytest.mark.parametrize(("environment", "processes"), [({}, "auto"), ({"NPROC": "8"}, "8")])
def test_one_node_launches_what_it_is_given(
    run: Callable[..., Ran], read: Read, environment: dict[str, str], processes: str
) -> None:
    ran = run([LAUNCH / "one_node.sh", CONFIG, "--loss.last_k=3"], environment, status=5)
    assert ran.status == 5
    settings, options = read(ran.calls[0])
    assert settings.loss.last_k == 3
    assert options == LaunchOptions(processes)


def test_several_nodes_meet_at_the_head(run: Callable[..., Ran], read: Read) -> None:
    script = [LAUNCH / "multi_node.sh", CONFIG, "--loss.last_k=3"]
    ran = run(script, {"NNODES": "2", "HEAD": "node0.example", "NPROC": "8", "PORT": "29501", "JOB": "mine"})
    settings, options = read(ran.calls[0])
    assert settings.loss.last_k == 3
    assert options == LaunchOptions("8", nodes=2, head="node0.example:29501", job="mine")


@pytest.mark.parametrize(("missing", "said"), [("NNODES", "how many nodes"), ("HEAD", "where all meet")])
def test_several_nodes_need_to_know_each_other(run: Callable[..., Ran], missing: str, said: str) -> None:
    ran = run([LAUNCH / "multi_node.sh", CONFIG], {"NNODES": "2", "HEAD": "node0", missing: ""})
    assert ran.status
    assert said in ran.errors
    assert not ran.calls


@pytest.mark.parametrize("status", [0, 2, 5, SAVED])
def test_slurm_starts_a_launcher_on_each_node_and_queues_again_what_has_saved(
    run: Callable[..., Ran], read: Read, status: int
) -> None:
    job = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2"}
    ran = run(["bash", LAUNCH / "slurm.sbatch", CONFIG, "--loss.last_k=3"], job, status)
    assert ran.status == status
    hostnames, _, python, *after = ran.calls
    assert hostnames == ["scontrol", "show", "hostnames", "node[0-1]"]
    settings, options = read(python)
    assert settings.loss.last_k == 3
    assert options == LaunchOptions("auto", nodes=2, head="node0:24567", job="1234567")
    assert after == ([["scontrol", "requeue", "1234567"]] if status == SAVED else [])


def in_project(arguments: list[str], variables: Mapping[str, str] = {}) -> list[str]:
    """Return a container's command as Kubernetes completes it, with the settings of this checkout."""
    filled = [re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], argument) for argument in arguments]
    return [argument.replace("/mnt/dist_train/configs", str(ROOT / "configs")) for argument in filled]


def test_a_kubernetes_job_is_told_of_its_own_pods(read: Read) -> None:
    service, job = documents("kubernetes.yaml")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    settings, options = read(in_project(container["command"] + container["args"]))
    nodes, name, domain = job["spec"]["completions"], job["metadata"]["name"], service["metadata"]["name"]
    assert job["spec"]["parallelism"] == nodes
    assert job["spec"]["template"]["spec"]["subdomain"] == domain
    assert service["spec"]["selector"] == {"job-name": name}
    assert options == LaunchOptions("auto", nodes=nodes, head=f"{name}-0.{domain}:29500")
    assert_kept_on_the_volume(settings, job["spec"]["template"]["spec"], container)
    (given_up, _) = job["spec"]["podFailurePolicy"]["rules"]
    assert set(given_up["onExitCodes"]["values"]) == FINAL
    assert given_up["onExitCodes"]["containerName"] == container["name"]


def test_a_train_job_is_told_what_its_runtime_knows(read: Read) -> None:
    (document,) = documents("trainjob.yaml")
    trainer = document["spec"]["trainer"]
    name, nodes = document["metadata"]["name"], trainer["numNodes"]
    # As the runtime's torch policy sets them.
    runtime = {"PET_NNODES": str(nodes), "PET_MASTER_ADDR": f"{name}-node-0-0.{name}", "PET_MASTER_PORT": "29500"}
    settings, options = read(in_project(trainer["command"] + trainer["args"], runtime))
    assert options == LaunchOptions("auto", nodes=nodes, head=f"{name}-node-0-0.{name}:29500")
    (patch,) = document["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert node["name"] == container["name"] == "node"
    assert_kept_on_the_volume(settings, pod, container)


def assert_kept_on_the_volume(settings: Settings, pod: dict[str, Any], container: dict[str, Any]) -> None:
    """All nodes see data and run folder, in a volume of the pod that is there, and have time to save."""
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert settings.run.out_dir.is_relative_to(mounts["work"])
    assert settings.data.dir.is_relative_to(mounts["work"])
    assert pod["terminationGracePeriodSeconds"] > LaunchOptions("auto").grace


# ---- SkyPilot --------------------------------------------------------------------------------------------------------

# What SkyPilot appends to `run` to see the uploads through, in short.
EPILOGUE = "\nstatus=$?\necho uploaded\nexit $status"


@pytest.fixture
def node(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the task's `run` as on one node, with the mount in a temporary folder and `python` as given."""
    mount, project, port = tmp_path / "mount", tmp_path / "project", free_port()
    for folder in (mount, project / ".venv/bin"):
        folder.mkdir(parents=True)
    script = skypilot()["run"].replace("/mnt/dist_train", str(mount)).replace("29500", str(port)) + EPILOGUE

    def start(python: str, rank: int = 0, nodes: int = 1) -> subprocess.Popen[str]:
        wrapper = project / ".venv/bin/python"
        if not wrapper.exists():  # one that another node is starting cannot be written
            wrapper.write_text(f"#!/bin/sh\n{python}\n")
            wrapper.chmod(0o755)
        variables = {
            "CONFIG": "tiny.yaml",
            "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * nodes),
            "SKYPILOT_NUM_NODES": str(nodes),
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NUM_GPUS_PER_NODE": "0",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            ["bash", "-c", script],
            cwd=project,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize("status", [0, 2, SAVED])
def test_skypilot_sees_the_status_when_all_is_uploaded(node: Callable[..., subprocess.Popen[str]], status: int) -> None:
    process = node(f"exit {status}")
    assert (process.communicate()[0], process.returncode) == ("uploaded\n", status)


def test_skypilot_goes_on_after_a_request_to_stop_and_with_nothing_else() -> None:
    assert skypilot()["resources"]["job_recovery"] == {"recover_on_exit_codes": [SAVED]}


def test_two_of_skypilots_nodes_train_as_one(node: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {}
    for key, value in TINY.items():
        section, name = key.split(".")
        settings.setdefault(section, {})[name] = value
    (tmp_path / "project/tiny.yaml").write_text(yaml.safe_dump(settings))
    processes = [node(f'exec {sys.executable} "$@"', rank, nodes=2) for rank in range(2)]
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert "on 2 × cpu" in "".join(output for output, _ in ended)
    assert len(losses(tmp_path / "mount/runs/tiny")) == TINY["train.max_iters"]
    assert (tmp_path / "mount/data/python-docs-bytes/manifest.json").exists()
