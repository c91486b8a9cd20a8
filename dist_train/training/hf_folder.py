"""A folder of GPT-2 weights in Hugging Face's format, which anybody may have written: read, and never trusted."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_train.data.untrusted import open_regular, read_json, require_plain_name
from dist_train.errors import UserError
from dist_train.model.pretrained import Weights, like, read_config, their_name, turned

CONFIG, WEIGHTS, INDEX, PICKLED = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)

_TYPES = ("F32", "F16", "BF16")
# Masks that older versions of transformers saved beside the weights.
_BUFFER = re.compile(r"h\.[0-9]+\.attn\.(bias|masked_bias)")
_HEAD, _EMBEDDING = "lm_head.weight", "wte.weight"


def open_folder(folder: Path, where: str) -> Weights:
    """Return the weights in `folder`, which the user knows as `where`. What they are is verified, and read later.

    Raises `UserError` for a network that is none of ours, and for a tensor that is missing, too much or another.
    """
    try:
        settings, n_vocab = read_config(read_json(resolved(folder / CONFIG)))
        files = _Files(folder)
        expected = {their_name(name): turned(name, tensor) for name, tensor in like(settings, n_vocab).items()}
        files.require(expected)
        biases = [files.read(name) for name in expected if name.endswith(".bias")]
    except (OSError, ValueError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"cannot start from {where}: {reason}; use GPT-2 weights as safetensors") from None
    return Weights(
        where=where,
        settings=settings,
        n_vocab=n_vocab,
        read=lambda name: turned(name, files.read(their_name(name))),
        fits_any_bias=not any(bias.any() for bias in biases),
    )


class _Files:
    """The tensors of one file, or of several with an index, by Hugging Face's names without a prefix.

    Files are mapped into memory, so that processes of one machine share what they read of them.
    """

    def __init__(self, folder: Path) -> None:
        """Raise `OSError`, `ValueError` or `SafetensorError`, with a line for the user, for what is no such folder."""
        places: dict[str, Any]
        if (folder / INDEX).exists():
            index = read_json(resolved(folder / INDEX))
            places = index.get("weight_map") if isinstance(index, dict) else None  # type: ignore[assignment]
            if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
                raise ValueError(f"{INDEX} has no weight_map of file names")
            opened = {file: _open(folder / require_plain_name(file)) for file in sorted(set(places.values()))}
        elif (folder / WEIGHTS).exists():
            opened = {WEIGHTS: _open(folder / WEIGHTS)}
            places = dict.fromkeys(opened[WEIGHTS].keys(), WEIGHTS)
        elif (folder / PICKLED).exists():
            raise ValueError(f"it has only the pickled {PICKLED}, which may run any code when it is read")
        else:
            raise ValueError(f"{WEIGHTS} is missing")
        self._place = {name.removeprefix("transformer."): (opened[file], name) for name, file in places.items()}

    def require(self, expected: dict[str, Tensor]) -> None:
        """Raise `ValueError` unless the tensors are the `expected` ones in name, shape and type."""
        found = {name for name in self._place if not _BUFFER.fullmatch(name)} - {_HEAD}
        if differing := found ^ expected.keys():
            raise ValueError(f"{min(differing)!r} is {'unexpected' if differing & found else 'missing'}")
        for name, tensor in expected.items():
            self._require_form(name, tensor)
        if _HEAD in self._place:
            self._require_form(_HEAD, expected[_EMBEDDING])
            if not torch.equal(self.read(_HEAD), self.read(_EMBEDDING)):
                raise ValueError(f"{_HEAD} is not {_EMBEDDING}, which this network uses in its place")

    def _require_form(self, name: str, like: Tensor) -> None:
        file, inside = self._place[name]
        form = file.get_slice(inside)  # raises SafetensorError where an index is wrong
        if form.get_dtype() not in _TYPES or form.get_shape() != list(like.shape):
            raise ValueError(
                f"{name!r} is {form.get_dtype()} {form.get_shape()}, not {', '.join(_TYPES)} {list(like.shape)}"
            )

    def read(self, name: str) -> Tensor:
        """Return a tensor in float32."""
        file, inside = self._place[name]
        tensor: Tensor = file.get_tensor(inside)
        return tensor.float()


def _open(path: Path) -> Any:
    place = resolved(path)
    os.close(open_regular(place))
    return safe_open(place, "pt")


def resolved(path: Path) -> Path:
    """Return where a file of the hub's cache lies: `snapshots/COMMIT/NAME` there is a link into `blobs`.

    Any other link stays one, and is refused when it is opened.
    """
    target = path.resolve()
    return target if path.is_symlink() and target.parent == path.parent.resolve().parent.parent / "blobs" else path
