"""Whether processes keep copies of a network or parts of one is no matter of what it learns, nor of what is saved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_train.config import Settings
from dist_train.training.trainer import train
from tests.conftest import finish, losses, metrics, start_together, train_together

PLAIN = {"model.dropout": 0.0, "loss.last_k": 3, "train.micro_batch_size": 2, "model.n_embd": 31, "model.n_head": 1}
EVERYTHING = {**PLAIN, "optim.ema_decay": 0.9, "runtime.recompute_blocks": True, "model.freeze": "[0]"}


@pytest.mark.parametrize(("first", "then"), [("fsdp", "one"), ("one", "fsdp")])
def test_a_run_may_change_from_parts_to_copies_and_back(
    first: str, then: str, tiny: Callable[..., Settings], tiny_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    still = PLAIN if first == "one" else EVERYTHING
    whole = train(tiny({**still, "run.out_dir": tmp_path / "whole"})).root
    for how, last in ((first, 4), (then, 12)):
        parallel = {} if how == "one" else {"runtime.parallel": how, "eval.ranks": "all"}
        settings = {**still, **parallel, "train.max_iters": last}
        if how == "one":
            train(tiny(settings))
        else:
            train_together(tiny_arguments(settings))
    run = tmp_path / "run"
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)
    for key in ("loss", "final_token_loss", "all_token_loss"):
        theirs, ours = ([line[key] for line in metrics(each, "eval")] for each in (whole, run))
        assert ours == pytest.approx(theirs, abs=1e-5)
    for file in ("model.safetensors", "optimizer.safetensors"):
        expected, found = (load_file(each / "checkpoints" / "step-000012" / file) for each in (whole, run))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    # One process measures the gradient of a micro-batch, two with parts of the network that of theirs together.
    assert all(line["gradient_noise"] is not None for line in metrics(run, "train"))


def test_float16_is_refused_where_nothing_scales_its_gradients(tiny_arguments: Callable[..., list[str]]) -> None:
    arguments = tiny_arguments({"runtime.parallel": "fsdp", "runtime.precision": "fp16"})
    statuses, errors = finish(start_together([arguments] * 2))
    assert statuses == [2, 2]
    assert sorted(bool(error) for error in errors) == [False, True]
    assert "use bf16, fp32 or ddp" in "".join(errors)
