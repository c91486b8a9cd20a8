"""`generate`: what a network makes of a text, shown as it comes."""

import contextlib
import io
import itertools
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from dist_train.data.tokenizer import end_of_text
from dist_train.errors import UserError
from dist_train.model.generation import Sampling
from dist_train.sections import derive_seed
from dist_train.study.author import Author, open_author

# A network that has learned little writes any byte, and some of them would move the cursor or ring the bell.
_HARMLESS = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
)


@dataclass(frozen=True)
class GenerateOptions:
    """What a user asks for. None: as the run samples while it trains."""

    prompt: Sequence[str] = ()
    """`-` is all of standard input."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_samples: int | None = None
    """After each prompt; one if None."""
    max_new_tokens: int | None = None
    seed: int = 0
    """Decides sample number n after a prompt, together with that prompt, whatever else is asked for."""
    device: str = "auto"
    interactive: bool = False

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise UserError(f"{name}={number} asks for no text; use 1 or more")
        if sys.stdin is None and (self.interactive or "-" in self.prompt):
            raise UserError("there is no standard input to read; start it without closing that, or give --prompt=TEXT")
        if self.interactive and self.num_samples is not None:
            raise UserError("num_samples: --interactive continues one text; leave --num-samples out")
        self.sampling(temperature=1.0)

    def sampling(self, temperature: float) -> Sampling:
        """Return how tokens are drawn, at `temperature` where none was asked for; raises `UserError` as it does."""
        return Sampling(temperature if self.temperature is None else self.temperature, self.top_k, self.top_p)


def run_generate(path: Path, options: GenerateOptions) -> None:
    """Print texts that the network at `path` writes, token by token. Raises `UserError` for what cannot be done."""
    author = open_author(path, options.device)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal's encoding need not have every character
    if options.interactive:
        _converse(author, options)
        return
    prompts = _prompts(author, options)
    for index, number in itertools.product(range(len(prompts)), range(options.num_samples or 1)):
        _show("\n" if index or number else "")
        if _is_terminal(sys.stdout) and (len(prompts) > 1 or (options.num_samples or 1) > 1):
            _show(f"── prompt {index + 1}, sample {number + 1} ──\n")
        before = author.read(prompts[index]) or [end_of_text(author.encoding)]
        _show_all(author.spell(itertools.chain(before, _continue(author, options, before, number))))


def _continue(author: Author, options: GenerateOptions, before: Sequence[int], number: int) -> Iterator[int]:
    """Yield the tokens of sample `number` after the tokens `before`."""
    sampling = replace(options.sampling(author.sample.temperature), never=author.never())
    count = options.max_new_tokens or author.sample.max_new_tokens
    # The prompt's tokens are part of it: two prompts would else be continued by the same luck.
    return author.write(before, count, sampling, derive_seed(options.seed, "generate", number, *before))


def _converse(author: Author, options: GenerateOptions) -> None:
    """Continue one text, to which the user adds a line at a time."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - `input` edits lines with it
    if _is_terminal(sys.stdin):
        print(
            "This network continues a text, it does not answer. Type how the text begins or goes on, or nothing to "
            "see more of it; Ctrl-C stops it, Ctrl-D ends.",
            file=sys.stderr,
        )
    text: list[int] = []
    for number, line in enumerate(itertools.chain(_given(options), iter(_ask, None))):
        text += author.read(line)
        text = text or [end_of_text(author.encoding)]
        # Its own list, because `text` grows with what is written.
        with contextlib.suppress(KeyboardInterrupt):
            _show_all(author.spell(_kept(_continue(author, options, list(text), number), text)))
        if text[-1] == end_of_text(author.encoding):
            _show("(the text has ended; another begins)\n" if _is_terminal(sys.stdout) else "")


def _ask() -> str | None:
    """Return a line of the user's; None at the end, which a second Ctrl-C is too."""
    is_watched = _is_terminal(sys.stdin) and _is_terminal(sys.stdout)
    try:
        return input("> " if is_watched else "")
    except (EOFError, KeyboardInterrupt):
        _show("\n" if is_watched else "")
        return None
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8; convert it") from None


def _kept(tokens: Iterable[int], into: list[int]) -> Iterator[int]:
    """Yield `tokens`, each once it is the last of `into`."""
    for token in tokens:
        into.append(token)
        yield token


# ---- prompts ---------------------------------------------------------------------------------------------------------


def _prompts(author: Author, options: GenerateOptions) -> list[str]:
    """Return the prompts that were given; else what is piped or redirected here; else the run's own."""
    if options.prompt:
        return _given(options)
    # /dev/null and terminals are neither pipe nor file. None: closed, and its number perhaps another file's.
    mode = os.fstat(0).st_mode if sys.stdin else 0
    is_piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
    return [(_standard_input() if is_piped else "") or author.sample.prompt]


def _given(options: GenerateOptions) -> list[str]:
    return [_standard_input() if prompt == "-" else prompt for prompt in options.prompt]


def _standard_input() -> str:
    """Return all of standard input but the line end that `echo` puts behind it."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8; convert it") from None


# ---- output ----------------------------------------------------------------------------------------------------------


def _show_all(pieces: Iterable[str]) -> None:
    """Print the pieces of a text as they come, and end the line also where they break off."""
    try:
        for piece in pieces:
            _show(piece)
    finally:
        _show("\n")


def _show(text: str) -> None:
    print(text.translate(_HARMLESS) if _is_terminal(sys.stdout) else text, end="", flush=True)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()
