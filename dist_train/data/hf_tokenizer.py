"""A tokenizer as the files that `AutoTokenizer.from_pretrained` reads, without custom code: the same ids for a text."""

from itertools import pairwise
from typing import Any

import tiktoken

from dist_train.data.tokenizer import END_OF_TEXT, cuts_like_gpt2
from dist_train.errors import UserError


def tokenizer_json(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """Return the `tokenizer.json` of a byte-level BPE that gives every text the ids that `encoding` does.

    Raises `UserError` for ranks that no merging of pairs has made.
    """
    ranks = encoding._mergeable_ranks
    spelled = {token: _spell(token) for token in ranks}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    # ByteLevel's own pattern is GPT-2's. Any other cuts first.
    cut = {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated", "invert": False}
    by_itself = {**byte_level, "use_regex": cuts_like_gpt2(encoding)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": content, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for content, number in sorted(encoding._special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": by_itself
        if cuts_like_gpt2(encoding)
        else {"type": "Sequence", "pretokenizers": [cut, by_itself]},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            "fuse_unk": False,
            "byte_fallback": False,
            # As tiktoken does it: a piece that is a token is not merged to one.
            "ignore_merges": True,
            "vocab": {spelled[token]: rank for token, rank in ranks.items()},
            "merges": [[spelled[left], spelled[right]] for left, right in merges(ranks)],
        },
    }


def tokenizer_config(n_positions: int) -> dict[str, Any]:
    """Return the `tokenizer_config.json` beside it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT),
        "model_max_length": n_positions,
        "clean_up_tokenization_spaces": False,
    }


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pair that each token of two or more bytes was merged of, in the order of their ranks.

    A token's pair is what remains of its bytes when the tokens of lower ranks are merged. Raises `UserError` where
    that is no pair.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _merge(token, ranks, rank)
        if len(parts) != 2:
            raise UserError(
                f"data.tokenizer: token {token!r} is merged of {len(parts)} parts; Hugging Face's are pairs"
            )
        pairs.append((parts[0], parts[1]))
    return pairs


def _merge(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Return the parts of `token` when merging goes on, lowest rank first, as long as that is lower than `below`."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 1:
        found = [ranks.get(left + right, below) for left, right in pairwise(parts)]
        lowest = min(found)
        if lowest >= below:
            break
        at = found.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _alphabet() -> dict[int, str]:
    """Return GPT-2's printable character for each byte (Radford et al. 2019).

    Itself where Latin-1 has one that shows, and else the next of those from U+0100 on.
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


_CHARACTERS = _alphabet()
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}


def _spell(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


def unspell(characters: str) -> bytes:
    """Return the bytes that `tokenizer_json` spells so. Raises `ValueError` for a character that stands for none."""
    try:
        return bytes(_BYTES[character] for character in characters)
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} stands for no byte") from None
