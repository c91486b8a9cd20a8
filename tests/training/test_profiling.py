"""What `log.profile` promises: a trace of the updates asked for, wherever a run starts and ends, and the same run."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_train.config import Settings
from dist_train.errors import UserError
from dist_train.training.trainer import train
from tests.conftest import finish, losses, start_together

Tiny = Callable[..., Settings]


def traces(run: Path) -> dict[str, Counter[str]]:
    """Return how often each name that is not an operation's is in each trace of a run."""
    found = {}
    for path in sorted((run / "profile").glob("*.pt.trace.json.gz")):
        events: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found[path.name] = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    return found


def updates(names: Counter[str]) -> list[int]:
    return sorted(int(name.removeprefix("ProfilerStep#")) for name in names if name.startswith("ProfilerStep#"))


def test_a_trace_has_the_updates_asked_for_with_their_phases_and_changes_nothing(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still, seen = (
        train(tiny({"run.out_dir": tmp_path / name, "train.micro_batch_size": 4, "log.profile": window})).root
        for name, window in (("still", "null"), ("seen", "[2, 5]"))
    )
    assert not (still / "profile").exists()
    assert losses(still) == losses(seen)
    weights = [load_file(run / "checkpoints/step-000012/model.safetensors") for run in (still, seen)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    ((name, names),) = traces(seen).items()
    assert updates(names) == [3, 4, 5]
    assert [names[phase] for phase in ("forward", "loss", "backward", "update")] == [6, 6, 6, 3]
    assert [names[phase] for phase in ("evaluate", "save")] == [1, 1]  # after update 4
    table = seen / "profile/steps-000003-000005.txt"
    rows = re.findall(r"^ +(?!Name)(\S+) +[\d.]+%", table.read_text(), re.MULTILINE)
    assert len(rows) == 15
    assert any(row.startswith("aten::") for row in rows)
    assert (
        f"profile of updates 3 … 5: {seen / 'profile' / name}, for https://ui.perfetto.dev" in capsys.readouterr().out
    )


def test_what_lies_in_the_window_is_written_wherever_the_run_starts_and_ends(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny({"train.max_iters": 5, "log.profile": "[0, 8]"}))
    train(tiny({"train.max_iters": 7, "log.profile": "[2, 30]"}))
    train(tiny({"train.max_iters": 9, "log.profile": "[0, 7]"}))
    assert "log.profile: [0, 7] lies outside of steps 7 … 9; nothing is recorded" in capsys.readouterr().out
    found = {name: updates(names) for name, names in traces(run).items()}
    assert found == {
        "steps-000001-000005.pt.trace.json.gz": [1, 2, 3, 4, 5],
        "steps-000006-000007.pt.trace.json.gz": [6, 7],
    }


def test_only_the_first_process_records(tiny_arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    short = {"train.max_iters": 3, "eval.batches": 1, "log.profile": "[1, 2]"}
    statuses, errors = finish(start_together([tiny_arguments(short)] * 2))
    assert statuses == [0, 0]
    assert errors == ["", ""]
    ((_, names),) = traces(tmp_path / "run").items()
    assert updates(names) == [2]


def test_a_run_that_cannot_write_its_profile_goes_on(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/profile").write_text("in the way")
    train(tiny({"log.profile": "[1, 2]"}))
    assert len(losses(tmp_path / "run")) == 12
    assert [record.message for record in caplog.records if "the profile cannot be written" in record.message]


@pytest.mark.parametrize("window", ["[3, 3]", "[5, 2]", "[-1, 3]", "[1]", "[1, 2, 3]", "[1.5, 2]", "7", "first"])
def test_a_window_that_is_none_is_refused_by_its_name(window: str, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"log\.profile: "):
        tiny({"log.profile": window})
