"""What stands in a file of settings is data: nothing in it runs, grows or waits, and whatever is wrong is one line."""

import json
import os
from pathlib import Path

import pytest

from dist_train.config_file import load_settings
from dist_train.errors import UserError
from tests.test_config import load, mistake

# Each line is three times the one before it.
BOMB = "a: &a [1, 1, 1]\n" + "".join(f"b{n}: &b{n} [*b{n - 1}, *b{n - 1}, *b{n - 1}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "anchors and aliases (& and *) are not read"),
        ("train: *somewhere", "anchors and aliases"),
        ("train: {<<: {max_iters: 5}}", "train.<<: unknown key"),
        ("run: {out_dir: !!python/object/apply:os.system [ls]}", "tags (!) are not read"),
        ("data: {dir: !!binary aGVsbG8=}", "tags (!)"),
        ("train: !!set {max_iters}", "tags (!)"),
        ("train: " + "[" * 20_000, "nested too deeply"),
        ("train: " + "{a: " * 500, "nested too deeply"),
        ("train: {max_iters: 5}\n---\nrun: {seed: 1}", "single document"),
        ("train: {max_iters: 1__0}", "train.max_iters: Input should be a valid integer (got '1__0')"),
        (f"train: {{max_iters: {'9' * 5000}}}", "train.max_iters: Input should be a valid integer"),
        ("run: {seed: 18446744073709551616}", "run.seed"),
        (f"model: {{n_layer: {10**30}}}", "model.n_layer: Input should be less than or equal to 10000"),
        ("train: {global_batch_size: 99999999999}", "train.global_batch_size"),
        ("checkpoint: {keep: 1}", "checkpoint.keep: Input should be greater than or equal to 2 (got 1)"),
        ("runtime: {timeout_seconds: 1e300}", "runtime.timeout_seconds"),
        (f"run: {{out_dir: {'x' * 256}}}", "run.out_dir: a name in a path has at most 255 bytes"),
        (f"data: {{source: files, path: books/{'é' * 128}.txt}}", "data.path: a name in a path has at most 255 bytes"),
        ('run: {out_dir: "a\\0b"}', r"line 1: 'a\x00b' holds a NUL"),
        (r'sample: {prompt: "\ud800"}', "is not valid UTF-8"),
        (r'"\ud800": {}', "is not valid UTF-8"),
        ('optim: {name: "a\\nb\\e[2J"}', r"optim.name: Input should be 'adamw' or 'muon' (got 'a\nb\x1b[2J')"),
        ('"a\\nb": 1', r"a\nb: unknown key"),
        (f"optim: {{name: {'x' * 9999}}}", "…)"),
        ("evall: {interval: 5}", "evall: unknown key; did you mean eval?"),
        ("train: {max_iters: {max_iters: 5}}", "train.max_iters"),
        ("\0", "not valid YAML"),
    ],
    ids=range(27),
)
def test_what_others_misuse_is_named_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in mistake(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (f"--train.max_iters={'9' * 5000}", "train.max_iters: Input should be a valid integer"),
        ("--train.max_iters=1__0", "train.max_iters: Input should be a valid integer (got '1__0')"),
        ("--train.max_iters=!!python/name:os.system", "train.max_iters"),
        ("--train.max_iters={a: 1, a: 2}", "train.max_iters: line 1: 'a' is given twice"),
        ("--train.max_iters=5\n6", "train.max_iters"),
        ("--trian.max_iters=5", "trian: unknown key; did you mean train?"),
        ("--train.max_iter=5", "train.max_iter: unknown key; did you mean max_iters?"),
        ("--sample.prompt=a\0b", r"sample.prompt: 'a\x00b' holds a NUL"),
        ("--run.out_dir=\udcff", r"run.out_dir: '\udcff' is not valid UTF-8"),
        ("--optim={name: adamw}", "write --section.key=value"),
        ("\n", r"cannot read '\n'"),
    ],
)
def test_odd_overrides_are_named_in_one_line(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in mistake(tmp_path, "", override)


def test_all_that_is_given_twice_comes_at_once_and_with_the_rest(tmp_path: Path) -> None:
    text = "train: {max_iters: 5, max_iters: 6}\nmodel: {n_layer: 1, n_layer: 2, n_head: x}\ntrain: {}\n7: {}"
    answer = mistake(tmp_path, text, "--eval.intervall=1")
    for part in (
        "line 1: 'max_iters' is given twice",
        "line 2: 'n_layer' is given twice",
        "line 3: 'train' is given twice",
        "line 4: key '7' is not text",
        "model.n_head: Input should be a valid integer (got 'x')",
        "eval.intervall: unknown key; did you mean interval?",
    ):
        assert part in answer


def test_a_text_with_any_characters_reads_back_as_it_was(tmp_path: Path) -> None:
    prompt = "a\nb\t\x1b[2J é 𐀀 \u2028 \"'\\ "
    settings = load(tmp_path, json.dumps({"sample": {"prompt": prompt}}))
    assert settings.sample.prompt == prompt
    assert load(tmp_path, settings.to_yaml()) == settings


def test_a_config_that_is_no_file_of_settings_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_text("# " + "x" * 200_000)
    (tmp_path / "latin.yaml").write_bytes("run: {out_dir: é}".encode("latin-1"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, expected in {
        tmp_path / "pipe": "not a regular file",
        tmp_path: "Is a directory",
        Path("/dev/zero"): "not a regular file",
        tmp_path / "large.yaml": "larger than 131,072 bytes",
        tmp_path / "latin.yaml": "give a text file in UTF-8",
        tmp_path / "loop": "oo many",
        Path("a\0b"): "null byte",
        Path("x" * 5000): "File name too long",
    }.items():
        with pytest.raises(UserError, match=expected) as caught:
            load_settings(path)
        assert str(caught.value).isprintable()
