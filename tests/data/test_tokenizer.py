"""Text to token ids and back."""

import base64
import json
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from dist_train.data.tokenizer import (
    _LONG_SPACE,
    END_OF_TEXT,
    GPT2_PATTERN,
    decode,
    encode_document,
    end_of_text,
    fingerprint,
    last_cut,
    load_tokenizer,
)
from dist_train.errors import UserError

BYTES = load_tokenizer("bytes")


def write_tiktoken(path: Path, encoding: tiktoken.Encoding) -> Path:
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks))
    return path


# ---- bytes -----------------------------------------------------------------------------------------------------------


@given(st.text())
def test_bytes_are_a_texts_utf8_and_come_back(text: str) -> None:
    document = encode_document(BYTES, text)
    assert document.dtype == np.uint32
    assert document.tolist() == [256, *text.encode()]
    assert decode(BYTES, document[1:].tolist()) == text


def test_bytes_have_256_ids_and_end_of_text() -> None:
    assert BYTES.n_vocab == 257
    assert end_of_text(BYTES) == 256
    assert decode(BYTES, [104, 105, 256]) == "hi" + END_OF_TEXT


# ---- gpt2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_the_time_machine_has_as_many_gpt2_tokens_as_is_known(time_machine: str) -> None:
    gpt2 = load_tokenizer("gpt2")
    document = encode_document(gpt2, time_machine)
    assert len(document) == 1 + 49_774
    assert document[0] == end_of_text(gpt2) == 50256
    assert gpt2.n_vocab == 50257
    assert decode(gpt2, document[1:].tolist()) == time_machine


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_a_tiktoken_file_of_gpt2s_ranks_is_gpt2(tmp_path: Path, time_machine: str) -> None:
    gpt2 = load_tokenizer("gpt2")
    from_file = load_tokenizer(str(write_tiktoken(tmp_path / "mine.tiktoken", gpt2)))
    assert from_file.n_vocab == 50257
    assert fingerprint(from_file) == fingerprint(gpt2)
    assert np.array_equal(encode_document(from_file, time_machine), encode_document(gpt2, time_machine))

    @given(st.text())
    def agree(text: str) -> None:
        assert encode_document(from_file, text).tolist() == encode_document(gpt2, text).tolist()

    agree()


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_tokenizers_are_told_apart_by_fingerprint(tmp_path: Path) -> None:
    bytes_as_file = load_tokenizer(str(write_tiktoken(tmp_path / "bytes.tiktoken", BYTES)))
    assert len({fingerprint(BYTES), fingerprint(load_tokenizer("gpt2"))}) == 2
    assert fingerprint(bytes_as_file) == fingerprint(BYTES)


# ---- texts that are not as usual -------------------------------------------------------------------------------------


def test_end_of_text_spelled_in_a_document_is_plain_text() -> None:
    document = encode_document(BYTES, f"a{END_OF_TEXT}b")
    assert document.tolist().count(256) == 1
    assert decode(BYTES, document[1:].tolist()) == f"a{END_OF_TEXT}b"


def test_an_empty_document_is_end_of_text_alone() -> None:
    assert encode_document(BYTES, "").tolist() == [256]


def test_halves_of_surrogate_pairs_are_paired_or_replaced() -> None:
    paired = encode_document(BYTES, "a\ud83d\ude42b")
    assert decode(BYTES, paired[1:].tolist()) == "a🙂b"
    assert decode(BYTES, encode_document(BYTES, "a\ud83db")[1:].tolist()) == "a�b"


def test_ids_that_the_vocabulary_leaves_free_are_skipped() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    with_gap = tiktoken.Encoding("gap", pat_str=".", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 300})
    assert decode(with_gap, [104, 256, 299, 105, 301, 10**6]) == "hi"
    assert decode(with_gap, [104, 0xC3, 105]) == "h�i"


# ---- names that lead nowhere -----------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'gtp2'.*bytes.*gpt2.*cl100k_base.*\.tiktoken"):
        load_tokenizer("gtp2")


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_vocabulary_that_cannot_be_fetched_is_one_line_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy"):  # so that nothing is reached, whatever network there is
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    if is_damaged:  # named as tiktoken names the file of cl100k_base, which no other test may have loaded
        (tmp_path / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").write_bytes(b"no vocabulary")
    started = time.perf_counter()
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR") as caught:
        load_tokenizer("cl100k_base")
    assert time.perf_counter() - started < 5
    assert "\n" not in str(caught.value)


def damage(lines: list[bytes], kind: str) -> list[bytes]:
    changed = {
        "a byte is missing": lines[:-1],
        "a rank is missing": [*lines[:-1], lines[-1].replace(b"255", b"256")],
        "no base64": [b"!!!! 0", *lines[1:]],
        "no rank": [lines[0].split()[0], *lines[1:]],
        "rank is no number": [lines[0].split()[0] + b" one", *lines[1:]],
        "a token is there twice": [*lines, lines[0].replace(b" 0", b" 256")],
        "empty": [],
    }
    return changed[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "a byte is missing",
        "a rank is missing",
        "no base64",
        "no rank",
        "rank is no number",
        "a token is there twice",
        "empty",
    ],
)
def test_a_damaged_tiktoken_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = write_tiktoken(tmp_path / "mine.tiktoken", BYTES)
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines(), kind)))
    with pytest.raises(UserError, match=r"mine\.tiktoken"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("name", ["missing.tiktoken", "folder.tiktoken"])
def test_a_tiktoken_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.tiktoken").mkdir()
    with pytest.raises(UserError, match=name):
        load_tokenizer(str(tmp_path / name))


# ---- cutting text ----------------------------------------------------------------------------------------------------

# Whitespace, signs, letters, digits and contractions in every order: what splitting patterns look at.
_SNIPPETS = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "a", "It's", " 'll", "12345", ".", "...", "/", "是", "é", "🙂"]
# Merges of all pairs show where each piece began, and one of three what o200k_base makes of a sign and a slash.
_BYTES = sorted(set("".join(_SNIPPETS).encode()))
_PAIRS = [bytes([byte]) for byte in range(256)] + [bytes([first, second]) for first in _BYTES for second in _BYTES]
_PAIRS.append(b".\n/")


@pytest.fixture(scope="module")
def patterns() -> dict[str, tiktoken.Encoding]:
    """Small vocabularies with the splitting patterns of tiktoken's large ones, which are there without a download."""
    encodings = {}
    with pytest.MonkeyPatch.context() as patch:
        for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(openai_public, loader, lambda *_, **__: {})
        for name in ("gpt2", "p50k_base", "cl100k_base", "o200k_base"):
            pattern = openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]
            ranks = {token: rank for rank, token in enumerate(_PAIRS)}
            encodings[name] = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return encodings


@pytest.mark.usefixtures("gpt2_vocabulary")
@pytest.mark.parametrize("ending", [" ", "\n"])
def test_a_million_spaces_are_cut_as_fewer_are(ending: str) -> None:
    gpt2 = load_tokenizer("gpt2")
    many = f"x{' ' * 10**6}{ending}y {' ' * 10**6}"
    with pytest.raises(ValueError, match="stack size exceeded"):
        gpt2.encode_to_numpy(many)
    few = f"x{' ' * 20_000}{ending}y {' ' * 20_000}"  # which the engine manages by itself
    run_as_one = encode_document(gpt2, few)[1:]
    assert np.array_equal(run_as_one, gpt2.encode_to_numpy(few))
    parts = [part for part in _LONG_SPACE.split(few) if part]
    assert np.array_equal(np.concatenate([gpt2.encode_to_numpy(part) for part in parts]), run_as_one)
    assert decode(gpt2, encode_document(gpt2, many)[1:].tolist()) == many


@pytest.fixture(scope="module")
def ours() -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(_PAIRS)}
    return tiktoken.Encoding("ours", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("name", ["gpt2", "p50k_base"])
@given(snippets=st.lists(st.one_of(st.sampled_from(_SNIPPETS), st.characters(exclude_categories=["Cs"])), max_size=40))
def test_the_faster_pattern_cuts_as_tiktokens(
    patterns: dict[str, tiktoken.Encoding], ours: tiktoken.Encoding, name: str, snippets: list[str]
) -> None:
    text = "".join(snippets)
    assert ours.encode_ordinary(text) == patterns[name].encode_ordinary(text)


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_real_text_has_the_tokens_that_tiktoken_gives_it(shared_data: Path) -> None:
    gpt2, stock = load_tokenizer("gpt2"), tiktoken.get_encoding("gpt2")
    assert gpt2._pat_str != stock._pat_str
    for line in (shared_data / "fineweb" / "fineweb_full_schema_20.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        assert encode_document(gpt2, text)[1:].tolist() == stock.encode_ordinary(text)


@pytest.mark.parametrize("name", ["gpt2", "p50k_base", "cl100k_base", "o200k_base"])
@given(snippets=st.lists(st.sampled_from(_SNIPPETS), min_size=1, max_size=40), end=st.integers(1, 120))
@example(["a", ".", "\n", "/", "a"], 5)
def test_where_a_text_is_cut_no_token_changes(
    patterns: dict[str, tiktoken.Encoding], name: str, snippets: list[str], end: int
) -> None:
    text = "".join(snippets)
    cut = last_cut(text[:end])
    left, right = (patterns[name].encode_ordinary(part) for part in (text[:cut], text[cut:]))
    has_place = cut < len(text[:end])
    assert left + right == patterns[name].encode_ordinary(text) or not has_place


def test_a_text_is_cut_near_its_end() -> None:
    assert last_cut("one two three") == 7
    assert last_cut("one two\nthree") == 8
    assert last_cut("one two  three") == 3  # the first of two spaces is a token of its own, but one of many is not
    assert last_cut("unbroken") == 8
    assert last_cut("first second" + "x" * 20_000) == 5
