"""A stand-in for the Hugging Face hub: answers what its clients ask about datasets and models, and fails on demand."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Every commit's files by their paths, and which commit each branch and tag is."""

    commits: dict[str, dict[str, bytes]]
    references: dict[str, str]

    def commit(self, revision: str) -> str | None:
        """Return the commit that a branch, tag or commit is."""
        known = {**self.references, **{commit: commit for commit in self.commits}}
        return known.get(revision)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    first_byte: int | None
    n_bytes: int
    """Of the body that was sent."""


class Hub(ThreadingHTTPServer):
    """Serves repositories on this machine while it is entered as a context."""

    daemon_threads = True
    block_on_close = False  # a handler may be hanging, as it was told to

    def __init__(self, repositories: dict[str, Repository]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[Request] = []
        self.faults: dict[str, list[str]] = defaultdict(list)
        """For a file's path what its next answers are: `torn`, `wrong`, `hang`, a status such as `500`, or `fine`."""
        self.hanging = Event()
        """Set when somebody waits for an answer that will not come."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Hub":
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()
        self.server_close()

    def reads(self, path: str) -> list[Request]:
        """Return the requests that got bytes of a file."""
        return [request for request in self.requests if request.path.endswith(path) and request.n_bytes]


def environment(url: str, home: Path) -> dict[str, str]:
    """Return variables with which the hub's clients talk to `url`; they read them when they are imported."""
    variables = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "COLUMNS": "120"}
    variables.pop("HF_HUB_OFFLINE", None)
    return variables


def start(arguments: list[str], variables: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    """Start Python in `folder` with the given environment."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=variables,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each body waits 40 ms behind its headers
    server: Hub

    def do_GET(self) -> None:
        kind = re.fullmatch(
            r"/(?:api/)?(?:datasets/|models/)?(?P<name>[^/]+/[^/]+)(?:/(?P<what>resolve|tree|revision)/(?P<revision>[^/]+)(?P<rest>/.*)?)?",
            urlsplit(self.path).path,
        )
        repository = self.server.repositories.get(kind["name"]) if kind else None
        if kind is None or repository is None:
            return self.reply(401, {"X-Error-Code": "RepoNotFound"})
        commit = repository.commit(unquote(kind["revision"] or "main"))  # a slash in a branch's name comes as %2F
        if commit is None:
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        inside = unquote(kind["rest"] or "").strip("/")
        if kind["what"] == "resolve":
            return self.file(inside, repository.commits[commit], commit)
        if kind["what"] == "tree":
            return self.listing(f"{inside}/" if inside else "", repository.commits[commit])
        files = [{"rfilename": name} for name in repository.commits[commit]]
        return self.json({"id": kind["name"], "sha": commit, "siblings": files, "tags": []})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Take orders from the process under test: `/faults` sets those of files, `/references` moves branches."""
        orders = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/faults":
            self.server.faults.update(orders)
        else:
            self.server.repositories[self.path.removeprefix("/references/")].references.update(orders)
        self.reply(200)

    def file(self, name: str, files: dict[str, bytes], commit: str) -> None:
        data = files.get(name)
        faults = self.server.faults[name] if self.command == "GET" else []
        fault = faults.pop(0) if faults else "fine"
        if data is None:
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if fault.isdigit():
            return self.reply(int(fault))
        if fault == "hang":
            self.server.hanging.set()
            Event().wait(60)
            return None
        if fault == "wrong":
            data = bytes(len(data))
        headers = {"ETag": f'"{_sha256(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.reply(206, headers, data[first : last + 1], is_torn=fault == "torn", first_byte=first)
        return self.reply(200, headers, data, is_torn=fault == "torn")

    def listing(self, folder: str, files: dict[str, bytes]) -> None:
        inside = {name: data for name, data in files.items() if name.startswith(folder)}
        below = {folder + name.removeprefix(folder).split("/")[0] for name in inside}
        shown = set(inside) if "recursive=true" in self.path.lower() else below & set(inside)
        answer: list[dict[str, object]] = [
            {"type": "directory", "path": name, "oid": name, "size": 0} for name in sorted(below - set(inside))
        ]
        for name in sorted(shown):
            size = len(inside[name])
            entry: dict[str, object] = {"type": "file", "path": name, "oid": name, "size": size}
            if name.endswith((".bin", ".parquet")):  # as LFS keeps what is large
                entry["lfs"] = {"oid": _sha256(inside[name]), "size": size, "pointerSize": 130}
            answer.append(entry)
        self.json(answer)

    def json(self, answer: object) -> None:
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def reply(
        self,
        status: int,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        is_torn: bool = False,
        first_byte: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        sent = body[: len(body) // 2] if is_torn else body
        if self.command == "HEAD":
            sent = b""
        self.server.requests.append(Request(self.command, unquote(self.path), first_byte, len(sent)))
        self.wfile.write(sent)
        if is_torn:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
