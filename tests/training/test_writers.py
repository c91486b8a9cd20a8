"""Where a run is shown: by the same names everywhere, and never at the run's expense."""

import importlib.metadata
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import Settings
from dist_train.errors import UserError
from dist_train.training.trainer import train
from tests.conftest import losses, metrics, run_command

Tiny = Callable[..., Settings]


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever runs the tests keeps what they have with Weights & Biases out of them, and the other way round."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_MODE", "offline")


def kept_by_wandb(run: Path) -> list[Any]:
    """Return what the package would send, the records of the newest of its folders in a run's."""
    from wandb.proto import wandb_internal_pb2

    newest = max((run / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime_ns)
    (path,) = newest.glob("*.wandb")
    # LevelDB's log after a header of 7 bytes: parts of records with a checksum, length and kind, in blocks of 32 KiB.
    content, at, record, records = path.read_bytes(), 7, b"", []
    while at < len(content):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(record))  # type: ignore[attr-defined]
            record = b""
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def test_weights_and_biases_has_tensorboards_names_and_goes_on_with_the_same_run(tiny: Tiny, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    first = train(tiny({"log.wandb": True, "train.max_iters": 8}))
    before = kept_by_wandb(run)
    train(tiny({"log.wandb": True}))
    after = kept_by_wandb(run)
    ids = {record.run.run_id for record in (*before, *after) if record.WhichOneof("record_type") == "run"}
    assert ids == {first.wandb_id.read_text().strip()}

    shown = history(before) + history(after)
    assert {row["_step"] for row in shown} == set(range(13))
    names = {name for row in shown for name in row if not name.startswith("_")}
    assert {name for name in names if not name.startswith("sample/")} == set(
        EventAccumulator(str(first.tensorboard)).Reload().Tags()["scalars"]
    )
    assert [row["train/loss"] for row in shown if "train/loss" in row] == losses(run)
    held_out = [line["final_token_loss"] for line in metrics(run, "eval")]
    assert [row["val/final_token_loss"] for row in shown if "val/final_token_loss" in row] == held_out

    (config,) = [record.run.config for record in before if record.WhichOneof("record_type") == "run"]
    kept = {item.key: json.loads(item.value_json) for item in config.update}
    assert kept["train"]["max_iters"] == 8
    assert kept["model"]["n_embd"] == 32


def test_a_run_goes_on_without_weights_and_biases_where_it_fails(
    tiny_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    online = {"WANDB_MODE": "online", "WANDB_API_KEY": "none that it takes"}
    ended = run_command("train", *tiny_arguments({"log.wandb": True}), environment=online)
    assert ended.returncode == 0
    assert len(losses(tmp_path / "run")) == 12
    assert ended.stderr.startswith("warning: Weights & Biases cannot be written (")
    assert ended.stderr.endswith("; training goes on without\n")
    assert ended.stderr.count("\n") == 1


def test_a_package_that_is_not_there_is_said_before_anything_is_done(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version

    def without_wandb(name: str) -> str:
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", without_wandb)
    with pytest.raises(UserError, match=r"log\.wandb: wandb is not there; pip install 'dist-train\[wandb\]'"):
        train(tiny({"log.wandb": True}))
    assert not (tmp_path / "run/metrics.jsonl").exists()
