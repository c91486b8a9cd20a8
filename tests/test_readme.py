"""The README as a newcomer reads it: its commands, settings and targets are there and do what it says."""

import re
import subprocess
from pathlib import Path

import pytest

from dist_train.config_help import describe_settings
from tests.conftest import ROOT, metrics, run_command, run_torchrun

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_settings_configs_and_targets_that_it_names_exist() -> None:
    keys = {key for key, _, _ in describe_settings()}
    named = set(re.findall(r"--([a-z]+\.[a-z_]+)=", README))
    assert named
    assert named - {"section.key"} <= keys
    for config in re.findall(r"configs/\w+\.yaml", README):
        assert (ROOT / config).exists(), config
    for target in re.findall(r"^make ([a-z]+)|`make ([a-z]+)", README, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", MAKEFILE, re.MULTILINE), target
    for script in re.findall(r"launch/\w+\.\w+", README):
        assert (ROOT / script).exists(), script


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert targets
    for target in targets[1].split():
        assert f"make {target} " in shown


@pytest.mark.parametrize(("asked", "processes"), [([], "auto"), (["NPROC=4"], "4")])
def test_make_train_starts_as_many_processes_as_asked(asked: list[str], processes: str) -> None:
    command = ["make", "-n", "train", "CONFIG=configs/model5.yaml", *asked, "ARGS=--run.seed=3"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"dist_train launch {processes} configs/model5.yaml --run.seed=3" in shown


def test_two_processes_of_the_quickstart_evaluate_like_one(data_dir: Path, tmp_path: Path) -> None:
    """The README's torchrun line, cut to 48 updates of 32; dropout off, as each process draws its own."""
    short = ["--train.max_iters=48", "--eval.interval=24", "--train.global_batch_size=32", "--model.dropout=0"]
    line = ["train", "configs/quickstart.yaml", *short, f"--data.dir={data_dir}", "--runtime.device=cpu"]
    two = run_torchrun(2, *line, f"--run.out_dir={tmp_path}/two")
    one = run_command(*line, f"--run.out_dir={tmp_path}/one")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for first, second in zip(metrics(tmp_path / "one", "eval"), metrics(tmp_path / "two", "eval"), strict=True):
        for loss in ("final_token_loss", "all_token_loss"):
            assert first[loss] == pytest.approx(second[loss], abs=1e-4)
    first, *_, last = metrics(tmp_path / "one", "eval")
    assert last["final_token_loss"] < first["final_token_loss"] - 1.0
