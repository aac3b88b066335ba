"""Prepared data: a folder of token shards larger than memory, written once and read through memory maps.

    out/tokenizer.json, tokenizer_config.json
    out/meta.json                     what the folder holds: `PreparedInfo`
    out/{train,held_out}/
        tokens-00000.bin              the split's tokens laid end to end (uint16 or uint32, little-endian)
        documents-00000.npy           where in the split each document that starts in this shard starts (int64)
        learned.bin                   conversations only: where in the split each answer starts and ends (int64)

A text is stored as bos, its ids and eos (bos and eos only where the vocabulary has them), a conversation as its chat
template writes it. Every shard but the last has the same number of tokens, and documents run across shards. The folder
appears whole or not at all (`files.folder`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from longwave import files
from longwave.data.chat import ChatEncoder, LossOn
from longwave.data.documents import Conversation, Document
from longwave.data.encoding import Encoded, Encoder, Kind, TextEncoder
from longwave.data.sources import Census, LeftOut, Source, documents
from longwave.data.splitting import default_share, split_held_out
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError

FORMAT = 1
META_FILE, LEARNED_FILE = "meta.json", "learned.bin"
DEFAULT_VOCABULARY = 8192
SHARD_TOKENS = 1 << 28  # half a GiB of uint16: few open files for a large corpus, cheap to copy for a small one
TRAINING_CHARACTERS = 1 << 30  # more text hardly changes a vocabulary, and its training holds every word in memory
_CHUNK_CHARACTERS, _CHUNK_DOCUMENTS = 2 << 20, 1024  # of text encoded in one call, in parallel over documents

Split = Literal["train", "held_out"]
DType = Literal["uint16", "uint32"]
Progress = Callable[[str, int], None]
"""Called with the stage ("tokenizer", then "tokens") and the bytes of text that the stage has read so far."""


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
    kind: `chat` where the documents are conversations, which training windows do not cut.
    left_out: number of conversations left out, since they have no answer that is learned.
    not_read: the files and rows of the source that hold nothing to learn, by the reason.
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


def prepare(
    source: Source,
    out: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    held_out: float | None = None,
    seed: int = 0,
    loss_on: LossOn | None = None,
    text_field: str | None = None,
    ignore: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> PreparedInfo:
    """Turns documents into a prepared folder, in memory that does not grow with the source.

    tokenizer: by default a new one of `vocab_size` entries (8192 unless given), trained on the first GiB of the
        training documents.
    held_out: share of the documents kept from training, which `seed` draws (`splitting`); by default two in a hundred,
        and one at least.
    loss_on: which tokens of a conversation are learned; only the assistant's by default.
    text_field, ignore: how the rows of a path are read (`sources.documents`).
    Raises UserError when `out` exists, for a source that cannot be read, for conversations or a chat template that
    cannot be used, and for settings without effect: a `vocab_size` beside a tokenizer, `loss_on` for texts.
    """
    if tokenizer is not None and vocab_size is not None:
        raise UserError(f"vocab_size = {vocab_size}: has no effect beside a given tokenizer; leave one of the two out")
    census = Census()

    def found(census: Census | None = None) -> Iterator[Document]:
        return documents(source, text_field, ignore=ignore, census=census)

    is_chat = isinstance(next(found()), Conversation)
    if loss_on is not None and not is_chat:
        raise UserError(f"loss_on = {loss_on}: has no effect on texts, of which every token is learned; leave it out")
    share = default_share(found(), seed) if held_out is None else held_out

    def read(stage: str, census: Census | None = None) -> Iterator[tuple[Document, bool]]:
        pairs = split_held_out(found(census), share, seed)
        return _reporting(pairs, stage, progress) if progress else pairs

    with files.folder(out, overwrite=False) as folder:
        if tokenizer is None:
            size = DEFAULT_VOCABULARY if vocab_size is None else vocab_size
            tokenizer = Tokenizer.train(_training_texts(read("tokenizer")), size)
        encoder = ChatEncoder(tokenizer, loss_on or "assistant") if is_chat else TextEncoder(tokenizer)
        info = replace(_write(folder, read("tokens", census), encoder), not_read=census.found())
        (folder / META_FILE).write_bytes(info.to_json())
        return info


class SplitTokens:
    """The tokens of one split, read through memory maps; len() is their number.

    info: the description of the prepared folder. where: the split's folder, named in error messages.
    edges: the places where answers start and end, alternating and ascending; None where every token is learned.
    Raises UserError for a folder that is not a prepared one, and for files that are missing or whose size has changed
    since they were written.
    """

    def __init__(self, folder: str | Path, split: Split):
        self.info = info = PreparedInfo.read(folder)
        self.where = Path(folder) / split
        numbers = range(len(info.split(split).shards))
        self.shards = [_map_tokens(_tokens_file(self.where, number), info.dtype) for number in numbers]
        self._starts = [np.asarray(np.load(_documents_file(self.where, n), mmap_mode="r")) for n in numbers]
        if [len(shard) for shard in self.shards] != info.split(split).shards:
            raise UserError(f"{folder}/{META_FILE}: corrupted (the shards of {split} differ); prepare the data again")
        self._bounds = [0, *accumulate(len(shard) for shard in self.shards)]
        self.edges = None if info.split(split).learned is None else _map_edges(self.where / LEARNED_FILE)

    def __len__(self) -> int:
        return self._bounds[-1]

    def read(self, start: int, stop: int) -> NDArray[np.unsignedinteger]:
        """The tokens from `start` up to `stop`, cut at the end of the split; a view if they lie in one shard."""
        pieces = [
            self.shards[number][max(start - base, 0) : stop - base] for number, base in self._touched(start, stop)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.uint16)])

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """The places from `start` up to `stop` where documents start."""
        pieces = [_between(self._starts[number], start, stop) for number, _ in self._touched(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.int64)])

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


def iter_documents(folder: str | Path, split: Split = "held_out") -> Iterator[NDArray[np.unsignedinteger]]:
    """The tokens of each whole document of a split, bos and eos included, for evaluation.

    Raises UserError when the split has no documents, and where `SplitTokens` does.
    """
    tokens = SplitTokens(folder, split)
    if len(tokens) == 0:
        raise UserError(f"{tokens.where}: holds no documents; prepare the data with held_out greater than 0")
    return tokens.documents()


class _Writer:
    """Appends documents to the shards of one split."""

    def __init__(self, folder: Path, dtype: DType, by_answer: bool):
        folder.mkdir()
        self._folder, self._dtype = folder, _on_disk(dtype)
        self._file: BinaryIO | None = None
        self._edges = (folder / LEARNED_FILE).open("wb") if by_answer else None
        self._starts: list[int] = []
        self._shards: list[int] = []
        self._documents = self._bytes = self._learned = 0

    def add(self, document: Encoded) -> None:
        """Writes one document, over as many shards as it takes."""
        tokens = np.array(document.ids, dtype=self._dtype)
        self._bytes += document.bytes
        self._documents += 1
        self._add_edges(document)
        starts_here = True
        while len(tokens):
            file = self._open()
            if starts_here:
                self._starts.append(sum(self._shards))
            piece, tokens = np.split(tokens, [SHARD_TOKENS - self._shards[-1]])
            file.write(piece.tobytes())
            self._shards[-1] += len(piece)
            starts_here = False

    def finish(self) -> SplitInfo:
        self._close()
        learned = None
        if self._edges is not None:
            self._edges.close()
            learned = self._learned
        return SplitInfo(self._documents, self._bytes, sum(self._shards), self._shards, learned)

    def _add_edges(self, document: Encoded) -> None:
        if self._edges is not None and document.learned is not None:
            edges = np.array(document.learned, dtype="<i8").reshape(-1, 2)
            self._learned += int((edges[:, 1] - edges[:, 0]).sum())
            self._edges.write((edges + sum(self._shards)).tobytes())

    def _open(self) -> BinaryIO:
        """The file of the current shard, or of a new one where the current shard is full."""
        if self._file is not None and self._shards[-1] < SHARD_TOKENS:
            return self._file
        self._close()
        self._file = _tokens_file(self._folder, len(self._shards)).open("wb")
        self._shards.append(0)
        return self._file

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        np.save(_documents_file(self._folder, len(self._shards) - 1), np.array(self._starts, dtype=np.int64))
        self._file, self._starts = None, []


def _write(folder: Path, pairs: Iterator[tuple[Document, bool]], encoder: Encoder[Any]) -> PreparedInfo:
    tokenizer, left_out = encoder.tokenizer, 0
    dtype: DType = "uint16" if tokenizer.vocab_size <= 65535 else "uint32"
    train, held_out = (_Writer(folder / split, dtype, encoder.by_answer) for split in ("train", "held_out"))
    for chunk in _chunks(pairs):
        encoded = encoder.encode([document for document, _ in chunk])
        for (_, is_held_out), parts in zip(chunk, encoded, strict=True):
            left_out += not parts
            for part in parts:
                (held_out if is_held_out else train).add(part)
    tokenizer.save(folder)
    splits = train.finish(), held_out.finish()
    info = PreparedInfo(FORMAT, tokenizer.vocab_size, dtype, tokenizer.fingerprint, *splits, encoder.kind, left_out)
    if not info.train.targets:
        raise UserError(f"nothing to learn: {left_out} of the conversations have no answer of the assistant")
    return info


def _chunks(pairs: Iterator[tuple[Document, bool]]) -> Iterator[list[tuple[Document, bool]]]:
    """Documents in groups small enough for memory and large enough to keep every core busy."""
    chunk: list[tuple[Document, bool]] = []
    characters = 0
    for pair in pairs:
        chunk.append(pair)
        characters += len(pair[0].text)
        if characters >= _CHUNK_CHARACTERS or len(chunk) == _CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _training_texts(pairs: Iterator[tuple[Document, bool]]) -> Iterator[str]:
    room = TRAINING_CHARACTERS
    for document, is_held_out in pairs:
        if room <= 0:
            return
        if not is_held_out:
            room -= len(document.text)
            yield document.text


def _reporting(
    pairs: Iterator[tuple[Document, bool]], stage: str, progress: Progress
) -> Iterator[tuple[Document, bool]]:
    size = 0
    for pair in pairs:
        size += len(pair[0].text.encode())
        progress(stage, size)
        yield pair


def _between(starts: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
    first, last = np.searchsorted(starts, (start, stop))
    return starts[first:last]


def _tokens_file(folder: Path, number: int) -> Path:
    return folder / f"tokens-{number:05d}.bin"


def _documents_file(folder: Path, number: int) -> Path:
    return folder / f"documents-{number:05d}.npy"


def _on_disk(dtype: DType) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _map_edges(path: Path) -> NDArray[np.int64]:
    """The edges of a split, memory-mapped where there are any: an empty file cannot be mapped."""
    return np.asarray(np.memmap(path, dtype="<i8", mode="r")) if path.stat().st_size else np.empty(0, np.int64)


def _map_tokens(path: Path, dtype: DType) -> NDArray[np.unsignedinteger]:
    """A plain array over the memory map: slicing `np.memmap` itself costs several times more."""
    return np.asarray(np.memmap(path, dtype=_on_disk(dtype), mode="r"))
