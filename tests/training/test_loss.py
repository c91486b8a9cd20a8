"""The loss is −log P, summed; what cannot be a −log P is caught."""

import math

import pytest
import torch
from torch.nn import functional as F

from dist_train.errors import LossError, UserError
from dist_train.training.loss import cross_entropy, first_loss_warning, require_possible


def test_it_equals_log_softmax_followed_by_negative_log_likelihood() -> None:
    logits, targets = torch.randn(3, 4, 11), torch.randint(11, (3, 4))
    expected = F.nll_loss(F.log_softmax(logits, dim=-1).flatten(0, 1), targets.flatten(), reduction="sum")
    loss_sum, count = cross_entropy(logits, targets)
    torch.testing.assert_close(loss_sum, expected)
    assert count == 12


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, targets = torch.randn(8, 1, 50257).bfloat16(), torch.randint(50257, (8, 1))
    loss, _ = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.float(), targets)[0])


def test_micro_batches_add_up_to_the_whole() -> None:
    logits, targets = torch.randn(6, 2, 7), torch.randint(7, (6, 2))
    parts = [cross_entropy(l, t) for l, t in zip(logits.split(2), targets.split(2), strict=True)]
    whole, count = cross_entropy(logits, targets)
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    assert sum(part for _, part in parts) == count


def test_leaving_the_log_softmax_out_is_caught() -> None:
    n_vocab = 257
    logits, targets = torch.randn(64, n_vocab) * 0.1, torch.randint(n_vocab, (64,))
    right = F.nll_loss(F.log_softmax(logits, dim=-1), targets).item()
    forgotten = F.nll_loss(logits, targets).item()
    assert first_loss_warning(right, n_vocab) is None
    assert "log-softmax" in (first_loss_warning(forgotten, n_vocab) or "")
    trained_without = F.nll_loss(F.one_hot(targets, n_vocab).float() * 9, targets).item()
    with pytest.raises(LossError, match=r"step 3 is -9\.0000, but −log P is never negative"):
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
