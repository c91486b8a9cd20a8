"""FineWeb from the hub, which a small server on this machine stands in for."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from dist_train.config import DataSettings
from dist_train.data.corpora import open_corpus

REPOSITORY = "datasets/HuggingFaceFW/fineweb"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: "data/*/*"}]
- config_name: sample-10BT
  data_files: [{split: train, path: "sample/10BT/*"}]
---
"""


class Hub(ThreadingHTTPServer):
    """Answers what `datasets` asks of a dataset repository, and knows one: FineWeb with a small sample."""

    def __init__(self, parquet: bytes) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.content = {
            "README.md": CARD.encode(),
            "data/CC-MAIN-2024-10/000_00000.parquet": parquet,
            "sample/10BT/000_00000.parquet": parquet,
        }

    def tree(self, folder: str) -> list[dict[str, object]]:
        inside = {name: data for name, data in self.content.items() if name.startswith(folder)}
        below = {folder + name.removeprefix(folder).split("/")[0] for name in inside}
        files = [{"type": "file", "path": name, "oid": name, "size": len(inside[name])} for name in below & set(inside)]
        return files + [{"type": "directory", "path": name, "oid": name, "size": 0} for name in below - set(inside)]


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if file := re.fullmatch(rf"/{REPOSITORY}/resolve/(?:main|{COMMIT})/(.+)", path):
            self.file(file[1])
        elif folder := re.fullmatch(rf"/api/{REPOSITORY}/tree/{COMMIT}(?:/(.+))?", path):
            self.listing(f"{folder[1]}/" if folder[1] else "")
        elif path == f"/api/{REPOSITORY}/revision/{COMMIT}":
            siblings = [{"rfilename": name} for name in self.server.content]
            self.json({"id": "HuggingFaceFW/fineweb", "sha": COMMIT, "siblings": siblings, "tags": []})
        else:
            self.reply(404)

    do_HEAD = do_GET

    def file(self, name: str) -> None:
        data = self.server.content.get(name)
        if data is None:
            return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.reply(206, headers, data[first : last + 1])
        return self.reply(200, headers, data)

    def listing(self, folder: str) -> None:
        if "recursive=true" in self.path.lower():
            files = [name for name in self.server.content if name.startswith(folder)]
            self.json([{"type": "file", "path": name, "oid": name, "size": 1} for name in files])
        else:
            self.json(self.server.tree(folder))

    def json(self, answer: object) -> None:
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def reply(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def parquet(shared_data: Path) -> Path:
    return shared_data / "fineweb" / "sample" / "10BT" / "000_00000.parquet"


@pytest.fixture(scope="module")
def hub(parquet: Path) -> Iterator[str]:
    with Hub(parquet.read_bytes()) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run(arguments: list[str], hub: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, because the hub's client reads its settings when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(folder / "hf"), "NO_PROXY": "127.0.0.1"}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def prepare(hub: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    (folder / "fineweb.yaml").write_text("data: {source: fineweb, tokenizer: bytes, dir: out, max_documents: 20}")
    return run(["-m", "dist_train", "prepare", "fineweb.yaml", *overrides], hub, folder)


READ = """
import json, pathlib
from dist_train.config import DataSettings
from dist_train.data.corpora import open_corpus
from dist_train.errors import UserError

def read(**changes):
    corpus = open_corpus(DataSettings(source="fineweb", max_documents=20, dir=pathlib.Path("unused"), **changes))
    return corpus, [vars(document) for document in corpus.documents]

def mistake(**changes):
    try:
        read(**changes)
    except UserError as error:
        return str(error)

corpus, documents = read()
print(json.dumps({
    "documents": documents,
    "revision": corpus.revision,
    "is_single_text": corpus.is_single_text,
    "unknown subset": mistake(subset="sample-11BT"),
    "unknown column": mistake(text_column="body"),
    "no text": mistake(text_column="token_count"),
}))
"""


@pytest.fixture(scope="module")
def read(hub: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process read from the hub."""
    ended = run(["-c", READ], hub, tmp_path_factory.mktemp("read"))
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_the_hubs_documents_are_those_of_its_files(
    read: dict[str, Any], parquet: Path, data_settings: Callable[..., DataSettings]
) -> None:
    local = open_corpus(data_settings(path=parquet, max_documents=20)).documents
    assert [document["text"] for document in read["documents"]] == [document.text for document in local]
    assert all(document["id"].startswith("<urn:uuid:") for document in read["documents"])
    assert len({document["id"] for document in read["documents"]}) == 20
    assert read["revision"] == COMMIT
    assert not read["is_single_text"]


def test_an_unknown_subset_is_answered_with_those_there_are(read: dict[str, Any]) -> None:
    assert "data.subset: FineWeb has no 'sample-11BT'" in read["unknown subset"]
    assert "'default', 'sample-10BT'" in read["unknown subset"]


def test_an_unknown_column_is_answered_with_those_there_are(read: dict[str, Any]) -> None:
    assert "no column 'body' (it has: text, id, dump, url, date," in read["unknown column"]
    assert "column 'token_count' holds int, not text" in read["no text"]


def test_fineweb_is_prepared_with_the_revision_it_is_of(hub: str, tmp_path: Path) -> None:
    ended = prepare(hub, tmp_path)
    assert ended.returncode == 0, ended.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["revision"] == COMMIT
    assert manifest["train"]["documents"] + manifest["val"]["documents"] == 20


def test_no_hub_is_one_line_within_seconds(tmp_path: Path) -> None:
    started = time.perf_counter()
    ended = prepare("http://127.0.0.1:1", tmp_path)
    assert time.perf_counter() - started < 10
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: cannot stream FineWeb's sample-10BT from the hub")
    assert ended.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"fineweb.yaml", "hf"}
