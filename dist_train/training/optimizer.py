"""Parameter groups, the optimizer, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from dist_train.sections import OptimSettings


def learning_rate(step: int, settings: OptimSettings, max_iters: int) -> float:
    """Return the learning rate of update number `step` (from 0): linear warm-up, then what `lr_schedule` says.

    A decay begins at the peak and has its last update at `min_lr`; where it is longer than what the warm-up leaves, it
    follows that at once.
    """
    if step < settings.warmup_iters:
        return settings.learning_rate * (step + 1) / settings.warmup_iters
    first = settings.warmup_iters
    if settings.lr_schedule == "wsd":
        first = max(first, max_iters - (settings.decay_iters or max(1, max_iters // 5)))
    if settings.lr_schedule == "constant" or step < first:
        return settings.learning_rate
    progress = (step - first) / max(1, max_iters - 1 - first)
    share = 1 - progress if settings.lr_schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.min_lr + (settings.learning_rate - settings.min_lr) * share


def build_optimizer(network: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019) over all of the network's parameters, fused into one pass over them."""
    assert settings.name == "adamw"
    parameters = list(network.parameters())
    decays = [settings.decay == "all" or parameter.dim() > 1 for parameter in parameters]
    groups = [
        {"params": [p for p, decay in zip(parameters, decays, strict=True) if decay is wanted], "weight_decay": rate}
        for wanted, rate in ((True, settings.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
