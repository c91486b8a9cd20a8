"""What a folder of token shards holds: its `manifest.json`, or, without one, the shards that other tools wrote."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_train.config import DataSettings
from dist_train.data.shards import Shard, TokenStream, map_shard
from dist_train.data.tokenizer import end_of_text, fingerprint, load_tokenizer
from dist_train.errors import UserError
from dist_train.storage import write_atomically

FILE = "manifest.json"


@dataclass(frozen=True)
class Split:
    """The train or the val part of prepared data."""

    tokens: int
    documents: int
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
            values = json.loads(path.read_text(encoding="utf-8"))
            splits = {
                name: Split(
                    values[name]["tokens"],
                    values[name]["documents"],
                    tuple(Shard(**shard) for shard in values[name]["shards"]),
                )
                for name in ("train", "val")
            }
            return Manifest(dict(values["tokenizer"]), dict(values["source"]), **splits)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error!r}); delete {folder} and prepare again") from None


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
            return f"{key}={found.get(key)!r}, not {value!r}"
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
    """Memory-map the shards in `data.dir`.

    Raises `UserError` if it was prepared from other settings, a split is missing, or a file is not what it should be.
    """
    manifest = Manifest.read(settings.dir)
    if manifest:
        require_match(manifest, settings, settings.dir)
        names = {"train": [s.file for s in manifest.train.shards], "val": [s.file for s in manifest.val.shards]}
        identity: object = [asdict(shard) for shard in manifest.shards]
    else:
        names = {split: sorted(path.name for path in settings.dir.glob(f"*{split}*.bin")) for split in ("train", "val")}
        identity = [_glimpse(settings.dir / name) for split in names.values() for name in split]
    for split, files in names.items():
        if not files:
            raise UserError(f"data.dir: {settings.dir} has no {split} shards; prepare it, or point data.dir elsewhere")
    headerless = settings.shard_format == "headerless" and not manifest  # what `prepare` writes has a header
    streams = {split: _open_stream(settings.dir, files, headerless) for split, files in names.items()}
    totals = {split: len(stream) for split, stream in streams.items()}
    if manifest and totals != {"train": manifest.train.tokens, "val": manifest.val.tokens}:
        raise UserError(
            f"data.dir: the shards in {settings.dir} are not those of its {FILE}; delete it and prepare again"
        )
    return TokenData(**streams, fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest())


def _glimpse(path: Path) -> list[Any]:
    """Return what tells a shard without a manifest from another, without reading gigabytes: name, size, both ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(1 << 16)
        file.seek(max(0, size - (1 << 16)))
        return [path.name, size, hashlib.sha256(start + file.read()).hexdigest()]


def _open_stream(folder: Path, files: list[str], headerless: bool) -> TokenStream:
    shards = [map_shard(folder / file, headerless) for file in files]
    if len({shard.dtype for shard in shards}) > 1:
        raise UserError(f"data.dir: {folder} mixes shards of uint16 and uint32 tokens; keep those of one tokenizer")
    return TokenStream(shards)
