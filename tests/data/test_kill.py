"""Killed at any moment, by a signal that nothing can catch: the same command goes on, and the bytes are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_train.data import documents
from dist_train.data.prepare import partial_folder, prepare
from dist_train.errors import UserError
from dist_train.sections import DataSettings

# Kills processes that have everything imported, so that each moment is one of the work.
KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import pyarrow
from dist_train.sections import DataSettings
from dist_train.data import documents, from_documents
from dist_train.data.prepare import prepare

documents.PIECE_BYTES, from_documents.COMMIT_SECONDS = 15_000, 0.0
settings = DataSettings.model_validate_json(sys.argv[1])
expected = {path.name: path.read_bytes() for path in Path(sys.argv[2]).glob("[!.]*")}
moments = random.Random(1337)

def start():
    process = os.fork()
    if not process:
        prepare(settings)
        os._exit(0)
    return process

def finish(process):
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status == 0:
        found = {path.name: path.read_bytes() for path in settings.dir.glob("[!.]*")}
        assert found == expected, {name: len(data) for name, data in found.items()}
        assert {path.name for path in settings.dir.parent.iterdir()} <= {"data", ".data.lock"}
        shutil.rmtree(settings.dir)
    return status

started = time.monotonic()
assert finish(start()) == 0
seconds = time.monotonic() - started
kills = 0
while kills < 20:
    process = start()
    time.sleep(moments.uniform(0, 0.7 * seconds))  # a moment as good as any
    os.kill(process, signal.SIGKILL)
    status = finish(process)
    assert status in (0, -signal.SIGKILL), status
    kills += status != 0
assert finish(start()) == 0
print(kills)
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n} " + "ü" * (n % 170)}) + "\n" for n in range(2500)))
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kind", ["documents", "single text"])
def test_twenty_kills_at_random_moments_change_no_byte(
    corpus: Path, tmp_path: Path, data_settings: Callable[..., DataSettings], kind: str
) -> None:
    path = corpus if kind == "documents" else corpus.rename(corpus.with_suffix(".txt"))
    uninterrupted = data_settings(path=path, dir=tmp_path / "uninterrupted", shard_tokens=50_000)
    prepare(uninterrupted)
    (tmp_path / "killed").mkdir()
    settings = data_settings(path=path, dir=tmp_path / "killed" / "data", shard_tokens=50_000, workers=1)
    command = [sys.executable, "-c", KILLER, settings.model_dump_json(), str(uninterrupted.dir)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) == 20


COMMAND = """
from dist_train.data import documents, from_documents
from dist_train.__main__ import main
import sys
documents.PIECE_BYTES, from_documents.COMMIT_SECONDS = 15_000, 0.0
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_workers_end_with_the_process_that_is_killed(
    corpus: Path, tmp_path: Path, data_settings: Callable[..., DataSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = data_settings(path=corpus, workers=2, shard_tokens=50_000)
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "config.yaml").write_text(json.dumps({"data": settings.model_dump(mode="json", exclude_none=True)}))
    command = [sys.executable, str(tmp_path / "command.py"), "prepare", str(tmp_path / "config.yaml")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: (partial_folder(settings) / "progress.json").exists())
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(workers) >= 2
    wait_until(lambda: not any(is_running(worker) for worker in workers))
    assert not settings.dir.exists()
    with pytest.raises(UserError, match="begun with another version of this program"):
        prepare(settings)
    monkeypatch.setattr(documents, "PIECE_BYTES", 15_000)
    prepare(settings)
    uninterrupted = data_settings(path=corpus, dir=tmp_path / "uninterrupted", shard_tokens=50_000, workers=1)
    prepare(uninterrupted)
    killed, whole = ({path.name: path.read_bytes() for path in s.dir.glob("[!.]*")} for s in (settings, uninterrupted))
    assert killed == whole


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process: int) -> bool:
    """Tell whether a process works on: one that has ended waits to be asked for its status by whoever adopted it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
