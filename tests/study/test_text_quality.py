"""Human text scores as human, and glued, shuffled or repeated text as bad."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.config import Settings
from dist_train.data.manifest import TokenData, open_tokens
from dist_train.data.prepare import prepare
from dist_train.data.tokenizer import END_OF_TEXT, decode, load_tokenizer
from dist_train.errors import UserError
from dist_train.sections import DataSettings
from dist_train.study.ngrams import CharacterModel
from dist_train.study.statistics import Estimate
from dist_train.study.text_measures import MEASURES, KnownWords, collapsed, measure_texts
from dist_train.study.text_quality import SAMPLE_TOKENS, Reference, shared_reference, text_suite
from dist_train.study.trained import open_trained
from dist_train.training.trainer import train
from tests.conftest import SHARED

Measured = dict[str, Estimate | None]


@pytest.fixture(scope="module")
def docs(data_dir: Path) -> tuple[DataSettings, TokenData, Reference]:
    return _opened(DataSettings(source="python-docs", tokenizer="bytes", dir=data_dir))


@pytest.fixture(scope="module")
def fineweb(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSettings, TokenData, Reference]:
    """300 documents of the web in GPT-2's tokens, or a skip."""
    path = SHARED / "fineweb" / "sample" / "10BT" / "000_00000.parquet"
    if not path.exists():
        pytest.skip("needs the folder ../shared/data")
    folder = tmp_path_factory.mktemp("fineweb")
    shutil.copytree(SHARED / "tiktoken-cache", folder / "cache")  # tiktoken may delete what is in it
    settings = DataSettings(
        source="files", path=str(path), max_documents=300, tokenizer="gpt2", dir=folder / "data", workers=1
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "cache"))
        prepare(settings)
        return _opened(settings)


def _opened(settings: DataSettings) -> tuple[DataSettings, TokenData, Reference]:
    data = open_tokens(settings)
    return settings, data, shared_reference(settings, 32, data.fingerprint)


@pytest.fixture(params=["docs", "fineweb"])
def corpus(request: pytest.FixtureRequest) -> tuple[DataSettings, TokenData, Reference]:
    return request.getfixturevalue(request.param)


def _text(settings: DataSettings, tokens: list[int]) -> str:
    return decode(load_tokenizer(settings.tokenizer), tokens).replace(END_OF_TEXT, "\n\n")


def _measure(texts: list[str], reference: Reference) -> Measured:
    return measure_texts(texts, reference.known, reference.model)


def _of(measured: Measured, name: str) -> Estimate:
    estimate = measured[name]
    assert estimate is not None
    return estimate


def _require_beyond(bad: Measured, human: Measured, directions: dict[str, int]) -> None:
    """A measure that notices puts bad text beyond the interval of human text, on the side it should."""
    for name, direction in directions.items():
        value, good = _of(bad, name)["value"], _of(human, name)
        assert value > good["high"] if direction > 0 else value < good["low"], name


def test_other_human_text_scores_as_human(corpus: tuple[DataSettings, TokenData, Reference]) -> None:
    settings, data, reference = corpus
    half, n_texts = len(data.val) // 2, len(reference.humans)
    # Between what the control is made of: as near to what the n-gram model has counted, and none of it the same.
    spacing = (len(data.val) - half - SAMPLE_TOKENS) // (n_texts - 1)
    starts = half + 32 + spacing * np.arange(n_texts - 1) + SAMPLE_TOKENS
    texts = [_text(settings, window) for window in data.val.windows(starts, SAMPLE_TOKENS).tolist()]
    assert not set(texts) & set(reference.humans)
    others = _measure(texts, reference)
    for name in MEASURES:
        other, human = _of(others, name), _of(reference.measures, name)
        slack = (human["high"] - human["low"]) / 2  # of many intervals some miss each other
        assert other["low"] <= human["high"] + slack, name
        assert other["high"] >= human["low"] - slack, name


def test_text_without_spaces_scores_as_bad(corpus: tuple[DataSettings, TokenData, Reference]) -> None:
    *_, reference = corpus
    stripped = _measure(["".join(text.split()) for text in reference.humans], reference)
    worse = {"spaces_per_character": -1, "word_length": 1, "unknown_words": 1, "bits_per_character": 1}
    _require_beyond(stripped, reference.measures, worse)
    assert _of(stripped, "unknown_words")["low"] > 5 * _of(reference.measures, "unknown_words")["high"]


def test_text_with_neighbouring_words_glued_scores_as_glued(
    corpus: tuple[DataSettings, TokenData, Reference],
) -> None:
    *_, reference = corpus
    glued = _measure([re.sub(r"(\w{3,}) (\w{3,}) ", r"\1\2 ", collapsed(text)) for text in reference.humans], reference)
    _require_beyond(glued, reference.measures, {"glued_words": 1, "unknown_words": 1, "word_length": 1})
    assert _of(reference.measures, "glued_words")["value"] < 0.02


def test_more_blanks_make_no_text_look_better(corpus: tuple[DataSettings, TokenData, Reference]) -> None:
    *_, reference = corpus
    spread = _measure([text.replace(" ", "   \n  ") for text in reference.humans], reference)
    for name in MEASURES:
        assert _of(spread, name)["value"] == pytest.approx(_of(reference.measures, name)["value"], rel=1e-9), name


def test_text_with_its_words_shuffled_scores_as_bad_only_where_order_counts(
    corpus: tuple[DataSettings, TokenData, Reference],
) -> None:
    *_, reference = corpus
    rng = random.Random(0)
    pieces = [text.split() for text in reference.humans]
    ordered = _measure([" ".join(words) for words in pieces], reference)
    shuffled = _measure([" ".join(rng.sample(words, len(words))) for words in pieces], reference)
    _require_beyond(shuffled, reference.measures, {"bits_per_character": 1})
    for name in ("spaces_per_character", "word_length"):
        assert _of(shuffled, name)["value"] == pytest.approx(_of(ordered, name)["value"])


def test_text_that_repeats_itself_scores_as_bad(corpus: tuple[DataSettings, TokenData, Reference]) -> None:
    *_, reference = corpus
    repeated = _measure([(text[:40] * len(text))[: len(text)] for text in reference.humans], reference)
    _require_beyond(
        repeated, reference.measures, {"repetition": 1, "distinct_1": -1, "distinct_2": -1, "distinct_3": -1}
    )


def test_the_n_gram_model_has_not_counted_the_human_text(docs: tuple[DataSettings, TokenData, Reference]) -> None:
    settings, data, reference = docs
    half = len(data.val) // 2
    counted = _text(settings, data.val.windows(np.array([0]), half)[0].tolist())
    assert not [text for text in reference.humans if text in counted]
    assert CharacterModel(collapsed(counted)).bits(reference.humans[0]) == reference.model.bits(reference.humans[0])


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_is_measured_beside_human_text_and_again_the_same(tiny: Callable[..., Settings], tmp_path: Path) -> None:
    train(tiny({"train.max_iters": 2}))
    trained = open_trained(tmp_path / "run", "cpu")
    torch.manual_seed(0)
    result = json.loads(json.dumps(text_suite(trained)))
    built = shared_reference.cache_info().misses
    torch.manual_seed(1)
    assert text_suite(open_trained(tmp_path / "run", "cpu")) == result
    assert shared_reference.cache_info().misses == built  # what runs share is made once for all of them
    assert not trained.network.training
    assert result["model"].keys() == result["human"].keys() == MEASURES.keys()
    assert result["n_samples"] == 48
    # Two updates leave bytes at random: nothing like text.
    _require_beyond(
        result["model"], result["human"], {"unknown_words": 1, "bits_per_character": 1, "spaces_per_character": -1}
    )
    assert len(result["samples"]) == 6
    for sample in result["samples"]:
        assert sample.keys() == {"prompt", "text", "human"}
        assert sample["text"] != sample["human"]


def test_held_out_text_that_is_too_short_or_a_source_is_a_mistake(
    tiny: Callable[..., Settings], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("A few words, and no more. " * 200)
    data = {"data.source": "files", "data.path": tmp_path / "short.txt", "data.dir": tmp_path / "short"}
    train(tiny({**data, "train.max_iters": 1}))
    trained = open_trained(tmp_path / "run", "cpu")
    with pytest.raises(UserError, match=r"data\.dir: .*short holds out 5\d\d tokens, .* needs 672; .*val_fraction"):
        text_suite(trained)
    with pytest.raises(
        UserError, match=r"text reads the run's own held-out text, not lambada\.jsonl; give the name alone"
    ):
        text_suite(trained, "lambada.jsonl")


# ---- the measures, on texts that can be counted by hand --------------------------------------------------------------

MODEL = CharacterModel("It is a model. It is a text.")


def test_words_at_a_cut_are_known_if_some_word_ends_or_begins_so() -> None:
    known = KnownWords("The quick brown fox doesn't jump.")
    assert known.count_unknown("The quick, brown FOX doesn't jump") == 0
    assert known.count_unknown("ick brown fox do") == 0  # of qu-ick and do-esn't
    assert known.count_unknown(" ick brown fox doe ") == 2  # whole words, which the corpus lacks
    assert known.count_unknown(" ox do ") == 0  # of two letters nearly all are words somewhere
    assert known.count_unknown("ickbrown foxjump thequ") == 3
    assert known.count_unknown("quickbrownfox") == 1  # nothing but one word, cut at both ends
    assert known.count_glued("the quickbrown foxes foxjumpthe ofox") == 2


def test_repetition_is_counted_within_a_text_and_never_across() -> None:
    known = KnownWords("")
    once = "a b c d e f g h"  # five 4-grams
    assert measure_texts([once, once], known, MODEL)["repetition"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    twice = measure_texts([f"{once} {once}"] * 2, known, MODEL)["repetition"]
    assert twice is not None
    assert twice["value"] == 5 / 13


def test_distinct_words_are_counted_among_equally_many() -> None:
    texts = ["one two three four five"] * 20
    short, long = (measure_texts(texts * times, KnownWords(""), MODEL)["distinct_1"] for times in (1, 7))
    assert short is not None
    assert long is not None
    assert short["value"] == long["value"] == 5 / 100


def test_the_zipf_slope_of_words_that_follow_the_law_is_minus_one() -> None:
    text = " ".join(f"w{rank}" for rank in range(1, 60) for _ in range(2000 // rank))
    zipf, flat = (
        measure_texts([each], KnownWords(""), MODEL)["zipf_slope"] for each in (text, " ".join(set(text.split())))
    )
    assert zipf is not None
    assert flat is not None
    assert zipf["value"] == pytest.approx(-1, abs=2e-2)
    assert flat["value"] == pytest.approx(0, abs=1e-12)


def test_what_too_few_words_cannot_say_is_none() -> None:
    measured = measure_texts(["+++", "---"], KnownWords("word"), MODEL)
    said = {name for name, estimate in measured.items() if estimate is not None}
    assert said == {"spaces_per_character", "bits_per_character"}


def test_the_character_model_is_a_distribution_and_gives_something_to_unseen_characters() -> None:
    text = "abcabdabcabe"
    model, unseen = CharacterModel(text), "\ufffd"
    for before in ("", "a", "abcab", "xyz", "x" * 9):
        bits = [model.bits(before + character) - model.bits(before) for character in {*text, unseen}]
        assert sum(2.0**-each for each in bits) == pytest.approx(1)
    assert model.bits("abcabc") < model.bits("acbacb") < model.bits("xyzxyz") < float("inf")
