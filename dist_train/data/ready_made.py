"""Shards that others made, in llm.c's format or nanoGPT's: from the hub or a local folder, checked on arrival."""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any, NamedTuple

from dist_train.data.hub import commit_of, open_remote, persist
from dist_train.data.progress import byte_bar
from dist_train.data.shards import HEADER_BYTES, OpenShard, Shard, file_sha256, require_known, token_dtype
from dist_train.data.tokenizer import load_tokenizer
from dist_train.errors import StorageError, UserError
from dist_train.sections import DataSettings

_CONNECTIONS = 8
_CHUNK_BYTES = 1 << 24
"""What one request fetches: little to lose, and 20 GB are 1200 requests, of which the hub allows 3000 in 5 minutes."""
_CHECKED_TOKENS = 1 << 20
_PART = ".part"

Advance = Callable[[int], None]
"""Is told of each part how many bytes it was."""


class Fetched(NamedTuple):
    """Shards of both splits, all checked, and the commit that they are of."""

    revision: str | None
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]


class Offer(NamedTuple):
    """A shard where it comes from."""

    source: str
    """A local path, or an `hf://` URL pinned to a commit."""
    size: int
    sha256: str | None = None

    @property
    def name(self) -> str:
        """What it is called here. Without its folders, so that nothing of a repository lands outside of ours."""
        return PurePosixPath(self.source).name


class Offers(NamedTuple):
    """The shards of both splits that `data.path` has, and the commit that they are of."""

    revision: str | None
    train: list[Offer]
    val: list[Offer]


def find_shards(settings: DataSettings) -> Offers:
    """Return which shards `fetch_shards` fetches: of the train split the first ones that hold `data.max_tokens`.

    Raises `UserError` if there are none of a split, or they are out of reach.
    """
    assert settings.path is not None
    repository = settings.path.removeprefix("hub:")
    commit = commit_of(repository, settings.revision) if repository != settings.path else None
    files = _of_hub(repository, commit) if commit else _of_folder(Path(settings.path).expanduser())
    train, val = (_split(files, split, settings.path) for split in ("train", "val"))
    found = Offers(commit, _first(train, settings), val)
    _require_distinct_names([*found.train, *found.val])
    return found


def fetch_shards(settings: DataSettings, folder: Path) -> Fetched:
    """Put the shards at `data.path` into `folder`: downloaded from the hub, or hard links to those of a local folder.

    Goes on where an earlier call was interrupted. Raises `UserError` if shards are missing, out of reach or not what
    they should be, `StorageError` if the disk is too small.
    """
    n_vocab = load_tokenizer(settings.tokenizer).n_vocab
    commit, train, val = find_shards(settings)
    bring = _download if commit else _link
    if commit:
        _require_space([*train, *val], folder)

    def fetch(offer: Offer, advance: Advance) -> Shard:
        sha256 = bring(offer, folder, advance)
        return Shard(offer.name, _count_tokens(folder / offer.name, n_vocab), sha256)

    shards = _in_parallel(fetch, [*train, *val])
    return Fetched(commit, tuple(shards[: len(train)]), tuple(shards[len(train) :]))


def _in_parallel(fetch: Callable[[Offer, Advance], Shard], offers: list[Offer]) -> list[Shard]:
    """Return what `fetch` returns for each offer; the first error, or Ctrl-C, stops the others soon."""
    stopping = Event()
    with byte_bar("fetching", sum(offer.size for offer in offers)) as bar, ThreadPoolExecutor(_CONNECTIONS) as pool:

        def advance(n_bytes: int) -> None:
            bar.advance(bar.task_ids[0], n_bytes)
            if stopping.is_set():
                raise _StoppedError

        futures = [pool.submit(fetch, offer, advance) for offer in offers]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        finally:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)


class _StoppedError(Exception):
    """Another download has failed."""


# ---- what there is ---------------------------------------------------------------------------------------------------


def _of_hub(repository: str, commit: str) -> list[Offer]:
    """Return all files of a dataset repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def ask() -> list[Offer]:
        listing = HfApi().list_repo_tree(repository, recursive=True, revision=commit, repo_type="dataset")
        return [
            Offer(f"hf://datasets/{repository}@{commit}/{file.path}", file.size, file.lfs.sha256 if file.lfs else None)
            for file in listing
            if isinstance(file, RepoFile)
        ]

    return persist(repository, ask)


def _of_folder(folder: Path) -> list[Offer]:
    """Return all files of a local folder."""
    if not folder.is_dir():
        raise UserError(f"data.path: there is no folder {folder}; give one with shards, or a hub:OWNER/NAME")
    # Not resolved any further: in the hub's own cache, for one, files are links to others named by their hash.
    return [Offer(str(path), path.stat().st_size) for path in folder.resolve().iterdir() if path.is_file()]


def _split(offers: list[Offer], split: str, where: str) -> list[Offer]:
    """Return the shards of one split, by their names as `open_tokens` reads them, in order."""
    found = sorted((offer for offer in offers if fnmatch(offer.name, f"*{split}*.bin")), key=lambda offer: offer.name)
    if not found:
        names = sorted(offer.name for offer in offers)
        there = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise UserError(f"data.path: {where} has no *{split}*.bin, it has: {there or 'nothing'}; give another")
    return found


def _first(offers: list[Offer], settings: DataSettings) -> list[Offer]:
    """Return as many of the shards as hold `data.max_tokens`, reckoned from their sizes."""
    if settings.max_tokens is None:
        return offers
    token_bytes = token_dtype(load_tokenizer(settings.tokenizer).n_vocab).itemsize
    held = accumulate((offer.size - HEADER_BYTES) // token_bytes for offer in offers)
    return offers[: 1 + sum(tokens < settings.max_tokens for tokens in held)]


def _require_distinct_names(offers: list[Offer]) -> None:
    names = Counter(offer.name for offer in offers)
    if doubled := sorted(name for name, times in names.items() if times > 1):
        raise UserError(f"data.path: there are several {doubled[0]}, one for both splits or in folders; rename them")


def _require_space(offers: list[Offer], folder: Path) -> None:
    """Raise `StorageError` now instead of after hours."""
    held = {path.name.removesuffix(_PART): path.stat().st_size for path in folder.iterdir()}
    missing = sum(max(0, offer.size - held.get(offer.name, 0)) for offer in offers)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise StorageError(
            f"the shards need {missing / 1e9:.1f} GB more where {folder} has {free / 1e9:.1f} GB free; "
            f"make room, take another --data.dir, or fewer with --data.max_tokens=…"
        )


# ---- bringing and checking -------------------------------------------------------------------------------------------


def _link(offer: Offer, folder: Path, advance: Advance) -> str:
    """Give a local shard a second name in `folder`, for no second copy of 20 GB, and return its hash.

    A hard link, as a symbolic one would lead out of the folder, where anything may become of the file. A copy where the
    file system has none, or the file is on another.
    """
    path, source = folder / offer.name, os.path.realpath(offer.source)
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
    sha256 = file_sha256(path)
    advance(offer.size)
    return sha256


def _download(offer: Offer, folder: Path, advance: Advance) -> str:
    """Download a shard, or what is missing of it, and return its hash; a wrong one is fetched once more."""
    path = folder / offer.name
    for _ in range(2):
        if path.exists():
            advance(path.stat().st_size)
        else:
            _download_rest(offer, path, advance)
        sha256 = file_sha256(path)
        if path.stat().st_size == offer.size and sha256 == (offer.sha256 or sha256):
            return sha256
        advance(-path.stat().st_size)
        path.unlink()
    raise UserError(f"{offer.source} arrived twice with other bytes than the hub lists; try again later")


def _download_rest(offer: Offer, path: Path, advance: Advance) -> None:
    """Append to what an earlier call got of a file, then give it its name.

    By ranges, because `hf_hub_download` (huggingface_hub 2.4) begins each file anew after an interruption.
    """
    part = path.with_name(path.name + _PART)
    with part.open("ab") as file, _open(offer) as remote:
        remote.seek(file.tell())
        advance(file.tell())
        while chunk := persist(offer.name, lambda: remote.read(_CHUNK_BYTES)):
            file.write(chunk)
            file.flush()
            advance(len(chunk))
        os.fsync(file.fileno())
    part.rename(path)


def _open(offer: Offer) -> Any:
    return persist(offer.name, lambda: open_remote(offer.source, size=offer.size, cache_type="none"))


def _count_tokens(path: Path, n_vocab: int) -> int:
    """Return how many tokens a shard holds, all of which the tokenizer knows. Raises `UserError` for another file."""
    shard = OpenShard(path)
    for begin in range(0, len(shard), _CHECKED_TOKENS):
        require_known(shard.read(begin, _CHECKED_TOKENS), n_vocab, path, begin)
    return len(shard)
