"""Sampling text from a network."""

from collections.abc import Sequence

import torch

from dist_train.errors import LossError
from dist_train.model.gpt import GPT


@torch.no_grad()
def generate(
    network: GPT, prompt: Sequence[int], max_new_tokens: int, temperature: float, generator: torch.Generator
) -> list[int]:
    """Return `prompt` and `max_new_tokens` sampled tokens; the network sees at most its last block_size of them.

    The network is in eval mode while sampling and in its former mode afterwards. `generator` is on the CPU, so that
    a seed gives the same draws for every device. Raises `LossError` if the logits are not finite.
    """
    was_training = network.training
    network.eval()
    device = network.token_embedding.weight.device
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        context = torch.tensor([tokens[-network.settings.block_size :]], device=device)
        logits_V = network(context, last_k=1)[0, 0].float().cpu() / temperature
        if not logits_V.isfinite().all():
            raise LossError("the network's logits are not finite, it has diverged; lower optim.learning_rate")
        tokens.append(int(torch.multinomial(logits_V.softmax(dim=-1), 1, generator=generator)))
    network.train(was_training)
    return tokens
