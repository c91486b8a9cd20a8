"""Where the last position looks: the very weights that fused attention used, found without leaving a trace."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.model.attention import last_attention
from dist_train.model.dropout import attend
from dist_train.model.gpt import GPT, Attention, build
from dist_train.sections import ModelSettings

L, B, H, T, V = 3, 4, 2, 24, 61


def network(**changes: object) -> GPT:
    values = {"n_layer": L, "n_head": H, "n_embd": 16, "block_size": T, "dropout": 0.0, **changes}
    gpt = build(ModelSettings.model_validate(values), V, seed=0, device=torch.device("cpu"))
    with torch.no_grad():
        for module in attentions(gpt):
            # An untrained network looks everywhere alike, and any weights would pass for its own.
            module.query_key_value.weight.mul_(40)
    return gpt.eval()


def tokens(length: int = T) -> Tensor:
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(0))


def attentions(gpt: GPT) -> list[Attention]:
    return [module for module in gpt.modules() if isinstance(module, Attention)]


def attending_by(gpt: GPT, attend: Callable[..., Tensor]) -> GPT:
    """Return a copy of the network that attends in another way."""
    gpt = copy.deepcopy(gpt)
    for module in attentions(gpt):
        module.attend = attend
    return gpt


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"n_head": 1}, {"n_layer": 1}])
@pytest.mark.parametrize("length", [T, 5, 1])
def test_it_is_the_last_row_of_the_attention_matrix_written_out(length: int, changes: dict[str, Any]) -> None:
    gpt, rows = network(**changes), []

    def explicit(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        scores = query @ key.transpose(2, 3) / query.size(-1) ** 0.5
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        rows.append(weights[:, :, -1])
        return weights @ value

    with torch.no_grad():
        attending_by(gpt, explicit).double()(tokens(length), length)
    found = last_attention(gpt, tokens(length))
    assert found.shape == (gpt.settings.n_layer, B, gpt.settings.n_head, length)
    torch.testing.assert_close(found.double(), torch.stack(rows), rtol=1e-4, atol=1e-6)


def test_a_trained_networks_heads_look_at_different_places() -> None:
    # Guards the tests around it: uniform weights would be right by accident.
    weights = last_attention(network(), tokens())
    assert weights.max() > 5 / T
    assert not torch.allclose(weights[0, :, 0], weights[0, :, 1], atol=0.05)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_with_the_values_it_makes_what_fused_attention_returned(precision: torch.dtype) -> None:
    attended: list[tuple[Tensor, Tensor]] = []

    def fused(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        result = attend(query, key, value, dropout)
        assert result.dtype == precision
        attended.append((value.float(), result[:, :, -1].float()))
        return result

    gpt = attending_by(network(), fused)
    is_mixed = precision != torch.float32
    with torch.autocast("cpu", precision) if is_mixed else nullcontext():
        found = last_attention(gpt, tokens())
    # Softmax in bfloat16 would miss a sum of 1 by some thousandths.
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(L, B, H), rtol=0, atol=1e-6)
    tolerance = 2e-2 if is_mixed else 1e-5
    for weights_BHT, (value_BHTE, result_BHE) in zip(found, attended, strict=True):
        expected = (weights_BHT[..., None] * value_BHTE).sum(dim=2)
        torch.testing.assert_close(result_BHE, expected, rtol=tolerance, atol=tolerance * value_BHTE.std().item())


def test_dropout_never_touches_it() -> None:
    gpt = network(dropout=0.5)
    assert torch.equal(last_attention(gpt.train(), tokens()), last_attention(gpt.eval(), tokens()))


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_mode_weights_hooks_and_random_numbers_are_as_before(is_training: bool, fails: bool) -> None:
    gpt = network(dropout=0.5).train(is_training)
    attention = attentions(gpt)[0]
    calls: list[int] = []
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    weights, random_state = copy.deepcopy(gpt.state_dict()), torch.get_rng_state()

    def fail(module: nn.Module, inputs: Any) -> None:
        raise RuntimeError("in the middle")

    if fails:
        # After the first layers were looked at, before the last.
        with gpt.blocks[-1].register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="in the middle"):
            last_attention(gpt, tokens())
    else:
        last_attention(gpt, tokens())
    assert all(module.training == is_training for module in gpt.modules())
    assert all(torch.equal(weights[name], tensor) for name, tensor in gpt.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert calls == [1]
    assert [len(module._forward_pre_hooks) for module in attentions(gpt)] == [1, 0, 0]


def test_gradients_are_neither_asked_for_nor_lost() -> None:
    gpt = network()
    gpt(tokens(), 1).sum().backward()
    before = [parameter.grad for parameter in gpt.parameters()]
    assert not last_attention(gpt, tokens()).requires_grad
    assert all(parameter.grad is kept for parameter, kept in zip(gpt.parameters(), before, strict=True))
