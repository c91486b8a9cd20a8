"""Sampling text from a network."""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_train.errors import LossError, UserError
from dist_train.model.gpt import GPT
from dist_train.model.past import Past


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen by its logit. Raises `UserError` for numbers that leave nothing to choose from."""

    temperature: float
    """Logits are divided by this: below 1 is safer, above 1 wilder, 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw among so many of the likeliest tokens alone."""
    top_p: float | None = None
    """Draw among as few of the likeliest tokens as together have this probability (Holtzman et al. 2020)."""
    never: tuple[int, ...] = ()
    """Ids that are not drawn, as those that a tokenizer leaves free."""

    def __post_init__(self) -> None:
        # Between 0 and 0.001 quotients are not finite any more, and the likeliest token is all that is left anyway.
        if not (self.temperature == 0 or 1e-3 <= self.temperature < math.inf):
            raise UserError(f"temperature={self.temperature} cannot divide logits; use 0 (the likeliest), or 0.001 on")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} leaves no token to draw; use 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is no probability to reach; use more than 0, and at most 1")

    def draw(self, logits_BV: Tensor, generator: torch.Generator) -> Tensor:
        """Return one token for each row of finite logits, int64 [B]; both on the CPU, as `generator` is."""
        if self.never:
            logits_BV = logits_BV.index_fill(1, torch.tensor(self.never), -math.inf)
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1)
        logits_BV = self._likeliest(logits_BV / self.temperature)
        return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)[:, 0]

    def _likeliest(self, logits_BV: Tensor) -> Tensor:
        """Return the logits, −∞ for tokens that top_k and then top_p leave out; of equal ones the first stay."""
        if self.top_k is None and self.top_p is None:
            return logits_BV
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            sorted_BV[:, self.top_k :] = -math.inf
        if self.top_p is not None:
            probabilities_BV = sorted_BV.softmax(dim=-1)
            reached_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV >= self.top_p  # by the likelier ones
            sorted_BV.masked_fill_(reached_BV, -math.inf)
        return torch.empty_like(logits_BV).scatter_(1, order_BV, sorted_BV)


def generate(
    network: GPT, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, generator: torch.Generator
) -> list[int]:
    """Return `prompt` and `max_new_tokens` sampled tokens, as `stream` draws them."""
    drawn = stream(network, [prompt], max_new_tokens, sampling, generator)
    return [*prompt, *(int(drawn_B[0]) for drawn_B in drawn)]


def generate_batch(
    network: GPT, prompts_BT: Tensor, max_new_tokens: int, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """Return prompts of one length (int64 [B, T]) and what `stream` draws after each, int64 [B, T + N] on the CPU."""
    drawn = stream(network, prompts_BT.tolist(), max_new_tokens, sampling, generator)
    return torch.cat([prompts_BT.cpu(), *(drawn_B[:, None] for drawn_B in drawn)], dim=1)


@torch.no_grad()
def stream(
    network: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, generator: torch.Generator
) -> Generator[Tensor, None, None]:
    """Yield the next token of each prompt, int64 [B] on the CPU, `max_new_tokens` times, as soon as they are drawn.

    Prompts may differ in length; the logits are for each as if it were alone. The network sees at most the last
    block_size tokens. Up to there a token costs one position. Beyond, it costs the whole context: what is seen slides,
    and every position in it, and all that was computed from it, is another each time.

    The network is in eval mode until the iterator is exhausted or closed, and in its former mode afterwards.
    `generator` is on the CPU, so that a seed gives the same draws for every device. Raises `UserError` for a prompt
    without tokens, `LossError` if the logits are not finite.
    """
    if not all(prompts):
        raise UserError("a prompt has no tokens, and nothing to go on from; give it one at least")
    block_size = network.settings.block_size
    T = max(map(len, prompts))
    pads_B = torch.tensor([T - len(prompt) for prompt in prompts])
    padded = [[0] * (T - len(prompt)) + list(prompt) for prompt in prompts]
    tokens_BT = torch.tensor(padded, device=network.token_embedding.weight.device)
    # What nobody would look at again is not kept: of a single token's prompt, or one that fills the context.
    capacity = min(block_size, T + max_new_tokens - 1)
    past = Past(pads_B, capacity if capacity > T else 0)
    with _evaluating(network):
        for length in range(T, T + max_new_tokens):
            if length > block_size:
                past = Past((pads_B - (length - block_size)).clamp(min=0), capacity=0)
            unseen_BT = tokens_BT[:, max(past.length, length - block_size) :]
            logits_BV = network(unseen_BT, 1, past)[:, 0].float().cpu()
            if not logits_BV.isfinite().all():
                raise LossError("the network's logits are not finite, it has diverged; lower optim.learning_rate")
            drawn_B = sampling.draw(logits_BV, generator)
            tokens_BT = torch.cat([tokens_BT, drawn_B[:, None].to(tokens_BT.device)], dim=1)
            yield drawn_B


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put `network` into eval mode, and back afterwards."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
