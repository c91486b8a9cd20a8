"""Dropout on a CPU: torch's distribution, and gradients of what was computed."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend

from dist_train.model import dropout as module
from dist_train.model.dropout import Dropout, attend


def tensors(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query [B, H, S, E], key and value [B, H, T, E] of a shape (B, H, S, T, E)."""
    B, H, S, T, E = shape
    torch.manual_seed(1)
    return [torch.randn(B, H, n, E, dtype=dtype, requires_grad=True) for n in (S, T, T)]


def attend_all(inputs: list[Tensor], dropout: float) -> Tensor:
    query, key, value = inputs
    return attend(query, key, value, dropout)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(2)
    return list(torch.autograd.grad(output, inputs, torch.randn_like(output)))


# ---- numbers ---------------------------------------------------------------------------------------------------------


@given(p=st.floats(0.01, 0.95), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_each_number_is_dropped_as_often_as_asked_for_and_the_others_scaled(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = torch.ones(101, 203, dtype=dtype)
    dropped = Dropout(p).train()(x)
    rate = (dropped == 0).double().mean().item()
    assert abs(rate - p) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    assert dropped[dropped != 0].unique().tolist() == [torch.tensor(1 / (1 - p), dtype=dtype).item()] or p * 2**16 % 1


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(4)
    kept = (Dropout(0.3).train()(torch.ones(400_000)) != 0).double() - 0.7
    for distance in (1, 2, 3, 4, 5, 8):
        correlation = (kept[:-distance] * kept[distance:]).mean().item() / 0.21
        assert abs(correlation) < 5 / 400_000**0.5


def test_gradients_go_where_numbers_were_kept() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    dropped = Dropout(0.25).train()(x)
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, dropped == 0)
    assert torch.allclose(dropped, x * x.grad)


def test_the_generators_seed_decides_and_evaluation_draws_nothing() -> None:
    layer, x = Dropout(0.5), torch.ones(1000)
    torch.manual_seed(5)
    first = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    state = torch.get_rng_state()
    assert layer.eval()(x) is x
    assert Dropout(0.0).train()(x) is x
    assert torch.equal(torch.get_rng_state(), state)


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_k", [1, 2, 5, 7, 8])
@pytest.mark.parametrize("at_once", [1, 64, 2**20])
def test_where_all_is_kept_it_is_torchs_attention(monkeypatch: pytest.MonkeyPatch, last_k: int, at_once: int) -> None:
    monkeypatch.setattr(module, "_CACHED_WEIGHTS", at_once)
    monkeypatch.setattr(module, "_kept", lambda shape, p, dtype: torch.ones(shape, dtype=dtype))
    monkeypatch.setattr(module, "_keep_probability", lambda p: 1.0)
    inputs = tensors(2, 3, last_k, 8, 4)
    ours, torchs = attend_all(inputs, 0.5), attend_all(inputs, 0.0)
    assert torch.allclose(ours, torchs, rtol=1e-12)
    for ours_, torchs_ in zip(gradients(ours, inputs), gradients(torchs, inputs), strict=True):
        assert torch.allclose(ours_, torchs_, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("last_k", [1, 3, 6])
def test_gradients_are_those_of_what_was_dropped(monkeypatch: pytest.MonkeyPatch, last_k: int) -> None:
    monkeypatch.setattr(module, "_CACHED_WEIGHTS", 40)

    def seeded(*inputs: Tensor) -> Tensor:
        torch.manual_seed(6)
        return attend_all(list(inputs), 0.4)

    assert torch.autograd.gradcheck(seeded, tensors(2, 2, last_k, 6, 4))


def test_the_mean_over_many_draws_is_attention_without_dropout() -> None:
    inputs = [tensor.detach() for tensor in tensors(1, 2, 8, 8, 4)]
    many = [tensor.expand(20_000, -1, -1, -1) for tensor in inputs]
    dropped = attend_all(many, 0.3)
    error = (dropped.mean(dim=0) - attend_all(inputs, 0.0)[0]).abs() / (dropped.std(dim=0) / 20_000**0.5 + 1e-12)
    assert error[:, 1:].max() < 5
    # The first position sees itself alone: all of it or nothing.
    alone = dropped[:, :, 0] / inputs[2][:, :, 0]
    assert ((alone == 0) | ((alone - 1 / 0.7).abs() < 1e-4)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_torchs(dtype: torch.dtype) -> None:
    exact = tensors(2, 4, 64, 64, 16)
    halves = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]

    def seeded(inputs: list[Tensor]) -> list[Tensor]:
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype, enabled=inputs[0].dtype == dtype):
            output = attend_all(inputs, 0.1)
        assert output.dtype == inputs[0].dtype
        return [output, *torch.autograd.grad(output, inputs, torch.ones_like(output))]

    def distance(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
        return [((f.double() - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True)]

    ours = distance(seeded(halves), seeded(exact))
    plain, plain_half = (attend_all(inputs, 0.0) for inputs in (exact, halves))
    torchs = distance(
        [plain_half, *torch.autograd.grad(plain_half, halves, torch.ones_like(plain_half))],
        [plain, *torch.autograd.grad(plain, exact, torch.ones_like(plain))],
    )
    assert all(error < 3 * torch_error + 1e-3 for error, torch_error in zip(ours, torchs, strict=True)), (ours, torchs)


def test_no_backend_that_rounds_the_rate_may_attend() -> None:
    assert SDPBackend.CUDNN_ATTENTION not in module._DROPPING_AS_ASKED
    entered: list[object] = []

    @contextlib.contextmanager
    def recorded(backends: object) -> Iterator[None]:
        entered.append(backends)
        yield

    query = torch.randn(1, 1, 4, 8)
    with pytest.MonkeyPatch.context() as patch:
        # As where there is a GPU.
        patch.setattr(module, "_is_eager_cpu", lambda _: False)
        patch.setattr(module, "sdpa_kernel", recorded)
        module.attend(query, query, query, 0.0)
        assert not entered
        module.attend(query, query, query, 0.1)
    assert entered == [module._DROPPING_AS_ASKED]
