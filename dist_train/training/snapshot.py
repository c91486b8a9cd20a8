"""Tensors copied into host memory that already is the safetensors file they become.

Copying is all that a training step waits for; the file is then hashed and written from that memory, while the tensors
change. The format is documented at https://huggingface.co/docs/safetensors: the header's length, a header in JSON, and
the tensors' bytes one after the other.
"""

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_CHUNK_BYTES = 4 << 20


class Snapshot:
    """Host memory for tensors of given names, shapes and types, used again from one copy to the next."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Make room for `tensors`: in pinned memory where one of them is on CUDA, for the copy's speed."""
        # The widest types first, as the format wants it: each tensor then starts at a multiple of its own width.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        self._header = _header({name: tensors[name] for name in names})
        is_pinned = any(tensor.is_cuda for tensor in tensors.values())
        self._bytes = torch.empty(
            sum(tensor.nbytes for tensor in tensors.values()), dtype=torch.uint8, pin_memory=is_pinned
        )
        parts = self._bytes.split([tensors[name].nbytes for name in names])
        self._copies = {
            name: part.view(tensors[name].dtype).view(tensors[name].shape)
            for name, part in zip(names, parts, strict=True)
        }

    def clear(self) -> None:
        """Make all values zero."""
        self._bytes.zero_()

    def copy(self, name: str, tensor: Tensor) -> None:
        """Copy the values of one of the tensors that this memory was made for.

        Those from CUDA are there once the device is synchronized.
        """
        # Only CUDA copies asynchronously into memory that is safe to be written to meanwhile.
        self._copies[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return len(self._header) + self._bytes.numel()

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the file's content in pieces that fit into a CPU's cache: each is hashed and written in turn."""
        yield self._header
        content: memoryview = self._bytes.numpy().data
        for start in range(0, len(content), _CHUNK_BYTES):
            yield content[start : start + _CHUNK_BYTES]


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries, start = {}, 0
    for name, tensor in tensors.items():
        offsets = [start, start := start + tensor.nbytes]
        entries[name] = {"dtype": _TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Spaces behind the text keep the tensors' bytes aligned to eight.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
