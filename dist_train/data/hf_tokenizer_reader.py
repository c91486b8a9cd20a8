"""A `tokenizer.json` read back, where it is of the kind that this project writes or GPT-2's own; and never trusted."""

from typing import Annotated, Any, Literal

import tiktoken
from pydantic import BaseModel, Field, ValidationError, field_validator

from dist_train.data.hf_tokenizer import merges, unspell
from dist_train.data.tokenizer import END_OF_TEXT, GPT2_PATTERN
from dist_train.errors import UserError


def read_tokenizer(written: Any) -> tiktoken.Encoding:
    """Return the encoding that gives every text the ids which the tokenizer of a `tokenizer.json` gives it.

    Special tokens spelled in a text are plain text, as in training. Raises `ValueError`, which says in a line what is
    wrong, for any other kind of tokenizer: one that is nearly right would be worse than none.
    """
    try:
        theirs = _Tokenizer.model_validate(written)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r:.80})") from None
    special = {added.content: added.id for added in theirs.added_tokens}
    # GPT-2's own vocabulary lists its special token too.
    ranks = {unspell(token): id for token, id in theirs.model.vocab.items() if special.get(token) != id}
    if END_OF_TEXT not in special:
        raise ValueError(f"it has no {END_OF_TEXT}")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("it does not have all bytes")
    if len({*ranks.values(), *special.values()}) < len(ranks) + len(special):
        raise ValueError("it has two tokens of one id")
    _require_merges(theirs.model.merges, ranks)
    return tiktoken.Encoding(
        "tokenizer.json", pat_str=theirs.pre_tokenizer.pattern, mergeable_ranks=ranks, special_tokens=special
    )


def _require_merges(written: list[tuple[str, str]], ranks: dict[bytes, int]) -> None:
    """Raise `ValueError` unless the pairs are merged in the order of what they become, which is all tiktoken knows."""
    try:
        follows = [(unspell(left), unspell(right)) for left, right in written] == merges(ranks)
    except UserError:
        follows = False
    if not follows:
        raise ValueError("its merges do not follow from its ids")


# ---- what of the file decides ids ------------------------------------------------------------------------------------


class _ByteLevel(BaseModel):
    type: Literal["ByteLevel"]
    add_prefix_space: Literal[False]
    use_regex: Literal[True] = True

    @property
    def pattern(self) -> str:
        return GPT2_PATTERN


class _CutAlready(BaseModel):
    type: Literal["ByteLevel"]
    add_prefix_space: Literal[False]
    use_regex: Literal[False]


class _Regex(BaseModel):
    Regex: str


class _Split(BaseModel):
    type: Literal["Split"]
    pattern: _Regex
    behavior: Literal["Isolated"]
    invert: Literal[False]


class _Sequence(BaseModel):
    type: Literal["Sequence"]
    pretokenizers: tuple[_Split, _CutAlready]

    @property
    def pattern(self) -> str:
        return self.pretokenizers[0].pattern.Regex


_Id = Annotated[int, Field(ge=0, lt=1 << 24)]


class _Added(BaseModel):
    id: _Id
    content: str


class _Bpe(BaseModel):
    type: Literal["BPE"] = "BPE"
    dropout: None = None
    continuing_subword_prefix: Literal["", None] = None
    end_of_word_suffix: Literal["", None] = None
    byte_fallback: Literal[False] = False
    vocab: dict[str, _Id]
    merges: list[tuple[str, str]]

    @field_validator("merges", mode="before")
    @classmethod
    def _in_pairs(cls, merges: Any) -> Any:
        """Take also the pairs of older files, which are one text each: a space is spelled otherwise."""
        older = isinstance(merges, list) and all(isinstance(pair, str) for pair in merges)
        return [pair.split(" ") for pair in merges] if older else merges


class _Tokenizer(BaseModel):
    added_tokens: list[_Added]
    normalizer: None
    pre_tokenizer: Annotated[_ByteLevel | _Sequence, Field(discriminator="type")]
    model: _Bpe
