"""Documents into prepared data (`prepared.py` says what its folder holds), in memory that does not grow with them.

A text is stored as bos, its ids and eos (bos and eos only where the vocabulary has them), a conversation as its chat
template writes it. Every shard but the last has the same number of tokens, and documents run across shards. The folder
appears whole or not at all (`files.folder`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from longwave import files
from longwave.data.chat import ChatEncoder, LossOn
from longwave.data.documents import Conversation, Document
from longwave.data.encoding import Encoded, Encoder, TextEncoder
from longwave.data.prepared import (
    FORMAT,
    LEARNED_FILE,
    META_FILE,
    SOURCES_FILE,
    DType,
    PreparedInfo,
    SplitInfo,
    SplitTokens,
    documents_file,
    on_disk,
    tokens_file,
)
from longwave.data.recall.documents import RecallDocument, RecallEncoder
from longwave.data.recall.words import spelled
from longwave.data.selection import Chooser, Counts, Lengths, Selection
from longwave.data.sources import Census, Source, documents
from longwave.data.splitting import default_share, split_held_out
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError, cut, require

__all__ = ["PreparedInfo", "SplitTokens", "prepare"]

DEFAULT_VOCABULARY = 8192
SHARD_TOKENS = 1 << 28  # half a GiB of uint16: few open files for a large corpus, cheap to copy for a small one
TRAINING_CHARACTERS = 1 << 30  # more text hardly changes a vocabulary, and its training holds every word in memory
_CHUNK_BYTES, _CHUNK_DOCUMENTS = 2 << 20, 1024  # of text encoded in one call, in parallel over documents
MOST_SOURCES = 1000  # that are told apart; beyond them a table of losses says nothing
_NONE_KEPT = "keep: no training document has such a length; give other ranges, or longer documents"
_NONE_HELD_OUT = "keep: no held-out document has such a length; hold out more (--held-out 0.1), or none (--held-out 0)"
_SLICE = 1 << 20  # characters: of a text that a tokenizer is trained on, since the library gathers 256 of them

Progress = Callable[[str, int], None]
"""Called with the stage and the bytes of text that it has read so far.

Stages are "tokenizer", then "counting" where tokens are asked for, then "tokens".
"""


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
    for_recall: bool = False,
    keep: tuple[Lengths, ...] = (),
    tokens: int | None = None,
    progress: Progress | None = None,
) -> PreparedInfo:
    """Turns documents into a prepared folder, in memory that does not grow with the source.

    tokenizer: by default a new one of `vocab_size` entries (8192 unless given), trained on the first GiB of the
        training documents.
    held_out: share of the documents kept from training, which `seed` draws (`splitting`); by default two in a hundred,
        and one at least.
    loss_on: which tokens of a conversation are learned; only the assistant's by default, and of recall tasks only the
        answers.
    text_field, ignore: how the rows of a path are read (`sources.documents`).
    for_recall: whether the new tokenizer has an entry for every word of recall tasks.
    keep, tokens: which documents are taken, by length and of each source up to its share (`selection`); `seed` draws.
    Raises UserError when `out` exists, for a source that cannot be read, for conversations or a chat template that
    cannot be used, and for settings without effect: a `vocab_size` beside a tokenizer, `loss_on` for texts.
    """
    for name, value in (("vocab_size", vocab_size), ("for_recall", for_recall or None)):
        idle = tokenizer is not None and value is not None
        require(not idle, f"{name} = {value}: has no effect beside a given tokenizer; leave one of the two out")
    census = Census()

    def found(census: Census | None = None) -> Iterator[Document]:
        return documents(source, text_field, ignore=ignore, census=census)

    first = next(found())
    if loss_on is not None and type(first) is Document:
        raise UserError(f"loss_on = {loss_on}: has no effect on texts, of which every token is learned; leave it out")
    share = default_share(found(), seed) if held_out is None else held_out

    def read(stage: str, census: Census | None = None) -> Iterator[tuple[Document, bool]]:
        pairs = split_held_out(found(census), share, seed)
        return _reporting(pairs, stage, progress) if progress else pairs

    with files.folder(out, overwrite=False) as folder:
        if tokenizer is None:
            size = DEFAULT_VOCABULARY if vocab_size is None else vocab_size
            tokenizer = Tokenizer.train(_training_texts(read("tokenizer")), size, spelled() if for_recall else "")
        encoder, selection = _encoder_of(first, tokenizer, loss_on), Selection(keep, tokens, seed)
        counts = None if tokens is None else _counted(read("counting"), encoder, selection)
        chooser = Chooser(selection, counts)
        info = replace(_write(folder, read("tokens", census), encoder, chooser), not_read=census.found())
        require(share == 0 or bool(info.held_out.tokens) or selection.takes_all, _NONE_HELD_OUT)
        (folder / META_FILE).write_bytes(info.to_json())
        return info


def _encoder_of(first: Document, tokenizer: Tokenizer, loss_on: LossOn | None) -> Encoder[Any]:
    """The encoder of documents like the first."""
    if isinstance(first, Conversation):
        return ChatEncoder(tokenizer, loss_on or "assistant")
    if isinstance(first, RecallDocument):
        return RecallEncoder(tokenizer, by_answer=loss_on != "all")
    return TextEncoder(tokenizer)


class _Writer:
    """Appends documents to the shards of one split."""

    def __init__(self, folder: Path, dtype: DType, by_answer: bool):
        folder.mkdir()
        self._folder, self._dtype = folder, on_disk(dtype)
        self._file: BinaryIO | None = None
        self._edges = (folder / LEARNED_FILE).open("wb") if by_answer else None
        self._sources = (folder / SOURCES_FILE).open("wb")
        self._starts: list[int] = []
        self._shards: list[int] = []
        self._documents = self._bytes = self._learned = 0

    def add(self, document: Encoded, source: int) -> None:
        """Writes one document, over as many shards as it takes, and the number of its source."""
        tokens = np.array(document.ids, dtype=self._dtype)
        self._bytes += document.bytes
        self._documents += 1
        self._add_edges(document)
        starts_here = True
        while len(tokens):
            file = self._open()
            if starts_here:
                self._starts.append(sum(self._shards))
                self._sources.write(source.to_bytes(4, "little"))
            piece, tokens = np.split(tokens, [SHARD_TOKENS - self._shards[-1]])
            file.write(piece.tobytes())
            self._shards[-1] += len(piece)
            starts_here = False

    def finish(self) -> SplitInfo:
        self._close()
        self._sources.close()
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
        self._file = (self._folder / tokens_file(len(self._shards))).open("wb")
        self._shards.append(0)
        return self._file

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        np.save(self._folder / documents_file(len(self._shards) - 1), np.array(self._starts, dtype=np.int64))
        self._file, self._starts = None, []


class _Sources(dict[str, int]):
    """The numbers of sources by their names, in the order in which they come; those beyond the first share one."""

    def __missing__(self, name: str) -> int:
        known = "others" if len(self) >= MOST_SOURCES else cut(name.encode(errors="replace").decode())
        return self.setdefault(known or "not named", len(self))


def _counted(pairs: Iterator[tuple[Document, bool]], encoder: Encoder[Any], selection: Selection) -> Counts:
    """The tokens of every source that training could have."""
    counts, sources = Counts(selection), _Sources()
    for document, is_held_out, parts in _encoded(pairs, encoder):
        for part in parts:
            source = sources[document.source]  # numbered as they are when documents are written
            if not is_held_out:
                counts.add(source, document.name, len(part.ids))
    return counts


def _write(
    folder: Path, pairs: Iterator[tuple[Document, bool]], encoder: Encoder[Any], chooser: Chooser
) -> PreparedInfo:
    tokenizer, left_out, sources = encoder.tokenizer, 0, _Sources()
    dtype: DType = "uint16" if tokenizer.vocab_size <= 65535 else "uint32"
    train, held_out = (_Writer(folder / split, dtype, encoder.by_answer) for split in ("train", "held_out"))
    for document, is_held_out, parts in _encoded(pairs, encoder):
        left_out += not parts
        for part in parts:
            source = sources[document.source]
            if chooser.takes(source, document.name, len(part.ids), is_held_out):
                (held_out if is_held_out else train).add(part, source)
    tokenizer.save(folder)
    splits = train.finish(), held_out.finish()
    info = PreparedInfo(FORMAT, tokenizer.vocab_size, dtype, tokenizer.fingerprint, *splits, encoder.kind, left_out)
    info = replace(info, sources=list(sources), shares=chooser.shares(sources))
    require(bool(info.train.tokens or not info.shares), _NONE_KEPT)
    if not info.train.targets:
        raise UserError(f"nothing to learn: {left_out} of the conversations have no answer of the assistant")
    return info


def _encoded(
    pairs: Iterator[tuple[Document, bool]], encoder: Encoder[Any]
) -> Iterator[tuple[Document, bool, list[Encoded]]]:
    """Each document, whether it is held out, and the documents to store of it."""
    for chunk in _chunks(pairs):
        encoded = encoder.encode([document for document, _ in chunk])
        yield from ((document, held, parts) for (document, held), parts in zip(chunk, encoded, strict=True))


def _chunks(pairs: Iterator[tuple[Document, bool]]) -> Iterator[list[tuple[Document, bool]]]:
    """Documents in groups small enough for memory and large enough to keep every core busy."""
    chunk: list[tuple[Document, bool]] = []
    taken = 0
    for pair in pairs:
        size = len(pair[0].text.encode())
        if chunk and (taken + size > _CHUNK_BYTES or len(chunk) == _CHUNK_DOCUMENTS):
            yield chunk
            chunk, taken = [], 0
        chunk.append(pair)
        taken += size
    if chunk:
        yield chunk


def _training_texts(pairs: Iterator[tuple[Document, bool]]) -> Iterator[str]:
    room = TRAINING_CHARACTERS
    for document, is_held_out in pairs:
        if room <= 0:
            return
        if not is_held_out:
            room -= len(document.text)
            yield from (document.text[start : start + _SLICE] for start in range(0, len(document.text), _SLICE))


def _reporting(
    pairs: Iterator[tuple[Document, bool]], stage: str, progress: Progress
) -> Iterator[tuple[Document, bool]]:
    size = 0
    for pair in pairs:
        size += len(pair[0].text.encode())
        progress(stage, size)
        yield pair
