"""The launch files as those they are for read them: the shell, Slurm, Kubernetes, Kubeflow Trainer, SkyPilot."""

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob as TrainJob

from tests.launch.files import LAUNCH, SCRIPTS, documents, skypilot

SHELL = {path.name: path.read_text(encoding="utf-8") for path in SCRIPTS} | {
    f"skypilot.yaml: {section}": skypilot()[section] for section in ("setup", "run")
}
NEWEST = kubernetes_validate.latest_version()

# What sbatch has to be told of a cluster before it reads a script. Nobody answers at that port.
SLURM = """ClusterName=none
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=1
AuthType=auth/none
GresTypes=gpu
MessageTimeout=2
NodeName=node[0-1] Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES
"""

# Of SkyPilot its schemas alone are imported: the rest wants an older click than huggingface_hub does, and 400 MB beside
# it. What they ask of that rest (how long idle clusters stay, what a server does beside) no launch file names. They are
# those of a server, whose plug-ins are there: a client passes on what it does not know.
SKYPILOT_SCHEMAS = """
import json, os, sys
from types import ModuleType, SimpleNamespace
rest = {name: ModuleType(name) for name in ("sky", "sky.server", "sky.server.daemons", "sky.skylet.autostop_lib")}
rest["sky"].__path__, rest["sky"].__version__ = [sys.argv[1] + "/sky"], "0"
rest["sky.skylet.autostop_lib"].AutostopWaitFor = SimpleNamespace(supported_modes=list)
rest["sky.server"].daemons = SimpleNamespace(INTERNAL_REQUEST_DAEMONS=[])
rest["sky.server"].plugins = SimpleNamespace(plugins_loaded=lambda: True)
sys.modules |= rest
os.environ["IS_SKYPILOT_SERVER"] = "true"
from sky.utils import schemas
print(json.dumps([schemas.get_task_schema(), schemas.get_resources_schema()]))
"""


@pytest.mark.parametrize("name", SHELL)
def test_bash_and_shellcheck_find_nothing(name: str) -> None:
    for checker in (["bash", "-n"], [str(Path(sys.executable).with_name("shellcheck")), "--shell=bash", "-"]):
        result = subprocess.run(checker, input=SHELL[name], capture_output=True, text=True)
        assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs Slurm's sbatch: apt-get install slurm-client")
@pytest.mark.parametrize(("wrong", "expected"), [("", "contact slurm controller"), ("--reqeue", "unrecognized option")])
def test_sbatch_reads_every_option_before_it_asks_a_cluster(tmp_path: Path, wrong: str, expected: str) -> None:
    config, script = tmp_path / "slurm.conf", tmp_path / "job.sbatch"
    config.write_text(SLURM)
    text = (LAUNCH / "slurm.sbatch").read_text()
    script.write_text(text.replace("--requeue", wrong or "--requeue"))
    command = ["sbatch", "--test-only", "--nodes=2", "--gpus-per-node=8", "--time=24:00:00", str(script), "CONFIG"]
    environment = {**os.environ, "SLURM_CONF": str(config)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode
    assert expected in result.stderr


def test_kubernetes_takes_the_job_and_its_service() -> None:
    kinds = [document["kind"] for document in documents("kubernetes.yaml")]
    assert kinds == ["Service", "Job"]
    for document in documents("kubernetes.yaml"):
        kubernetes_validate.validate(document, NEWEST, strict=True)


def test_kubernetes_would_refuse_a_field_that_it_does_not_know() -> None:
    _, job = documents("kubernetes.yaml")
    job["spec"]["template"]["spec"]["restartpolicy"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError, match="restartpolicy"):
        kubernetes_validate.validate(job, NEWEST, strict=True)


def test_kubeflow_trainer_knows_every_field_of_the_train_job() -> None:
    (document,) = documents("trainjob.yaml")
    assert (document["apiVersion"], document["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert understood(document) == document
    misspelt = deepcopy(document)
    misspelt["spec"]["trainer"]["numnodes"] = 2
    assert understood(misspelt) != misspelt


def understood(document: dict[str, Any]) -> dict[str, Any]:
    """Return what Kubeflow Trainer's models make of a document: they leave out what they do not know."""
    train_job = TrainJob.from_dict(document)
    assert train_job
    return train_job.to_dict()


def test_skypilot_takes_the_task() -> None:
    folder = Path(sys.prefix) / "skypilot"
    if not folder.exists():
        pytest.skip(f"{folder} is not there; make develop puts SkyPilot's package into it")
    result = subprocess.run([sys.executable, "-c", SKYPILOT_SCHEMAS, folder], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    task_schema, resources_schema = json.loads(result.stdout)
    task, resources = skypilot(), skypilot()["resources"]
    jsonschema.validate(task, task_schema)
    jsonschema.validate(resources, resources_schema)
    recovery = {**resources, "job_recovery": {**resources["job_recovery"], "misspelt": 1}}
    for wrong, schema in (({**task, "misspelt": 1}, task_schema), (recovery, resources_schema)):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
