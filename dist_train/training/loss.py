"""What the loss sees: cross-entropy over the last k positions, whose logits are not all held at once.

Sums and counts travel, means are made at the end: whoever adds up micro-batches or ranks divides once, by all tokens.
Axes: B batch, T positions, S the last positions that the loss sees, D width, V vocabulary, N runs over B and S.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.profiler import record_function

from dist_train.errors import LossError, require_same_device
from dist_train.model.gpt import GPT

# Logits made at once: 134 MB of bfloat16. Fewer make the head's matrix products slower, more gain little.
_LOGITS_AT_ONCE = 2**26
# Of these, as many get their softmax in float32 at once as stay in a CPU's cache meanwhile.
_SOFTMAX_AT_ONCE = 2**22


class LastKLoss(nn.Module):
    """A network with its loss on the last k positions: what is run, and differentiated, as one."""

    def __init__(self, network: GPT) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, last_k: int) -> Tensor:
        """Return the sum of −log P over the last `last_k` of the `targets_BT`, in nats, a float32 scalar."""
        with record_function("forward"):
            hidden_BSD = self.network.hidden(tokens_BT, last_k)
        return self._loss(hidden_BSD, targets_BT[:, -last_k:])

    @record_function("loss")
    def _loss(self, hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        require_same_device(hidden=hidden_BSD, targets=targets_BS)
        rows = rows_at_once(self.network)
        # Whole, logits take seven times their own bytes: as float32, as log-softmax, and the gradients of all. float16
        # has to stay whole, as its gradients need the scaler's factor before they are made, and parts make them first.
        if 4 * targets_BS.numel() <= rows or _precision(hidden_BSD) == torch.float16:
            return cross_entropy(self.network.logits(hidden_BSD), targets_BS)
        weight_VD, n_vocab = self.network.token_embedding.weight, self.network.n_vocab
        loss_sum: Tensor = _HeadCrossEntropy.apply(
            hidden_BSD.flatten(0, 1), weight_VD, targets_BS.flatten(), n_vocab, rows
        )
        return loss_sum


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Return the sum of −log P(target) over all B·S positions in nats, a float32 scalar.

    Equals log-softmax followed by the negative log-likelihood; in float32 whatever the logits are, because
    half-precision sums over a vocabulary lose the loss's third digit.
    """
    require_same_device(logits=logits_BSV, targets=targets_BS)
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), reduction="sum")


def rows_at_once(network: GPT) -> int:
    """Return for how many positions logits may be held at once."""
    return max(1, _LOGITS_AT_ONCE // network.token_embedding.num_embeddings)


def logits_bytes(network: GPT, positions: int, width_bytes: int) -> int:
    """Return about how much head and loss hold at once for so many positions, with logits of `width_bytes`."""
    rows, (V, D) = rows_at_once(network), network.token_embedding.weight.shape
    if 4 * positions <= rows:
        return positions * V * (width_bytes + 3 * 4)  # as they are, in float32, their log-softmax, its gradient
    return min(rows, positions) * V * width_bytes + V * D * 2 * width_bytes + positions * D * 4


def _precision(hidden: Tensor) -> torch.dtype:
    """Return the type that a matrix product of `hidden` runs in."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _HeadCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy together, some rows at a time, with the gradients made on the way.

    The loss is a scalar, so that they are known up to its factor when the logits are there, and nothing is computed
    twice. torch 2.13's `linear_cross_entropy` does the same, but sums the loss up in the logits' bfloat16, which
    leaves it two digits, and took 3.7 times as long on a CPU (4096 rows, GPT-2's vocabulary); in float32 it would leave
    the head without mixed precision.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, n_vocab: int, rows: int) -> Tensor:
        """Return the sum of −log P; of the weight's V rows those after `n_vocab` are padding and never predicted."""
        precision = _precision(hidden_ND)
        hidden, weight = hidden_ND.to(precision), weight_VD.to(precision)
        loss_sum = hidden_ND.new_zeros((), dtype=torch.float32)
        d_hidden_ND = torch.empty_like(hidden_ND)
        d_weight_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None  # not of a frozen one
        for at in range(0, len(hidden), rows):
            part = slice(at, at + rows)
            logits = hidden[part] @ weight.T
            logits[:, n_vocab:] = -math.inf
            loss_sum += _replace_by_gradient(logits, targets_N[part])
            d_hidden_ND[part] = logits @ weight
            if d_weight_VD is not None:
                d_weight_VD += logits.T @ hidden[part]
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden state and weight; a second time is an error, as they are scaled in place."""
        (factor,) = gradients
        d_hidden_ND, d_weight_VD = ctx.saved_tensors
        return d_hidden_ND.mul_(factor), None if d_weight_VD is None else d_weight_VD.mul_(factor), None, None, None


def _replace_by_gradient(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return the sum of −log P, and put its gradient in the logits' place: the softmax, less 1 at the target."""
    loss_sum = logits_NV.new_zeros((), dtype=torch.float32)
    rows = max(1, _SOFTMAX_AT_ONCE // logits_NV.size(1))
    for logits, targets in zip(logits_NV.split(rows), targets_N[:, None].split(rows), strict=True):
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        loss_sum -= log_probabilities.gather(1, targets).sum()
        gradient = log_probabilities.exp_()
        logits.copy_(gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1.0)))
    return loss_sum


def first_loss_warning(loss: float, n_vocab: int) -> str | None:
    """Say so if the untrained network's loss is not the ln V of chance: the softmax or the initialisation is wrong."""
    chance = math.log(n_vocab)
    if abs(loss - chance) <= 0.1 * chance:
        return None
    return (
        f"the first loss is {loss:.3f} where an untrained network should have about ln {n_vocab} = {chance:.3f}: "
        f"is the log-softmax there, is the initialisation or the logit scale wrong?"
    )


def impossibility(loss: float) -> tuple[str, str] | None:
    """Say what is wrong with a loss that no −log P can have, negative, infinite or not a number, and what to do."""
    if not math.isfinite(loss):
        return f"the loss is {loss}", "lower optim.learning_rate or set optim.grad_clip: 1.0"
    if loss < 0:
        return f"the loss is {loss:.4f}", "−log P is never negative: the log-softmax is missing"
    return None


def require_possible(loss: float, step: int) -> None:
    """Raise `LossError` for a held-out loss after `step` updates that cannot be."""
    if found := impossibility(loss):
        what, remedy = found
        raise LossError(f"held out after step {step}, {what}; {remedy}")
