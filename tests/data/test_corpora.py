"""Documents from each source, in a fixed order; and what is said when a source is not as it should be."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_train.config import DataSettings
from dist_train.data.corpora import Document, open_corpus
from dist_train.errors import UserError

MakeSettings = Callable[..., DataSettings]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of each kind, one of them deeper, and one that is no text."""
    folder = tmp_path / "corpus"
    (folder / "deeper").mkdir(parents=True)
    (folder / "b.txt").write_bytes("B\r\nüber".encode())
    (folder / "deeper" / "b.txt").write_text("B again")
    write_lines(folder / "a.jsonl", [{"text": "A0"}, {"text": "A1\n", "n": 1}])
    pq.write_table(pa.table({"text": ["C0", None, "C2"], "n": [1, 2, 3]}), folder / "c.parquet")
    (folder / "notes.md").write_text("not read")
    return folder


def write_lines(path: Path, records: list[object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read(settings: DataSettings) -> list[Document]:
    return list(open_corpus(settings).documents)


# ---- embedded --------------------------------------------------------------------------------------------------------


def test_python_docs_are_one_text_the_same_each_time(data_settings: MakeSettings) -> None:
    corpus = open_corpus(data_settings(source="python-docs"))
    (document,) = corpus.documents
    assert corpus.is_single_text
    assert corpus.revision
    assert len(document.text) > 100_000
    assert [document] == read(data_settings(source="python-docs"))
    paragraphs = document.text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)  # or the held-out end would be known from training


def test_python_web_has_many_documents_in_a_fixed_order(data_settings: MakeSettings) -> None:
    settings = data_settings(source="python-web", max_documents=150)
    documents = read(settings)
    assert not open_corpus(settings).is_single_text
    assert len({document.id for document in documents}) == len(documents) == 150
    assert {document.id.split(":")[0] for document in documents} == {"readme", "docstrings"}
    assert documents == read(settings)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_its_names(folder: Path, data_settings: MakeSettings) -> None:
    assert read(data_settings(path=folder)) == [
        Document("a.jsonl:0", "A0"),
        Document("a.jsonl:1", "A1\n"),
        Document("b.txt:0", "B\nüber"),
        Document("c.parquet:0", "C0"),
        Document("c.parquet:2", "C2"),  # a row without text is no document, and moves no other's name
        Document("deeper/b.txt:0", "B again"),
    ]
    assert not open_corpus(data_settings(path=folder)).is_single_text


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("a.jsonl", ["A0", "A1\n"]),
        ("c.parquet", ["C0", "C2"]),
        ("*.txt", ["B\nüber"]),
        ("**/*.txt", ["B\nüber", "B again"]),
        ("[ac].*", ["A0", "A1\n", "C0", "C2"]),
        ("deeper", ["B again"]),
    ],
)
def test_a_path_is_a_file_a_folder_or_a_glob(
    folder: Path, data_settings: MakeSettings, pattern: str, texts: list[str]
) -> None:
    assert [document.text for document in read(data_settings(path=folder / pattern))] == texts


def test_a_document_has_the_same_name_by_folder_and_by_glob(
    folder: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = read(data_settings(path=folder))
    assert read(data_settings(path=folder / "**" / "*.*")) == everything
    monkeypatch.chdir(folder)
    assert read(data_settings(path=".")) == everything
    assert read(data_settings(path="**/*")) == everything
    assert read(data_settings(path="b.txt")) == [everything[2]]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path, data_settings: MakeSettings) -> None:
    (tmp_path / "book[1].txt").write_text("one")
    assert read(data_settings(path=tmp_path / "book[1].txt")) == [Document("book[1].txt:0", "one")]


def test_one_text_file_is_a_single_text(folder: Path, data_settings: MakeSettings) -> None:
    assert open_corpus(data_settings(path=folder / "b.txt")).is_single_text
    assert not open_corpus(data_settings(path=folder / "a.jsonl")).is_single_text


def test_max_documents_are_the_first_ones(folder: Path, data_settings: MakeSettings) -> None:
    everything = read(data_settings(path=folder))
    for count in (1, 3, 100):
        assert read(data_settings(path=folder, max_documents=count)) == everything[:count]


def test_the_text_may_be_in_another_column(tmp_path: Path, data_settings: MakeSettings) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": 1, "body": "A"}])
    pq.write_table(pa.table({"body": pa.array(["B"], pa.large_string())}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"body": pa.array(["C"]).dictionary_encode()}), tmp_path / "c.parquet")
    settings = data_settings(path=tmp_path, text_column="body")
    assert [document.text for document in read(settings)] == ["A", "B", "C"]


def test_rows_without_text_and_blank_lines_are_no_documents(tmp_path: Path, data_settings: MakeSettings) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "A"}\r\n\r\n{"text": null}\n{"text": ""}\n\n')
    assert read(data_settings(path=tmp_path)) == [Document("a.jsonl:0", "A"), Document("a.jsonl:3", "")]


def test_real_fineweb_rows_are_read(shared_data: Path, data_settings: MakeSettings) -> None:
    parquet = shared_data / "fineweb" / "sample" / "10BT" / "000_00000.parquet"
    documents = read(data_settings(path=parquet))
    assert len(documents) == 1410
    assert len({document.id for document in documents}) == 1410
    lines = shared_data / "fineweb" / "fineweb_full_schema_20.jsonl"
    assert len(read(data_settings(path=lines))) == 20


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_nothing_found_is_answered_with_what_is_looked_for(tmp_path: Path, data_settings: MakeSettings) -> None:
    for path in (tmp_path / "missing", tmp_path / "*.csv", tmp_path):
        with pytest.raises(UserError, match=r"\.txt, \.jsonl or \.parquet"):
            open_corpus(data_settings(path=path))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut off', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"body": "x", "url": "y"}', r"'text'.*body, url.*data\.text_column"),
        (b'{"text": 7}', r"'text'.*data\.text_column"),
        (b'["text"]', r"'text'.*list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, data_settings: MakeSettings, line: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.jsonl, line 3 .*{reason}"):
        read(data_settings(path=tmp_path))


def test_text_that_is_not_utf8_is_named(tmp_path: Path, data_settings: MakeSettings) -> None:
    (tmp_path / "latin.txt").write_bytes("über".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 at byte 0"):
        read(data_settings(path=tmp_path))


def test_a_missing_column_is_answered_with_those_there_are(folder: Path, data_settings: MakeSettings) -> None:
    with pytest.raises(UserError, match=r"c\.parquet has no column 'body' \(it has: text, n\)"):
        read(data_settings(path=folder / "c.parquet", text_column="body"))


def test_a_column_of_numbers_is_not_text(folder: Path, data_settings: MakeSettings) -> None:
    with pytest.raises(UserError, match=r"c\.parquet: column 'n' holds int, not text"):
        read(data_settings(path=folder / "c.parquet", text_column="n"))


@pytest.mark.parametrize(
    "kept", [slice(0), slice(0, -20), slice(100, None)], ids=["empty", "cut off", "beginning lost"]
)
def test_a_damaged_parquet_file_is_one_line(folder: Path, data_settings: MakeSettings, kept: slice) -> None:
    path = folder / "c.parquet"
    path.write_bytes(path.read_bytes()[kept])
    with pytest.raises(UserError, match=r"c\.parquet as parquet") as caught:
        read(data_settings(path=path))
    assert "\n" not in str(caught.value)


def test_a_file_that_goes_away_is_a_mistake_of_the_source(folder: Path, data_settings: MakeSettings) -> None:
    for name in ("a.jsonl", "b.txt", "c.parquet"):
        corpus = open_corpus(data_settings(path=folder / name))
        (folder / name).unlink()
        with pytest.raises(UserError, match=name):
            list(corpus.documents)
