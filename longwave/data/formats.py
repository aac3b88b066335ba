"""Files of data by the end of their names: rows of JSON, CSV or Parquet, or plain text, as they are or compressed.

| name ends in | holds |
|---|---|
| `.jsonl`, `.ndjson`, `.jsonlines` | a row on each line |
| `.json` | an array of rows, or rows one after the other |
| `.csv`, `.tsv` | rows, below a line with the names of their fields |
| `.parquet` | rows (needs `longwave[data]`) |
| anything else | text |

Behind any of these `.gz`, `.bz2`, `.xz` or `.zst` (which needs `longwave[data]`) is unpacked on the way. Capital
letters do not matter. A file that is named like data is never read as text.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from longwave.data.rows import DECODER, Rules, json_faults, parsed
from longwave.errors import UserError, require

# A longer text becomes several documents. A document is tokenised whole, in up to 190 bytes of memory per byte of text
# (measured), and this much text is half a million tokens.
PIECE_BYTES = 2 << 20
ROW_BYTES = 16 << 20  # of one row: what is read at once, and takes up to 25 times as much once it is parsed
_TOGETHER = 16  # rows of Parquet that are read at once
_BLOCK = 1 << 20
_ESCAPE = 12  # characters: no token of JSON that was cut off, but for a string, fails as far from the end as this


class NotRead(Exception):
    """A file that holds no text and no rows, or needs a library that is not there.

    reason: why, in words that many files can share. detail: what more there is to say of this file.
    """

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class Row(NamedTuple):
    """A row, and its place as it stands behind the name of its file: `:3` for a line, `[3]` in an array."""

    content: Any
    place: str


def read(path: Path, rules: Rules) -> Iterator[Row | str]:
    """The rows of a file, or the pieces of its text.

    Raises NotRead, before anything is given, for a file that is neither; UserError naming the place of a fault.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    unpack = _PACKED.get(suffixes[-1]) if suffixes else None
    kind = next(iter(suffixes[-2:-1] if unpack else suffixes[-1:]), "")
    opened = _Opened(path, unpack)
    with opened.faults():
        if kind == ".parquet" and unpack is None:
            yield from _parquet(path)
        elif kind in _ROWS:
            yield from _ROWS[kind](opened, rules)
        else:
            yield from _text(opened)


class _Opened(NamedTuple):
    """A file to open, any number of times, and how it is unpacked, if it is."""

    path: Path
    unpack: Callable[[BinaryIO], Any] | None

    @contextmanager
    def bytes(self) -> Iterator[io.BufferedReader]:
        with self.path.open("rb") as file:
            if self.unpack is None:
                yield file
            else:
                with io.BufferedReader(self.unpack(file), _BLOCK) as unpacked:
                    yield unpacked

    @contextmanager
    def text(self) -> Iterator[io.TextIOBase]:
        with self.bytes() as file:
            yield io.TextIOWrapper(file, encoding="utf-8-sig", newline="")

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Names the file where it cannot be read or unpacked."""
        try:
            yield
        except (EOFError, zlib.error, lzma.LZMAError, *_zstd_errors()) as error:
            raise UserError(f"{self.path}: damaged, or not packed as its name says ({error})") from error
        except OSError as error:
            said = error.strerror or f"damaged, or not packed as its name says: {error}"
            raise UserError(f"{self.path}: cannot be read ({said}); mend it or move it away") from error


# --- text -------------------------------------------------------------------------------------------------------------


def _text(opened: _Opened) -> Iterator[str]:
    _require_text(opened)
    with opened.bytes() as file:
        yield from pieces(file)


def pieces(file: io.BufferedIOBase) -> Iterator[str]:
    """A text in UTF-8 in pieces of at most `PIECE_BYTES` that end with a line; a byte order mark is left out."""
    rest = file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
    while block := rest + file.read(PIECE_BYTES - len(rest)):
        end = _last_border(block) if len(block) == PIECE_BYTES else len(block)
        rest = block[end:]
        yield block[:end].decode()


def _last_border(block: bytes) -> int:
    """The place behind the last line end in a block, or before its last character where it has none."""
    if end := block.rfind(b"\n") + 1:
        return end
    end = len(block) - 1
    while block[end] & 0xC0 == 0x80:  # a byte within a character
        end -= 1
    return end


def _require_text(opened: _Opened) -> None:
    """Raises NotRead unless the whole file is UTF-8 without a NUL byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with opened.bytes() as file:
            while block := file.read(_BLOCK):
                if "\0" in decoder.decode(block):
                    raise NotRead(_NO_TEXT)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise NotRead(_NO_TEXT) from error


# --- rows -------------------------------------------------------------------------------------------------------------


def _lines(opened: _Opened, rules: Rules) -> Iterator[Row]:
    with opened.bytes() as file:
        number = 0
        while line := file.readline(ROW_BYTES + 1):
            number += 1
            where = f"{opened.path}:{number}"
            require(len(line) <= ROW_BYTES, f"{where}: {_TOO_LONG}")
            if line.strip():
                with json_faults(where):
                    row = parsed(line.decode("utf-8-sig"))
                yield Row(row, f":{number}")


def _json(opened: _Opened, rules: Rules) -> Iterator[Row]:
    """The rows of an array, or of objects one after the other. NotRead for a file that begins with anything else."""
    _require_text(opened)
    with opened.text() as file:
        rows = _Values(file, str(opened.path)).read()
        try:
            first = next(rows, None)
        except UserError as error:
            raise NotRead(_NO_ROWS, error) from error
        if not rules.fits(first):
            raise NotRead(_NO_ROWS)
        for number, row in enumerate(chain([first], rows)):
            yield Row(row, f"[{number}]")


class _Values:
    """Reads the values of a JSON array, or values one after the other, without holding more than one of them.

    A value that goes on beyond what was read is tried again with twice as much: linear in the size of the file.
    """

    def __init__(self, file: io.TextIOBase, path: str) -> None:
        self._file, self._path = file, path
        self._text, self._place, self._ended = "", 0, False

    def read(self) -> Iterator[Any]:
        """The values, in order."""
        number, is_array = 0, self._next() == "["
        self._place += is_array
        while (start := self._next()) and not (is_array and start == "]"):
            if is_array and number:
                self._expect(start == ",", number)
                self._place += 1
                self._next()
            yield self._value(number)
            number += 1
        self._expect(not is_array or start == "]", number)
        self._place += is_array
        self._expect(not self._next(), number)

    def _next(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in " \t\r\n":
                self._place += 1
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._more()

    def _value(self, number: int) -> Any:
        with json_faults(f"{self._path}[{number}]"):
            while True:
                try:
                    value, self._place = DECODER.raw_decode(self._text, self._place)
                    return value
                except json.JSONDecodeError as error:
                    cut = error.msg.startswith("Unterminated") or len(self._text) - error.pos < _ESCAPE
                    if self._ended or not cut:
                        raise
                    require(len(self._text) - self._place <= ROW_BYTES, f"{self._path}[{number}]: {_TOO_LONG}")
                    self._more()

    def _more(self) -> None:
        left = self._text[self._place :]
        block = self._file.read(max(_BLOCK, len(left)))
        self._text, self._place, self._ended = left + block, 0, not block

    def _expect(self, holds: bool, number: int) -> None:
        require(holds, f"{self._path}[{number}]: not JSON: a comma or the end of the array is missing, or text follows")


def _table(delimiter: str) -> Callable[[_Opened, Rules], Iterator[Row]]:
    """A reader of CSV: a row for each record, its fields named by the first."""

    def read(opened: _Opened, rules: Rules) -> Iterator[Row]:
        _require_text(opened)
        with opened.text() as file, _large_fields():
            records = _records(file, str(opened.path), delimiter)
            _, names = next(records, (0, []))
            if not rules.fits(dict.fromkeys(names)):
                raise NotRead("a table without columns of a known form; name it .txt if it is meant as text")
            for number, cells in records:
                said = f"{opened.path}:{number}: {len(cells)} fields, where {len(names)} are named"
                require(len(cells) == len(names), said)
                yield Row(dict(zip(names, cells, strict=True)), f":{number}")

    return read


def _records(file: io.TextIOBase, path: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV file that are not blank, each with the number of the line that it ends in."""
    lines = _Bounded(file, path)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            lines.taken = 0
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from error


class _Bounded:
    """The lines of a file. taken: characters since a record began, which `_records` resets; at most `ROW_BYTES`."""

    def __init__(self, file: io.TextIOBase, path: str) -> None:
        self._file, self._path, self.taken = file, path, 0

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(ROW_BYTES + 1):
            self.taken += len(line)
            require(self.taken <= ROW_BYTES, f"{self._path}: {_TOO_LONG}, or close its quotes")
            yield line


def _parquet(path: Path) -> Iterator[Row]:
    parquet = _imported("pyarrow.parquet")
    arrow = _imported("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_TOGETHER):
                require(batch.nbytes <= _TOGETHER * ROW_BYTES, f"{path}[{number}]: {_TOO_LONG}")
                for row in batch.to_pylist():
                    yield Row(_without_nulls(row), f"[{number}]")
                    number += 1
    except arrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from error


def _without_nulls(value: Any) -> Any:
    """A value without fields that are null: a column of objects holds every field of any of them in each."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


@contextmanager
def _large_fields() -> Iterator[None]:
    """Fields as long as any row may be, while a file is read: the limit of `csv` is one of the process."""
    before = csv.field_size_limit(ROW_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


_NO_TEXT = "not UTF-8 text"
_NO_ROWS = "JSON without rows of a known form; name it .txt if it is meant as text"
_TOO_LONG = f"a row of more than {ROW_BYTES >> 20} MiB; cut its text into several rows"
_ROWS: dict[str, Callable[[_Opened, Rules], Iterator[Row]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".jsonlines": _lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
}


# --- compressed files -------------------------------------------------------------------------------------------------


def _zst(file: BinaryIO) -> Any:
    return _imported("zstandard").ZstdDecompressor().stream_reader(file, read_across_frames=True)


def _zstd_errors() -> tuple[type[Exception], ...]:
    try:
        return (import_module("zstandard").ZstdError,)
    except ImportError:
        return ()


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise NotRead(f"needs {name.split('.')[0]} (pip install 'longwave[data]')") from None


_PACKED: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zst,
}
