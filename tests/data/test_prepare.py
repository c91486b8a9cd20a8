"""Documents to shards and a manifest: all of them or nothing."""

import base64
import errno
import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dist_train.data import documents, encode, from_documents
from dist_train.data import prepare as prepare_module
from dist_train.data.content import FILE as VERIFIED
from dist_train.data.corpora import open_corpus
from dist_train.data.documents import Corpus, Document, Piece
from dist_train.data.encode import Encoded, Encoder
from dist_train.data.journal import Journal
from dist_train.data.manifest import is_prepared, open_tokens
from dist_train.data.plan import plan
from dist_train.data.prepare import partial_folder, prepare
from dist_train.data.tokenizer import decode, encode_document, load_tokenizer
from dist_train.errors import ProcessLostError, StorageError, UserError
from dist_train.sections import DataSettings

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


def contents(folder: Path) -> dict[str, bytes]:
    """All but the record of what was verified, which says when each file was written."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != VERIFIED}


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
    texts = [document.text for document in open_corpus(settings).read() if isinstance(document, Document)]
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
    assert {file.name for file in settings.dir.iterdir()} == {"manifest.json", "corpus.json", VERIFIED} | {
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
    write_lines(tmp_path / "many.jsonl", ["x"] * 5000)
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


def test_a_single_text_of_many_pieces_has_the_tokens_of_the_whole(
    shared_data: Path, gpt2_vocabulary: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = shared_data / "book" / "time_machine_gutenberg35.txt"
    whole, parts = (data_settings(path=book, tokenizer="gpt2", dir=gpt2_vocabulary / name) for name in ("a", "b"))
    prepare(whole)
    monkeypatch.setattr(documents, "PIECE_BYTES", 10_000)
    prepare(parts)
    assert contents(parts.dir) == contents(whole.dir)


# ---- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_bytes", [1_000_000, 300])
@pytest.mark.parametrize("bound", [{"max_documents": 57}, {"max_tokens": 1000}, {"max_documents": 9999}])
def test_a_bound_keeps_the_first_of_the_source(
    corpus: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, piece_bytes: int, bound: dict[str, int]
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    everything = data_settings(path=corpus, dir=corpus.parent / "everything")
    bounded = data_settings(path=corpus, **bound)
    prepare(everything)
    manifest = prepare(bounded).manifest
    for split in ("train", "val"):
        first, all_ = tokens_on_disk(bounded, split), tokens_on_disk(everything, split)
        assert first == all_[: len(first)]
    n_documents, n_tokens = (
        sum(getattr(part, name) for part in (manifest.train, manifest.val)) for name in ("documents", "tokens")
    )
    if "max_tokens" in bound:
        assert n_tokens == 1000
    else:
        assert n_documents == min(200, bound["max_documents"])


def test_what_lies_beyond_a_bound_is_not_read(
    corpus: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 300)
    read = []
    encode_piece = Encoder.__call__

    def count(encoder: Encoder, piece: Piece, first: int = 0) -> Encoded:
        read.append(piece)
        return encode_piece(encoder, piece, first)

    monkeypatch.setattr(Encoder, "__call__", count)
    prepare(data_settings(path=corpus, max_documents=20, workers=1))
    prepare(data_settings(path=corpus, dir=corpus.parent / "tokens", max_tokens=400, workers=1))
    assert len(read) < 16


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_broken_beyond_a_bound_is_no_mistake(
    tmp_path: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 300)
    (tmp_path / "source").mkdir()
    write_lines(tmp_path / "source" / "a.jsonl", [f"document {number}" for number in range(80)])
    (tmp_path / "source" / "b.parquet").write_bytes(b"broken")
    manifest = prepare(data_settings(path=tmp_path / "source", max_documents=50, workers=workers)).manifest
    assert manifest.train.documents + manifest.val.documents == 50
    with pytest.raises(UserError, match=r"cannot read .*b\.parquet"):
        prepare(data_settings(path=tmp_path / "source", dir=tmp_path / "all", workers=workers))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_texts_of_many_parts_count_as_the_documents_they_are(
    tmp_path: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 1000)
    (tmp_path / "texts").mkdir()
    texts = [f"{number} " + "hello world " * 250 for number in range(4)]
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    settings = data_settings(path=tmp_path / "texts", max_documents=count, val_fraction=0.4)
    manifest = prepare(settings).manifest
    written = {split: documents_on_disk(settings, split) for split in ("train", "val")}
    assert sorted(written["train"] + written["val"]) == texts[:count]
    described = json.loads((settings.dir / "corpus.json").read_text())
    for split, part in (("train", manifest.train), ("val", manifest.val)):
        assert part.documents == described[split]["documents"] == len(written[split])


@pytest.mark.parametrize("most_tokens", [1, 100, 400])
@pytest.mark.parametrize("workers", [1, 2])
def test_pieces_that_are_handed_over_in_parts_are_whole(
    corpus: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, most_tokens: int, workers: int
) -> None:
    whole = data_settings(path=corpus, dir=corpus.parent / "whole")
    prepare(whole)
    if workers > 1:
        monkeypatch.setattr(documents, "PIECE_BYTES", 5000)  # workers have the limit that they were started with
    monkeypatch.setattr(encode, "_MOST_TOKENS", most_tokens)
    monkeypatch.setattr(from_documents, "COMMIT_SECONDS", 0.0)
    settings = data_settings(path=corpus, workers=workers)
    add = Journal.add

    def add_and_stop(journal: Journal, part: Encoded) -> None:
        add(journal, part)
        if journal.n_documents > 100:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_and_stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings)
    prepare(settings)
    assert contents(settings.dir) == contents(whole.dir)


def test_the_last_tenth_of_a_bounded_single_text_is_held_out(tmp_path: Path, data_settings: MakeSettings) -> None:
    (tmp_path / "book.txt").write_text("".join(chr(97 + number % 26) for number in range(5000)))
    settings = data_settings(path=tmp_path / "book.txt", max_tokens=1000, shard_tokens=150)
    manifest = prepare(settings).manifest
    assert (manifest.train.tokens, manifest.val.tokens) == (900, 1 + 100)
    assert tokens_on_disk(settings, "train")[-1] == 97 + 898 % 26
    assert tokens_on_disk(settings, "val")[1] == 97 + 899 % 26


# ---- many processes --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_any_number_of_workers_writes_the_same_bytes(
    shared_data: Path, data_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 500_000)
    parquet = shared_data / "fineweb" / "sample" / "10BT" / "000_00000.parquet"
    written = []
    for workers in (1, 2, 3):
        settings = data_settings(
            path=parquet, dir=tmp_path / str(workers), tokenizer="gpt2", shard_tokens=300_000, workers=workers
        )
        prepare(settings)
        written.append(contents(settings.dir))
    assert len(written[0]) > 8
    assert written[1] == written[0]
    assert written[2] == written[0]


def test_a_worker_that_is_killed_is_named_and_the_rest_kept(
    corpus: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 300)
    monkeypatch.setattr(from_documents, "COMMIT_SECONDS", 0.0)
    settings = data_settings(path=corpus, workers=2)
    add = Journal.add

    def add_and_kill(journal: Journal, part: Encoded) -> None:
        add(journal, part)
        if journal.pieces == 3:
            for child in multiprocessing.active_children():
                child.kill()

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_and_kill)
        with pytest.raises(ProcessLostError, match="worker of prepare was killed"):
            prepare(settings)
    assert not settings.dir.exists()
    unfinished = Journal.read(partial_folder(settings))
    assert unfinished
    assert unfinished.pieces >= 3
    prepare(settings)
    uninterrupted = data_settings(path=corpus, dir=settings.dir.parent / "uninterrupted")
    prepare(uninterrupted)
    assert contents(settings.dir) == contents(uninterrupted.dir)


# ---- interrupted -----------------------------------------------------------------------------------------------------


def begin(settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be interrupted after a few pieces have been written for good."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 300)
    add = Journal.add

    def add_and_stop(journal: Journal, part: Encoded) -> None:
        add(journal, part)
        if journal.pieces == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(from_documents, "COMMIT_SECONDS", 0.0)
        patch.setattr(Journal, "add", add_and_stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings)
    assert not settings.dir.exists()


def test_unfinished_work_of_other_settings_is_refused_and_kept(
    corpus: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = data_settings(path=corpus)
    begin(settings, monkeypatch)
    before = contents(partial_folder(settings))
    with pytest.raises(UserError, match=r"unfinished work in .*\.partial was begun with max_documents=None, not 7"):
        prepare(data_settings(path=corpus, max_documents=7))
    assert contents(partial_folder(settings)) == before


@pytest.mark.parametrize(
    "change",
    [lambda path: path.write_text(path.read_text() + '{"text": "one more"}'), lambda path: os.utime(path, (0, 0))],
    ids=["content", "time alone"],
)
def test_unfinished_work_on_a_source_that_has_changed_is_refused(
    corpus: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    settings = data_settings(path=corpus)
    begin(settings, monkeypatch)
    change(corpus)
    with pytest.raises(UserError, match="has changed since the work in"):
        prepare(settings)


def test_the_revision_that_was_begun_with_is_the_one_gone_on_with(
    corpus: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = data_settings(path=corpus)
    begin(settings, monkeypatch)
    begun = Journal.read(partial_folder(settings))
    opened = []

    def open_and_tell(settings: DataSettings) -> Corpus:
        opened.append(settings.revision)
        return open_corpus(settings)

    monkeypatch.setattr(from_documents, "open_corpus", open_and_tell)
    prepare(settings)
    assert begun
    assert opened == [begun.source["revision"]]


def test_what_only_wants_its_name_is_never_made_again_nor_deleted(
    corpus: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = data_settings(path=corpus)

    def fail(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda old, new: fail() if new == settings.dir else replace(old, new))
        with pytest.raises(StorageError, match="busy"):
            prepare(settings)
    finished = contents(partial_folder(settings))
    with pytest.raises(UserError, match=r"\.data\.partial was prepared with max_documents=None, not 7"):
        prepare(data_settings(path=corpus, max_documents=7))
    assert contents(partial_folder(settings)) == finished
    monkeypatch.setattr(prepare_module, "make_shards", fail)
    prepare(settings)
    assert contents(settings.dir) == finished


def test_what_is_said_to_be_there_is_on_the_disk_before_it_is_said(
    corpus: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 1000)
    monkeypatch.setattr(from_documents, "COMMIT_SECONDS", 0.0)
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        fsync(descriptor)
        done.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def note_replace(source: Path, target: Path) -> None:
        replace(source, target)
        done.append(f"replace {target.name}")

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    prepare(data_settings(path=corpus, shard_tokens=10**6))
    commit = ["sync train_000000.bin", "sync val_000000.bin", "sync .data.partial"]
    journal = ["sync .progress.json.new", "replace progress.json"]
    assert done[:5] == [*commit, *journal]
    end = ["sync .corpus.json.new", "replace corpus.json", "sync .manifest.json.new", "replace manifest.json"]
    end += ["sync ..verified.json.new", "replace .verified.json"]
    end += ["sync .data.partial", "replace data", f"sync {corpus.parent.name}"]
    assert done[-len(end) :] == end
    assert set(done[: -len(end)]) == {*commit, *journal}


@pytest.mark.parametrize("name", [".", ".."])
def test_a_place_that_cannot_be_renamed_to_is_refused_before_any_work(
    tmp_path: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "deeper")
    if name == "..":
        monkeypatch.setattr(Path, "iterdir", lambda _: iter(()))
    with pytest.raises(UserError, match="cannot be renamed to; give a folder inside it"):
        prepare(data_settings(path=tmp_path / "none.txt", dir=Path(name)))


def test_a_link_to_an_empty_folder_is_a_good_place(corpus: Path, data_settings: MakeSettings, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    prepare(data_settings(path=corpus, dir=tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "manifest.json").exists()


def test_shards_that_hold_less_than_the_journal_says_are_refused(
    corpus: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = data_settings(path=corpus)
    begin(settings, monkeypatch)
    shard = partial_folder(settings) / "train_000000.bin"
    os.truncate(shard, 1500)
    with pytest.raises(UserError, match=r"train_000000\.bin holds less than was written to it; delete"):
        prepare(settings)


def test_a_dry_run_writes_nothing_and_says_what_would_be(
    corpus: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = data_settings(path=corpus)
    lines = plan(settings)
    assert {path.name for path in corpus.parent.iterdir()} == {corpus.name}
    manifest = prepare(settings).manifest
    n_tokens = manifest.train.tokens + manifest.val.tokens
    assert f", {n_tokens:,} tokens in 200 documents" in lines["write"]
    assert "about" not in lines["write"]
    assert plan(settings) == {"nothing": f"{settings.dir} is prepared already"}
    monkeypatch.setattr(documents, "PIECE_BYTES", 1000)
    bounded = plan(data_settings(path=corpus, dir=corpus.parent / "other", max_documents=100))["write"]
    n_estimated = int(bounded.split("about ")[1].split(" ")[0].replace(",", ""))
    assert n_estimated == pytest.approx(n_tokens / 2, rel=0.1)
    assert "in 100 documents" in bounded
    assert "about" in plan(data_settings(path=corpus, dir=corpus.parent / "other"))["write"]


def test_a_dry_run_refuses_what_prepare_refuses(
    corpus: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(data_settings(path=corpus), monkeypatch)
    assert "earlier attempt" in plan(data_settings(path=corpus))["go on"]
    with pytest.raises(UserError, match="was begun with max_documents=None, not 7"):
        plan(data_settings(path=corpus, max_documents=7))


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


def test_a_bad_document_is_counted_and_named_or_stops_it_all(corpus: Path, data_settings: MakeSettings) -> None:
    with corpus.open("a") as file:
        file.write('{"text": "never clo\n' + '{"text": null}\n' * 8)
    settings = data_settings(path=corpus, shard_tokens=500)
    with pytest.raises(UserError, match=r"corpus\.jsonl, line 201 is not JSON; .* data\.on_bad_document: skip"):
        prepare(settings.model_copy(update={"on_bad_document": "stop"}))
    assert_nothing_is_left(settings, corpus)
    manifest = prepare(settings).manifest
    assert manifest.train.documents + manifest.val.documents == 200
    assert manifest.source["unreadable"] == 9
    assert [text.split(" ")[2] for text in manifest.source["first_unreadable"]] == ["201", "202", "203", "204", "205"]


def test_a_bad_document_beyond_the_bound_is_none(corpus: Path, data_settings: MakeSettings) -> None:
    with corpus.open("a") as file:
        file.write("bad")
    manifest = prepare(data_settings(path=corpus, max_documents=200, on_bad_document="stop")).manifest
    assert manifest.source["unreadable"] == 0


def test_where_nothing_can_be_read_the_first_reason_is_given(tmp_path: Path, data_settings: MakeSettings) -> None:
    (tmp_path / "all.jsonl").write_text("bad\nworse\n")
    with pytest.raises(UserError, match=r"there is no text in it, 2 cannot be read \(all\.jsonl, line 1 is not JSON\)"):
        prepare(data_settings(path=tmp_path / "all.jsonl"))


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


def test_a_disk_that_is_full_is_status_4_and_the_same_command_goes_on(
    tmp_path: Path, corpus: Path, data_settings: MakeSettings
) -> None:
    (tmp_path / "data.yaml").write_text(f"data: {{source: files, path: {corpus}, tokenizer: bytes, dir: data}}")

    def run(limit: int | None) -> subprocess.CompletedProcess[str]:
        """Let no file grow beyond `limit` bytes."""
        return subprocess.run(
            [sys.executable, "-m", "dist_train", "prepare", "data.yaml"],
            cwd=tmp_path,
            preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    ended = run(8000)
    assert ended.returncode == 4, ended.stderr
    assert ended.stderr.startswith("error: cannot write data: File too large; free space")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()
    assert run(None).returncode == 0
    whole = data_settings(path=corpus, dir=tmp_path / "whole")
    prepare(whole)
    assert tokens_on_disk(whole.model_copy(update={"dir": tmp_path / "data"}), "train") == tokens_on_disk(
        whole, "train"
    )


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


def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 100_000)
    text = "All work and no play makes Jack a dull boy. " * 400
    corpus = tmp_path / "corpus.jsonl"
    sizes, peaks = [], []
    for n_documents in (10, 300, 1500):  # the first loads what is kept: it is not compared
        write_lines(corpus, [text] * n_documents)
        settings = data_settings(path=corpus, dir=tmp_path / str(n_documents), shard_tokens=1_000_000)
        tracemalloc.start()
        prepare(settings)
        sizes.append(corpus.stat().st_size)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A few pieces more or less are under way, as the workers happen to run.
    assert peaks[2] - peaks[1] < (sizes[2] - sizes[1]) / 10


def test_the_data_room_imports_nothing_heavy() -> None:
    script = """
import sys
from dist_train.data import corpora, manifest, prepare, shards, tokenizer, windows
print(*sorted({"torch", "datasets", "pyarrow", "huggingface_hub"} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.split() == []
