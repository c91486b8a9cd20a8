"""A run's losses over what they cost."""

import json
from pathlib import Path

import numpy as np
import pytest

from dist_train.errors import UserError
from dist_train.study.learning import BUDGETS, Curve, read_curve, read_metrics


def curve(updates: list[float], losses: list[float]) -> Curve:
    return Curve({budget: np.array(updates) for budget in BUDGETS}, {"all_token_loss": np.array(losses)})


def test_between_evaluations_the_loss_is_straight_over_the_logarithm() -> None:
    halving = curve([1, 2, 4, 8], [5, 4, 3, 2])
    assert halving.at("updates", 4, "all_token_loss") == pytest.approx(3)
    assert halving.at("FLOPs", 2**1.5, "all_token_loss") == pytest.approx(3.5)
    assert halving.needed("updates", "all_token_loss", 3.5) == pytest.approx(2**1.5)
    assert halving.needed("updates", "all_token_loss", 5.0) == 1
    assert halving.needed("updates", "all_token_loss", 1.9) is None


def test_a_loss_that_goes_up_again_has_come_down_where_it_did_first() -> None:
    bumpy = curve([1, 2, 4, 8], [5, 3, 4, 2])
    assert bumpy.needed("updates", "all_token_loss", 3.0) == pytest.approx(2)


def test_a_curve_joins_evaluations_with_what_was_spent_by_then(tmp_path: Path) -> None:
    train = [
        {
            "kind": "train",
            "step": s,
            "supervised_tokens": 10 * s,
            "flops": 100 * s,
            "step_seconds": s,
            "gradient_signal": None,
        }
        for s in (1, 2, 3)
    ]
    evals = [{"kind": "eval", "step": s, "final_token_loss": 9 - s, "all_token_loss": 8 - s} for s in (0, 1, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*train, *evals]))
    read = read_curve(tmp_path)
    assert {budget: list(spent) for budget, spent in read.spent.items()} == {
        "updates": [1, 3],
        "supervised tokens": [10, 30],
        "FLOPs": [100, 300],
        "seconds": [1, 6],
    }
    assert list(read.losses["final_token_loss"]) == [8, 6]


def test_a_run_that_is_not_there_or_has_done_nothing_has_no_curve(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        read_curve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n')
    with pytest.raises(UserError, match="no finished updates"):
        read_curve(tmp_path)


def test_records_that_are_broken_or_of_an_earlier_version_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "step_seconds": 1}\n{"kind": "eval", "step": 1}\n')
    with pytest.raises(UserError, match="made by an earlier version"):
        read_curve(tmp_path)
    for line in ("torn", "[1]"):
        path.write_text(line + "\n")
        with pytest.raises(UserError, match="a line that is no JSON object"):
            read_metrics(tmp_path, "eval")


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n{"kind": "train"}\n{"kind": "eval", "st')
    assert read_metrics(tmp_path, "eval") == [{"kind": "eval", "step": 0}]
