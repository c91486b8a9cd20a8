"""The learning rate is a function of the step; decay goes where the settings say."""

import pytest
import torch

from dist_train.model.gpt import GPT, build
from dist_train.runtime.parallel import Replica
from dist_train.runtime.process import Process
from dist_train.sections import ModelSettings, OptimSettings, RuntimeSettings
from dist_train.training.optimizer import build_optimizer, learning_rate, set_learning_rate, state_like, state_of


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


def muon_network(freeze: tuple[int, ...] = ()) -> tuple[GPT, torch.optim.Optimizer]:
    model = ModelSettings(n_layer=2, n_head=1, n_embd=8, block_size=4, freeze=freeze)
    network = build(model, 11, seed=0, device=torch.device("cpu"))
    return network, build_optimizer(network, OptimSettings(name="muon", learning_rate=0.1, weight_decay=0.2))


def give_gradients(network: GPT) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_has_the_matrices_between_layers_and_adamw_all_else() -> None:
    network, optimizer = muon_network()
    other, _ = muon_network()
    matrices = [module.weight for module in other.modules() if isinstance(module, torch.nn.Linear)]
    rest = [parameter for parameter in other.parameters() if not any(parameter is matrix for matrix in matrices)]
    assert len(matrices) == 2 * 4
    apart = [
        torch.optim.Muon(matrices, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.1, weight_decay=0.2, fused=True),
    ]
    for _ in range(3):
        for each in (network, other):
            give_gradients(each)
        for step in (optimizer.step, *(each.step for each in apart)):
            step()
    torch.testing.assert_close(network.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("freeze", [(), (1,), (0, 1)])
def test_muons_state_is_what_checkpoints_expect(freeze: tuple[int, ...]) -> None:
    network, optimizer = muon_network(freeze)
    network(torch.zeros(1, 4, dtype=torch.int64), 4).sum().backward()
    optimizer.step()
    made, expected = state_of(network, optimizer), state_like(network, optimizer)
    assert {name: (x.shape, x.dtype) for name, x in made.items()} == {
        name: (x.shape, x.dtype) for name, x in expected.items()
    }
    assert any(name.startswith("momentum_buffer") for name in made) == (freeze != (0, 1))


def test_muon_leaves_out_an_update_whose_gradient_is_no_number() -> None:
    network, optimizer = muon_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    replica = Replica(network, network, Process(0, 1, torch.device("cpu")), RuntimeSettings(precision="fp32"))
    for _ in range(2):  # nor does it update in the one after
        give_gradients(network)
        if not optimizer.state:
            network.final_norm.weight.grad = torch.full((8,), torch.inf)
        replica.update(optimizer, grad_clip=None)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
