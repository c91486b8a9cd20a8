"""Parameter groups, the optimizer, and the learning rate as a pure function of the step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

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


def build_optimizer(network: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """Return what `optim.name` says, over the network's parameters that learn."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    between = {module.weight for module in network.modules() if isinstance(module, nn.Linear)}
    matrices = [parameter for parameter in learning if parameter in between]
    if settings.name == "muon" and matrices:
        return MuonAndAdamW(matrices, [parameter for parameter in learning if parameter not in between], settings)
    return _adamw(learning, settings)


def _adamw(parameters: list[nn.Parameter], settings: OptimSettings) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019), fused into one pass over all parameters."""
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


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices between a network's layers, AdamW for all else: the embeddings, too, are tables of vectors.

    Muon (Jordan 2024) orthogonalises the momentum of a matrix. Scaled as by Liu et al. 2025 (arXiv:2502.16982), so that
    its updates are as large as AdamW's, it shares their learning rate and weight decay.
    """

    found_inf: Tensor | None = None
    """Where this is not 0, a step changes nothing. AdamW looks at it on the device; Muon cannot, so that steps wait."""

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], settings: OptimSettings) -> None:
        self._muon = torch.optim.Muon(
            matrices,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = _adamw(others, settings)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], defaults={})
        # One record of everything, whoever asks.
        self._muon.state = self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters."""
        if self.found_inf is None or not self.found_inf.item():
            self._muon.step()
            self._adamw.step()


def state_like(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return tensors of the names, shapes and types of the optimizer's state, which it makes at its first update."""
    names = _names(network)
    state: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            if "momentum" in group:
                state[f"momentum_buffer.{name}"] = parameter
            else:
                state[f"step.{name}"] = torch.empty((), device=parameter.device)
                state |= {f"{kind}.{name}": parameter for kind in ("exp_avg", "exp_avg_sq")}
    return state


def state_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors called `<state>.<parameter>`: names survive a change of order."""
    names = _names(network)
    return {
        f"{kind}.{names[parameter]}": tensor
        for parameter, state in optimizer.state.items()
        for kind, tensor in state.items()
    }


def restore_state(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state that `state_of` returned."""
    parameters = dict(network.named_parameters())
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        parameter = parameters[name]
        optimizer.state[parameter][kind] = tensor.to(parameter.device)


def _names(network: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in network.named_parameters()}


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
