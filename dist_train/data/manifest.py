"""What a folder of token shards holds: its `manifest.json`, or, without one, the shards that other tools wrote."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from dist_train.data.content import Content, contents
from dist_train.data.shards import OpenShard, Shard, TokenStream
from dist_train.data.tokenizer import end_of_text, fingerprint, load_tokenizer
from dist_train.data.untrusted import read_json, require_plain_name
from dist_train.errors import UserError
from dist_train.sections import DataSettings
from dist_train.storage import write_atomically

FILE = "manifest.json"

_MOST_VOCABULARY = 1 << 24
"""More than any tokenizer has: tokens are counted by their ids."""
_SHOWN_CHARACTERS = 300
"""Of a value that somebody else may have written."""


@dataclass(frozen=True)
class Split:
    """The train or the val part of prepared data."""

    tokens: Annotated[int, Field(strict=True, ge=0)]
    documents: Annotated[int, Field(strict=True, ge=0)]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """Prepared data: with which tokenizer, from what, and every shard with its hash."""

    tokenizer: dict[str, Any]
    source: dict[str, Any]
    train: Split
    val: Split

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All files of both splits."""
        return (*self.train.shards, *self.val.shards)

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`; last, because its presence says that the data is complete."""
        write_atomically(folder / FILE, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def read(folder: Path) -> "Manifest | None":
        """Return the folder's manifest, or None where there is none. Raises `UserError` if it is damaged."""
        path = folder / FILE
        try:
            manifest = _ADAPTER.validate_python(read_json(path))
            _require_consistent(manifest)
            return manifest
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({_reason(error)}); delete {folder} and prepare again") from None


_ADAPTER = TypeAdapter(Manifest)


def _require_consistent(manifest: Manifest) -> None:
    """Raise `ValueError` for what `Manifest.write` never wrote, though each value is of the right type."""
    for name, split in (("train", manifest.train), ("val", manifest.val)):
        if split.tokens != (total := sum(shard.tokens for shard in split.shards)):
            raise ValueError(f"{name} has {split.tokens} tokens and its shards have {total}")
    names = Counter(shard.file for shard in manifest.shards)
    if doubled := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"{doubled[0]} is named twice")
    n_vocab, end = manifest.tokenizer.get("n_vocab"), manifest.tokenizer.get("end_of_text")
    if type(n_vocab) is not int or type(end) is not int or not 0 <= end < n_vocab <= _MOST_VOCABULARY:
        raise ValueError("tokenizer has no n_vocab with an end_of_text below it")


def _reason(error: Exception) -> str:
    """Return in one short line what is wrong with a manifest."""
    if isinstance(error, OSError):
        return str(error.strerror)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


def source_identity(settings: DataSettings) -> dict[str, Any]:
    """Return the settings that decide which tokens come out of `prepare`, as they stand in the manifest."""
    keys = ("source", "path", "text_column", "subset", "max_documents", "max_tokens", "val_fraction", "shard_tokens")
    # `revision` is what was read, also where nothing was asked for.
    return {**settings.model_dump(mode="json", include=set(keys)), "asked_revision": settings.revision}


def tokenizer_identity(name: str) -> dict[str, Any]:
    """Return what tells a tokenizer from others, as it stands in the manifest."""
    encoding = load_tokenizer(name)
    return {
        "name": name,
        "n_vocab": encoding.n_vocab,
        "end_of_text": end_of_text(encoding),
        "fingerprint": fingerprint(encoding),
    }


def first_difference(source: dict[str, Any], tokenizer: dict[str, Any], settings: DataSettings) -> str | None:
    """Say in which setting data differs from what is asked for, given the manifest's `source` and `tokenizer`."""
    wanted = {**source_identity(settings), "tokenizer": settings.tokenizer}
    if settings.revision in (None, source.get("revision")):  # any will do, or it is the very commit
        del wanted["asked_revision"]
    found = {**source, "tokenizer": tokenizer.get("name")}
    for key, value in wanted.items():
        if found.get(key) != value:
            return f"{key}={repr(found.get(key))[:_SHOWN_CHARACTERS]}, not {value!r}"
    # tiktoken holds its own vocabularies to their hashes; only a file can change under its name.
    is_file = settings.tokenizer.endswith(".tiktoken")
    if is_file and fingerprint(load_tokenizer(settings.tokenizer)) != tokenizer.get("fingerprint"):
        return f"another content of tokenizer={settings.tokenizer!r}"
    return None


def require_match(manifest: Manifest, settings: DataSettings, folder: Path) -> None:
    """Raise `UserError` naming the first setting in which the data in `folder` differs from what is asked for."""
    if difference := first_difference(manifest.source, manifest.tokenizer, settings):
        raise UserError(
            f"data.dir: {folder} was prepared with {difference}; choose another --data.dir or delete that folder"
        )


@dataclass(frozen=True)
class TokenData:
    """The two token streams of a folder, and a hash that tells other data apart."""

    train: TokenStream
    val: TokenStream
    fingerprint: str


def is_prepared(folder: Path) -> bool:
    """Tell whether `folder` has a manifest or shards, whoever wrote them."""
    return (folder / FILE).exists() or any(folder.glob("*.bin"))


def open_tokens(settings: DataSettings) -> TokenData:
    """Memory-map the shards in `data.dir`, every byte of them verified, now or before.

    Raises `UserError` if it was prepared from other settings, a split is missing, or a file is not what it should be.
    """
    folder, manifest = settings.dir, Manifest.read(settings.dir)
    if manifest:
        require_match(manifest, settings, folder)
        names = {"train": [s.file for s in manifest.train.shards], "val": [s.file for s in manifest.val.shards]}
    else:
        names = _find_shards(folder)
    for split, files in names.items():
        if not files:
            raise UserError(f"data.dir: {folder} has no {split} shards; prepare it, or point data.dir elsewhere")
    headerless = settings.shard_format == "headerless" and not manifest  # what `prepare` writes has a header
    opened = {split: [OpenShard(folder / file, headerless) for file in files] for split, files in names.items()}
    shards = _verify(folder, [*opened["train"], *opened["val"]])
    if manifest:
        require_written(manifest, shards, folder)
    streams = {split: _stream(folder, parts) for split, parts in opened.items()}
    # Of foreign shards what their manifest would say: the names, which are the order, and the content.
    identity = json.dumps([asdict(shard) for shard in shards])
    return TokenData(**streams, fingerprint=hashlib.sha256(identity.encode()).hexdigest())


def _find_shards(folder: Path) -> dict[str, list[str]]:
    """Return the names of the shards of both splits in a folder without a manifest."""
    names = {split: sorted(path.name for path in folder.glob(f"*{split}*.bin")) for split in ("train", "val")}
    try:
        for name in (*names["train"], *names["val"]):
            require_plain_name(name)
    except ValueError as error:
        raise UserError(f"data.dir: {error}; rename it") from None
    if both := set(names["train"]) & set(names["val"]):
        raise UserError(f"data.dir: {folder / min(both)} is named for both splits; rename it")
    return names


def _verify(folder: Path, opened: list[OpenShard]) -> list[Shard]:
    """Return what was opened with the hashes of its content, which the shards know from now on."""
    found = _read_contents(folder, [shard.path.name for shard in opened])
    for shard in opened:
        stamp, shard.sha256 = found[shard.path.name]
        if stamp != shard.stamp:
            raise UserError(f"{shard.path} was changed while it was opened; let nothing write to it, then start again")
    return [Shard(shard.path.name, len(shard), str(shard.sha256)) for shard in opened]


def verify_written(folder: Path, manifest: Manifest) -> None:
    """Read every byte of what `manifest` describes, and remember that it was found as it should be.

    Raises `UserError` for a file that is not. With no more than a few files open at once.
    """
    found = _read_contents(folder, [shard.file for shard in manifest.shards])
    require_written(manifest, [replace(shard, sha256=found[shard.file].sha256) for shard in manifest.shards], folder)


def _read_contents(folder: Path, names: list[str]) -> dict[str, Content]:
    try:
        return contents(folder, names)
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename or folder}: {error.strerror}; mend it, or prepare the data again"
        ) from None


def require_written(manifest: Manifest, shards: Sequence[Shard], folder: Path) -> None:
    """Raise `UserError` naming the first of the shards in `folder` that is not the one in the manifest."""
    for wanted, found in zip(manifest.shards, shards, strict=True):
        if wanted != found:
            raise UserError(
                f"data.dir: {folder / wanted.file} is not the shard that {FILE} describes "
                f"({found.tokens} tokens, sha256 {found.sha256[:12]}…, not {wanted.tokens}, {wanted.sha256[:12]}…); "
                f"bring the old file back, or delete {folder} and prepare again"
            )


def _stream(folder: Path, shards: list[OpenShard]) -> TokenStream:
    if len({shard.tokens.dtype for shard in shards}) > 1:
        raise UserError(f"data.dir: {folder} mixes shards of uint16 and uint32 tokens; keep those of one tokenizer")
    return TokenStream(shards)
