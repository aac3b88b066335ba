"""Documents read from files and folders (`formats.py` says of which kinds), and Python's standard library."""

from __future__ import annotations

import io
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from longwave import trial
from longwave.data import formats
from longwave.data.documents import Conversation, Document
from longwave.data.formats import NotRead
from longwave.data.rows import Rules
from longwave.errors import UserError, require
from longwave.files.jsonfile import plain

_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_SHOWN = 5  # names of files that are told for each reason why some were left out
_WHAT_WOULD_DO = "give text in UTF-8, .jsonl, .json, .csv or .parquet, or a folder of them"

Source = str | Path | Callable[[], Iterator[Document]]
"""A path, or a function that yields documents (such as `standard_library`); preparing data reads it more than once."""


@dataclass
class LeftOut:
    """Files and rows that were not read for one reason. names: the first of them, below the source."""

    reason: str
    count: int
    names: list[str]

    def __str__(self) -> str:
        more = f" and {self.count - len(self.names):,} more" if self.count > len(self.names) else ""
        return f"{self.count:,} ({self.reason}): {', '.join(map(plain, self.names))}{more}"


class Census:
    """Takes note of what is left out of a source."""

    def __init__(self) -> None:
        self._found: dict[str, LeftOut] = {}

    def add(self, reason: str, name: str) -> None:
        found = self._found.setdefault(reason, LeftOut(reason, 0, []))
        found.count += 1
        if len(found.names) < _SHOWN:
            found.names.append(name)

    def found(self) -> list[LeftOut]:
        """For each reason what was left out, in the order of the reasons."""
        return [self._found[reason] for reason in sorted(self._found)]

    def __str__(self) -> str:
        return "; ".join(map(str, self.found()))


def documents(
    source: Source, text_field: str | None = None, *, ignore: tuple[str, ...] = (), census: Census | None = None
) -> Iterator[Document]:
    """The documents of a file of text or rows, or of a folder of both, in a fixed order.

    A folder is read recursively in the order of names. Nothing in it is passed over in silence: hidden entries, links
    to folders, and files that hold neither text nor rows are noted. A long text gives several documents, cut at line
    ends.

    text_field: the field of a row that holds the text, whatever else the row holds. By default a row in one of the
        forms of `conversations.FORMS` is a conversation, and any other holds its text in `text`.
    ignore: keys of rows and of messages that are passed over. census: notes what is left out.
    Raises UserError for a path that is missing (at once), for a path that holds no text, for a bad row, and for texts
    mixed with conversations (when reading reaches them).
    """
    census = census or Census()
    if callable(source):
        return _of_one_kind(_at_least_one(source(), getattr(source, "__name__", "the source"), census))
    path, rules = Path(source), Rules(text_field, frozenset(ignore))
    if not path.exists():
        raise UserError(f"{shown_name(path)}: no such file or folder; {_WHAT_WOULD_DO}")
    if path.is_dir():
        found = _each(_files(path, census), rules, census)
        return _of_one_kind(_at_least_one(found, shown_name(path), census))
    again = f"{shown_name(path)}: not a file that can be read more than once; {_WHAT_WOULD_DO}"
    require(path.is_file(), again)
    return _of_one_kind(_at_least_one(_single(path, rules, census), shown_name(path), census))


def standard_library() -> Iterator[Document]:
    """The sources of Python's standard library, without its tests: about 12 MB of real text on any machine."""
    root, census = Path(sysconfig.get_path("stdlib")), Census()
    found = _files(root, census, without=_NOT_LIBRARY)
    return _each(((path, name) for path, name in found if path.suffix == ".py"), Rules(), census)


def _at_least_one(found: Iterator[Document], where: str, census: Census) -> Iterator[Document]:
    first = next(found, None)
    if first is None:
        raise UserError(f"{where}: holds no text ({str(census) or 'empty'}); {_WHAT_WOULD_DO}")
    yield first
    yield from found


def _of_one_kind(found: Iterator[Document]) -> Iterator[Document]:
    first = None
    for document in _begun(found):
        first = first or document
        if isinstance(document, Conversation) != isinstance(first, Conversation):
            what = ("a text", "a conversation")
            kinds = what if isinstance(first, Conversation) else what[::-1]
            raise UserError(f"{document.name}: {kinds[0]}, yet {first.name} is {kinds[1]}; prepare the two apart")
        yield document


def _begun(found: Iterator[Document]) -> Iterator[Document]:
    """All documents; in a trial run only the first, up to half a million characters."""
    read = 0
    for document in found:
        yield document
        read += len(document.text)
        if trial.is_on() and read >= trial.CHARACTERS:
            return


def _each(paths: Iterable[tuple[Path, str]], rules: Rules, census: Census) -> Iterator[Document]:
    """The documents of files, with the names that they go by."""
    for path, name in paths:
        try:
            yield from _file(path, name, rules, census)
        except NotRead as error:
            census.add(error.reason, name)


def _single(path: Path, rules: Rules, census: Census) -> Iterator[Document]:
    try:
        yield from _file(path, shown_name(path.name), rules, census)
    except NotRead as error:
        raise UserError(f"{shown_name(path)}: holds no text ({error}); {_WHAT_WOULD_DO}") from error


def _files(root: Path, census: Census, without: frozenset[str] = frozenset()) -> Iterator[tuple[Path, str]]:
    """The regular files below a folder, sorted, with their names below it; first a folder's files, then its folders."""
    waiting = [root]
    while waiting:
        files, folders = list[tuple[Path, str]](), list[Path]()
        for entry in _entries(waiting.pop(), without):
            path, name = Path(entry.path), shown_name(os.path.relpath(entry.path, root))
            if entry.name.startswith("."):
                census.add("hidden", name)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif os.path.isdir(path):
                census.add("a link to a folder", name)
            elif os.path.isfile(path):
                files.append((path, name))
            else:
                census.add("not a regular file", name)
        yield from files
        waiting += folders[::-1]


def _entries(folder: Path, without: frozenset[str]) -> list[os.DirEntry[str]]:
    """What stands in a folder, sorted by name."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if entry.name not in without), key=lambda entry: entry.name)
    except OSError as error:
        said = f"{shown_name(folder)}: cannot be read ({error.strerror}); make it readable or move it away"
        raise UserError(said) from error


def _file(path: Path, name: str, rules: Rules, census: Census) -> Iterator[Document]:
    """The documents of a file. Raises NotRead, before any, for a file that holds neither text nor rows."""
    some, source = False, name.split("/")[0]
    for number, piece in enumerate(formats.read(path, rules)):
        if isinstance(piece, str):
            yield Document(f"{name}#{number}" if number else name, piece, source=source)
        else:
            document = rules.document(piece.content, f"{name}{piece.place}", f"{shown_name(path)}{piece.place}")
            document = replace(document, source=document.source or source)
            if document.text or isinstance(document, Conversation):
                yield from _pieces(document)
            else:
                census.add("rows without text", document.name)
        some = True
    if not some:
        raise NotRead("empty")


def _pieces(document: Document) -> Iterator[Document]:
    """A document, cut at line ends where it is a long text."""
    text = document.text.encode()
    if isinstance(document, Conversation) or len(text) <= formats.PIECE_BYTES:
        yield document
    else:
        for number, piece in enumerate(formats.pieces(io.BytesIO(text))):
            yield replace(document, name=f"{document.name}#{number}" if number else document.name, text=piece)


def shown_name(path: str | os.PathLike[str]) -> str:
    """A path as text that can be printed and stored, whatever the bytes of its name."""
    return os.fsencode(path).decode(errors="backslashreplace")
