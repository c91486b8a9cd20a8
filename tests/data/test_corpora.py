"""Documents from each source, in a fixed order; and what is said when a source is not as it should be."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.data import documents
from dist_train.data.corpora import open_corpus
from dist_train.data.documents import Document, Piece, Unreadable
from dist_train.errors import UserError
from dist_train.sections import DataSettings

MakeSettings = Callable[..., DataSettings]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of each kind, one of them deeper, and one that is no text."""
    folder = tmp_path / "corpus"
    (folder / "deeper").mkdir(parents=True)
    (folder / "b.txt").write_bytes("B\r\nüber".encode())
    (folder / "deeper" / "b.txt").write_text("B again")
    write_lines(folder / "a.jsonl", [{"text": "A0"}, {"text": "A1\n", "n": 1}])
    pq.write_table(pa.table({"text": ["C0", "C1", "C2"], "n": [1, 2, 3]}), folder / "c.parquet")
    (folder / "notes.md").write_text("not read")
    return folder


def write_lines(path: Path, records: list[object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_all(settings: DataSettings) -> list[Document | Unreadable]:
    return list(open_corpus(settings).read())


def read(settings: DataSettings) -> list[Document]:
    """The documents, where all of them can be read."""
    documents = read_all(settings)
    assert all(isinstance(document, Document) for document in documents)
    return [document for document in documents if isinstance(document, Document)]


# ---- embedded --------------------------------------------------------------------------------------------------------


def test_python_docs_are_one_text_the_same_each_time(data_settings: MakeSettings) -> None:
    corpus = open_corpus(data_settings(source="python-docs"))
    (document,) = corpus.read()
    assert isinstance(document, Document)
    assert corpus.is_single_text
    assert corpus.revision
    assert len(document.text) > 100_000
    assert [document] == read(data_settings(source="python-docs"))
    paragraphs = document.text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)  # or the held-out end would be known from training


def test_python_web_has_many_documents_in_a_fixed_order(data_settings: MakeSettings) -> None:
    settings = data_settings(source="python-web")
    documents = read(settings)
    assert not open_corpus(settings).is_single_text
    assert len({document.id for document in documents}) == len(documents) > 150
    assert {document.id.split(":")[0] for document in documents} == {"readme", "docstrings"}
    assert documents == read(settings)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_its_names(folder: Path, data_settings: MakeSettings) -> None:
    assert read(data_settings(path=folder)) == [
        Document("a.jsonl:0", "A0"),
        Document("a.jsonl:1", "A1\n"),
        Document("b.txt:0", "B\nüber"),
        Document("c.parquet:0", "C0"),
        Document("c.parquet:1", "C1"),
        Document("c.parquet:2", "C2"),
        Document("deeper/b.txt:0", "B again"),
    ]
    assert not open_corpus(data_settings(path=folder)).is_single_text


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("a.jsonl", ["A0", "A1\n"]),
        ("c.parquet", ["C0", "C1", "C2"]),
        ("*.txt", ["B\nüber"]),
        ("**/*.txt", ["B\nüber", "B again"]),
        ("[ac].*", ["A0", "A1\n", "C0", "C1", "C2"]),
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


def test_the_text_may_be_in_another_column(tmp_path: Path, data_settings: MakeSettings) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": 1, "body": "A"}])
    pq.write_table(pa.table({"body": pa.array(["B"], pa.large_string())}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"body": pa.array(["C"]).dictionary_encode()}), tmp_path / "c.parquet")
    settings = data_settings(path=tmp_path, text_column="body")
    assert [document.text for document in read(settings)] == ["A", "B", "C"]


def test_an_id_that_the_source_has_names_the_document(tmp_path: Path, data_settings: MakeSettings) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "A", "id": "<urn:a>"}, {"text": "B", "id": 7}])
    pq.write_table(pa.table({"id": ["<urn:c>", None], "text": ["C", "D"]}), tmp_path / "b.parquet")
    assert [document.id for document in read(data_settings(path=tmp_path))] == [
        "<urn:a>",
        "a.jsonl:1",
        "<urn:c>",
        "b.parquet:1",
    ]


def test_blank_lines_are_no_documents_and_rows_without_text_are_unreadable(
    tmp_path: Path, data_settings: MakeSettings
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "A"}\r\n\r\n{"text": null}\n{"text": ""}\n\n')
    pq.write_table(pa.table({"text": ["B", None, "C"]}), tmp_path / "b.parquet")
    assert read_all(data_settings(path=tmp_path)) == [
        Document("a.jsonl:0", "A"),
        Unreadable("a.jsonl, line 3", "has no text in column 'text' (it has: text)"),
        Document("a.jsonl:3", ""),
        Document("b.parquet:0", "B"),
        Unreadable("b.parquet, row 1", "has no text"),  # and moves no other's name
        Document("b.parquet:2", "C"),
    ]


@pytest.mark.parametrize(("suffix", "compression"), [(".gz", "gzip"), (".zst", "zstd")])
def test_compressed_lines_are_read_as_plain_ones(
    tmp_path: Path, data_settings: MakeSettings, suffix: str, compression: str
) -> None:
    for name in ("plain", "compressed"):
        (tmp_path / name).mkdir()
    write_lines(tmp_path / "plain" / "a.jsonl", [{"text": f"{number} ü" * 50} for number in range(500)])
    lines = (tmp_path / "plain" / "a.jsonl").read_bytes()
    path = tmp_path / "compressed" / f"a.jsonl{suffix}"
    # Two streams, as `cat` and parallel compressors leave them.
    streams = [pa.compress(part, compression, asbytes=True) for part in (lines[:10_000], lines[10_000:])]
    path.write_bytes(b"".join(streams))
    plain, compressed = (read(data_settings(path=tmp_path / name)) for name in ("plain", "compressed"))
    assert [document.text for document in compressed] == [document.text for document in plain]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl.*Truncated"):
        read(data_settings(path=path))


@given(cut=st.integers(50, 400))
def test_pieces_of_any_size_hold_the_same_documents(corpus_of_all_kinds: Path, cut: int) -> None:
    settings = DataSettings(source="files", path=str(corpus_of_all_kinds), dir=Path("unused"))
    whole = read(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", cut)
        parts = read(settings)
    assert sum(piece.size for piece in open_corpus(settings).pieces) == pytest.approx(open_corpus(settings).size)
    assert [part.id for part in parts if not part.continues] == [document.id for document in whole]
    texts: list[str] = []
    for part in parts:
        if part.continues:
            texts[-1] += part.text
        else:
            texts.append(part.text)
    assert texts == [document.text for document in whole]


@pytest.fixture(scope="module")
def corpus_of_all_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of each kind, all larger than the pieces they will be cut into; parquet in row groups of 40."""
    folder = tmp_path_factory.mktemp("kinds")
    texts = [f"{number}: " + "All work and no play\nmakes Jack a dull boy. " * (number % 4) for number in range(100)]
    write_lines(folder / "a.jsonl", [{"text": text} for text in texts])
    pq.write_table(pa.table({"text": texts}), folder / "b.parquet", row_group_size=40)
    (folder / "c.txt").write_text("".join(texts))
    (folder / "d.txt").write_text("")
    return folder


def test_pieces_in_any_order_hold_their_own_rows(corpus_of_all_kinds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 200)
    pieces = list(open_files_at(corpus_of_all_kinds / "b.parquet"))
    in_order = [list(piece.read()) for piece in pieces]
    assert len(pieces) > 10
    names = [document.id for part in in_order for document in part if isinstance(document, Document)]
    assert names == [f"b.parquet:{row}" for row in range(100)]
    assert [list(piece.read(3)) for piece in pieces] == [part[3:] for part in in_order]
    assert [list(piece.read()) for piece in reversed(pieces)] == in_order[::-1]
    assert [list(piece.read()) for piece in pieces[1::3]] == in_order[1::3]


def open_files_at(path: Path) -> Iterable[Piece]:
    return open_corpus(DataSettings(source="files", path=str(path), dir=Path("unused"))).pieces


def test_real_fineweb_rows_are_read(shared_data: Path, data_settings: MakeSettings) -> None:
    parquet = shared_data / "fineweb" / "sample" / "10BT" / "000_00000.parquet"
    documents = read(data_settings(path=parquet))
    assert len(documents) == 1410
    assert len({document.id for document in documents}) == 1410
    lines = shared_data / "fineweb" / "fineweb_full_schema_20.jsonl"
    assert len(read(data_settings(path=lines))) == 20


def test_links_are_followed_and_hidden_files_are_not_read(folder: Path, data_settings: MakeSettings) -> None:
    everything = read(data_settings(path=folder))
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "b.txt").write_text("hidden")
    (folder / "deeper").rename(folder.parent / "elsewhere")
    (folder / "deeper").symlink_to(folder.parent / "elsewhere")
    assert read(data_settings(path=folder)) == everything
    assert read(data_settings(path=folder / "**" / "*")) == everything


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path, data_settings: MakeSettings) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    assert read(data_settings(path=tmp_path)) == [Document("a.txt:0", "text")]


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_nothing_found_is_answered_with_what_is_looked_for(tmp_path: Path, data_settings: MakeSettings) -> None:
    for path in (tmp_path / "missing", tmp_path / "*.csv", tmp_path):
        with pytest.raises(UserError, match=r"\.txt, \.jsonl \(\.gz, \.zst\) or \.parquet"):
            open_corpus(data_settings(path=path))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut off', "is not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"body": "x", "url": "y"}', "no text in column 'text' (it has: body, url)"),
        (b'{"text": 7}', "no text in column 'text'"),
        (b'["text"]', "no JSON object"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, data_settings: MakeSettings, line: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good again"}')
    good, bad, again = read_all(data_settings(path=tmp_path))
    assert (good, again) == (Document("a.jsonl:0", "good"), Document("a.jsonl:3", "good again"))
    assert isinstance(bad, Unreadable)
    assert bad.where == "a.jsonl, line 3"
    assert reason in bad.reason


def test_a_column_that_the_first_line_does_not_have_is_a_mistake(tmp_path: Path, data_settings: MakeSettings) -> None:
    write_lines(tmp_path / "a.jsonl", [{"body": "x", "url": "y"}] * 3)
    with pytest.raises(UserError, match=r"a\.jsonl has no column 'text' \(it has: body, url\); set data\.text_column"):
        read(data_settings(path=tmp_path))


@pytest.mark.parametrize("piece_bytes", [1_000_000, 1000])
def test_text_that_is_not_utf8_is_no_document_at_all(
    tmp_path: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    (tmp_path / "latin.txt").write_bytes(b"words " * 2000 + "über".encode("latin-1"))
    (tmp_path / "words.txt").write_text("words")
    unreadable, document = read_all(data_settings(path=tmp_path))
    assert isinstance(unreadable, Unreadable)
    assert str(unreadable).startswith("latin.txt is not UTF-8")
    assert document == Document("words.txt:0", "words")


def test_a_missing_column_is_answered_with_those_there_are(folder: Path, data_settings: MakeSettings) -> None:
    with pytest.raises(UserError, match=r"c\.parquet has no column 'body' \(it has: text, n\)"):
        read(data_settings(path=folder / "c.parquet", text_column="body"))


def test_parquet_text_that_is_not_utf8_is_named(tmp_path: Path, data_settings: MakeSettings) -> None:
    buffers = pa.array([b"good", b"\xff\xfe", b"again"], pa.binary()).buffers()
    texts = pa.StringArray.from_buffers(3, buffers[1], buffers[2])
    pq.write_table(pa.table({"text": texts, "id": texts}), tmp_path / "a.parquet")
    assert read_all(data_settings(path=tmp_path)) == [
        Document("good", "good"),
        Unreadable("a.parquet, row 1", "is not UTF-8"),
        Document("again", "again"),
    ]


def test_a_line_that_is_too_long_is_named_and_not_kept(
    tmp_path: Path, data_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    monkeypatch.setattr(documents, "LONGEST_BYTES", 1000)
    lines = [{"text": "first"}, {"text": "x" * 5000}, {"text": "third"}, {"text": "y" * 900}, {"text": "z" * 1100}]
    write_lines(tmp_path / "a.jsonl", [*lines, {"text": "last"}])
    found = [
        str(part) if isinstance(part, Unreadable) else part.text for part in read_all(data_settings(path=tmp_path))
    ]
    assert [text.replace("longer than 0 MB", "too long") for text in found] == [
        "first",
        "a.jsonl, line 2 is too long",
        "third",
        "y" * 900,
        "a.jsonl, line 5 is too long",
        "last",
    ]


def test_a_column_of_numbers_is_not_text(folder: Path, data_settings: MakeSettings) -> None:
    with pytest.raises(UserError, match=r"c\.parquet: column 'n' holds int64, not text"):
        read(data_settings(path=folder / "c.parquet", text_column="n"))


@pytest.mark.parametrize(
    "kept", [slice(0), slice(0, -20), slice(100, None)], ids=["empty", "cut off", "beginning lost"]
)
def test_a_damaged_parquet_file_is_one_line(folder: Path, data_settings: MakeSettings, kept: slice) -> None:
    path = folder / "c.parquet"
    path.write_bytes(path.read_bytes()[kept])
    with pytest.raises(UserError, match=r"cannot read .*c\.parquet") as caught:
        read(data_settings(path=path))
    assert "\n" not in str(caught.value)


def test_a_file_that_goes_away_is_a_mistake_of_the_source(folder: Path, data_settings: MakeSettings) -> None:
    for name in ("a.jsonl", "b.txt", "c.parquet"):
        corpus = open_corpus(data_settings(path=folder / name))
        (folder / name).unlink()
        with pytest.raises(UserError, match=name):
            list(corpus.read())
