"""Whatever stands in a settings file or on the command line: it is taken, or refused in one line."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dist_train.__main__ import main
from dist_train.config_help import describe_settings
from tests.faults.conftest import cases

ROW = "fuzzed settings: loaded, or status 2 in one line"
KEYS = [key for key, _, _ in describe_settings()]

# With half characters, as YAML's escapes and a file name on the command line may bring them.
ANY_TEXT = st.text(st.characters(), max_size=30)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**30, -(10**400), 2**63, 5e-324, 1e308, -0.0])
# No source that needs the network, no pattern that walks the whole disk: this is about what settings say.
WORDS = ["all", "python-docs", "python-web", "files", "shards", "null", "no", "1e5", "0x10", "1__0", "\0", "a\nb"]
SCALARS = st.none() | st.booleans() | NUMBERS | ANY_TEXT.filter(lambda text: "/" not in text) | st.sampled_from(WORDS)
VALUES = st.recursive(SCALARS, lambda one: st.lists(one) | st.dictionaries(ANY_TEXT, one, max_size=3), max_leaves=5)

FRAGMENTS = [
    *"[]{},?|>'#%@`~é*!\"\t\0\x85\ufeff\ud800 ",
    *("train:", "model: {", "seed:", ": ", "\n", "\n  ", "\n- ", "---\n", "...\n", "&a ", "*a", "<<: ", "10", "1__0"),
    *(
        "3e-4",
        ".inf",
        ".nan",
        "!!python/object/apply:os.system ",
        "!!binary ",
        "!!set ",
        "!!int ",
        r'"\uD800"',
        r'"\0"',
    ),
    *("9" * 5000, "[" * 2000, "{a: " * 500, "seed: 1\n" * 50, "a" * 5000),
]
YAML_TEXT = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
SECTIONS = st.dictionaries(st.sampled_from(KEYS) | ANY_TEXT, VALUES, max_size=5)


def nest(by_key: dict[str, Any]) -> str:
    """Write `section.key` and values as the JSON that is YAML, too."""
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in by_key.items():
        section, _, key = dotted.partition(".")
        nested.setdefault(section, {})[key] = value
    return json.dumps(nested)


FILES = (
    (YAML_TEXT | ANY_TEXT | SECTIONS.map(nest)).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.binary(max_size=60)
    | st.just(b"train: {max_iters: 10}")
)
OVERRIDES = st.lists(
    st.builds("--{}={}".format, st.sampled_from(KEYS), ANY_TEXT.filter(lambda text: "/" not in text) | YAML_TEXT)
    | ANY_TEXT.filter(lambda text: text not in ("-h", "--help", "--dry-run")),
    max_size=2,
)

Command = Callable[[bytes, list[str]], tuple[int, str]]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command that reads all settings and writes nothing; return its status and what it says went wrong."""
    config = tmp_path / "config.yaml"

    def run(content: bytes, overrides: list[str]) -> tuple[int, str]:
        config.write_bytes(content)
        # Last, so that they count: no source that takes long, no tokenizer that is fetched.
        fixed = ["--data.tokenizer=bytes", f"--data.dir={tmp_path / 'data'}"]
        began = time.perf_counter()
        status = main(["prepare", str(config), "--dry-run", *overrides, *fixed])
        assert time.perf_counter() - began < 5
        return status, capsys.readouterr().err

    return run


def test_any_settings_are_taken_or_refused_in_one_line(command: Command, figure: Callable[..., None]) -> None:
    number = cases(60, 1000)
    figure(ROW, cases=number)

    @examples(max_examples=number)
    @given(FILES, OVERRIDES)
    def holds(content: bytes, overrides: list[str]) -> None:
        status, said = command(content, overrides)
        if status == 0:
            assert said == ""
        else:
            assert status == 2
            assert said.startswith("error: ")
            assert said.endswith("\n")
            assert said[:-1].isprintable(), "one line, and nothing that moves the cursor"

    holds()


COUNT = st.integers(1, 1000)
VALID = st.fixed_dictionaries(
    {},
    optional={
        "run.seed": st.integers(0, 2**64 - 1),
        "run.out_dir": st.text("aé _-.", min_size=1, max_size=20),
        "data.max_documents": st.none() | COUNT,
        "data.val_fraction": st.floats(0.01, 0.99),
        "model.n_layer": COUNT,
        "model.dropout": st.floats(0, 0.99),
        "model.bias": st.booleans(),
        "model.logit_scale": st.floats(1e-9, 1e9) | st.just("rsqrt_n_embd"),
        "loss.last_k": st.integers(1, 256) | st.just("all"),
        "optim.learning_rate": st.floats(1e-12, 1e3),
        "optim.lr_schedule": st.sampled_from(["constant", "cosine", "wsd"]),
        "optim.grad_clip": st.none() | st.floats(1e-9, 1e9),
        "train.max_iters": COUNT,
        "sample.prompt": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
        "checkpoint.keep": st.integers(2, 99),
        "runtime.timeout_seconds": st.floats(1, 1e6),
    },
)


def test_valid_settings_are_taken(command: Command) -> None:
    @examples(max_examples=cases(20, 200))
    @given(VALID)
    def holds(by_key: dict[str, object]) -> None:
        assert command(nest(by_key).encode(), []) == (0, "")
        # `null` and quotes mean something else on the command line.
        by_key.pop("sample.prompt", None)
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in by_key.items()}
        assert command(b"", [f"--{key}={text}" for key, text in texts.items()]) == (0, "")

    holds()
