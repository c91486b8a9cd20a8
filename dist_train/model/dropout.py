"""Dropout, and causal attention with it, at a price that a CPU can pay too.

On a CPU torch draws dropout number by number, and attention that drops weights computes all of them in float32 at once.
Here a random word of 64 bits decides over four numbers, and attention is worked through a few heads at a time, so that
their weights stay in the cache. Axes as in `gpt.py`.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Weights that are worked on at once: 2 MB of bfloat16, what a core's cache holds.
_CACHED_WEIGHTS = 2**20

# What may attend on a GPU. cuDNN is left out: it rounds the rate to sixteenths, 0.1 to 0.125, and says
# nothing (pytorch/pytorch#174245); FlashAttention-3 and FlexAttention cannot drop at all.
_DROPPING_AS_ASKED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Dropout(nn.Module):
    """Sets each number to 0 with probability `p` and scales the others to keep the mean, while training only."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if not _is_eager_cpu(x):
            return F.dropout(x, self.p)
        return x * _kept(x.shape, self.p, x.dtype).mul_(1 / _keep_probability(self.p))


def attend(query_BHSE: Tensor, key_BHTE: Tensor, value_BHTE: Tensor, dropout: float) -> Tensor:
    """Return causal attention [B, H, S, E] of the last S of T positions, each weight dropped at the rate `dropout`."""
    S, T = query_BHSE.size(2), key_BHTE.size(2)
    if dropout and _is_eager_cpu(query_BHSE):
        return _CachedAttention.apply(query_BHSE, key_BHTE, value_BHTE, dropout)
    with sdpa_kernel(_DROPPING_AS_ASKED) if dropout else nullcontext():
        if S == T:  # an `if`: a compiler that leaves S open cannot hand the comparison itself on
            return F.scaled_dot_product_attention(query_BHSE, key_BHTE, value_BHTE, dropout_p=dropout, is_causal=True)
        # `is_causal` aligns the mask top-left, which is wrong for the last S of T. One position needs no mask at all.
        mask_ST = _sees(S, T, query_BHSE.device) if S > 1 else None
        return F.scaled_dot_product_attention(query_BHSE, key_BHTE, value_BHTE, attn_mask=mask_ST, dropout_p=dropout)


def _is_eager_cpu(x: Tensor) -> bool:
    """Say whether the ways of this file may serve: a compiler cannot follow them, and has its own."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _sees(S: int, T: int, device: torch.device) -> Tensor:
    """Return which of T positions each of the last S sees, bool [S, T]."""
    return torch.ones(S, T, dtype=torch.bool, device=device).tril(T - S)


def _keep_probability(p: float) -> float:
    """Return 1 − p as 16 bits have it: off by 2⁻¹⁷ at most, and the scale that goes with it keeps the mean exactly."""
    return 1 - round(p * 2**16) / 2**16


def _kept(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """Return 1 where a number is kept and 0 where it is dropped, drawn from the CPU's default generator."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    uniform = words.view(torch.int16)[:count].view(shape)
    return torch.ge(uniform, round(p * 2**16) - 2**15, out=torch.empty(shape, dtype=dtype))


class _CachedAttention(torch.autograd.Function):
    """Causal attention with dropout on a CPU, a few heads at a time; backward computes their weights again."""

    @staticmethod
    def forward(ctx: Any, query_BHSE: Tensor, key_BHTE: Tensor, value_BHTE: Tensor, p: float) -> Tensor:
        """Return [B, H, S, E]."""
        (B, H, S, E), T = query_BHSE.shape, key_BHTE.size(2)
        # N runs over sequences and heads.
        query_NSE, key_NTE, value_NTE = (x.reshape(B * H, -1, E) for x in (query_BHSE, key_BHTE, value_BHTE))
        bias_ST = query_BHSE.new_zeros(S, T).masked_fill_(~_sees(S, T, query_BHSE.device), -math.inf)
        kept_NST = torch.empty(B * H, S, T, dtype=torch.bool)
        attended_NSE = torch.empty_like(query_NSE)
        with torch.autocast("cpu", enabled=False):  # the types are what they should be, the softmax's result included
            for heads in _slices(B * H, S * T):
                weights = _weights(query_NSE[heads], key_NTE[heads], bias_ST)
                kept = _kept(weights.shape, p, weights.dtype)
                kept_NST[heads] = kept
                torch.bmm(weights.mul_(kept), value_NTE[heads], out=attended_NSE[heads])
        ctx.save_for_backward(query_NSE, key_NTE, value_NTE, bias_ST, kept_NST)
        ctx.keep_probability = _keep_probability(p)
        return attended_NSE.mul_(1 / ctx.keep_probability).view(B, H, S, E)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        (gradient_BHSE,) = gradients
        query_NSE, key_NTE, value_NTE, bias_ST, kept_NST = ctx.saved_tensors
        N, S, E = query_NSE.shape
        B, H = gradient_BHSE.shape[:2]
        gradient_NSE = gradient_BHSE.reshape(N, S, E) * (1 / ctx.keep_probability)
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query_NSE, key_NTE, value_NTE))
        for heads in _slices(N, S * key_NTE.size(1)):
            query, key, gradient = query_NSE[heads], key_NTE[heads], gradient_NSE[heads]
            weights = _weights(query, key, bias_ST)
            kept = kept_NST[heads].to(weights.dtype)
            torch.bmm((weights * kept).transpose(1, 2), gradient, out=d_value[heads])
            d_weights = torch.bmm(gradient, value_NTE[heads].transpose(1, 2)).mul_(kept)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(E**-0.5)
            torch.bmm(d_scores, key, out=d_query[heads])
            torch.bmm(d_scores.transpose(1, 2), query, out=d_key[heads])
        return *(x.view(B, H, -1, E) for x in (d_query, d_key, d_value)), None


def _slices(n: int, weights_each: int) -> list[slice]:
    """Cut `n` heads into runs whose weights fit into the cache."""
    step = max(1, _CACHED_WEIGHTS // weights_each)
    return [slice(start, start + step) for start in range(0, n, step)]


def _weights(query_NSE: Tensor, key_NTE: Tensor, bias_ST: Tensor) -> Tensor:
    """Return how much each position attends to each other before dropout, [N, S, T]."""
    scores = torch.baddbmm(bias_ST, query_NSE, key_NTE.transpose(1, 2), alpha=query_NSE.size(-1) ** -0.5)
    return torch.softmax(scores, dim=-1)
