"""Documents to shards and a manifest: all of them or nothing."""

import base64
import hashlib
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dist_train.config import DataSettings
from dist_train.data.corpora import open_corpus
from dist_train.data.manifest import is_prepared, open_tokens
from dist_train.data.prepare import prepare
from dist_train.data.tokenizer import decode, encode_document, load_tokenizer
from dist_train.errors import StorageError, UserError

MakeSettings = Callable[..., DataSettings]
BYTES = load_tokenizer("bytes")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """200 documents of various lengths."""
    path = tmp_path / "corpus.jsonl"
    write_lines(path, [f"document {number} " + "ü" * (number % 17) for number in range(200)])
    return path


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def tokens_on_disk(settings: DataSettings, split: str) -> list[int]:
    """All tokens of a split, read as the format says and not by the project."""
    files = sorted(settings.dir.glob(f"{split}_*.bin"))
    return np.concatenate([np.fromfile(file, dtype="<u2", offset=1024) for file in files]).tolist()


def documents_on_disk(settings: DataSettings, split: str) -> list[str]:
    """The texts of a split in order, for tokens that are bytes."""
    texts = decode(BYTES, tokens_on_disk(settings, split)).split("<|endoftext|>")
    assert texts[0] == ""
    return texts[1:]


# ---- what is written -------------------------------------------------------------------------------------------------


def test_tokens_are_end_of_text_and_encoding_of_each_document_in_order(
    corpus: Path, data_settings: MakeSettings
) -> None:
    settings = data_settings(path=corpus, shard_tokens=500)
    prepare(settings)
    texts = [document.text for document in open_corpus(settings).documents]
    train, val = (documents_on_disk(settings, split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts)
    for split, part in (("train", train), ("val", val)):
        assert part == [text for text in texts if text in set(part)]
        expected = [token for text in part for token in encode_document(BYTES, text).tolist()]
        assert tokens_on_disk(settings, split) == expected


def test_the_manifest_counts_and_hashes_what_is_there(corpus: Path, data_settings: MakeSettings) -> None:
    settings = data_settings(path=corpus, shard_tokens=500, val_fraction=0.2)
    manifest = prepare(settings).manifest
    read = json.loads((settings.dir / "manifest.json").read_text())
    assert {file.name for file in settings.dir.iterdir()} == {"manifest.json"} | {
        shard["file"] for split in ("train", "val") for shard in read[split]["shards"]
    }
    for split in ("train", "val"):
        assert read[split]["tokens"] == len(tokens_on_disk(settings, split)) == getattr(manifest, split).tokens
        assert read[split]["documents"] == len(documents_on_disk(settings, split))
        assert read[split]["tokens"] == sum(shard["tokens"] for shard in read[split]["shards"])
        assert [shard["tokens"] for shard in read[split]["shards"][:-1]] == [500] * (len(read[split]["shards"]) - 1)
        for shard in read[split]["shards"]:
            data = (settings.dir / shard["file"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]
            assert len(data) == 1024 + 2 * shard["tokens"]
    assert read["tokenizer"] == {**read["tokenizer"], "name": "bytes", "n_vocab": 257, "end_of_text": 256}
    assert read["source"] == {**read["source"], "source": "files", "path": str(corpus), "val_fraction": 0.2}


def test_about_the_asked_for_share_of_documents_is_held_out(tmp_path: Path, data_settings: MakeSettings) -> None:
    write_lines(tmp_path / "many.jsonl", [""] * 5000)
    manifest = prepare(data_settings(path=tmp_path / "many.jsonl", val_fraction=0.1)).manifest
    assert 430 < manifest.val.documents < 570  # three standard deviations
    assert manifest.train.documents + manifest.val.documents == 5000


def test_where_a_document_belongs_hangs_on_its_id_alone(tmp_path: Path, data_settings: MakeSettings) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"m{number:02d}.txt").write_text(f"document {number}")
    alone = data_settings(path=folder, dir=tmp_path / "alone", val_fraction=0.3)
    prepare(alone)
    for number in range(30):
        (folder / f"a{number:02d}.txt").write_text(f"earlier {number}")
        (folder / f"z{number:02d}.txt").write_text(f"later {number}")
    among_others = data_settings(path=folder, dir=tmp_path / "others", val_fraction=0.3)
    prepare(among_others)
    some = data_settings(path=folder, dir=tmp_path / "some", val_fraction=0.3, max_documents=50)
    prepare(some)
    for split in ("train", "val"):
        everything = documents_on_disk(among_others, split)
        assert [text for text in everything if text.startswith("document")] == documents_on_disk(alone, split)
        first = documents_on_disk(some, split)
        assert first == everything[: len(first)]


def test_files_of_one_name_in_many_folders_are_not_all_on_one_side(tmp_path: Path, data_settings: MakeSettings) -> None:
    for number in range(40):
        (tmp_path / "pages" / str(number)).mkdir(parents=True)
        (tmp_path / "pages" / str(number) / "index.txt").write_text("page")
    manifest = prepare(data_settings(path=tmp_path / "pages", val_fraction=0.5)).manifest
    assert 8 < manifest.val.documents < 32


def test_the_last_tenth_of_a_single_text_is_held_out(tmp_path: Path, data_settings: MakeSettings) -> None:
    text = "".join(chr(97 + number % 26) for number in range(999))
    (tmp_path / "book.txt").write_text(text)
    settings = data_settings(path=tmp_path / "book.txt")
    manifest = prepare(settings).manifest
    assert tokens_on_disk(settings, "train") == [256, *text[:899].encode()]
    assert tokens_on_disk(settings, "val") == [256, *text[899:].encode()]  # 100 of 1000 tokens, after end-of-text
    assert (manifest.train.documents, manifest.val.documents) == (1, 1)


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_the_time_machine_in_gpt2s_tokens(shared_data: Path, time_machine: str, data_settings: MakeSettings) -> None:
    book = shared_data / "book" / "time_machine_gutenberg35.txt"
    settings = data_settings(path=book, tokenizer="gpt2")
    prepare(settings)
    expected = encode_document(load_tokenizer("gpt2"), time_machine).tolist()
    assert tokens_on_disk(settings, "train") + tokens_on_disk(settings, "val")[1:] == expected
    assert len(tokens_on_disk(settings, "val")) == 1 + 4977


def test_python_docs_are_prepared_with_the_version_they_are_of(data_settings: MakeSettings) -> None:
    manifest = prepare(data_settings(source="python-docs")).manifest
    assert manifest.source["revision"] == sys.version.split()[0]
    assert manifest.val.tokens == pytest.approx(manifest.train.tokens / 9, rel=1e-3)


# ---- a second time ---------------------------------------------------------------------------------------------------


def test_a_second_prepare_touches_nothing_and_says_so(corpus: Path, data_settings: MakeSettings) -> None:
    settings = data_settings(path=corpus)
    first = prepare(settings)
    before = {file: file.stat().st_mtime_ns for file in [settings.dir, *settings.dir.iterdir()]}
    corpus.unlink()  # nor does it read anything
    second = prepare(settings)
    assert first.is_new
    assert not second.is_new
    assert second.manifest == first.manifest
    assert {file: file.stat().st_mtime_ns for file in [settings.dir, *settings.dir.iterdir()]} == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_documents": 100}, "max_documents=None, not 100"),
        ({"val_fraction": 0.2}, "val_fraction=0.1, not 0.2"),
        ({"shard_tokens": 1000}, "shard_tokens=100000000, not 1000"),
        ({"text_column": "body"}, "text_column='text', not 'body'"),
        ({"tokenizer": "gpt2"}, "tokenizer='bytes', not 'gpt2'"),
        ({"path": "elsewhere.jsonl"}, "not 'elsewhere.jsonl'"),
    ],
)
def test_other_settings_are_refused_by_name(
    corpus: Path, data_settings: MakeSettings, changes: dict[str, object], named: str
) -> None:
    prepare(data_settings(path=corpus))
    for use in (prepare, open_tokens):
        with pytest.raises(UserError, match=named):
            use(data_settings(**{"path": corpus, **changes}))


def test_a_tokenizer_file_that_has_changed_is_noticed(
    tmp_path: Path, corpus: Path, data_settings: MakeSettings
) -> None:
    path = tmp_path / "mine.tiktoken"
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    path.write_text("\n".join(lines))
    settings = data_settings(path=corpus, tokenizer=str(path))
    prepare(settings)
    open_tokens(settings)
    path.write_text("\n".join([*lines, "ZG8= 256"]))  # "do", which "document" has
    with pytest.raises(UserError, match=r"another content of tokenizer='.*mine\.tiktoken'"):
        open_tokens(settings)


def test_two_that_prepare_the_same_at_once_both_succeed(corpus: Path, data_settings: MakeSettings) -> None:
    settings = data_settings(path=corpus)
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: prepare(settings), range(4)))
    assert [result.manifest for result in results] == [results[0].manifest] * 4
    assert sum(result.is_new for result in results) == 1
    assert {path.name for path in settings.dir.parent.iterdir()} == {"data", corpus.name}


# ---- failing ---------------------------------------------------------------------------------------------------------


def assert_nothing_is_left(settings: DataSettings, *others: Path) -> None:
    assert {path.name for path in settings.dir.parent.iterdir()} == {path.name for path in others}


def test_a_bad_document_at_the_end_leaves_nothing_behind(corpus: Path, data_settings: MakeSettings) -> None:
    with corpus.open("a") as file:
        file.write('{"text": "never clo')
    settings = data_settings(path=corpus, shard_tokens=500)
    with pytest.raises(UserError, match="line 201"):
        prepare(settings)
    assert_nothing_is_left(settings, corpus)


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_a_document_that_cannot_be_tokenized_is_named(tmp_path: Path, data_settings: MakeSettings) -> None:
    path = tmp_path / "spaces.jsonl"
    write_lines(path, ["good", "x" + " " * 2_000_000 + "y"])  # more than the splitting pattern can look ahead
    settings = data_settings(path=path, tokenizer="gpt2")
    with pytest.raises(UserError, match=r"spaces\.jsonl:1"):
        prepare(settings)
    assert_nothing_is_left(settings, path)


def test_a_part_without_documents_is_a_mistake(tmp_path: Path, data_settings: MakeSettings) -> None:
    write_lines(tmp_path / "few.jsonl", ["only one"])
    settings = data_settings(path=tmp_path / "few.jsonl")
    with pytest.raises(UserError, match=r"of 1 documents none is in the (train|val) part"):
        prepare(settings)
    assert_nothing_is_left(settings, tmp_path / "few.jsonl")


def test_a_place_that_cannot_be_written_is_a_storage_error(
    tmp_path: Path, corpus: Path, data_settings: MakeSettings
) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file" / "data", tmp_path / "file" / "deeper" / "data"):
        with pytest.raises(StorageError, match=r"cannot write .*data"):
            prepare(data_settings(path=corpus, dir=folder))


@pytest.mark.parametrize("name", ["notes.txt", "fineweb_train_000001.bin"])
def test_a_folder_with_other_things_in_it_is_refused_before_any_work(
    tmp_path: Path, data_settings: MakeSettings, name: str
) -> None:
    settings = data_settings(path=tmp_path / "does not exist.txt")
    settings.dir.mkdir()
    (settings.dir / name).write_bytes(b"mine")
    with pytest.raises(UserError, match=r"data\.dir.*data"):
        prepare(settings)
    assert (settings.dir / name).read_bytes() == b"mine"
    with pytest.raises(UserError, match=rf"data\.dir.*{name}"):
        prepare(data_settings(path=tmp_path, dir=settings.dir / name))


def test_an_empty_folder_is_a_good_place(corpus: Path, data_settings: MakeSettings) -> None:
    settings = data_settings(path=corpus)
    settings.dir.mkdir()
    assert not is_prepared(settings.dir)
    assert prepare(settings).is_new
    assert is_prepared(settings.dir)


# ---- costs -----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, data_settings: MakeSettings) -> None:
    text = "All work and no play makes Jack a dull boy. " * 4000
    write_lines(tmp_path / "large.jsonl", [text] * 150)
    size = (tmp_path / "large.jsonl").stat().st_size
    settings = data_settings(path=tmp_path / "large.jsonl", shard_tokens=4_000_000)
    tracemalloc.start()
    prepare(settings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 25_000_000
    assert peak < 8_000_000


def test_the_data_room_imports_nothing_heavy() -> None:
    script = """
import sys
from dist_train.data import corpora, manifest, prepare, shards, tokenizer, windows
print(*sorted({"torch", "datasets", "pyarrow", "huggingface_hub"} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.split() == []
