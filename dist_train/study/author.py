"""Whatever can continue a text: a run, one of its checkpoints, a folder in Hugging Face's format, GPT-2 itself."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

from dist_train.data.hf_tokenizer_reader import read_tokenizer
from dist_train.data.tokenizer import encode_document, end_of_text, load_tokenizer, token_bytes
from dist_train.data.untrusted import read_json
from dist_train.errors import UserError
from dist_train.model.generation import Sampling, stream
from dist_train.model.gpt import GPT
from dist_train.model.pretrained import network_of
from dist_train.runtime.device import choose_device
from dist_train.sections import SampleSettings
from dist_train.training.hf_folder import resolved
from dist_train.training.initial_weights import is_gpt2, open_weights
from dist_train.training.saved import is_saved, open_saved

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Author:
    """A network with its tokenizer. It computes in float32, whatever precision it was trained in."""

    network: GPT
    encoding: tiktoken.Encoding
    sample: SampleSettings
    """How its run samples; the defaults where there is no run."""

    def never(self) -> tuple[int, ...]:
        """Return the ids that are no text: those without bytes, and special tokens but for end-of-text."""
        special = set(self.encoding._special_tokens.values()) - {end_of_text(self.encoding)}
        return tuple(
            token for token in range(self.network.n_vocab) if token in special or not token_bytes(self.encoding, token)
        )

    def read(self, text: str) -> list[int]:
        """Return the tokens of `text`; a special token spelled there is plain text, as in training."""
        return encode_document(self.encoding, text, continues=True).tolist()

    def write(self, before: Sequence[int], max_new_tokens: int, sampling: Sampling, seed: int) -> Iterator[int]:
        """Yield what follows the tokens `before`, one by one: `max_new_tokens`, or up to an end-of-text, included."""
        generator = torch.Generator().manual_seed(seed)
        with closing(stream(self.network, [before], max_new_tokens, sampling, generator)) as drawn:
            for drawn_B in drawn:
                token = int(drawn_B[0])
                yield token
                if token == end_of_text(self.encoding):
                    return

    def spell(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text of `tokens` as soon as characters are whole; what is never UTF-8 is �, end-of-text nothing."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if token != end_of_text(self.encoding):
                yield decoder.decode(token_bytes(self.encoding, token))
        yield decoder.decode(b"", final=True)


def open_author(path: Path, device: str = "auto") -> Author:
    """Read what there is at `path`: a run (its newest checkpoint that holds), a checkpoint, a folder, a GPT-2's name.

    Data that a run was trained on need not be there. Raises `UserError` for what cannot be read.
    """
    sample = SampleSettings()
    if is_saved(path):
        saved = open_saved(path)
        weights, encoding, sample = saved.weights(str(path)), saved.encoding, saved.settings.sample
    else:
        weights = open_weights(str(path))
        encoding = load_tokenizer("gpt2") if is_gpt2(str(path)) else _read_tokenizer(path.expanduser())
    if encoding.n_vocab > weights.n_vocab:
        raise UserError(
            f"the tokenizer of {path} has {encoding.n_vocab} tokens, its network {weights.n_vocab}; "
            f"put the tokenizer there that the network was trained with"
        )
    return Author(network_of(weights, choose_device(device, 0, 1)), encoding, sample)


def _read_tokenizer(folder: Path) -> tiktoken.Encoding:
    try:
        return read_tokenizer(read_json(resolved(folder / TOKENIZER)))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"cannot read {folder / TOKENIZER}: {reason}; use a folder that `export` wrote, or put GPT-2's there"
        ) from None
