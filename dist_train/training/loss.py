"""What the loss sees: cross-entropy over the last k positions.

Sums and counts travel, means are made at the end: whoever adds up micro-batches or ranks divides once, by all tokens.
"""

import math

from torch import Tensor
from torch.nn import functional as F

from dist_train.errors import LossError, require_same_device


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> tuple[Tensor, int]:
    """Return the sum of −log P(target) over all B·S positions in nats, a float32 scalar, and their count.

    Equals log-softmax followed by the negative log-likelihood; in float32 whatever the logits are, because
    half-precision sums over a vocabulary lose the loss's third digit.
    """
    require_same_device(logits=logits_BSV, targets=targets_BS)
    loss_sum = F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), reduction="sum")
    return loss_sum, targets_BS.numel()


def first_loss_warning(loss: float, n_vocab: int) -> str | None:
    """Say so if the untrained network's loss is not the ln V of chance: the softmax or the initialisation is wrong."""
    chance = math.log(n_vocab)
    if abs(loss - chance) <= 0.1 * chance:
        return None
    return (
        f"the first loss is {loss:.3f} where an untrained network should have about ln {n_vocab} = {chance:.3f}: "
        f"is the log-softmax there, is the initialisation or the logit scale wrong?"
    )


def require_possible(loss: float, step: int) -> None:
    """Raise `LossError` for a loss that no −log P can have: negative, infinite or not a number."""
    if not math.isfinite(loss):
        raise LossError(f"the loss of step {step} is {loss}; lower optim.learning_rate or set optim.grad_clip: 1.0")
    if loss < 0:
        raise LossError(
            f"the loss of step {step} is {loss:.4f}, but −log P is never negative; the log-softmax is missing"
        )
