"""A tokenizer that was written for Hugging Face's libraries is read back as it was, and any other kind is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_train.data.hf_tokenizer import tokenizer_json
from dist_train.data.hf_tokenizer_reader import read_tokenizer
from dist_train.data.tokenizer import END_OF_TEXT, load_tokenizer
from tests.data.test_hf_tokenizer import TEXTS, other


def through_a_file(written: dict[str, Any]) -> Any:
    return json.loads(json.dumps(written))


@pytest.mark.parametrize("name", ["bytes", "gpt2", "other"])
def test_what_is_written_is_read_back_exactly(name: str, gpt2_vocabulary: Path) -> None:
    encoding = other(load_tokenizer("gpt2")) if name == "other" else load_tokenizer(name)
    back = read_tokenizer(through_a_file(tokenizer_json(encoding)))
    assert back._mergeable_ranks == encoding._mergeable_ranks
    assert back._special_tokens == encoding._special_tokens
    assert back._pat_str == encoding._pat_str
    for text in TEXTS:
        assert back.encode_ordinary(text) == encoding.encode_ordinary(text)


def test_gpt2_as_its_authors_libraries_wrote_it(gpt2_vocabulary: Path) -> None:
    encoding = load_tokenizer("gpt2")
    written = tokenizer_json(encoding)
    model = written["model"]
    written["model"] = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "vocab": {**model["vocab"], END_OF_TEXT: 50256},
        "merges": [" ".join(pair) for pair in model["merges"]],
    }
    del written["pre_tokenizer"]["use_regex"]
    written["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    back = read_tokenizer(through_a_file(written))
    assert back.n_vocab == 50257
    for text in TEXTS:
        assert back.encode_ordinary(text) == encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer.*Metaspace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"added_tokens": []}, r"it has no <\|endoftext\|>"),
        ({"added_tokens": [{"id": 7, "content": END_OF_TEXT}]}, "two tokens of one id"),
        ({"added_tokens": [{"id": -1, "content": END_OF_TEXT}]}, "greater than or equal to 0"),
        ({"model": {"type": "Unigram"}}, "model.type"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "does not have all bytes"),
        ({"model": {"type": "BPE", "vocab": {" ": 0}, "merges": []}}, "' ' stands for no byte"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}}, "merges"),
    ],
)
def test_another_kind_is_refused_in_one_line(changes: dict[str, Any], expected: str) -> None:
    written = {**tokenizer_json(load_tokenizer("bytes")), **changes}
    with pytest.raises(ValueError, match=expected) as caught:
        read_tokenizer(written)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_tokenizer_is_refused() -> None:
    nothing: list[Any] = [None, [], {}, "tokenizer", {"model": 1}]
    for written in nothing:
        with pytest.raises(ValueError, match="got"):
            read_tokenizer(written)


def test_merges_that_tiktoken_would_make_in_another_order_are_refused(gpt2_vocabulary: Path) -> None:
    written = tokenizer_json(load_tokenizer("gpt2"))
    written["model"]["merges"].reverse()
    with pytest.raises(ValueError, match="do not follow"):
        read_tokenizer(written)
