"""What a run has learned can be asked for its text: the same for a seed wherever its weights lie, and as it comes."""

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
import transformers

from dist_train.__main__ import main
from dist_train.config import Settings
from dist_train.data.tokenizer import decode
from dist_train.model.generation import Sampling
from dist_train.study.author import open_author
from dist_train.study.export import export
from dist_train.training.trainer import train
from tests.conftest import ROOT

# Ctrl-C reaches the command also where who runs the tests has bequeathed that it is ignored.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from dist_train.__main__ import main
raise SystemExit(main())
"""

Generate = Callable[..., str]


@pytest.fixture
def run(tiny: Callable[..., Settings]) -> Path:
    """A run that has learned next to nothing: it writes any byte, most of which are not UTF-8 by themselves."""
    return train(tiny({"train.max_iters": 1, "sample.prompt": "Its own é", "sample.temperature": 0.9})).root


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Generate:
    """Run the command in this process and return what it prints."""

    def generate(path: Path, *arguments: str) -> str:
        capsys.readouterr()
        assert main(["generate", str(path), "--device=cpu", *arguments]) == 0
        return capsys.readouterr().out

    return generate


def start(*arguments: str, stdin: int, stdout: int) -> "subprocess.Popen[bytes]":
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    command = [sys.executable, "-c", PROGRAM, "generate", *arguments]
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=variables)


def test_run_checkpoint_and_exported_folder_write_the_same(run: Path, tmp_path: Path, generate: Generate) -> None:
    export(run, tmp_path / "out")
    asked = ["--prompt=The é", "--temperature=1.2", "--top-k=200", "--top-p=0.99", "--max-new-tokens=40", "--seed=5"]
    written = generate(run, *asked)
    assert written.startswith("The é")
    assert written.endswith("\n")
    assert len(written) > 20
    assert generate(run / "checkpoints/step-000001", *asked) == written
    assert generate(tmp_path / "out", *asked) == written
    assert generate(run, *asked[:-1]) != written


def test_a_folder_that_hugging_faces_libraries_wrote_is_continued_as_they_do(
    run: Path, tmp_path: Path, generate: Generate
) -> None:
    export(run, tmp_path / "out")
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        for parameter in model.parameters():  # so that no two tokens are as likely
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs/tokenizer.json").read_text() != (tmp_path / "out/tokenizer.json").read_text()
    tokens = model.generate(**tokenizer("The é", return_tensors="pt"), max_new_tokens=9, do_sample=False)[0]
    written = generate(tmp_path / "theirs", "--prompt=The é", "--max-new-tokens=9", "--temperature=0")
    assert written == bytes(tokens.tolist()).decode(errors="replace") + "\n"


def test_what_is_not_asked_for_is_as_the_run_samples(run: Path, generate: Generate) -> None:
    own = ["--prompt=Its own é", "--temperature=0.9", "--max-new-tokens=8"]
    assert generate(run) == generate(run, *own)
    assert generate(run, "--temperature=0", "--seed=1") == generate(run, "--temperature=0", "--seed=2")


def test_a_sample_does_not_depend_on_what_else_is_asked_for(run: Path, generate: Generate) -> None:
    asked = ["--max-new-tokens=20", "--top-k=100"]
    together = generate(run, *asked, "--prompt=one", "--prompt=two", "--num-samples=2")
    ones, twos = (generate(run, *asked, f"--prompt={prompt}", "--num-samples=2") for prompt in ("one", "two"))
    assert together == ones + "\n" + twos
    first = generate(run, *asked, "--prompt=one")
    assert ones.startswith(first + "\n")
    assert ones != first + "\n" + first
    assert ones.replace("one", "two") != twos


def test_pieces_are_whole_characters_and_join_to_the_text(run: Path) -> None:
    author = open_author(run, "cpu")
    text = "aé是🙂"
    pieces = list(author.spell(author.read(text)))
    assert pieces == ["a", "", "é", "", "", "是", "", "", "", "🙂", ""]
    tokens = list(author.write([256], 300, Sampling(1.0, never=(256,)), seed=1))
    assert "".join(author.spell(tokens)) == decode(author.encoding, tokens)
    assert "".join(author.spell([*"é".encode()[:1], 256])) == "�"


def test_end_of_text_ends_a_sample_and_ids_without_text_are_never_drawn(run: Path) -> None:
    author = open_author(run, "cpu")
    only_end = Sampling(1.0, never=tuple(range(256)))
    assert list(author.write([1, 2], 9, only_end, seed=0)) == [256]
    assert author.never() == ()
    assert author.read("<|endoftext|>") == list(b"<|endoftext|>")
    ranks, special = author.encoding._mergeable_ranks, {"<|endoftext|>": 256, "<|another|>": 258}
    gaps = tiktoken.Encoding("gaps", pat_str=author.encoding._pat_str, mergeable_ranks=ranks, special_tokens=special)
    author.network.n_vocab = 260
    assert replace(author, encoding=gaps).never() == (257, 258, 259)


def test_lines_go_on_with_one_text(run: Path, generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(lines: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), "utf-8"))
        return generate(run, *arguments, "--temperature=0")

    whole = given("", "--prompt=é", "--max-new-tokens=12").removesuffix("\n")
    # Greedily, a text that is written in three parts is that text.
    parts = given("\n\n", "--interactive", "--prompt=é", "--max-new-tokens=4").splitlines()
    assert len(parts) == 3
    assert "é" + "".join(parts) == whole
    assert given("é\nx", "--interactive", "--max-new-tokens=4").splitlines()[0] == parts[0]
    added = given("é\nx", "--interactive", "--max-new-tokens=4").splitlines()[1]
    assert given("", f"--prompt=é{parts[0]}x", "--max-new-tokens=4") == f"é{parts[0]}x{added}\n"
    assert given("é", "--prompt=-", "--max-new-tokens=12") == whole + "\n"


def test_a_terminal_is_talked_to_and_ctrl_c_stops_a_sample(run: Path) -> None:
    master, slave = pty.openpty()
    started = start(str(run), "--device=cpu", "--interactive", "--max-new-tokens=1000000", stdin=slave, stdout=slave)
    shown = _shown(master)

    def wait_for(text: str, times: int = 1) -> str:
        whole = ""
        while whole.count(text) < times:
            whole += next(shown)
        return whole

    wait_for("> ")
    os.write(master, "Once é\n".encode())
    written = wait_for("\n")
    written += "".join(next(shown) for _ in range(5))
    started.send_signal(2)
    written += wait_for("\n> ")
    assert not [c for c in written if c not in "\r\n\t" and not c.isprintable()]
    os.write(master, b"\x04")
    assert started.wait(timeout=30) == 0
    assert started.stderr
    assert b"does not answer" in started.stderr.read()
    os.close(slave)
    os.close(master)


def _shown(terminal: int) -> Iterator[str]:
    """Yield what comes to a terminal, for half a minute."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            yield os.read(terminal, 4096).decode(errors="replace").replace("�", "")
    raise AssertionError("nothing more came")


def test_a_pipe_is_a_prompt_and_one_that_closes_is_quiet(run: Path) -> None:
    asked = [str(run), "--device=cpu", "--max-new-tokens=1000000"]
    started = start(*asked, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert started.stdin
    assert started.stdout
    assert started.stderr
    started.stdin.write("From é\n".encode())
    started.stdin.close()
    assert started.stdout.read(7) == "From é".encode()
    started.stdout.close()
    assert started.wait(timeout=30) == 0
    assert started.stderr.read() == b""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "there is nothing to start from at nowhere; use gpt2"),
        (["DAMAGED"], "is damaged"),
        (["RUN", "--temperature=-1"], "temperature=-1.0"),
        (["RUN", "--temperature=hot"], "invalid float value: 'hot'"),
        (["RUN", "--top-k=0"], "top_k=0"),
        (["RUN", "--top-p=2"], "top_p=2.0"),
        (["RUN", "--num-samples=0"], "num_samples=0"),
        (["RUN", "--max-new-tokens=-5"], "max_new_tokens=-5"),
        (["RUN", "--interactive", "--num-samples=2"], "leave --num-samples out"),
        (["RUN", "--sample.temperature=1"], "a run keeps its own settings"),
        (["FOLDER"], "tokenizer.json: No such file or directory; use a folder that `export` wrote"),
        (["BROKEN"], "tokenizer.json: its merges do not follow from its ids"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], expected: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder = run / "checkpoints/step-000001", tmp_path / "out"
    tokenizer = folder / "tokenizer.json"
    if arguments[0] in ("FOLDER", "BROKEN"):
        export(run, folder)
        content = tokenizer.read_text().replace('"merges": []', '"merges": ["a b"]')
        tokenizer.unlink()
        if arguments[0] == "BROKEN":
            tokenizer.write_text(content)
    if arguments[0] == "DAMAGED":
        (checkpoint / "model.safetensors").write_bytes(b"")
    path = {"RUN": run, "DAMAGED": checkpoint, "FOLDER": folder, "BROKEN": folder}.get(arguments[0], arguments[0])
    capsys.readouterr()
    assert main(["generate", str(path), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert expected in error
