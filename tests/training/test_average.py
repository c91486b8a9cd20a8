"""The average of the weights is what is evaluated and saved, and changes nothing of what learns."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from dist_train.config import Settings
from dist_train.training.trainer import train
from tests.conftest import losses, metrics
from tests.training.saved_run import start

Tiny = Callable[..., Settings]


def test_it_is_the_exponential_mean_with_a_shorter_memory_at_first(tiny: Tiny) -> None:
    run = start(tiny({"optim.ema_decay": 0.7, "model.freeze": "[0]"}))
    expected = {name: value.clone() for name, value in run.replica.network.state_dict().items()}
    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15]):
        run.advance()
        assert decay < 0.7
        for name, value in run.replica.network.state_dict().items():
            expected[name] += (1 - decay) * (value - expected[name])
        assert run.step == step + 1
    torch.testing.assert_close(run.replica.weights(), expected)
    assert not any(name.startswith("blocks.0.") for name in run.replica.average.tensors)


def test_a_long_run_forgets_as_slowly_as_it_was_told(tiny: Tiny) -> None:
    average = start(tiny({"optim.ema_decay": 0.7})).replica.average
    name, parameter = next(iter(average.parameters.items()))
    before = average.tensors[name].clone()
    parameter.data += 1
    average.update(1000)
    torch.testing.assert_close(average.tensors[name], before + 0.3)


def test_it_is_evaluated_and_saved_and_what_learns_is_as_without(tiny: Tiny, tmp_path: Path) -> None:
    plain = train(tiny({"run.out_dir": tmp_path / "plain"})).root
    averaged = train(tiny({"run.out_dir": tmp_path / "averaged", "optim.ema_decay": 0.9})).root
    assert losses(plain) == losses(averaged)
    first, *others = zip(metrics(plain, "eval"), metrics(averaged, "eval"), strict=True)
    assert first[0]["loss"] == first[1]["loss"]
    assert all(one["loss"] != other["loss"] for one, other in others)
    (weights, _), (average, own) = (
        [load_file(run / "checkpoints" / "step-000012" / f"{file}.safetensors") for file in ("model", "optimizer")]
        for run in (plain, averaged)
    )
    assert average.keys() == weights.keys()
    assert all(torch.equal(own[f"weight.{name}"], weights[name]) for name in weights)
    assert not any(torch.equal(average[name], weights[name]) for name in weights)
