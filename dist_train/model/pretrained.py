"""GPT-2's weights under Hugging Face's names, and back: one table for both ways. Knows no files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, PositiveFloat, ValidationError
from torch import Tensor

from dist_train.errors import UserError
from dist_train.model.gpt import GPT, outline
from dist_train.sections import ModelSettings

# Modules of the network, and of each block: ours, theirs.
_OUTER = {"token_embedding": "wte", "position_embedding": "wpe", "final_norm": "ln_f"}
_NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
# Theirs are `Conv1D`s, which keep weights as [in, out], where a linear layer has [out, in].
_TRANSPOSED = {
    "attention.query_key_value": "attn.c_attn",
    "attention.project": "attn.c_proj",
    "mlp.expand": "mlp.c_fc",
    "mlp.project": "mlp.c_proj",
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_THEIR_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}


def their_name(name: str) -> str:
    """Return what Hugging Face calls our tensor `name`, without the prefix `transformer.`."""
    module, kind = name.rsplit(".", 1)
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    _, number, part = module.split(".", 2)
    return f"h.{number}.{(_NORMS | _TRANSPOSED)[part]}.{kind}"


def turned(name: str, tensor: Tensor) -> Tensor:
    """Return our tensor `name` as theirs lies, or theirs as ours does: a view, transposed where they differ."""
    return tensor.T if name.endswith(tuple(f".{module}.weight" for module in _TRANSPOSED)) else tensor


def like(settings: ModelSettings, n_vocab: int) -> dict[str, Tensor]:
    """Return tensors without content of the names, shapes and types of a network's weights."""
    return outline(settings, n_vocab).state_dict()


# ---- in --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Weights to start from: what network they are of, and where its tensors come from."""

    where: str
    """As the user knows it."""
    settings: ModelSettings
    """Of the network that they are of; `block_size` is how many positions there are."""
    n_vocab: int
    read: Callable[[str], Tensor]
    """Returns the tensor that we call so, in float32."""
    fits_any_bias: bool = False
    """Whether all biases are zero, so that a network without them is the same."""


def require_fit(weights: Weights, settings: ModelSettings, n_vocab: int) -> None:
    """Raise `UserError` that names every setting to change, and its value, for a network that `weights` do not fit."""
    theirs = weights.settings
    keys = ["n_layer", "n_head", "n_embd", "activation", "norm_eps", *([] if weights.fits_any_bias else ["bias"])]
    wanted = {key: getattr(theirs, key) for key in keys if getattr(theirs, key) != getattr(settings, key)}
    changes = [f"model.{key}={str(value).lower()}" for key, value in wanted.items()]
    if settings.block_size > theirs.block_size:
        changes += [f"model.block_size={theirs.block_size} (or less)"]
    if n_vocab != weights.n_vocab:
        name = "gpt2" if weights.n_vocab == 50257 else "one"
        changes += [f"data.tokenizer={name} (of {weights.n_vocab} tokens, not {n_vocab})"]
    if changes:
        raise UserError(f"model.init_from: {weights.where} does not fit the settings; set {', '.join(changes)}")


@torch.no_grad()
def load(network: GPT, weights: Weights) -> None:
    """Give `network`, which they fit, these weights: of the positions its first, and the rows of its vocabulary.

    Raises `UserError` for a number that is not finite.
    """
    scale = weights.read("token_embedding.weight").new_tensor(_scale(weights.settings) / network.logit_scale)
    for name, parameter in network.named_parameters():
        tensor = weights.read(name)
        if not tensor.isfinite().all():
            raise UserError(f"{name} of {weights.where} is not finite; use other weights")
        if name.startswith("final_norm.") and scale != 1:
            tensor = tensor * scale
        # Only embeddings differ in length: by positions, and by rows that pad the vocabulary and predict nothing.
        rows = min(len(parameter), len(tensor))
        parameter[:rows].copy_(tensor[:rows])


def network_of(weights: Weights, device: torch.device) -> GPT:
    """Return the network that `weights` are of, on `device` and in eval mode. Raises `UserError` as `load` does."""
    with torch.device("meta"):
        network = GPT(weights.settings, weights.n_vocab)
    network.to_empty(device=device)
    load(network, weights)
    return network.eval()


class _Config(BaseModel):
    """What of Hugging Face's `config.json` decides the network, with the defaults of its `GPT2Config`."""

    model_type: Literal["gpt2"]
    vocab_size: int = Field(default=50257, ge=1, le=1 << 24)
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: Literal["gelu", "gelu_new", "gelu_pytorch_tanh"] = "gelu_new"
    layer_norm_epsilon: PositiveFloat = 1e-5
    # What this network does in one way alone.
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: Literal[True] = True


def read_config(config: Any) -> tuple[ModelSettings, int]:
    """Return the settings, and the vocabulary's size, of the network that a `config.json` describes.

    Raises `ValueError`, which says in a line what is wrong, for a network that is none of ours.
    """
    try:
        theirs = _Config.model_validate(config, strict=True)
        settings = ModelSettings(
            n_layer=theirs.n_layer,
            n_head=theirs.n_head,
            n_embd=theirs.n_embd,
            block_size=theirs.n_positions,
            activation=_ACTIVATIONS[theirs.activation_function],  # type: ignore[arg-type]
            norm_eps=theirs.layer_norm_epsilon,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "config.json"
        raise ValueError(f"{where}: {first['msg']} (got {first['input']!r:.80})") from None
    if theirs.n_inner not in (None, 4 * theirs.n_embd):
        raise ValueError(f"n_inner: {theirs.n_inner} is not four times n_embd")
    return settings, theirs.vocab_size


# ---- out -------------------------------------------------------------------------------------------------------------


def their_config(settings: ModelSettings, n_vocab: int, end_of_text: int) -> dict[str, Any]:
    """Return the `config.json` with which `AutoModelForCausalLM` builds the network."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": n_vocab,
        "n_positions": settings.block_size,
        "n_ctx": settings.block_size,
        "n_embd": settings.n_embd,
        "n_layer": settings.n_layer,
        "n_head": settings.n_head,
        "activation_function": _THEIR_ACTIVATIONS[settings.activation],
        "layer_norm_epsilon": settings.norm_eps,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), settings.dropout),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def their_tensors(tensors: Mapping[str, Tensor], settings: ModelSettings, n_vocab: int) -> dict[str, Tensor]:
    """Return a network's weights under Hugging Face's names, with all that its format has no word for folded in.

    Rows that pad the vocabulary are left out, missing biases become zeros, and the logits' factor goes into the final
    LayerNorm.
    """
    theirs = {}
    for name, shape in like(settings.model_copy(update={"bias": True}), n_vocab).items():
        tensor = tensors[name] if name in tensors else torch.zeros(shape.shape)
        if name == "token_embedding.weight":
            tensor = tensor[:n_vocab]
        if name.startswith("final_norm."):
            tensor = tensor * _scale(settings)
        theirs[f"transformer.{their_name(name)}"] = turned(name, tensor).contiguous()
    return theirs


def _scale(settings: ModelSettings) -> float:
    """Return the factor on the logits as a number."""
    return settings.n_embd**-0.5 if settings.logit_scale == "rsqrt_n_embd" else float(settings.logit_scale)
