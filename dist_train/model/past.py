"""What a network keeps of the positions it has seen, so that the next one costs one position. Axes as in `gpt.py`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.model.dropout import attend


class Past:
    """Keys and values of B texts that end together; shorter ones have padding before them, which no text sees.

    Memory for all positions is taken at once, when the first come. A text of `capacity` positions cannot grow, nor
    slide: position embeddings are absolute, so that one token less in front moves all others, in every layer.
    """

    def __init__(self, pads_B: Tensor, capacity: int) -> None:
        """Make room for `capacity` positions, padding included; with 0 the first positions are the only ones.

        `pads_B` (int64, on the CPU) counts the positions of padding before each text.
        """
        self.length = 0
        """How many positions have been seen, padding included."""
        self._pads_B1 = pads_B[:, None]
        self._is_padded = bool(pads_B.any())
        self._capacity = capacity
        self._sees_B1TK: Tensor | None = None
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def extend(self, T: int, device: torch.device) -> Tensor:
        """Go on by T columns; return where in its text each of them stands, int64 [T], or [B, T] with padding."""
        columns_T = torch.arange(self.length, self.length + T, device=device)
        self.length += T
        if not self._is_padded:
            return columns_T
        pads_B1 = self._pads_B1.to(device)
        earlier_TK = columns_T[:, None] >= torch.arange(self.length, device=device)
        is_text_BK = torch.arange(self.length, device=device) >= pads_B1
        itself_TK = columns_T[:, None] == torch.arange(self.length, device=device)
        # Padding sees itself: a softmax over nothing is no number, and would stay none in the layers above.
        self._sees_B1TK = (earlier_TK & is_text_BK[:, None] | itself_TK)[:, None]
        return (columns_T - pads_B1).clamp(min=0)

    def attend(self, layer: nn.Module, query_BHSE: Tensor, key_BHTE: Tensor, value_BHTE: Tensor) -> Tensor:
        """Return attention [B, H, S, E] of the last S positions to all so far; `layer` tells whose keys these are."""
        if self._capacity:
            key_BHTE, value_BHTE = self._remember(layer, key_BHTE, value_BHTE)
        if self._sees_B1TK is None:
            return attend(query_BHSE, key_BHTE, value_BHTE, dropout=0.0)
        sees_B1SK = self._sees_B1TK[:, :, -query_BHSE.size(2) :]
        return F.scaled_dot_product_attention(query_BHSE, key_BHTE, value_BHTE, attn_mask=sees_B1SK)

    def _remember(self, layer: nn.Module, *new: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values [B, H, T, E]; return all that it has."""
        if layer not in self._kept:
            B, H, _, E = new[0].shape
            key, value = (each.new_empty(B, H, self._capacity, E) for each in new)
            self._kept[layer] = key, value
        key, value = self._kept[layer]
        for kept, each in zip((key, value), new, strict=True):
            kept[:, :, self.length - each.size(2) : self.length] = each
        return key[:, :, : self.length], value[:, :, : self.length]
