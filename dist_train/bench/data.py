"""Speed of preparing and of reading data, side by side with the usual ways to do both."""

import importlib.metadata
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dist_train.bench.apart import Block, run_apart
from dist_train.bench.shard_ways import WAYS
from dist_train.config import Settings
from dist_train.data.corpora import open_corpus
from dist_train.data.documents import Document
from dist_train.data.encode import count_workers
from dist_train.data.manifest import Manifest
from dist_train.data.shards import HEADER_BYTES, OpenShard, TokenStream
from dist_train.errors import UserError
from dist_train.sections import DataSettings
from dist_train.storage import write_results

# Blocks of all that is compared alternate, A B C A B C …, so that a machine which slows down meanwhile slows all of it.
_BLOCKS = 3
MIN_TEXT_BYTES = 400_000_000
_ROW_GROUP_ROWS = 1_000
"""As in FineWeb's files."""

_WINDOW_TOKENS = 257
_WINDOWS_PER_BATCH = 64
_READINGS = 5
"""Of windows, in each block."""


class Corpus(NamedTuple):
    """The text that all ways read, in one parquet file."""

    path: Path
    documents: int
    text_bytes: int
    distinct_text_bytes: int


def bench_data(
    settings: Settings, min_text_bytes: int = MIN_TEXT_BYTES, blocks: int = _BLOCKS, batches: int = 1_000
) -> Path:
    """Race `prepare` and reading windows against the usual ways; return the `bench_data.json` that says how they did.

    The text is that of `data.source`, repeated to `min_text_bytes`; one reading of windows has `batches`.
    Needs about `min_text_bytes` on the disk of temporary files, and frees them. Raises `DistTrainError`.
    """
    path = settings.run.out_dir / "bench_data.json"
    ways: dict[str, list[Block]] = {name: [] for name in WAYS}
    readings: dict[str, list[float]] = {"stream": [], "memmap_loop": []}
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder, Console().status("writing the corpus") as status:
        corpus = _write_corpus(settings.data, Path(folder) / "corpus.parquet", min_text_bytes)
        data = _prepared_from(corpus, settings.data, Path(folder) / "shards")
        for number in range(blocks):
            for name, way in WAYS.items():
                status.update(f"block {number + 1} of {blocks}: {name}")
                ways[name].append(run_apart(way, data))
                if name == "ours":
                    token_bytes = _time_windows(data.dir, batches, seed=number, readings=readings)
                shutil.rmtree(data.dir, ignore_errors=True)
    read_bytes = batches * _WINDOWS_PER_BATCH * _WINDOW_TOKENS * token_bytes
    results = _results(settings, data.workers, corpus, ways, _windows(readings, read_bytes, token_bytes))
    write_results(path, results)
    for table in _tables(results):
        Console().print(table)
    print(f"bench_data.json  {path}")
    return path


# ---- the corpus ------------------------------------------------------------------------------------------------------


def _write_corpus(data: DataSettings, path: Path, min_text_bytes: int) -> Corpus:
    """Write the source's texts to a parquet file like FineWeb's, again and again until they are `min_text_bytes`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = list(_first_texts(data, min_text_bytes))
    distinct_bytes = sum(map(len, texts))
    if not distinct_bytes:
        raise UserError(f"data.source: {data.source} has no text to measure with; choose another --data.source")
    # Repeating is fair because no way remembers a text: to each of them the second copy is as new as the first.
    # Under an id of its own, since `prepare` holds documents out by their ids.
    copies = -(-min_text_bytes // distinct_bytes)
    every_text = (text for _ in range(copies) for text in texts)
    rows = 0
    with pq.ParquetWriter(path, pa.schema([("text", pa.string()), ("id", pa.string())]), compression="snappy") as file:
        while group := list(islice(every_text, _ROW_GROUP_ROWS)):
            ids = [f"document-{row}" for row in range(rows, rows + len(group))]
            file.write_table(pa.table({"text": pa.array(group, pa.string()), "id": ids}))
            rows += len(group)
    return Corpus(path, rows, copies * distinct_bytes, distinct_bytes)


def _first_texts(data: DataSettings, max_bytes: int) -> Iterator[bytes]:
    """Yield the source's texts in UTF-8 until there are `max_bytes`."""
    size = 0
    documents = (document for document in open_corpus(data).read() if isinstance(document, Document))
    for document in islice(documents, data.max_documents):
        text = document.text.encode(errors="replace")
        yield text
        size += len(text)
        if size >= max_bytes:
            return


def _prepared_from(corpus: Corpus, data: DataSettings, folder: Path) -> DataSettings:
    """Return settings that prepare all of the corpus into `folder`, by a number of workers that is the same for all."""
    source = {"source": "files", "path": str(corpus.path), "text_column": "text", "revision": None}
    bounds = {"max_documents": None, "max_tokens": None}
    return data.model_copy(update={**source, **bounds, "workers": count_workers(data), "dir": folder})


# ---- windows ---------------------------------------------------------------------------------------------------------


def _time_windows(folder: Path, batches: int, seed: int, readings: dict[str, list[float]]) -> int:
    """Add the seconds of alternating readings of the same random windows; return the bytes of a stored token."""
    manifest = Manifest.read(folder)
    assert manifest is not None
    paths = [folder / shard.file for shard in manifest.train.shards]
    shards = [OpenShard(path) for path in paths]
    plain = np.memmap(paths[0], shards[0].tokens.dtype, "r", offset=HEADER_BYTES)
    for tokens in (*(shard.tokens for shard in shards), plain):
        tokens.max()  # brings every page into the cache, and into each of the maps
    stream = TokenStream(shards)
    # Within the first shard, which is all that the loop over one memory map reads.
    last = len(plain) - _WINDOW_TOKENS
    starts_NB = np.random.default_rng(seed).integers(0, last, (batches, _WINDOWS_PER_BATCH), endpoint=True)
    for _ in range(_READINGS):
        started = time.perf_counter()
        for starts_B in starts_NB:
            torch.from_numpy(stream.windows(starts_B, _WINDOW_TOKENS))
        between = time.perf_counter()
        for starts_B in starts_NB:
            _batch_by_sample(plain, starts_B)
        readings["stream"].append(between - started)
        readings["memmap_loop"].append(time.perf_counter() - between)
    return plain.itemsize


def _batch_by_sample(tokens: np.ndarray, starts: np.ndarray) -> torch.Tensor:
    """Return windows [B, T+1] as nanoGPT's `get_batch` does, one after the other; only its map is not opened anew."""
    return torch.stack(
        [torch.from_numpy(tokens[start : start + _WINDOW_TOKENS].astype(np.int64)) for start in starts.tolist()]
    )


# ---- results ---------------------------------------------------------------------------------------------------------


def _results(
    settings: Settings,
    workers: int | None,
    corpus: Corpus,
    blocks: dict[str, list[Block]],
    windows: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Return what `bench_data.json` holds; what cannot be known here is None."""
    assert workers is not None
    ways = {name: _way(name, taken, corpus) for name, taken in blocks.items()}
    speeds = {name: way["tokens_per_second"] for name, way in ways.items()}
    stream, loop = (windows[name]["gb_per_second"] for name in ("stream", "memmap_loop"))
    return {
        "config": settings.model_dump(mode="json"),
        "documents": corpus.documents,
        "text_bytes": corpus.text_bytes,
        "distinct_text_bytes": corpus.distinct_text_bytes,
        "workers": workers,
        "ways": ways,
        "windows": windows,
        "ratios": {
            "ours_over_pool": speeds["ours"] / speeds["pool"],
            "ours_over_workers_times_bare": speeds["ours"] / (workers * speeds["bare"]),
            "windows_over_memmap_loop": stream / loop,
        },
        "windows_gb_per_second": stream,
        "prepare_peak_bytes": ways["ours"]["peak_bytes"],
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("tiktoken", "numpy", "pyarrow", "torch")},
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _way(name: str, blocks: list[Block], corpus: Corpus) -> dict[str, Any]:
    # Ours as the command that it is, with Python's start; what it is compared with from its first line on.
    seconds = statistics.median(block.process_seconds if name == "ours" else block.seconds for block in blocks)
    peaks = [block.peak_bytes for block in blocks if block.peak_bytes is not None]
    return {
        "seconds": seconds,
        "tokens_per_second": blocks[0].tokens / seconds,
        "text_mb_per_second": corpus.text_bytes / seconds / 1e6,
        "peak_bytes": max(peaks, default=None),
        "blocks": [block._asdict() for block in blocks],
    }


def _windows(readings: dict[str, list[float]], read_bytes: int, token_bytes: int) -> dict[str, dict[str, Any]]:
    """Return how fast windows came, counted in bytes as they are stored and as they are delivered, in int64."""
    speeds = {name: read_bytes / statistics.median(seconds) / 1e9 for name, seconds in readings.items()}
    return {
        name: {
            "gb_per_second": speed,
            "delivered_gb_per_second": speed * 8 / token_bytes,
            "reading_seconds": readings[name],
        }
        for name, speed in speeds.items()
    }


def _tables(results: dict[str, Any]) -> Iterator[Table]:
    """Yield what was measured, the ways beside each other."""
    ratios, workers, blocks = results["ratios"], results["workers"], len(results["ways"]["ours"]["blocks"])
    table = _table(
        f"{results['text_bytes'] / 1e6:,.0f} MB of text to tokens, {workers} workers: medians of {blocks} blocks",
        f"ours is {ratios['ours_over_pool']:.2f} × the pool, "
        f"and {ratios['ours_over_workers_times_bare']:.0%} of {workers} × the bare loop",
        "M tokens/s",
        "MB/s",
        "seconds",
        "peak MiB",
    )
    for name, way in results["ways"].items():
        peak = "–" if way["peak_bytes"] is None else f"{way['peak_bytes'] / 2**20:,.0f}"
        speeds = way["tokens_per_second"] / 1e6, way["text_mb_per_second"], way["seconds"]
        table.add_row(name, *(f"{speed:,.2f}" for speed in speeds), peak)
    yield table
    table = _table(
        f"windows of {_WINDOW_TOKENS} tokens in batches of {_WINDOWS_PER_BATCH}",
        f"the stream is {ratios['windows_over_memmap_loop']:.1f} × the loop over a memory map",
        "GB/s as stored",
        "GB/s as delivered",
    )
    for name, row in results["windows"].items():
        table.add_row(name, f"{row['gb_per_second']:.2f}", f"{row['delivered_gb_per_second']:.2f}")
    yield table


def _table(title: str, caption: str, *headings: str) -> Table:
    table = Table("", title=title, caption=caption, box=SIMPLE_HEAD, collapse_padding=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
