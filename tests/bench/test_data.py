"""The data benchmark: all ways make the same tokens, what it writes down was measured, and it leaves nothing behind."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dist_train.bench import data as benchmark
from dist_train.bench.apart import PeakMemory, run_apart
from dist_train.bench.data import bench_data
from dist_train.bench.shard_ways import WAYS
from dist_train.config import Settings
from dist_train.config_file import load_settings
from dist_train.data.manifest import Manifest, open_tokens
from dist_train.errors import UserError
from dist_train.sections import DataSettings
from tests.conftest import ROOT

TEXTS = [f"{number} " + "the same words, " * number for number in range(1, 41)]
TEXT_BYTES = sum(map(len, TEXTS))


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    """Settings of a benchmark of `TEXTS` as bytes, and a folder of its own for temporary files."""
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = tmp_path / "bench.yaml"
    config.write_text("data: {source: files, tokenizer: bytes, workers: 2}")

    def load(**data: Any) -> Settings:
        values = {"data.path": source, **{f"data.{key}": value for key, value in data.items()}}
        overrides = [f"--{key}={value}" for key, value in values.items()]
        return load_settings(config, [*overrides, f"--run.out_dir={tmp_path / 'run'}"])

    return load


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def corpus(settings: Callable[..., Settings], tmp_path: Path) -> DataSettings:
    """Settings that make shards of 50,000 tokens of 200 kB of `TEXTS`."""
    data = settings(shard_tokens=50_000).data
    return benchmark._prepared_from(
        benchmark._write_corpus(data, tmp_path / "corpus.parquet", 200_000), data, tmp_path / "shards"
    )


def test_it_writes_what_it_measured_and_leaves_nothing_else(
    settings: Callable[..., Settings], scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bench_data(settings(), min_text_bytes=200_000, blocks=2, batches=20)
    results = json.loads(path.read_text())
    assert path == settings().run.out_dir / "bench_data.json"
    assert list(scratch.iterdir()) == []
    assert results["text_bytes"] >= 200_000
    assert results["distinct_text_bytes"] == TEXT_BYTES
    assert results["workers"] == 2

    ways, clocks = results["ways"], {"ours": "process_seconds", "pool": "seconds", "bare": "seconds"}
    assert list(ways) == list(clocks)
    for name, way in ways.items():
        assert way["seconds"] == statistics.median(block[clocks[name]] for block in way["blocks"])
        assert all(0 < block["seconds"] < block["process_seconds"] for block in way["blocks"])
        assert len(way["blocks"]) == 2
        assert way["tokens_per_second"] * way["seconds"] == pytest.approx(way["blocks"][0]["tokens"])
        assert way["text_mb_per_second"] * way["seconds"] == pytest.approx(results["text_bytes"] / 1e6)
    speeds = {name: way["tokens_per_second"] for name, way in ways.items()}

    read_bytes = 20 * 64 * 257 * 2
    for row in results["windows"].values():
        assert len(row["reading_seconds"]) == 10
        assert row["gb_per_second"] == pytest.approx(read_bytes / 1e9 / statistics.median(row["reading_seconds"]))
        assert row["delivered_gb_per_second"] == pytest.approx(4 * row["gb_per_second"])
    stream, loop = (results["windows"][name]["gb_per_second"] for name in ("stream", "memmap_loop"))
    assert results["windows_gb_per_second"] == stream
    assert results["ratios"] == {
        "ours_over_pool": speeds["ours"] / speeds["pool"],
        "ours_over_workers_times_bare": speeds["ours"] / (2 * speeds["bare"]),
        "windows_over_memmap_loop": stream / loop,
    }
    if Path("/proc").is_dir():
        assert results["prepare_peak_bytes"] == max(block["peak_bytes"] for block in ways["ours"]["blocks"])
        assert 10e6 < results["prepare_peak_bytes"] < 1e9
    assert {"config", "python", "tiktoken", "numpy", "pyarrow", "torch", "cpu_count", "date"} <= results.keys()
    assert "bare" in (printed := capsys.readouterr().out)
    assert "memmap_loop" in printed


def test_all_ways_make_the_same_tokens(corpus: DataSettings) -> None:
    texts = pq.read_table(corpus.path).column("text").to_pylist()
    expected = [token for text in texts for token in [256, *text.encode()]]
    n_tokens = {}
    for name, way in WAYS.items():
        block = run_apart(way, corpus.model_copy(update={"dir": corpus.dir / name} if name != "ours" else {}))
        n_tokens[name] = block.tokens
    assert n_tokens == {"ours": len(expected), "pool": len(expected), "bare": len(expected) - len(texts)}
    shards = [np.fromfile(path, "<u2") for path in sorted((corpus.dir / "pool").iterdir())]
    assert [len(shard) for shard in shards[:-1]] == [50_000] * (len(expected) // 50_000)
    assert np.concatenate(shards).tolist() == expected


def test_both_readers_return_the_same_windows(corpus: DataSettings) -> None:
    WAYS["ours"](corpus)
    manifest = Manifest.read(corpus.dir)
    assert manifest
    plain = np.memmap(corpus.dir / manifest.train.shards[0].file, "<u2", "r", offset=1024)
    starts = np.array([0, 123, 49_743])
    assert np.array_equal(
        benchmark._batch_by_sample(plain, starts), open_tokens(corpus).train.windows(starts, benchmark._WINDOW_TOKENS)
    )


def test_the_corpus_repeats_the_first_documents_under_new_ids(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    corpus = benchmark._write_corpus(settings(max_documents=3).data, tmp_path / "corpus.parquet", 200_000)
    rows = pq.read_table(corpus.path).to_pydict()
    assert rows["text"] == TEXTS[:3] * (corpus.documents // 3)
    assert len(set(rows["id"])) == len(rows["id"]) == corpus.documents
    assert sum(map(len, rows["text"])) == corpus.text_bytes
    assert 200_000 <= corpus.text_bytes < 200_000 + sum(map(len, TEXTS[:3]))
    assert pq.ParquetFile(corpus.path).metadata.row_group(0).num_rows == 1_000


def test_of_a_large_source_only_what_is_needed_is_read(settings: Callable[..., Settings], tmp_path: Path) -> None:
    corpus = benchmark._write_corpus(settings().data, tmp_path / "corpus.parquet", len(TEXTS[0]) + 1)
    assert pq.read_table(corpus.path).column("text").to_pylist() == TEXTS[:2]


def test_nothing_is_left_after_an_interruption(
    settings: Callable[..., Settings], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def interrupted(way: object, data: DataSettings) -> None:
        data.dir.mkdir()
        seen.extend(path.name for folder in scratch.iterdir() for path in folder.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "run_apart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_data(settings(), min_text_bytes=1_000)
    assert sorted(seen) == ["corpus.parquet", "shards"]
    assert list(scratch.iterdir()) == []
    assert not (settings().run.out_dir / "bench_data.json").exists()


def test_a_mistake_met_in_another_process_stays_one_line(settings: Callable[..., Settings], scratch: Path) -> None:
    with pytest.raises(UserError, match="there is no 'nonsense'"):
        bench_data(settings(tokenizer="nonsense"), min_text_bytes=1_000)
    assert list(scratch.iterdir()) == []


def test_a_source_without_text_is_a_mistake(settings: Callable[..., Settings], tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(UserError, match="has no text to measure with"):
        bench_data(settings(path=empty), min_text_bytes=1_000)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs a /proc")
def test_memory_counts_the_children_of_children() -> None:
    code = "block = b'x' * 64_000_000; print('ready', flush=True); input()"
    shell = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, code]
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        with PeakMemory(process.pid) as memory:
            process.communicate("\n")
    assert memory.peak_bytes is not None
    assert 64e6 < memory.peak_bytes < 120e6


def test_the_ready_made_benchmark_takes_text_that_is_everywhere() -> None:
    settings = load_settings(ROOT / "configs/bench_data.yaml")
    assert (settings.data.source, settings.data.tokenizer) == ("python-web", "gpt2")
    assert benchmark.MIN_TEXT_BYTES >= 200e6
