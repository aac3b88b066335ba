"""Documents read from text files, folders, JSONL files of texts or of conversations, and Python's standard library."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from longwave.data.conversations import Message, messages_of
from longwave.errors import UserError

# A longer text file becomes several documents. A document is tokenised whole, in about 150 bytes of memory per byte of
# text, and this much text is a million tokens.
PIECE_CHARACTERS = 4 << 20
_BLOCK_BYTES = 1 << 20
_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """A text and the name it is known by: its path below the source, with a line or piece number where needed."""

    name: str
    text: str


@dataclass(frozen=True)
class Conversation(Document):
    """Messages of a conversation; `text` is their contents joined, without the form that a chat template adds."""

    messages: tuple[Message, ...]


Source = str | Path | Callable[[], Iterator[Document]]
"""A path, or a function that yields documents (such as `standard_library`); preparing data reads it more than once."""


def documents(source: Source, text_field: str | None = None) -> Iterator[Document]:
    """The non-empty documents of a text file, a `.jsonl` file, or a folder of both, in a fixed order.

    A folder is read recursively in the order of names, without hidden files and files that are not UTF-8 text. A text
    file longer than `PIECE_CHARACTERS` gives several documents, cut at line ends.

    text_field: the field of a JSONL line that holds the text. By default a line in one of the forms of
        `conversations.FORMS` is a conversation, and any other line holds its text in `text`.
    Raises UserError for a path that is missing (at once), for a path that holds no text, for a bad JSONL line, and for
    texts mixed with conversations (when reading reaches them).
    """
    if callable(source):
        return _of_one_kind(_at_least_one(source(), getattr(source, "__name__", "the source")))
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a text file, a .jsonl file or a folder of them")
    found = _walk(path, text_field) if path.is_dir() else _file(path, path.name, text_field)
    return _of_one_kind(_at_least_one(found, str(path)))


def standard_library() -> Iterator[Document]:
    """The sources of Python's standard library, without its tests: about 12 MB of real text on any machine."""
    root = Path(sysconfig.get_path("stdlib"))
    for path, name in _files(root, without=_NOT_LIBRARY):
        if path.suffix == ".py" and _is_text(path):
            yield from _text(path, name)


def split_held_out(documents: Iterable[Document], fraction: float, seed: int = 0) -> Iterator[tuple[Document, bool]]:
    """Each document, and whether it is held out of training, which its name and the seed alone decide.

    A single document is cut in two at a line end, and its end is held out.

    fraction: the expected share of documents held out, 0 <= fraction < 1.
    Raises UserError for another fraction, and when all documents have gone to one side.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"held_out = {fraction}: at least 0 and less than 1")
    documents = iter(documents)
    first = list(islice(documents, 2))
    if len(first) == 1 and fraction > 0:
        return iter(_cut(first[0], fraction))
    return _split(chain(first, documents), fraction, seed)


def is_held_out(name: str, fraction: float, seed: int = 0) -> bool:
    """Whether the document of this name is held out."""
    return _draw(name, seed) < fraction


def _split(documents: Iterator[Document], fraction: float, seed: int) -> Iterator[tuple[Document, bool]]:
    count, lowest, highest = 0, 1.0, 0.0
    for document in documents:
        draw = _draw(document.name, seed)
        count, lowest, highest = count + 1, min(lowest, draw), max(highest, draw)
        yield document, draw < fraction
    if count and 0 < fraction <= lowest:
        enough = math.floor(lowest * 1000 + 1) / 1000
        raise UserError(f"held_out = {fraction}: none of {count} documents is held out; {enough} holds one out, 0 none")
    if count and highest < fraction:
        raise UserError(f"held_out = {fraction}: all {count} documents are held out, none is left to train; give less")


def _draw(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on the name and the seed alone."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _cut(document: Document, fraction: float) -> list[tuple[Document, bool]]:
    """A single document cut in two: the text to train on, and its end, held out."""
    text = document.text
    if isinstance(document, Conversation):
        raise UserError(f"held_out = {fraction}: {document.name} is the only conversation; give more of them, or 0")
    middle = int(len(text) * (1 - fraction))
    middle = text.rfind("\n", 0, middle) + 1 or middle
    if not 0 < middle < len(text):
        raise UserError(f"held_out = {fraction}: {document.name} is too short to be cut in two; give more text, or 0")
    return [(Document(document.name, text[:middle]), False), (Document(f"{document.name}#end", text[middle:]), True)]


def _at_least_one(found: Iterator[Document], where: str) -> Iterator[Document]:
    first = next(found, None)
    if first is None:
        raise UserError(
            f"{where}: holds no text (empty, or not UTF-8); give a text file, a .jsonl file or a folder of them"
        )
    yield first
    yield from found


def _of_one_kind(found: Iterator[Document]) -> Iterator[Document]:
    first = None
    for document in found:
        first = first or document
        if isinstance(document, Conversation) != isinstance(first, Conversation):
            what = ("a text", "a conversation")
            kinds = what if isinstance(first, Conversation) else what[::-1]
            raise UserError(f"{document.name}: {kinds[0]}, yet {first.name} is {kinds[1]}; prepare the two apart")
        yield document


def _walk(folder: Path, text_field: str | None) -> Iterator[Document]:
    for path, name in _files(folder):
        yield from _file(path, name, text_field)


def _files(root: Path, without: frozenset[str] = frozenset()) -> Iterator[tuple[Path, str]]:
    """The regular files below a folder, sorted, with their paths relative to it; hidden files are left out."""
    for folder, folders, names in os.walk(root, onerror=_refuse):
        folders[:] = sorted(name for name in folders if name not in without and not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path, path.relative_to(root).as_posix()


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}); make it readable or move it away") from error


def _file(path: Path, name: str, text_field: str | None) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        return _jsonl(path, name, text_field)
    return _text(path, name) if _is_text(path) else iter(())


def _is_text(path: Path) -> bool:
    """Whether the whole file is UTF-8 without a NUL byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                if "\0" in decoder.decode(block):
                    return False
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _text(path: Path, name: str) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        pieces = iter(lambda: file.read(PIECE_CHARACTERS) + file.readline(PIECE_CHARACTERS), "")
        for number, piece in enumerate(pieces):
            yield Document(f"{name}#{number}" if number else name, piece)


def _jsonl(path: Path, name: str, text_field: str | None) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                document = _document(line, text_field, f"{name}:{number}", f"{path}:{number}")
                if document.text or isinstance(document, Conversation):
                    yield document


def _document(line: bytes, text_field: str | None, name: str, where: str) -> Document:
    with _json_faults(where):
        row = json.loads(line.decode("utf-8-sig"))
    document = _read(row, text_field, name, where)
    with _json_faults(where):
        chat = isinstance(document, Conversation)
        said = json.dumps(document.messages, ensure_ascii=False) if chat else document.text
        said.encode()  # fails on half a surrogate pair, which JSON can write as an escape and UTF-8 cannot
    return document


@contextmanager
def _json_faults(where: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a line of JSON in UTF-8 ({error})") from error


def _read(row: Any, text_field: str | None, name: str, where: str) -> Document:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}; each line must be a JSON object")
    messages = messages_of(row, where) if text_field is None else None
    if messages is not None:
        return Conversation(name, "\n".join(message["content"] for message in messages), messages)
    text = row.get(text_field or "text")
    if isinstance(text, str):
        return Document(name, text)
    forms = "" if text_field else ", nor messages, conversations, or prompt and completion"
    raise UserError(f"{where}: no string field {text_field or 'text'!r}{forms}")
