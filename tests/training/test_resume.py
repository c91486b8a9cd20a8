"""A run goes on with settings that fit: the others are named, all at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import Settings
from dist_train.errors import UserError
from dist_train.training.resume import differences
from tests.training.saved_run import edit_json, save_steps, start, vouch

Tiny = Callable[..., Settings]


@pytest.fixture
def checkpoints(tiny: Tiny, tmp_path: Path) -> Path:
    """A folder with steps 1 and 2 of a tiny run."""
    save_steps(tiny(), tmp_path / "checkpoints", steps=2)
    return tmp_path / "checkpoints"


def test_a_checkpoint_of_another_version_is_refused_by_name(checkpoints: Path, tiny: Tiny) -> None:
    def rename(state: Any) -> None:
        state["settings"]["model"]["norm_epsilon"] = state["settings"]["model"].pop("norm_eps")

    edit_json(rename)(checkpoints / "step-000002" / "state.json")
    vouch(checkpoints / "step-000002")
    with pytest.raises(UserError, match=r"model\.norm_epsilon was 1e-05, is null; set them back"):
        start(tiny()).resume(checkpoints)


def test_settings_that_may_change_are_told_and_all_others_refused_at_once(checkpoints: Path, tiny: Tiny) -> None:
    changed = {"train.max_iters": 100, "eval.interval": 7, "checkpoint.keep": 5, "run.out_dir": "elsewhere"}
    resumed = start(tiny(changed)).resume(checkpoints)
    assert resumed
    assert [text.split()[0] for text in resumed.changed] == [
        "run.out_dir",
        "train.max_iters",
        "eval.interval",
        "checkpoint.keep",
    ]
    assert "train.max_iters 12 -> 100" in resumed.changed
    with pytest.raises(UserError) as caught:
        start(tiny({**changed, "optim.learning_rate": 1, "run.seed": 2, "model.dropout": 0.5})).resume(checkpoints)
    for text in ("run.seed was 1337, is 2", "model.dropout was 0.1, is 0.5", "optim.learning_rate was 0.001, is 1.0"):
        assert text in str(caught.value)
    assert "eval.interval" not in str(caught.value)


def test_another_end_of_a_cosine_says_where_the_learning_rate_jumps(tiny: Tiny, tmp_path: Path) -> None:
    cosine = {"optim.lr_schedule": "cosine"}
    save_steps(tiny(cosine), tmp_path / "checkpoints", steps=6)
    resumed = start(tiny({**cosine, "train.max_iters": 100})).resume(tmp_path / "checkpoints")
    assert resumed
    expected = "train.max_iters 12 -> 100 (the learning rate of update 7 is 0.000991, not 0.000429)"
    assert resumed.changed == [expected]


def test_a_former_end_that_is_no_number_is_told_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    cosine = tiny({"optim.lr_schedule": "cosine"})
    save_steps(cosine, tmp_path, steps=1)
    edit_json(lambda state: state["settings"]["train"].update(max_iters="many\n"))(tmp_path / "step-000001/state.json")
    vouch(tmp_path / "step-000001")
    resumed = start(cosine).resume(tmp_path)
    assert resumed
    assert resumed.changed == [r'train.max_iters "many\n" -> 12']


def test_a_setting_that_one_side_lacks_is_refused(tiny: Tiny) -> None:
    saved = tiny().model_dump(mode="json")
    saved["eval"]["often"] = saved["eval"].pop("interval")
    allowed, refused = differences(saved, tiny())
    assert not allowed
    assert refused == {"eval.often": (4, None), "eval.interval": (None, 4)}


def test_a_setting_that_was_not_there_yet_may_have_its_default(tiny: Tiny) -> None:
    saved = tiny().model_dump(mode="json")
    for section, key in (("model", "freeze"), ("log", "wandb"), ("optim", "ema_decay")):
        del saved[section][key]
    assert differences(saved, tiny()) == ({}, {})
    assert differences(saved, tiny({"model.freeze": "[0]"}))[1] == {"model.freeze": (None, [0])}
