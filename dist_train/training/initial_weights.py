"""What a new run starts from in place of chance: GPT-2's weights, or what another run has learned."""

from pathlib import Path

import torch
from torch import nn

from dist_train.data.hub import first_answer, reason_of
from dist_train.errors import UserError
from dist_train.model.pretrained import Weights
from dist_train.training.hf_folder import CONFIG, WEIGHTS, open_folder
from dist_train.training.saved import is_saved, open_saved

# Of the repositories openai-community/NAME: weights that change behind a name would make the same config another run.
_COMMITS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}


def open_weights(init_from: str) -> Weights:
    """Return the weights that `model.init_from` names; of GPT-2's own, what is not there yet is downloaded.

    Raises `UserError` if there are none, or none of this network's layout.
    """
    if is_gpt2(init_from):
        return open_folder(_download(init_from), init_from)
    path = Path(init_from).expanduser()
    if (path / CONFIG).exists():
        return open_folder(path, init_from)
    if is_saved(path):
        return open_saved(path).weights(init_from)
    raise UserError(
        f"there is nothing to start from at {init_from}; use {', '.join(_COMMITS)}, a folder with "
        f"{CONFIG} and {WEIGHTS}, or one of a run or checkpoint"
    )


def is_gpt2(init_from: str) -> bool:
    """Tell whether `init_from` names GPT-2's own weights, which go with its own tokenizer."""
    return init_from in _COMMITS


def _download(name: str) -> Path:
    """Return the folder of the hub's cache that has the weights; the processes of a machine download them once."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, commit = f"openai-community/{name}", _COMMITS[name]
    kept = [try_to_load_from_cache(repository, file, revision=commit) for file in (CONFIG, WEIGHTS)]
    try:
        if not all(isinstance(path, str) for path in kept):
            first_answer("model", repository, commit)
        config, _ = (hf_hub_download(repository, file, revision=commit) for file in (CONFIG, WEIGHTS))
        return Path(config).parent
    except Exception as error:  # the client's versions use three HTTP libraries without a common base
        is_missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        remedy = (
            "a pickled pytorch_model.bin is not read; use a folder that has both"
            if is_missing
            else "connect to the internet once, or use a folder that has them"
        )
        raise UserError(f"cannot get {CONFIG} and {WEIGHTS} of {repository} ({reason_of(error)}); {remedy}") from None


def bit_sums(network: nn.Module) -> dict[str, int]:
    """Return for each tensor the sum of its bit patterns: where one bit differs, so does a sum.

    One pass over the weights, in any order.
    """
    state = network.state_dict()
    sums = torch.stack([tensor.view(torch.int32).sum(dtype=torch.int64) for tensor in state.values()]).tolist()
    return dict(zip(state, sums, strict=True))
