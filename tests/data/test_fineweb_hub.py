"""FineWeb from the hub, which a small server on this machine stands in for."""

import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dist_train.data import hub
from dist_train.data.corpora import open_corpus
from dist_train.data.documents import Document
from dist_train.errors import UserError
from dist_train.sections import DataSettings
from tests.data.hub_server import Hub, Repository, environment, start

NEWEST, TAGGED, SCRIPT, EDU = "0123456789abcdef" * 2 + "01234567", "a" * 40, "c" * 40, "e" * 40
CRAWLS = [f"CC-MAIN-{2013 + number // 10}-{10 + number % 10}" for number in range(101)]
SAMPLE = "sample/10BT/000_00000.parquet"
CRAWL = f"data/{CRAWLS[0]}/000_00000.parquet"


def card(*crawls: str) -> bytes:
    folders = {"default": "data/*/*", **{name: f"data/{name}/*" for name in crawls}, "sample-10BT": "sample/10BT/*"}
    files = [
        f'- {{config_name: {name}, data_files: [{{split: train, path: "{path}"}}]}}' for name, path in folders.items()
    ]
    return "\n".join(["---", "configs:", *files, "---", ""]).encode()


def some_rows(parquet: bytes, first: int, count: int) -> bytes:
    """Return a parquet file of a few of the real one's rows, in groups of 5."""
    written = io.BytesIO()
    table = pyarrow.parquet.read_table(io.BytesIO(parquet)).slice(first, count)
    pyarrow.parquet.write_table(table, written, row_group_size=5)
    return written.getvalue()


@pytest.fixture(scope="module")
def parquet(shared_data: Path) -> Path:
    return shared_data / "fineweb" / "sample" / "10BT" / "000_00000.parquet"


@pytest.fixture(scope="module")
def server(parquet: Path) -> Iterator[Hub]:
    real = parquet.read_bytes()
    newest = {"README.md": card(*CRAWLS[:3]), CRAWL: some_rows(real, 30, 20), SAMPLE: real}
    tagged = {"README.md": card(), CRAWL: real, SAMPLE: some_rows(real, 0, 20)}
    script = {"README.md": card(), "fineweb.py": b"open('was run', 'w')", SAMPLE: newest[CRAWL]}
    edu = {"README.md": card(*CRAWLS), CRAWL: real, SAMPLE: some_rows(real, 20, 10)}
    repositories = {
        "HuggingFaceFW/fineweb": Repository(
            {NEWEST: newest, TAGGED: tagged, SCRIPT: script}, {"main": NEWEST, "v1.0.0": TAGGED, "script": SCRIPT}
        ),
        "HuggingFaceFW/fineweb-edu": Repository({EDU: edu}, {"main": EDU}),
    }
    with Hub(repositories) as running:
        yield running


READ = """
import hashlib, json, os, pathlib, pickle, time, urllib.request
from dist_train.sections import DataSettings
from dist_train.data import hub
from dist_train.errors import UserError

def settings(**changes):
    return DataSettings(**{"source": "fineweb", "dir": pathlib.Path("unused"), **changes})

def order(path, orders):
    body = json.dumps(orders).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + path, body, method="POST")).close()

def contents(pieces):
    # What travels to a worker, and comes from there.
    read = [pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(piece)).read())) for piece in pieces]
    return [[document.id, hashlib.sha256(document.text.encode()).hexdigest()] for part in read for document in part]

def read(**changes):
    corpus = hub.open_fineweb(settings(**changes))
    pieces = list(corpus.pieces)
    sizes = [corpus.size, sum(piece.size for piece in pieces)]
    documents = contents(pieces)
    return {"revision": corpus.revision, "sizes": sizes, "documents": documents, "is_single": corpus.is_single_text}

def mistake(action, *arguments, **changes):
    try:
        action(*arguments, **changes)
    except UserError as error:
        return str(error)

time.sleep = lambda seconds: None
SAMPLE, CRAWL, crawl = %r
answers = {
    "sample": read(),
    "tag": read(revision="v1.0.0"),
    "commit": read(revision="a" * 40),
    "crawl": read(subset=crawl),
    "edu": read(source="fineweb-edu"),
    "unknown subset": mistake(read, subset="sample-11BT"),
    "unknown of many subsets": mistake(read, source="fineweb-edu", subset="sample-11BT"),
    "unknown revision": mistake(read, revision="v2"),
    "script": [mistake(read, revision="script"), pathlib.Path("was run").exists()],
    "unknown column": mistake(read, text_column="body"),
    "no text": mistake(read, text_column="token_count"),
}

# More failures in a row than huggingface_hub by itself puts up with: ahead of the pieces, and within.
failures = ["torn"] * 7 + ["500", "429", "503", "408", "500", "500", "torn"]
order("/faults", {CRAWL: failures})
pieces = list(hub.open_fineweb(settings(subset=crawl)).pieces)
order("/faults", {CRAWL: failures})
answers["through failures"] = contents(pieces)

order("/faults", {CRAWL: ["404"]})
hub.forget_open_files()
answers["not there"] = mistake(contents, pieces)
order("/faults", {CRAWL: ["500"] * 6 + ["fine"] * 9})
hub._PATIENCE_SECONDS = 0
answers["away"] = mistake(contents, pieces)

corpus = hub.open_fineweb(settings())
order("/references/HuggingFaceFW/fineweb", {"main": "a" * 40})
answers["main moved"] = contents(corpus.pieces)
answers["moved to"] = read()["revision"]
order("/references/HuggingFaceFW/fineweb", {"main": corpus.revision})
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process got from the hub."""
    folder = tmp_path_factory.mktemp("read")
    process = start(["-c", READ % ((SAMPLE, CRAWL, CRAWLS[0]),)], environment(server.url, folder / "hf"), folder)
    printed, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    assert complaints == ""
    return json.loads(printed)


@pytest.fixture(scope="module")
def local(parquet: Path) -> list[list[str]]:
    """Id and hash of the real documents' texts, read without the hub."""
    documents = open_corpus(DataSettings(source="files", path=str(parquet), dir=Path("unused"))).read()
    return [[d.id, sha256(d.text.encode()).hexdigest()] for d in documents if isinstance(d, Document)]


def test_the_hubs_documents_are_those_of_its_files(
    answers: dict[str, Any], local: list[list[str]], parquet: Path
) -> None:
    sample = answers["sample"]
    assert len(local) == 1410
    assert sample["documents"] == local
    assert all(document_id.startswith("<urn:uuid:") for document_id, _ in local)
    assert sample["sizes"] == [parquet.stat().st_size, pytest.approx(parquet.stat().st_size)]
    assert not sample["is_single"]


def test_subset_and_source_choose_the_files(answers: dict[str, Any], local: list[list[str]]) -> None:
    assert answers["crawl"]["documents"] == local[30:50]
    assert answers["edu"]["documents"] == local[20:30]
    assert answers["edu"]["revision"] == EDU


def test_a_revision_is_read_and_said_as_the_commit_it_is(answers: dict[str, Any], local: list[list[str]]) -> None:
    assert answers["sample"]["revision"] == NEWEST
    assert answers["tag"]["revision"] == answers["commit"]["revision"] == TAGGED
    assert answers["tag"]["documents"] == answers["commit"]["documents"] == local[:20]


def test_everything_is_read_at_the_commit_that_was_opened(answers: dict[str, Any], local: list[list[str]]) -> None:
    assert answers["main moved"] == local
    assert answers["moved to"] == TAGGED


def test_an_unknown_subset_is_answered_with_those_there_are(answers: dict[str, Any]) -> None:
    assert answers["unknown subset"] == (
        "data.subset: HuggingFaceFW/fineweb has no 'sample-11BT'; "
        f"choose one of sample-10BT, default, {', '.join(CRAWLS[:3])}"
    )
    assert answers["unknown of many subsets"].endswith(
        f"choose one of sample-10BT, default, {CRAWLS[0]} … {CRAWLS[-1]} (101 crawls)"
    )


def test_an_unknown_revision_is_named(answers: dict[str, Any]) -> None:
    assert answers["unknown revision"].startswith("data.revision: HuggingFaceFW/fineweb has no 'v2'; give")


def test_no_code_of_the_repository_is_run(answers: dict[str, Any]) -> None:
    line, was_run = answers["script"]
    assert line.startswith(
        f"data.revision: cannot read HuggingFaceFW/fineweb at {SCRIPT}: Dataset scripts are no longer"
    )
    assert not was_run


def test_an_unknown_column_is_answered_with_those_there_are(answers: dict[str, Any]) -> None:
    assert "no column 'body' (it has: text, id, dump, url, date," in answers["unknown column"]
    assert "column 'token_count' holds int64, not text" in answers["no text"]


def test_cut_connections_and_a_hub_in_trouble_change_no_document(
    answers: dict[str, Any], local: list[list[str]]
) -> None:
    assert answers["through failures"] == local[30:50]


def test_what_is_not_there_is_not_asked_for_again(answers: dict[str, Any]) -> None:
    assert answers["not there"].startswith(f"cannot read {CRAWL} from the hub: Client error '404 Not Found'")
    assert "\n" not in answers["not there"]


def test_a_hub_that_stays_away_ends_in_a_line_that_says_how_to_go_on(answers: dict[str, Any]) -> None:
    assert answers["away"].startswith(f"cannot read {CRAWL} from the hub: Server error '500 Internal")
    assert answers["away"].endswith("give the same command again, it goes on where it was")


def test_a_row_group_costs_one_request_and_no_byte_of_the_next(
    answers: dict[str, Any], server: Hub, parquet: Path
) -> None:
    opened_twice = 2  # for one corpus before `main` moved and for one after
    footer = pyarrow.parquet.read_metadata(parquet)
    reads = [read for read in server.reads(f"{NEWEST}/{SAMPLE}") if read.first_byte != parquet.stat().st_size - 65536]
    chunks = [[footer.row_group(group).column(column) for column in (0, 1)] for group in range(footer.num_row_groups)]
    wanted = [sum(chunk.total_compressed_size for chunk in pair) for pair in chunks]
    assert [read.n_bytes for read in reads] == wanted * opened_twice


def test_patience_ends_by_the_clock_and_only_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waits = [0.0], []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds + 2

    def cut() -> None:
        raise ConnectionResetError("cut")

    def bug() -> None:
        raise ValueError("bug")

    monkeypatch.setattr(hub, "time", type("Clock", (), {"sleep": sleep, "monotonic": lambda: now[0]}))
    with pytest.raises(UserError, match="cannot read it from the hub: cut;"):
        hub.persist("it", cut)
    assert waits == [1, 2, 4, 8, 16]
    assert now[0] <= 60
    with pytest.raises(ValueError, match="bug"):
        hub.persist("it", bug)
    assert len(waits) == 5


def test_importing_the_hub_imports_none_of_its_clients() -> None:
    heavy = "('datasets', 'huggingface_hub', 'pyarrow', 'torch', 'pandas')"
    code = f"import sys, dist_train.data.ready_made; sys.exit(str([m for m in {heavy} if m in sys.modules] or ''))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stderr.strip() == ""


def prepare(variables: dict[str, str], folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    (folder / "fineweb.yaml").write_text("data: {source: fineweb, tokenizer: bytes, dir: out, max_documents: 20}")
    process = start(["-m", "dist_train", "prepare", "fineweb.yaml", *overrides], variables, folder)
    printed, complaints = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, printed, complaints)


def test_fineweb_is_prepared_with_the_revision_it_is_of(server: Hub, tmp_path: Path, answers: dict[str, Any]) -> None:
    ended = prepare(environment(server.url, tmp_path / "hf"), tmp_path, "--data.workers=1")
    assert ended.returncode == 0, ended.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["revision"] == NEWEST
    assert manifest["train"]["documents"] + manifest["val"]["documents"] == 20


def test_no_hub_is_one_line_within_seconds(tmp_path: Path) -> None:
    started = time.perf_counter()
    ended = prepare(environment("http://127.0.0.1:1", tmp_path / "hf"), tmp_path)
    assert time.perf_counter() - started < 10
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: cannot reach HuggingFaceFW/fineweb on the hub: ")
    assert ended.stderr.endswith("read local files with --data.source=files --data.path=…\n")
    assert ended.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"fineweb.yaml", "hf"}


OPEN = """
import pathlib, time
import huggingface_hub.hf_api
from dist_train.sections import DataSettings
from dist_train.data.hub import open_fineweb
from dist_train.errors import UserError

started = time.perf_counter()
try:
    open_fineweb(DataSettings(source="fineweb", dir=pathlib.Path("unused")))
except UserError as error:
    print(time.perf_counter() - started, error)
"""


def test_every_way_of_having_no_hub_is_noticed_within_seconds(server: Hub, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and never says a word
        variables = {
            "silent": environment(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path),
            "unroutable": environment("http://10.255.255.1:9", tmp_path),
            "unknown name": environment("http://hub.invalid", tmp_path),
            "offline": {**environment(server.url, tmp_path), "HF_HUB_OFFLINE": "1"},
        }
        processes = {name: start(["-c", OPEN], values, tmp_path) for name, values in variables.items()}
        outputs = {name: process.communicate(timeout=60) for name, process in processes.items()}
    for name, (printed, complaints) in outputs.items():
        assert complaints == "", name
        seconds, line = printed.strip().split(" ", 1)
        assert float(seconds) < 9, name
        assert line.startswith("cannot reach HuggingFaceFW/fineweb on the hub: "), name
        assert "--data.source=files" in line, name
    assert "offline mode is enabled" in outputs["offline"][0]
