"""Where the last position looks: the attention weights that fused attention never shows. Axes as in `gpt.py`."""

from contextlib import ExitStack

import torch
from torch import Tensor

from dist_train.model.gpt import GPT, Attention


@torch.no_grad()
def last_attention(network: GPT, tokens_BT: Tensor) -> Tensor:
    """Return how much the last of T positions attends to each of them, float32 [L, B, H, T] for L layers.

    The network runs as ever, in eval mode and with its fused attention; beside it each layer's weights are computed
    from what goes into it. For one query that costs a sixth of a forward pass, and memory for the result. Mode and
    hooks are as before when it returns or raises.
    """
    weights_LBHT: list[Tensor] = []

    def look(attention: Attention, inputs: tuple[Tensor, ...]) -> None:
        query_BH1E, key_BHTE, _ = attention.heads(inputs[0], last_k=1)
        weights_LBHT.append(_weights(query_BH1E, key_BHTE))

    was_training = network.training
    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, Attention):
                stack.enter_context(module.register_forward_pre_hook(look))
        stack.callback(network.train, was_training)
        network.eval()
        network.hidden(tokens_BT, last_k=1)
    return torch.stack(weights_LBHT)


def _weights(query_BH1E: Tensor, key_BHTE: Tensor) -> Tensor:
    """Return the softmax of one query's scaled products with all keys, [B, H, T]: the last position sees them all."""
    # Fused attention adds up and exponentiates in float32 whatever the type of queries and keys; autocast would not.
    with torch.autocast(query_BH1E.device.type, enabled=False):
        scores_BH1T = query_BH1E.float() @ key_BHTE.float().transpose(2, 3)
        return torch.softmax(scores_BH1T.squeeze(2) * query_BH1E.size(-1) ** -0.5, dim=-1)
