"""The network: GPT-2's layout with pre-norm blocks, on one page, small parts first.

Axes: B batch, T positions, S the last positions that the loss sees (S <= T), D width, H heads, E width per head,
V vocabulary. The last block and the head work for those S positions alone: that makes final-token training cheap.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dist_train.errors import UserError, require_same_device
from dist_train.model.dropout import Dropout, attend
from dist_train.model.past import Past
from dist_train.sections import ModelSettings


class Attention(nn.Module):
    """Causal self-attention in which the last S positions ask and all T positions answer."""

    attend = staticmethod(attend)

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.n_head, self.dropout = settings.n_head, settings.dropout
        self.query_key_value = nn.Linear(settings.n_embd, 3 * settings.n_embd, bias=settings.bias)
        self.project = nn.Linear(settings.n_embd, settings.n_embd, bias=settings.bias)

    def forward(self, x_BTD: Tensor, last_k: int, past: Past | None = None) -> Tensor:
        """Return [B, S, D] for the last S = `last_k` positions of `x_BTD`, which follow on `past`."""
        heads = self.heads(x_BTD, last_k)
        # The functional form does not know eval(): dropout has to follow the module's state here.
        dropout = self.dropout if self.training else 0.0
        attended_BHSE = past.attend(self, *heads) if past else self.attend(*heads, dropout)
        return self.project(attended_BHSE.transpose(1, 2).flatten(2))

    def heads(self, x_BTD: Tensor, last_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries of the last S positions, keys and values of all, each [B, H, S or T, E]."""
        T, D = x_BTD.shape[1:]
        if last_k == T:
            query, key, value = self.query_key_value(x_BTD).split(D, dim=-1)
        else:
            weights, biases = self.query_key_value.weight, self.query_key_value.bias
            query = F.linear(x_BTD[:, T - last_k :], weights[:D], None if biases is None else biases[:D])
            key, value = F.linear(x_BTD, weights[D:], None if biases is None else biases[D:]).split(D, dim=-1)
        query, key, value = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in (query, key, value))
        return query, key, value


class MLP(nn.Module):
    """Two linear layers, four times as wide between them."""

    recomputes = True  # the activation, in backward

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.expand = nn.Linear(settings.n_embd, 4 * settings.n_embd, bias=settings.bias)
        self.activation = nn.GELU(approximate="tanh" if settings.activation == "gelu_tanh" else "none")
        self.project = nn.Linear(4 * settings.n_embd, settings.n_embd, bias=settings.bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return [B, S, D], and keep for backward what the activation was made of rather than what it made."""
        expanded = self.expand(x_BSD)
        activated = self.activation(expanded)
        if not self.recomputes or torch.compiler.is_compiling():  # a compiler chooses by itself what to keep
            return self.project(activated)
        # Making it again is cheap, and it would be a fifth of all that a block keeps.
        address = activated.data_ptr()  # the hooks live on: one that named the tensor would keep it
        with saved_tensors_hooks(
            lambda kept: kept.shape if kept.data_ptr() == address else kept,
            lambda kept: self.activation(expanded).view(kept) if isinstance(kept, torch.Size) else kept,
        ):
            return self.project(activated)


class LayerNorm(nn.LayerNorm):
    """Normalises in the residual stream's type, also where `runtime.parallel: fsdp` sends its weights in half of it."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if each is None else each.to(x.dtype) for each in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream after its own LayerNorm before and dropout behind."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(settings.n_embd, eps=settings.norm_eps, bias=settings.bias)
        self.attention = Attention(settings)
        self.mlp_norm = LayerNorm(settings.n_embd, eps=settings.norm_eps, bias=settings.bias)
        self.mlp = MLP(settings)
        self.dropout = Dropout(settings.dropout)
        self.recomputes = False

    def recompute(self) -> None:
        """Keep nothing but the input for backward, which then computes the rest again: a third more work."""
        # Hooks within those that drop everything would keep what these give up.
        self.recomputes, self.mlp.recomputes = True, False

    def forward(self, x_BTD: Tensor, last_k: int, past: Past | None = None) -> Tensor:
        """Return the residual stream [B, S, D] of the last S = `last_k` positions."""
        if self.recomputes and torch.is_grad_enabled():
            # Dropout draws the same again: the generators' states are kept as well.
            kept: Tensor = checkpoint(self._run, x_BTD, last_k, past, use_reentrant=False)
            return kept
        return self._run(x_BTD, last_k, past)

    def _run(self, x_BTD: Tensor, last_k: int, past: Past | None) -> Tensor:
        x_BSD = x_BTD[:, x_BTD.size(1) - last_k :]
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BTD), last_k, past))
        return x_BSD + self.dropout(self.mlp(self.mlp_norm(x_BSD)))


class GPT(nn.Module):
    """Embeddings, blocks, final LayerNorm, and a head that is the token embedding itself."""

    def __init__(self, settings: ModelSettings, n_vocab: int) -> None:
        super().__init__()
        self.settings, self.n_vocab = settings, n_vocab
        rows = math.ceil(n_vocab / settings.vocab_multiple) * settings.vocab_multiple
        self.token_embedding = _table(rows, settings.n_embd)
        self.position_embedding = _table(settings.block_size, settings.n_embd)
        self.dropout = Dropout(settings.dropout)
        self.blocks = nn.ModuleList([Block(settings) for _ in range(settings.n_layer)])
        self.final_norm = LayerNorm(settings.n_embd, eps=settings.norm_eps, bias=settings.bias)
        scale = settings.logit_scale
        self.logit_scale = settings.n_embd**-0.5 if scale == "rsqrt_n_embd" else float(scale)
        for part in settings.freeze:
            embeddings = (self.token_embedding, self.position_embedding)
            for module in embeddings if part == "embeddings" else (self.blocks[part],):
                module.requires_grad_(False)

    def forward(self, tokens_BT: Tensor, last_k: int, past: Past | None = None) -> Tensor:
        """Return the logits [B, S, V] of the last S = `last_k` of the T positions of `tokens_BT` (int64).

        With a `past` the tokens follow on those that it has seen, and it has seen them afterwards: for sampling.
        Raises `UserError` if the tokens are on another device than the weights, or longer than the context.
        """
        return self.logits(self.hidden(tokens_BT, last_k, past))

    def hidden(self, tokens_BT: Tensor, last_k: int, past: Past | None = None) -> Tensor:
        """Return the head's input [B, S, D] at the last S = `last_k` positions: the normed residual stream, scaled."""
        T = tokens_BT.size(1)
        require_same_device(model=self.token_embedding.weight, batch=tokens_BT)
        if not 1 <= last_k <= T <= self.settings.block_size:
            raise UserError(f"last_k={last_k} of {T} tokens with block_size={self.settings.block_size} does not fit")
        positions_T = past.extend(T, tokens_BT.device) if past else torch.arange(T, device=tokens_BT.device)
        x_BTD = self.dropout(self.token_embedding(tokens_BT) + self.position_embedding(positions_T))
        for block in self.blocks[:-1]:
            x_BTD = block(x_BTD, T, past)
        # Scaling D numbers per position instead of V logits is the same product and costs nothing.
        return self.final_norm(self.blocks[-1](x_BTD, last_k, past)) * self.logit_scale

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Return logits [..., V] for `hidden_BSD` [..., D]; rows that pad the vocabulary are left out of them."""
        return F.linear(hidden_BSD, self.token_embedding.weight)[..., : self.n_vocab]

    def n_parameters(self) -> int:
        """Return how many numbers are learned; the tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())


def _table(rows: int, width: int) -> nn.Embedding:
    """Return an embedding with no numbers yet: to draw some on the meta device imports torch's compiler, for 0.7 s."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def outline(settings: ModelSettings, n_vocab: int) -> GPT:
    """Return a network without numbers: names, shapes and what learns."""
    with torch.device("meta"):
        return GPT(settings, n_vocab)


def build(settings: ModelSettings, n_vocab: int, seed: int, device: torch.device) -> GPT:
    """Return an initialised fp32 network on `device`; the same weights for the same seed on every device."""
    network = outline(settings, n_vocab).to_empty(device="cpu")
    initialize(network, torch.Generator().manual_seed(seed))
    return network.to(device)


def recompute_blocks(network: GPT) -> None:
    """Have every block recompute, as `Block.recompute` says."""
    for block in network.modules():
        if isinstance(block, Block):
            block.recompute()


@torch.no_grad()
def initialize(network: GPT, generator: torch.Generator) -> None:
    """Draw every weight anew, as `model.initialization` says."""
    settings = network.settings
    for name, module in network.named_modules():
        match module:
            case nn.Linear():
                is_residual = settings.initialization == "gpt2" and name.endswith("project")
                std = 0.02 / math.sqrt(2 * settings.n_layer) if is_residual else 0.02
                nn.init.normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            case nn.Embedding() if settings.initialization == "model5":
                nn.init.xavier_normal_(module.weight, generator=generator)
            case nn.Embedding():
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            case nn.LayerNorm():
                module.reset_parameters()
