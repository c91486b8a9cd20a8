"""Text to token ids and back: every tokenizer is a `tiktoken.Encoding` that knows `<|endoftext|>`."""

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tiktoken

from dist_train.errors import UserError

END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts text into pieces before merging bytes (Radford et al. 2019). Written so that all alternatives without
# a look-ahead are one group: only then does tiktoken's regex engine run them as an automaton. 1.5 times as fast in all.
GPT2_PATTERN = r"(?: ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"
_CUT_LIKE_GPT2 = ("gpt2", "r50k_base", "p50k_base", "p50k_edit")


def load_tokenizer(name: str) -> tiktoken.Encoding:
    """Return the encoding called `name`: a tiktoken name, `bytes`, or the path of a `.tiktoken` file.

    Raises `UserError` if there is none of that name, its vocabulary cannot be fetched, or it has no end-of-text.
    """
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        # The pattern cuts at most 64 characters at a time, so that merging, which finds nothing, stays linear.
        return tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256}
        )
    if name.endswith(".tiktoken"):
        return _from_file(Path(name).expanduser())
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        raise UserError(f"data.tokenizer: there is no {name!r}; use one of {known}, or the path of a .tiktoken file")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors, a file of the wrong hash is a ValueError
        reason = type(error).__name__
        raise UserError(
            f"data.tokenizer: tiktoken cannot fetch {name!r} ({reason}); connect to the internet once, set "
            f"TIKTOKEN_CACHE_DIR to a folder that has its vocabulary, or use --data.tokenizer=bytes"
        ) from None
    if END_OF_TEXT not in encoding.special_tokens_set:
        raise UserError(
            f"data.tokenizer: {name!r} has no {END_OF_TEXT}, which stands before each document; use another"
        )
    if name not in _CUT_LIKE_GPT2:
        return encoding
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def _from_file(path: Path) -> tiktoken.Encoding:
    """Read a `.tiktoken` file, a line of base64 bytes and a rank for each token, with GPT-2's splitting pattern.

    Not through tiktoken's own reader: that caches a local file by its path, and would go on with an old content.
    """
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as error:
        raise UserError(f"data.tokenizer: cannot read {path}: {error.strerror}") from None
    except (ValueError, binascii.Error):
        raise UserError(f"data.tokenizer: {path} is no .tiktoken file; its lines are `base64-bytes rank`") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"data.tokenizer: {path} is incomplete; it needs all 256 bytes and ranks 0 … n-1")
    return tiktoken.Encoding(
        path.stem, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )


def encode_document(encoding: tiktoken.Encoding, text: str, continues: bool = False) -> np.ndarray:
    """Return `<|endoftext|>` and the tokens of `text`, uint32 [n]; a special token spelled there is plain text.

    Without `<|endoftext|>` where the text goes on with a document.
    """
    tokens = [] if continues else [np.array([end_of_text(encoding)], dtype=np.uint32)]
    try:
        tokens += [_encode(encoding, text)]
    except ValueError:  # the pattern's engine gives up on a million spaces in a row
        tokens += [_encode(encoding, part) for part in _LONG_SPACE.split(text)]
    return np.concatenate(tokens)


# A run of whitespace is one piece but for its last character, which goes with the word behind it. Looked for from the
# run's start alone: from everywhere it would take quadratic time.
_LONG_SPACE = re.compile(r"(?<!\s)(\s{10000,}(?=\s\S))")


def _encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        # Half of a surrogate pair, which JSON can spell: as tiktoken's own `encode` does, pair it or put � there.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return encoding.encode_to_numpy(text, disallowed_special=())


# Between a word and the space before the next, or after a line's end, whichever characters the words are made of:
# no pattern that tiktoken has joins what is left and right of that, and none looks past it.
_CUT = re.compile(r"(?<=\S) (?=\S)|(?<=\S\n)(?=[^\s/])")


def last_cut(text: str) -> int:
    """Return the last place at which `text` can be cut so that the parts' tokens are the tokens of the whole.

    Its end where there is no such place: then the tokens around the cut may differ.
    """
    for start in (max(0, len(text) - 10_000), 0):
        places = [match.start() for match in _CUT.finditer(text, start)]
        if places:
            return places[-1]
    return len(text)


def cuts_like_gpt2(encoding: tiktoken.Encoding) -> bool:
    """Tell whether `encoding` cuts text into the pieces that GPT-2's does."""
    return encoding._pat_str == GPT2_PATTERN


def end_of_text(encoding: tiktoken.Encoding) -> int:
    """Return the id of `<|endoftext|>`."""
    return encoding.encode_single_token(END_OF_TEXT)


def fingerprint(encoding: tiktoken.Encoding) -> str:
    """Return a hash of how `encoding` cuts one fixed text, so that two tokenizers of one name are told apart."""
    probe = " ".join(chr(code) for code in range(32, 0x2FF)) + " 1234567 It isn't the    same\n\n\tthing—是 🙂"
    tokens = encode_document(encoding, probe)
    return hashlib.sha256(f"{encoding.n_vocab} {tokens.tolist()}".encode()).hexdigest()[:16]


def decode(encoding: tiktoken.Encoding, tokens: Sequence[int]) -> str:
    """Return the text of `tokens`; ids that the vocabulary leaves free are skipped, broken UTF-8 shows as �.

    Some vocabularies have such gaps (cl100k_base has 16), and an untrained network may sample them.
    """
    return b"".join(token_bytes(encoding, token) for token in tokens).decode("utf-8", errors="replace")


def token_bytes(encoding: tiktoken.Encoding, token: int) -> bytes:
    """Return the bytes of one token, which need not be whole characters; none of an id that is left free."""
    try:
        return encoding.decode_single_token_bytes(token)
    except KeyError:
        return b""
