"""The Hugging Face hub: what is asked of it and how patiently, and FineWeb's parquet files as pieces of a corpus."""

import concurrent.futures
import posixpath
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from threading import Thread
from typing import Any, TypeVar

from dist_train.data.documents import Corpus, Document, Unreadable
from dist_train.data.parquet import Rows, forget_open_files, row_pieces
from dist_train.errors import UserError
from dist_train.sections import DataSettings

T = TypeVar("T")

# ---- the connection --------------------------------------------------------------------------------------------------

_FIRST_ANSWER_SECONDS = 5.0
_PATIENCE_SECONDS = 60.0


def commit_of(repository: str, revision: str | None) -> str:
    """Return the commit that a dataset repository's commit, tag or branch is, by default its newest.

    Everything is read at this commit, even if `main` moves.
    """
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return first_answer("dataset", repository, revision or "main")
    except RevisionNotFoundError:
        raise UserError(
            f"data.revision: {repository} has no {revision or 'main'!r}; give a commit, tag or branch of it"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"data.path: the hub shows no dataset repository {repository!r}; check its name, or log in with "
            f"`hf auth login` if it is private"
        ) from None
    except Exception as error:
        raise _unreachable(repository, error) from None


def first_answer(kind: str, repository: str, revision: str) -> str:
    """Return the commit of a `dataset` or `model` at a revision; raises whatever the hub's client does, within seconds.

    Asked once and ahead of what is wanted, for which the client by itself tries half a minute before it says that there
    is no hub.
    """
    from huggingface_hub import HfApi

    _silence_tries()
    wait = _FIRST_ANSWER_SECONDS
    options: dict[str, Any] = {"repo_type": kind, "revision": revision, "expand": ["sha"], "timeout": wait}
    return str(_within(wait, lambda: HfApi().repo_info(repository, **options).sha))


def _silence_tries() -> None:
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it tells of each try in two lines, from every process


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """Return what `ask` returns, or raise `TimeoutError`: neither looking up a name nor a second address has an end."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return answer.result(seconds)
    except concurrent.futures.TimeoutError:  # another class than the builtin one before Python 3.11
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None


def persist(name: str, action: Callable[[], T]) -> T:
    """Return what `action` returns, tried for about a minute where the network is at fault; then raise `UserError`.

    `HfFileSystem` (huggingface_hub 2.4) itself repeats a read five times, after 1 + 2 + 4 + 8 + 8 s, where there is no
    connection, no answer for 10 s, a body that is cut, or a status 408, 429 (for as long as the hub says), 500, 502,
    503 or 504; looking up the revision it does not repeat at all. What it gives up on is repeated here, by the clock:
    its own 23 s, or 83 s where there is no answer, count as well.
    """
    started, wait = time.monotonic(), 1.0
    while True:
        try:
            return action()
        except Exception as error:
            if not _is_of_the_network(error):
                raise
            if _is_final(error):
                raise UserError(
                    f"cannot read {name} from the hub: {reason_of(error)}; check data.revision, or log in with "
                    f"`hf auth login`"
                ) from None
            if time.monotonic() - started + wait > _PATIENCE_SECONDS:
                raise UserError(
                    f"cannot read {name} from the hub: {reason_of(error)}; connect to the internet and give the same "
                    f"command again, it goes on where it was"
                ) from None
        forget_open_files()
        time.sleep(wait)
        wait *= 2


def _is_of_the_network(error: Exception) -> bool:
    """Tell the network's errors from our own: the client's versions use three HTTP libraries without a common base."""
    return isinstance(error, OSError) or type(error).__module__.startswith(("http", "requests", "urllib3"))


def _is_final(error: Exception) -> bool:
    """Tell whether asking again is pointless: what is not there, not allowed, or switched off."""
    from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", 0)
    is_refused = 400 <= status < 500 and status not in (408, 429)
    return is_refused or isinstance(error, FileNotFoundError | EntryNotFoundError | OfflineModeIsEnabled)


def _unreachable(repository: str, error: Exception) -> UserError:
    return UserError(
        f"cannot reach {repository} on the hub: {reason_of(error)}; connect to the internet, or read local files with "
        f"--data.source=files --data.path=…"
    )


def reason_of(error: Exception) -> str:
    """Return in a line what the hub's client says in several."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]  # the others are where to read more


def open_remote(url: str, **options: Any) -> Any:
    from huggingface_hub import HfFileSystem

    _silence_tries()
    return HfFileSystem().open(url, **options)


# ---- FineWeb ---------------------------------------------------------------------------------------------------------


def open_fineweb(settings: DataSettings) -> Corpus:
    """Return FineWeb or FineWeb-Edu (Penedo et al. 2024, ODC-By 1.0), of which only what is read is downloaded.

    `datasets` says which files a subset has, but does not read them: a process that stops within its stream dies of
    SIGABRT on its way out, all work done (huggingface/datasets#7566, apache/arrow#45214).
    Raises `UserError` if the hub, the subset or the revision is not there; while reading if the text column is not.
    """
    repository = f"HuggingFaceFW/{settings.source}"
    commit = commit_of(repository, settings.revision)
    try:
        sizes = _sizes(_urls(repository, settings.subset, commit))
    except Exception as error:
        if _is_of_the_network(error):
            raise _unreachable(repository, error) from None
        raise

    pieces = chain.from_iterable(_pieces(url, size, settings.text_column) for url, size in sizes.items())
    return Corpus(pieces, size=sum(sizes.values()), revision=commit)


def _pieces(url: str, size: int, column: str) -> list["HubRows"]:
    name = url.split("/", 5)[-1]  # behind hf:, nothing, datasets, owner and name@commit
    found = _read_parquet(name, lambda: list(row_pieces(open_file, url, name, size, column)))
    return [HubRows(rows) for rows in found]


def _read_parquet(name: str, action: Callable[[], T]) -> T:
    import pyarrow

    try:
        return persist(name, action)
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {name} as parquet: {reason_of(error)}; choose another data.revision") from None


@dataclass(frozen=True)
class HubRows:
    """Rows of a file on the hub, read with patience."""

    rows: Rows

    @property
    def size(self) -> float:
        """How much of `Corpus.size` this is, in bytes of the source."""
        return self.rows.size

    def read(self, first: int = 0) -> list[Document | Unreadable]:
        """Return the documents of all rows but the `first`.

        Raises `UserError` if the hub stays away, or the file is none of parquet.
        """
        return _read_parquet(self.rows.name, lambda: list(self.rows.read(first)))


def open_file(url: str) -> Any:
    """Open a file on the hub; nothing is read ahead, as pyarrow asks for what it needs at once."""
    return open_remote(url, cache_type="none")


def _urls(repository: str, subset: str, commit: str) -> list[str]:
    """Return `hf://` URLs, pinned to the commit, of a subset's parquet files in order."""
    from datasets import get_dataset_config_names, load_dataset_builder

    try:
        builder: Any = load_dataset_builder(repository, name=subset, revision=commit)
        return list(builder.config.data_files["train"])
    except ValueError:
        names = get_dataset_config_names(repository, revision=commit)
        if subset in names:
            raise
        raise UserError(f"data.subset: {repository} has no {subset!r}; choose one of {_list(names)}") from None
    except RuntimeError as error:  # of a revision with a loading script: `datasets` runs none since 4.0
        raise UserError(
            f"data.revision: cannot read {repository} at {commit}: {reason_of(error)}; choose another"
        ) from None


def _list(subsets: list[str]) -> str:
    """Name all subsets, the samples first; of more than a hundred crawls, one a month, the ends."""
    crawls = sorted(name for name in subsets if name.startswith("CC-MAIN-"))
    others = [name for name in subsets if name not in crawls]
    if len(crawls) > 100:
        crawls = [f"{crawls[0]} … {crawls[-1]} ({len(crawls)} crawls)"]
    return ", ".join([*sorted(others, key=lambda name: not name.startswith("sample-")), *crawls])


def _sizes(urls: list[str]) -> dict[str, int]:
    """Return the files' sizes in bytes, from one listing of the folder that they share."""
    from huggingface_hub import HfFileSystem

    paths = {url: url.removeprefix("hf://") for url in urls}
    folder = posixpath.commonpath([posixpath.dirname(path) for path in paths.values()])
    found: Any = HfFileSystem().find(folder, detail=True)
    return {url: found[path]["size"] for url, path in paths.items()}
