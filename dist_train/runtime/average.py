"""An exponential moving average of weights, which is evaluated in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """The average of what learns of a network; without a decay there is none, and nothing here does anything."""

    def __init__(self, network: nn.Module, decay: float | None) -> None:
        self._decay = 0.0 if decay is None else decay
        learning = [] if decay is None else list(network.named_parameters())
        self.parameters = {name: parameter for name, parameter in learning if parameter.requires_grad}
        """The network's own."""
        self.tensors = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        """The average, by the same names."""

    @torch.no_grad()
    def update(self, n_updates: int) -> None:
        """Take in the weights, which were updated `n_updates` times before the last one."""
        if self.tensors:
            # With the full decay from the start the average would long be of weights that knew nothing yet.
            decay = min(self._decay, (1 + n_updates) / (10 + n_updates))
            get_ema_multi_avg_fn(decay)([*self.tensors.values()], [*self.parameters.values()], n_updates)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the network's parameters be the average within."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.tensors[name] = self.tensors[name], parameter.data
