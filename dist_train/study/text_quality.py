"""The text that a run writes, beside what humans wrote at the same places.

Of the held-out text the first half is counted by the n-gram model, and from the second half come the prompts and what
really follows them: so the model has seen neither. A prompt fills the context. Thereby every sampled token is one at
the last position, the only one that final-token training trains; what a run makes of shorter prompts is another matter.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tiktoken
import torch

from dist_train.data.batches import read_windows
from dist_train.data.manifest import open_tokens
from dist_train.data.shards import TokenStream
from dist_train.data.tokenizer import END_OF_TEXT, decode, load_tokenizer
from dist_train.data.windows import evenly_spaced
from dist_train.errors import UserError
from dist_train.model.generation import Sampling, generate_batch
from dist_train.sections import DataSettings
from dist_train.study.ngrams import CharacterModel
from dist_train.study.statistics import Estimate
from dist_train.study.text_measures import KnownWords, collapsed, measure_texts
from dist_train.study.trained import Trained

SAMPLES = 48
"""Texts of a run, each after a prompt of its own; fewer where the held-out text is short."""
SAMPLE_TOKENS = 160
TEMPERATURE = 1.0
"""What the network believes, neither sharpened nor flattened."""
SHOWN_SAMPLES = 6

# What is read of a large corpus: beyond that, words and n-grams that are new are rare ones.
_VOCABULARY_TOKENS = 2_000_000
_PIECE_TOKENS = 10_000
_MODEL_CHARACTERS = 300_000


@dataclass(frozen=True)
class Reference:
    """What the texts of all runs on the same data are held against."""

    prompts_BT: torch.Tensor
    """int64 [B, block_size]."""
    prompts: list[str]
    humans: list[str]
    """What follows them, `SAMPLE_TOKENS` each."""
    known: KnownWords
    """The words of the training text."""
    model: CharacterModel
    measures: dict[str, Estimate | None]
    """Of `humans`."""


def text_suite(trained: Trained, source: str | None = None) -> dict[str, Any]:
    """Sample a text after each prompt, and measure these texts and the human ones alike.

    `<|endoftext|>` counts as a paragraph's end in all of them. The same run and step give the same texts.
    Raises `UserError` if a `source` is given, since the run's held-out text is the only one, or if that is too short;
    `LossError` if the network has diverged.
    """
    if source is not None:
        raise UserError(f"--suite: text reads the run's own held-out text, not {source}; give the name alone")
    settings = trained.settings
    reference = shared_reference(settings.data, settings.model.block_size, trained.data.fingerprint)
    generator = torch.Generator().manual_seed(settings.run.derive_seed("text quality"))
    with trained.replica.inference():
        tokens_BT = generate_batch(
            trained.network, reference.prompts_BT, SAMPLE_TOKENS, Sampling(TEMPERATURE), generator
        )
    texts = [_text(trained.encoding, row[-SAMPLE_TOKENS:].tolist()) for row in tokens_BT]
    shown = list(zip(reference.prompts, texts, reference.humans, strict=True))[:: -(-len(texts) // SHOWN_SAMPLES)]
    return {
        "n_samples": len(texts),
        "n_tokens": SAMPLE_TOKENS,
        "temperature": TEMPERATURE,
        "model": measure_texts(texts, reference.known, reference.model),
        "human": reference.measures,
        "samples": [{"prompt": prompt, "text": text, "human": human} for prompt, text, human in shown],
    }


@functools.lru_cache(maxsize=2)
def shared_reference(settings: DataSettings, block_size: int, fingerprint: str) -> Reference:
    """Read what runs on this data share; `fingerprint` tells other data in the same folder apart."""
    encoding, data = load_tokenizer(settings.tokenizer), open_tokens(settings)
    half = len(data.val) // 2
    windows_BT = _second_half(data.val, half, block_size, encoding.n_vocab, settings)
    humans = [_text(encoding, row[block_size:]) for row in windows_BT.tolist()]
    counted = _text(encoding, data.val.windows(np.array([0]), min(half, _MODEL_CHARACTERS))[0].tolist())
    known, model = (
        KnownWords(_training_text(encoding, data.train)),
        CharacterModel(collapsed(counted)[:_MODEL_CHARACTERS]),
    )
    return Reference(
        prompts_BT=windows_BT[:, :block_size],
        prompts=[_text(encoding, row[:block_size]) for row in windows_BT.tolist()],
        humans=humans,
        known=known,
        model=model,
        measures=measure_texts(humans, known, model),
    )


def _second_half(
    held_out: TokenStream, half: int, block_size: int, n_vocab: int, settings: DataSettings
) -> torch.Tensor:
    """Return evenly spaced windows of a prompt and what follows, int64 [B, T + N]; what follows does not overlap."""
    rest = len(held_out) - half
    count = min(SAMPLES, (rest - block_size) // SAMPLE_TOKENS)
    if count < 2:
        raise UserError(
            f"data.dir: {settings.dir} holds out {len(held_out)} tokens, and text quality needs "
            f"{2 * (block_size + 2 * SAMPLE_TOKENS)}; prepare data with a larger data.val_fraction"
        )
    # A window there is one token longer than what it is asked for.
    starts = half + evenly_spaced(rest, block_size + SAMPLE_TOKENS - 1, count)
    return read_windows(held_out, starts, block_size + SAMPLE_TOKENS - 1, n_vocab)


def _training_text(encoding: tiktoken.Encoding, train: TokenStream) -> str:
    """Return the training text, of a large one evenly spaced pieces."""
    if len(train) <= _VOCABULARY_TOKENS:
        return _text(encoding, train.windows(np.array([0]), len(train))[0].tolist())
    starts = evenly_spaced(len(train), _PIECE_TOKENS, _VOCABULARY_TOKENS // _PIECE_TOKENS)
    return "\n\n".join(_text(encoding, piece) for piece in train.windows(starts, _PIECE_TOKENS).tolist())


def _text(encoding: tiktoken.Encoding, tokens: Sequence[int]) -> str:
    return decode(encoding, tokens).replace(END_OF_TEXT, "\n\n")
