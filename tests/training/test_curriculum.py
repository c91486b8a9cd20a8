"""What the loss sees may change with the step: the run is what its parts would be."""

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import Settings
from dist_train.config_file import load_settings
from dist_train.errors import UserError
from dist_train.model.cost import step_flops
from dist_train.training.curriculum import last_k_at
from dist_train.training.trainer import train
from tests.conftest import losses, metrics, train_together

STAGES = [{"from_step": 0, "last_k": "all"}, {"from_step": 5, "last_k": 1}]


def stages(*pairs: tuple[int, int | str]) -> str:
    return json.dumps([{"from_step": step, "last_k": last_k} for step, last_k in pairs])


@pytest.mark.parametrize(
    ("curriculum", "expected"),
    [
        ("null", [3, 3, 3, 3, 3, 3]),
        (stages((0, "all"), (2, 8), (5, 1)), [16, 16, 8, 8, 8, 1]),
        ("shrink", [16, 9, 5, 3, 2, 1]),
        ("grow", [1, 2, 3, 5, 9, 16]),
    ],
)
def test_last_k_is_a_function_of_the_step(tiny: Callable[..., Settings], curriculum: str, expected: list[int]) -> None:
    settings = tiny({"loss.last_k": 3, "loss.curriculum": curriculum, "train.max_iters": 6})
    assert [last_k_at(step, settings) for step in range(6)] == expected
    assert last_k_at(100, settings) == expected[-1]


@pytest.mark.parametrize(
    ("curriculum", "expected"),
    [
        ("[]", "loss.curriculum: "),
        (stages((1, "all")), "from_step has to begin at 0 and to rise (got [1])"),
        (stages((0, "all"), (0, 1)), "from_step has to begin at 0 and to rise (got [0, 0])"),
        (stages((0, 1), (9, 17)), "loss.curriculum=17 is more than model.block_size=16"),
        ('[{"from_step": 0}]', "loss.curriculum: Field required"),
        (stages((0, "all"), (12, 1)), "loss.curriculum: from_step=12 never comes in train.max_iters=12"),
        ("sideways", "loss.curriculum: Input should be 'shrink' or 'grow'"),
    ],
)
def test_a_curriculum_that_cannot_be_is_a_mistake(
    tiny: Callable[..., Settings], curriculum: str, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        tiny({"loss.curriculum": curriculum})
    assert expected in str(caught.value)


def test_a_curriculum_reads_back_from_the_run_folder(tiny: Callable[..., Settings], tmp_path: Path) -> None:
    settings = tiny({"loss.curriculum": json.dumps(STAGES)})
    (tmp_path / "again.yaml").write_text(settings.to_yaml())
    assert load_settings(tmp_path / "again.yaml") == settings


def run(tiny: Callable[..., Settings], folder: Path, changes: dict[str, Any]) -> Path:
    train(tiny({"run.out_dir": folder, "model.dropout": 0.1, **changes}))
    return folder


def test_a_run_is_each_stage_while_it_lasts(tiny: Callable[..., Settings], tmp_path: Path) -> None:
    every = run(tiny, tmp_path / "all", {"loss.last_k": "all"})
    one_stage = run(tiny, tmp_path / "stage", {"loss.curriculum": stages((0, "all"))})
    staged = run(tiny, tmp_path / "staged", {"loss.curriculum": json.dumps(STAGES), "eval.interval": 5})
    assert losses(one_stage) == losses(every)
    assert losses(staged)[:5] == losses(every)[:5]
    lines = metrics(staged, "train")
    assert [line["last_k"] for line in lines] == [16] * 5 + [1] * 7
    assert [line["supervised_tokens"] for line in lines] == list(accumulate([8 * 16] * 5 + [8] * 7))
    settings = load_settings(staged / "config.yaml")
    flops = {k: step_flops(settings.model, n_rows=257, sequences=8, last_k=k) for k in (1, 16)}
    assert [line["flops"] for line in lines] == list(accumulate(flops[line["last_k"]] for line in lines))
    # What an evaluation calls `loss` is what the update before it saw.
    at_switch, last = metrics(staged, "eval")[1], metrics(staged, "eval")[-1]
    assert (at_switch["step"], at_switch["loss"]) == (5, at_switch["all_token_loss"])
    assert last["loss"] == last["final_token_loss"] == last["loss_by_position"][-1]
    assert last["all_token_loss"] == pytest.approx(sum(last["loss_by_position"]) / 16, rel=1e-12)


def test_a_curriculum_goes_on_where_it_was(tiny: Callable[..., Settings], tmp_path: Path) -> None:
    whole = run(tiny, tmp_path / "whole", {"loss.curriculum": "shrink"})
    cut = {"loss.curriculum": json.dumps([*STAGES, {"from_step": 7, "last_k": 4}])}
    run(tiny, tmp_path / "cut", {**cut, "train.max_iters": 8})
    resumed = run(tiny, tmp_path / "cut", cut)
    uninterrupted = run(tiny, tmp_path / "uncut", cut)
    kept = ("loss", "last_k", "tokens", "supervised_tokens", "flops", "grad_norm")
    assert [[line[key] for key in kept] for line in metrics(resumed, "train")] == [
        [line[key] for key in kept] for line in metrics(uninterrupted, "train")
    ]
    assert metrics(whole, "train")[-1]["last_k"] == 1


def test_who_moves_the_end_of_a_smooth_law_is_told_where_it_jumps(
    tiny: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"loss.curriculum": "shrink", "optim.lr_schedule": "cosine"}
    train(tiny({**changes, "train.max_iters": 8}))
    train(tiny({**changes, "train.max_iters": 16}))
    assert "last_k of update 9 is 4, not 1" in " ".join(capsys.readouterr().out.split())


def test_two_processes_follow_a_curriculum_like_one(
    tiny_arguments: Callable[..., list[str]], tiny: Callable[..., Settings], tmp_path: Path
) -> None:
    changes = {"loss.curriculum": json.dumps(STAGES), "model.dropout": 0}
    one = run(tiny, tmp_path / "one", changes)
    two = tmp_path / "two"
    train_together(tiny_arguments({**changes, "run.out_dir": two}))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


def test_early_evaluations_come_after_powers_of_two(tiny: Callable[..., Settings], tmp_path: Path) -> None:
    early = run(tiny, tmp_path / "early", {"eval.early": True, "eval.interval": 6})
    assert [line["step"] for line in metrics(early, "eval")] == [0, 1, 2, 4, 6, 8, 12]
    plain = run(tiny, tmp_path / "plain", {})
    assert losses(early) == losses(plain)
