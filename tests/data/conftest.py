import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.sections import DataSettings


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the project, or a skip."""
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared/data")
    return folder


@pytest.fixture
def gpt2_vocabulary(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """tiktoken's vocabulary files; a copy, because tiktoken deletes a file whose hash is wrong."""
    folder = tmp_path_factory.mktemp("tiktoken") / "cache"
    shutil.copytree(shared_data / "tiktoken-cache", folder)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def time_machine(shared_data: Path) -> str:
    return (shared_data / "book" / "time_machine_gutenberg35.txt").read_text(encoding="utf-8")


@pytest.fixture
def data_settings(tmp_path: Path) -> Callable[..., DataSettings]:
    """Settings of data that goes to `tmp_path / "data"`, of bytes unless said otherwise."""

    def make(**changes: Any) -> DataSettings:
        if "path" in changes:
            changes = {"source": "files", **changes, "path": str(changes["path"])}
        return DataSettings(**{"dir": tmp_path / "data", "tokenizer": "bytes", **changes})

    return make
