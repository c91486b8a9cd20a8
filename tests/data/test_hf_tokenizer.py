"""A tokenizer written for Hugging Face's libraries gives every text the ids that it gave in training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dist_train.data.hf_tokenizer import merges, tokenizer_json
from dist_train.data.tokenizer import END_OF_TEXT, load_tokenizer
from dist_train.errors import UserError

# As OpenAI's later vocabularies cut: three digits at most, and words with one sign before.
OTHER_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
TEXTS = [
    "",
    " ",
    "Hello world, it's  the\n\n\tsame   thing 12345 times—是 🙂\r\n",
    "  leading and trailing  \n ",
    "e\u0301 ﷽ \u200b\x00\x7f İI''ll'LL don't",
    "".join(map(chr, range(0x250))),
    "word" * 50 + " " * 100 + "\n" * 30,
]


def written(encoding: tiktoken.Encoding) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(encoding)))


def other(encoding: tiktoken.Encoding) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "other", pat_str=OTHER_CUT, mergeable_ranks=encoding._mergeable_ranks, special_tokens={END_OF_TEXT: 50256}
    )


@pytest.mark.parametrize("name", ["gpt2", "r50k_base", "other"])
def test_ids_of_byte_pairs(name: str, gpt2_vocabulary: Path, time_machine: str) -> None:
    encoding = other(load_tokenizer("gpt2")) if name == "other" else load_tokenizer(name)
    theirs = written(encoding)
    assert theirs.get_vocab_size() == encoding.n_vocab
    for text in (*TEXTS, time_machine[:50_000]):
        tokens = encoding.encode_ordinary(text)
        assert theirs.encode(text).ids == tokens
        assert theirs.decode(tokens) == text
    assert theirs.encode(f"one{END_OF_TEXT}").ids[-1] == 50256


BYTES = load_tokenizer("bytes")
THEIR_BYTES = written(BYTES)


@given(st.text(st.characters(codec="utf-8")))
def test_ids_of_bytes(text: str) -> None:
    tokens = list(text.encode())
    assert BYTES.encode_ordinary(text) == tokens
    if END_OF_TEXT not in text:
        assert THEIR_BYTES.encode(text).ids == tokens
    assert THEIR_BYTES.decode(tokens) == text


def test_the_end_of_text_of_bytes() -> None:
    assert THEIR_BYTES.encode(f"a{END_OF_TEXT}").ids == [97, 256]


def test_merges_follow_from_ranks() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"he": 257, b"the": 258, b" the": 259}
    assert merges(ranks) == [(b"t", b"h"), (b"h", b"e"), (b"th", b"e"), (b" ", b"the")]
    with pytest.raises(UserError, match="b'abc' is merged of 3 parts"):
        merges({**ranks, b"abc": 260})


def test_the_library_is_needed_by_tests_alone() -> None:
    code = "import sys, dist_train.study.export; sys.exit(str({'tokenizers', 'transformers'} & set(sys.modules) or ''))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stderr.strip() == ""
