"""The learning rate is a function of the step; decay goes where the settings say."""

import pytest
import torch

from dist_train.model.gpt import build
from dist_train.sections import ModelSettings, OptimSettings
from dist_train.training.optimizer import build_optimizer, learning_rate, set_learning_rate


@pytest.mark.parametrize(
    ("schedule", "warmup", "step", "expected"),
    [
        ("constant", 0, 0, 1.0),
        ("constant", 0, 99, 1.0),
        ("constant", 10, 0, 0.1),
        ("constant", 10, 9, 1.0),
        ("constant", 10, 10, 1.0),
        ("cosine", 10, 4, 0.5),
        ("cosine", 10, 10, 1.0),
        ("cosine", 0, 99, 0.2),
        ("cosine", 10, 99, 0.2),
        ("cosine", 99, 99, 1.0),
        ("wsd", 10, 4, 0.5),
        ("wsd", 10, 79, 1.0),
        ("wsd", 10, 80, 1.0),
        ("wsd", 10, 99, 0.2),
        ("wsd", 90, 99, 0.2),
    ],
)
def test_learning_rate_by_table(schedule: str, warmup: int, step: int, expected: float) -> None:
    settings = OptimSettings.model_validate(
        {"learning_rate": 1.0, "min_lr": 0.2, "warmup_iters": warmup, "lr_schedule": schedule}
    )
    assert learning_rate(step, settings, max_iters=100) == pytest.approx(expected)


def test_a_stable_schedule_decays_on_a_line_and_is_the_longer_one_until_then() -> None:
    settings = OptimSettings(learning_rate=1.0, lr_schedule="wsd", decay_iters=5)
    assert [learning_rate(step, settings, max_iters=10) for step in range(10)] == [1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert [learning_rate(step, settings, max_iters=20) for step in range(15)] == [1] * 15


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_decay_reaches_the_parameters_it_should(decay: str) -> None:
    model = ModelSettings(n_layer=1, n_head=1, n_embd=8, block_size=4)
    network = build(model, 11, seed=0, device=torch.device("cpu"))
    optimizer = build_optimizer(network, OptimSettings.model_validate({"weight_decay": 0.5, "decay": decay}))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    for name, parameter in network.named_parameters():
        decayed = decay == "all" or parameter.dim() > 1
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.05 if decayed else 1), msg=name)
