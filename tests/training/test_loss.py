"""The loss is −log P, summed; what cannot be a −log P is caught."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_train.bench.memory import added_bytes
from dist_train.errors import LossError, UserError
from dist_train.model.gpt import GPT, build
from dist_train.sections import ModelSettings
from dist_train.training import loss as loss_module
from dist_train.training.loss import LastKLoss, cross_entropy, first_loss_warning, require_possible, rows_at_once


def test_it_equals_log_softmax_followed_by_negative_log_likelihood() -> None:
    logits, targets = torch.randn(3, 4, 11), torch.randint(11, (3, 4))
    expected = F.nll_loss(F.log_softmax(logits, dim=-1).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(cross_entropy(logits, targets), expected)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, targets = torch.randn(8, 1, 50257).bfloat16(), torch.randint(50257, (8, 1))
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.float(), targets))


def test_micro_batches_add_up_to_the_whole() -> None:
    logits, targets = torch.randn(6, 2, 7), torch.randint(7, (6, 2))
    parts = [cross_entropy(l, t) for l, t in zip(logits.split(2), targets.split(2), strict=True)]
    torch.testing.assert_close(torch.stack(parts).sum(), cross_entropy(logits, targets))


T, N_VOCAB, ROWS = 16, 61, 64


def loss_and_gradients(last_k: int, precision: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss of three sequences and its gradients, with dropout off."""
    settings = ModelSettings(n_layer=2, n_head=2, n_embd=16, block_size=T, dropout=0.0, vocab_multiple=ROWS)
    network = build(settings, N_VOCAB, seed=0, device=torch.device("cpu"))
    tokens = torch.randint(N_VOCAB, (3, T + 1), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        loss = LastKLoss(network)(tokens[:, :-1], tokens[:, 1:], last_k) / (3 * last_k)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("last_k", [2, T - 1, T])
def test_the_head_in_parts_has_the_loss_and_every_gradient_of_the_whole(
    last_k: int, precision: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, expected_gradients = loss_and_gradients(last_k, precision)
    monkeypatch.setattr(loss_module, "_LOGITS_AT_ONCE", 5 * ROWS)
    monkeypatch.setattr(loss_module, "_SOFTMAX_AT_ONCE", 2 * ROWS)
    loss, gradients = loss_and_gradients(last_k, precision)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        largest = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=tolerance * largest, msg=name)


def test_float16_stays_whole_as_its_gradients_need_the_scalers_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, whole_gradients = loss_and_gradients(T, torch.float16)
    monkeypatch.setattr(loss_module, "_LOGITS_AT_ONCE", 5 * ROWS)
    parts, gradients = loss_and_gradients(T, torch.float16)
    assert torch.equal(parts, whole)
    assert all(torch.equal(gradients[name], whole_gradients[name]) for name in whole_gradients)


def test_all_logits_of_a_batch_of_gpt2_are_too_many_at_once() -> None:
    with torch.device("meta"):
        network = GPT(ModelSettings(n_layer=1), n_vocab=50257)
    assert 1000 < rows_at_once(network) < 2000


def test_the_head_in_parts_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ModelSettings(n_layer=1, n_head=1, n_embd=8, block_size=64, dropout=0.0)
    network = build(settings, 4096, seed=0, device=torch.device("cpu"))
    objective, tokens = LastKLoss(network), torch.randint(4096, (16, 65))
    logits_bytes = 4 * 16 * 64 * 4096

    def step() -> None:
        objective(tokens[:, :-1], tokens[:, 1:], 64).backward()
        network.zero_grad()

    all_at_once = added_bytes(step, torch.device("cpu"))  # as they are few
    monkeypatch.setattr(loss_module, "_LOGITS_AT_ONCE", 128 * 4096)
    monkeypatch.setattr(loss_module, "_SOFTMAX_AT_ONCE", 8 * 4096)
    in_parts = added_bytes(step, torch.device("cpu"))
    assert all_at_once is not None
    assert in_parts is not None
    assert all_at_once > 2 * logits_bytes
    assert in_parts < logits_bytes / 3


def test_leaving_the_log_softmax_out_is_caught() -> None:
    n_vocab = 257
    logits, targets = torch.randn(64, n_vocab) * 0.1, torch.randint(n_vocab, (64,))
    right = F.nll_loss(F.log_softmax(logits, dim=-1), targets).item()
    forgotten = F.nll_loss(logits, targets).item()
    assert first_loss_warning(right, n_vocab) is None
    assert "log-softmax" in (first_loss_warning(forgotten, n_vocab) or "")
    trained_without = F.nll_loss(F.one_hot(targets, n_vocab).float() * 9, targets).item()
    with pytest.raises(LossError, match=r"after step 3, the loss is -9\.0000; −log P is never negative"):
        require_possible(trained_without, step=3)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_with_status_3(loss: float) -> None:
    with pytest.raises(LossError) as caught:
        require_possible(loss, step=7)
    assert caught.value.exit_status == 3
    assert "step 7" in str(caught.value)


def test_mixing_devices_is_answered_in_words_that_name_both() -> None:
    with pytest.raises(UserError, match="logits is on cpu but targets is on meta"):
        cross_entropy(torch.randn(1, 1, 5), torch.zeros(1, 1, dtype=torch.int64, device="meta"))
