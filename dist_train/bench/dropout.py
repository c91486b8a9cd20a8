"""Whether attention really drops what the settings say: counted on the network's own attention, not believed."""

import torch

from dist_train.model.gpt import Attention
from dist_train.sections import ModelSettings

# Enough that the rate's standard error stays below 0.002 where 12 heads of 64 serve a single position.
_SEQUENCES = 32


@torch.no_grad()
def attention_drop_rate(settings: ModelSettings, last_k: int, device: torch.device) -> float:
    """Return the share of attention weights that a network of these settings drops while training, 0 … 1.

    Without queries and keys attention is uniform, so that no weight is 0 by itself. Position t's value is 1 at place t
    of each head and 0 elsewhere, so that the output's place t is the weight that position t got.
    """
    T, H, D = settings.block_size, settings.n_head, settings.n_embd
    attention = Attention(settings).to(device).train()
    for parameter in attention.parameters():
        parameter.zero_()
    attention.query_key_value.weight[2 * D :].fill_diagonal_(1)
    attention.project.weight.fill_diagonal_(1)
    shown = min(T, D // H)  # a head has no place for more positions
    values_BTHE = torch.zeros(_SEQUENCES, T, H, D // H, device=device)
    values_BTHE[:, :shown, :, :shown] = torch.eye(shown, device=device)[:, None]
    weights_BSHE = attention(values_BTHE.flatten(2), last_k).unflatten(-1, (H, D // H))[..., :shown]
    # What the causal mask hides from a position is no drop.
    sees_SE = torch.ones(T, shown, dtype=torch.bool, device=device).tril()[T - last_k :]
    return (weights_BSHE.transpose(1, 2)[..., sees_SE] == 0).double().mean().item()
