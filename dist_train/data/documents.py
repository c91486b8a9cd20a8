"""What a corpus is made of: documents, read piece by piece, each piece by whichever process takes it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

PIECE_BYTES = 4_000_000
"""About how much text one piece holds: a third of a second of work, and some megabytes of tokens to hand over."""

LONGEST_BYTES = 32_000_000
"""A longer line or row is no document: what is read of it in one go has to fit into the memory several times."""


class Document(NamedTuple):
    """A text, or a part of one that is too long for a piece."""

    id: str
    """Names the document wherever it is read from: the train/val split hangs on it."""
    text: str
    continues: bool = False
    """Goes on where the document before it ended; both have one id."""


class Unreadable(NamedTuple):
    """Stands where a document should be."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where} {self.reason}"


class Piece(Protocol):
    """A part of a corpus, always the same one however many processes share the work. Travels to them pickled."""

    @property
    def size(self) -> float:
        """How much of `Corpus.size` this is, in bytes of the source."""

    def read(self, first: int = 0) -> Iterable[Document | Unreadable]:
        """Return its documents in order, from number `first` on.

        Raises `UserError` for what makes the rest of the source useless as well.
        """


class Texts(NamedTuple):
    """A piece that has been read already, because finding its documents is reading them."""

    documents: tuple[Document | Unreadable, ...]
    size: float

    def read(self, first: int = 0) -> Iterable[Document | Unreadable]:
        """Return the documents."""
        return self.documents[first:]


@dataclass(frozen=True)
class Corpus:
    """A source of text in a fixed order."""

    pieces: Iterable[Piece]
    """Found while it is iterated over, once."""
    size: float | None = None
    """Bytes of the source, where they are known before it is read."""
    is_single_text: bool = False
    """One text, such as a book: its end is held out, not some of its documents."""
    revision: str | None = None
    """Which version of the source this is: what was begun from one is not finished from another."""

    def read(self) -> Iterator[Document | Unreadable]:
        """Yield every document in order, in this process."""
        for piece in self.pieces:
            yield from piece.read()


def gather(documents: Iterable[Document | Unreadable]) -> Iterator[Texts]:
    """Put documents together into pieces of about `PIECE_BYTES`."""
    gathered: list[Document | Unreadable] = []
    size = 0
    for document in documents:
        gathered.append(document)
        size += len(document.text.encode(errors="surrogatepass")) if isinstance(document, Document) else 0
        if size >= PIECE_BYTES:
            yield Texts(tuple(gathered), size)
            gathered, size = [], 0
    if gathered:
        yield Texts(tuple(gathered), size)
