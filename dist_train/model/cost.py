"""How much work an update of the weights is, and what it keeps in memory meanwhile. Axes as in `gpt.py`."""

from dist_train.sections import ModelSettings


def step_flops(settings: ModelSettings, n_rows: int, sequences: int, last_k: int, recomputes: bool = False) -> int:
    """Return the FLOPs of the matrix products in forward and backward of `sequences` × block_size tokens.

    A product of m×n by n×p is 2mnp; the causal half of attention counts, not the masked one. Only what is really
    computed counts: keys and values everywhere, all else of the last block and the head, with its `n_rows` of the
    padded vocabulary, for `last_k` positions; gradients only where something learns from them; with `recomputes`
    (`runtime.recompute_blocks`) the blocks' forward a second time.
    """
    T, D = settings.block_size, settings.n_embd
    learns_below = learns_embeddings = "embeddings" not in settings.freeze
    flops = 0
    for block in range(settings.n_layer):
        S = last_k if block == settings.n_layer - 1 else T
        pairs = S * T - S * (S - 1) // 2  # how many (query, key) pairs the causal mask leaves
        linear, attention = 2 * (2 * D * D * T + (D * D + D * D + 8 * D * D) * S), 4 * D * pairs
        learns = block not in settings.freeze
        learns_below |= learns
        # Backward is a product for the gradient of each factor. One of attention's factors is never a weight.
        flops += linear * (1 + learns_below + learns) + attention * (1 + 2 * learns_below)
        if recomputes and learns_below:
            # Up to what backward needs: without dropout behind it that is not the MLP's last product.
            flops += linear + attention - (0 if settings.dropout else 2 * 4 * D * D * S)
    return sequences * (flops + 2 * D * n_rows * S * (2 + learns_embeddings))


def kept_bytes(settings: ModelSettings, sequences: int, last_k: int, width_bytes: int, recomputes: bool = False) -> int:
    """Return about how much the blocks keep of `sequences` × block_size tokens from forward until backward.

    The residual stream and dropout's masks in four bytes and one, whatever else linear layers read in `width_bytes`.
    With `recomputes` the blocks' inputs, and one whole block, while it is run again.
    """
    T, D = settings.block_size, settings.n_embd
    masks = 2 if settings.dropout else 0
    # The stream, as both norms read it; their results; queries, keys and values, what was attended to; what widens.
    asked = 4 + masks + (1 + 1 + 1 + 4) * width_bytes
    everywhere = 4 + (1 + 2) * width_bytes
    blocks = [sequences * D * (everywhere * T + asked * S) for S in [T] * (settings.n_layer - 1) + [last_k]]
    if recomputes:
        return 4 * sequences * T * D * settings.n_layer + max(blocks)
    return sum(blocks)
