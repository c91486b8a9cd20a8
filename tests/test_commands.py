"""The command line: help without torch, one line for every mistake, what a run ends by saying."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import run_command

COMMANDS = ["prepare", "train", "launch", "bench", "bench-data", "compare", "generate"]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_teaches_and_needs_no_torch(command: str | None) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    code = f"""
import sys
from dist_train.__main__ import main
try:
    main({arguments!r})
finally:
    assert not {{"torch", "matplotlib", "numpy", "tiktoken"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
    assert "usage: dist-train" in result.stdout
    if command in ("prepare", "train", "launch", "bench"):
        assert "--loss.last_k=1" in result.stdout
        assert "final-token training" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "COMMAND"),
        (["trian", "configs/quickstart.yaml"], "trian"),
        (["train"], "CONFIG"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "configs/quickstart.yaml", "--train.max_iter=5"], "did you mean max_iters?"),
        (["train", "configs/quickstart.yaml", "--train.max_iters", "5"], "write --section.key=value"),
        (["prepare", "configs/quickstart.yaml", "--data.tokenizer=gpt3", "--data.dir=/tmp/none"], "there is no 'gpt3'"),
        (
            ["train", "configs/quickstart.yaml", "--train.global_batch_size=6", "--train.micro_batch_size=4"],
            "use 3 or 6",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], expected: str) -> None:
    result = run_command(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert expected in result.stderr


def test_only_the_first_process_repeats_what_all_read_wrong() -> None:
    result = run_command("train", "nowhere.yaml", environment={"RANK": "1", "WORLD_SIZE": "2"})
    assert (result.returncode, result.stderr) == (2, "")


def test_prepare_says_what_there_is_and_does_it_once(tmp_path: Path) -> None:
    arguments = ["prepare", "configs/quickstart.yaml", f"--data.dir={tmp_path}/shards"]
    first, second = run_command(*arguments), run_command(*arguments)
    assert first.returncode == second.returncode == 0, first.stderr
    assert "is prepared" in first.stdout
    assert "was prepared already" in second.stdout


def test_train_ends_by_naming_what_it_made(tiny_arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    result = run_command("train", *tiny_arguments())
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    for made in (run, run / "plots/loss.png", run / "samples/step-000012.txt"):
        assert str(made) in result.stdout
        assert made.exists()
    assert (run / "samples/step-000012.txt").read_text().strip() in result.stdout
    assert f"--logdir {tmp_path}" in result.stdout
    assert "step     12/12  held-out loss: final token" in result.stdout
    again = run_command("train", *tiny_arguments())
    assert again.returncode == 0
    assert "finished before; another --run.out_dir" in again.stdout
    longer = run_command("train", *tiny_arguments({"train.max_iters": 13}))
    assert longer.returncode == 0
    assert "continued from step 12" in longer.stdout
