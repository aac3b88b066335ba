"""Which documents are held out of training: drawn by name, so that the same documents always give the same split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice

from longwave.data.documents import Conversation, Document
from longwave.errors import UserError
from longwave.units import counted

SHARE = 0.02  # of the documents, where none is asked for


def default_share(documents: Iterable[Document], seed: int = 0) -> float:
    """`SHARE`, or where it would hold none of these documents out, the share that holds one out.

    Conversations that nobody answers do not count, since they are left out. A single document is cut in two at `SHARE`.
    """
    draws = (_draw(document.name, seed) for document in documents if _counts(document))
    first, lowest = next(draws, 1.0), 1.0
    for draw in draws:
        lowest = min(lowest, first, draw)
        if lowest < SHARE:
            return SHARE
    return SHARE if lowest == 1 else math.nextafter(lowest, 1)


def _counts(document: Document) -> bool:
    return not isinstance(document, Conversation) or bool(document.answers)


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
        enough = math.floor(lowest * 1e6 + 1) / 1e6
        said = f"none of {counted(count, 'document')} is held out; {enough} holds one out, 0 none (--held-out {enough})"
        raise UserError(f"held_out = {fraction}: {said}")
    if count and highest < fraction:
        said = f"{counted(count, 'document')}, all held out: none is left to train; give less (--held-out {SHARE})"
        raise UserError(f"held_out = {fraction}: {said}")


def _draw(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on the name and the seed alone."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _cut(document: Document, fraction: float) -> list[tuple[Document, bool]]:
    """A single document cut in two: the text to train on, and its end, held out."""
    text = document.text
    if isinstance(document, Conversation):
        raise UserError(
            f"held_out = {fraction}: {document.name} is the only conversation; give more of them, or --held-out 0"
        )
    middle = int(len(text) * (1 - fraction))
    middle = text.rfind("\n", 0, middle) + 1 or middle
    if not 0 < middle < len(text):
        raise UserError(
            f"held_out = {fraction}: {document.name} is too short to be cut in two; give more text, or --held-out 0"
        )
    end = replace(document, name=f"{document.name}#end", text=text[middle:])
    return [(replace(document, text=text[:middle]), False), (end, True)]
