"""Prepared data: a folder of token shards larger than memory, written once and read through memory maps.

    out/tokenizer.json, tokenizer_config.json
    out/meta.json                     what the folder holds: `PreparedInfo`
    out/{train,held_out}/
        tokens-00000.bin              the split's tokens laid end to end (uint16 or uint32, little-endian)
        documents-00000.npy           where in the split each document that starts in this shard starts (int64)
        sources.bin                   the number of each document's source, in the order of the split (int32)
        learned.bin                   of answers, if they alone are learned: where each starts and ends (int64)

Nothing is believed unread: sizes, small files and lists of places are checked when a split is opened, a shard of tokens
(its checksum, and that every id is in the vocabulary) when it is first read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from longwave import files
from longwave.data.encoding import Kind
from longwave.data.intact import Intact
from longwave.data.selection import SourceShare
from longwave.data.sources import LeftOut
from longwave.data.tokenizer import Tokenizer
from longwave.errors import MachineError, UserError, require

FORMAT = 1
META_FILE, LEARNED_FILE, SOURCES_FILE = "meta.json", "learned.bin", "sources.bin"
Split = Literal["train", "held_out"]
DType = Literal["uint16", "uint32"]
_LARGE = (".bin", ".npy")  # endings of the files that are checked when they are read
_AGAIN = "prepare the data again"
_PLACES = "corrupted (its places do not fit the tokens)"


@dataclass(frozen=True)
class SplitInfo:
    """Sizes of one split.

    bytes: UTF-8 bytes of the learned text, the denominator of bits per byte.
    shards: number of tokens of each shard file.
    learned: number of tokens that are learned; None where all are.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    documents: int
    bytes: int
    tokens: int
    shards: list[int]
    learned: int | None = None

    @property
    def targets(self) -> int:
        """Number of tokens that are learned."""
        return self.tokens if self.learned is None else self.learned


@dataclass(frozen=True)
class PreparedInfo:
    """Description of a prepared folder: the content of its `meta.json`.

    tokenizer: the fingerprint of the tokenizer that made the ids.
    kind: `chat` where the documents are conversations, `recall` where they are recall tasks; windows cut neither.
    left_out: number of conversations left out, since they have no answer that is learned.
    not_read: the files and rows that hold nothing to learn, by the reason.
    sources: the names of the documents' sources; empty in folders that were written before sources were kept.
    shares: what was taken of each source, where documents were chosen by length or up to a number of tokens.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    format: int
    vocab_size: int
    dtype: DType
    tokenizer: str
    train: SplitInfo
    held_out: SplitInfo
    kind: Kind = "text"
    left_out: int = 0
    not_read: list[LeftOut] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    shares: list[SourceShare] = field(default_factory=list)

    @property
    def documents(self) -> int:
        """Number of documents of both splits."""
        return self.train.documents + self.held_out.documents

    @property
    def tokens(self) -> int:
        """Number of tokens of both splits."""
        return self.train.tokens + self.held_out.tokens

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the learned text of both splits."""
        return self.train.bytes + self.held_out.bytes

    @classmethod
    def read(cls, folder: str | Path) -> PreparedInfo:
        """Raises UserError for a folder that is not a prepared one, is damaged, or is of another version."""
        path = Path(folder) / META_FILE
        if not path.is_file():
            raise UserError(
                f"{folder}: not a prepared folder (no {META_FILE}); make one with `longwave prepare TEXT OUT`"
            )
        try:
            info = TypeAdapter(cls).validate_json(path.read_bytes())
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"])
            raise UserError(
                f"{path}: corrupted ({where or 'content'}: {fault['msg']}); prepare the data again"
            ) from error
        if info.format != FORMAT:
            raise UserError(f"{path}: format = {info.format}: this version reads {FORMAT}; prepare the data again")
        if not files.verify(folder, full=False):
            raise UserError(f"{folder}: has no {files.MANIFEST} to check its shards against; prepare the data again")
        Intact(Path(folder)).require_small(*_LARGE)
        return info

    def to_json(self) -> bytes:
        return TypeAdapter(PreparedInfo).dump_json(self, indent=2) + b"\n"

    def split(self, split: Split) -> SplitInfo:
        return {"train": self.train, "held_out": self.held_out}[split]

    def require_vocab(self, vocab_size: int) -> None:
        """Raises UserError unless a model with `vocab_size` entries can take every id of this data."""
        if vocab_size < self.vocab_size:
            raise UserError(f"vocab_size = {vocab_size}: the data's ids need at least {self.vocab_size}")

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError unless the data was written with this very tokenizer."""
        if tokenizer.fingerprint != self.tokenizer:
            raise UserError(
                f"tokenizer = {tokenizer.fingerprint[:12]}: the data was written with {self.tokenizer[:12]}; "
                "prepare it with the model's own tokenizer"
            )


class SplitTokens:
    """The tokens of one split, read through memory maps; len() is their number.

    info: the description of the prepared folder. where: the split's folder, named in error messages.
    edges: the places where answers start and end, alternating and ascending; None where every token is learned.
    sources: of each document, as its place in `PreparedInfo.sources`; empty where sources were not kept.
    Raises UserError for a folder that is not a prepared one, and for files that are missing, cut or damaged. A shard of
    tokens that is damaged is found when it is first read: a MachineError.
    """

    def __init__(self, folder: str | Path, split: Split):
        self.info = info = PreparedInfo.read(folder)
        self.where, self._intact, held = Path(folder) / split, Intact(Path(folder)), info.split(split)
        self._bounds = [0, *accumulate(held.shards)]
        agree = min(held.shards, default=1) > 0 and self._bounds[-1] == held.tokens
        require(agree, f"{folder}/{META_FILE}: corrupted (the shards of {split} differ); prepare the data again")
        self.shards = [self._tokens(number, size) for number, size in enumerate(held.shards)]
        self._starts = [self._starts_in(number) for number in range(len(held.shards))]
        self.edges = None if held.learned is None else self._edges(held.learned)
        self.sources = self._sources_of()
        self._checked = set[int]()  # numbers of the shards of tokens

    def __len__(self) -> int:
        return self._bounds[-1]

    def read(self, start: int, stop: int) -> NDArray[np.unsignedinteger]:
        """The tokens from `start` up to `stop`, cut at the end of the split; a view if they lie in one shard."""
        touched = self._touched(start, stop)
        pieces = [self._shard(number)[max(start - base, 0) : stop - base] for number, base in touched]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.uint16)])

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """The places from `start` up to `stop` where documents start."""
        pieces = [_between(self._starts[number], start, stop) for number, _ in self._touched(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.int64)])

    def document_at(self, place: int) -> int:
        """The number in the split of the document that a place lies in."""
        return sum(int(np.searchsorted(starts, place, side="right")) for starts in self._starts) - 1

    def learned(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the tokens from `start` up to `stop` are to be predicted."""
        if self.edges is None:
            return np.ones(stop - start, np.bool_)
        # A token lies within an answer if an odd number of edges stand at or before it: one more start than ends.
        return np.searchsorted(self.edges, np.arange(start, stop), side="right") % 2 == 1

    def documents(self) -> Iterator[NDArray[np.unsignedinteger]]:
        """The tokens of each whole document, in order."""
        start = None
        for starts in self._starts:
            for stop in starts:
                if start is not None:
                    yield self.read(start, int(stop))
                start = int(stop)
        if start is not None:
            yield self.read(start, len(self))

    def _touched(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The numbers of the shards that hold any of the tokens, each with the place in the split where it begins."""
        number = bisect_right(self._bounds, start) - 1
        while number < len(self.shards) and self._bounds[number] < stop:
            yield number, self._bounds[number]
            number += 1

    def _shard(self, number: int) -> NDArray[np.unsignedinteger]:
        """The tokens of a shard, which are checked when they are first read. MachineError if they are damaged.

        A run is on its way by then, and ends as with any fault of the machine.
        """
        if number not in self._checked:
            try:
                self._check(number)
            except UserError as error:
                raise MachineError(str(error)) from error
            self._checked.add(number)
        return self.shards[number]

    def _check(self, number: int) -> None:
        path = self._intact.require(f"{self.where.name}/{tokens_file(number)}")
        fits = int(self.shards[number].max()) < self.info.vocab_size
        require(fits, f"{path}: corrupted (ids beyond the vocabulary of {self.info.vocab_size}); {_AGAIN}")

    def _tokens(self, number: int, size: int) -> NDArray[np.unsignedinteger]:
        """The memory map of a shard, as a plain array: slicing `np.memmap` itself costs several times more."""
        path, dtype = self.where / tokens_file(number), on_disk(self.info.dtype)
        require(path.stat().st_size == size * dtype.itemsize, f"{path}: corrupted (not {size} tokens); {_AGAIN}")
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))

    def _starts_in(self, number: int) -> NDArray[np.int64]:
        """The places where documents start in a shard."""
        path = self._intact.require(f"{self.where.name}/{documents_file(number)}")
        try:
            starts = np.asarray(np.lib.format.open_memmap(path, mode="r"))
        except (ValueError, EOFError, OverflowError, TypeError) as error:
            raise UserError(f"{path}: corrupted ({error}); {_AGAIN}") from error
        listed = starts.dtype == np.int64 and starts.ndim == 1
        require(listed and _ascends(starts, *self._bounds[number : number + 2]), f"{path}: {_PLACES}; {_AGAIN}")
        return starts

    def _sources_of(self) -> NDArray[np.int32]:
        """The source of each document; none where sources were not kept."""
        if not self.info.sources:
            return np.empty(0, np.int32)
        path = self._intact.require(f"{self.where.name}/{SOURCES_FILE}")
        found = np.fromfile(path, "<i4")
        known = found.min(initial=0) >= 0 and found.max(initial=0) < len(self.info.sources)
        require(bool(known) and len(found) == sum(map(len, self._starts)), f"{path}: {_PLACES}; {_AGAIN}")
        return found

    def _edges(self, learned: int) -> NDArray[np.int64]:
        """The edges of the answers, memory-mapped where there are any: an empty file cannot be mapped."""
        path = self._intact.require(f"{self.where.name}/{LEARNED_FILE}")
        size = path.stat().st_size
        require(size % 16 == 0, f"{path}: {_PLACES}; {_AGAIN}")
        edges = np.asarray(np.memmap(path, dtype="<i8", mode="r")) if size else np.empty(0, np.int64)
        agree = _ascends(edges[::2], 0, len(self)) and _ascends(edges[1::2], 1, len(self) + 1)
        agree = agree and bool((edges[1:] >= edges[:-1]).all()) and int((edges[1::2] - edges[::2]).sum()) == learned
        require(agree, f"{path}: {_PLACES}; {_AGAIN}")
        return edges


def _ascends(places: NDArray[np.int64], first: int, stop: int) -> bool:
    """Whether every place is larger than the one before, the first at least `first`, and the last below `stop`."""
    if not len(places):
        return True
    return bool(places[0] >= first and places[-1] < stop and (places[1:] > places[:-1]).all())


def iter_documents(folder: str | Path, split: Split = "held_out") -> Iterator[NDArray[np.unsignedinteger]]:
    """The tokens of each whole document of a split, bos and eos included, for evaluation.

    Raises UserError when the split has no documents, and where `SplitTokens` does.
    """
    tokens = SplitTokens(folder, split)
    if len(tokens) == 0:
        raise UserError(f"{tokens.where}: holds no documents; prepare the data with held_out greater than 0")
    return tokens.documents()


def _between(starts: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
    first, last = np.searchsorted(starts, (start, stop))
    return starts[first:last]


def tokens_file(number: int) -> str:
    """The name of a shard of tokens within its split."""
    return f"tokens-{number:05d}.bin"


def documents_file(number: int) -> str:
    """The name of the list of documents that start in a shard, within its split."""
    return f"documents-{number:05d}.npy"


def on_disk(dtype: DType) -> np.dtype:
    """The type of tokens as they are stored."""
    return np.dtype(dtype).newbyteorder("<")
