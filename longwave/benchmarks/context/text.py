"""The text of `longwave bench context`: the token ids of one long sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longwave.data.encoding import TextEncoder
from longwave.data.sources import Source, documents, standard_library
from longwave.data.tokenizer import Tokenizer
from longwave.errors import require

_TOGETHER = 64  # documents that are encoded at a time


@dataclass(frozen=True)
class Text:
    """A text as one sequence. ids (N): its documents' tokens one after the other; found: tokens before they repeat."""

    name: str
    ids: NDArray[np.int32]
    found: int

    def describe(self) -> str:
        """The name and tokens of the text in words, and whether it is repeated."""
        times = len(self.ids) / self.found
        repeated = f"; repeated, {times:.1f} times in all, since contexts are longer" if times > 1 else ""
        return f"text: {self.found:,} tokens of {self.name}{repeated}"


def read_text(path: str | Path | None, tokenizer: Tokenizer | None, vocab_size: int, count: int) -> Text:
    """The first `count` tokens of a file or folder, or of the Python standard library; repeated where it has fewer.

    tokenizer: None trains a byte-level BPE of `vocab_size` entries on the text, as `quickstart` does. UserError for a
    source without text, and for a tokenizer with more entries than the model.
    """
    source: Source = standard_library if path is None else path
    if tokenizer is None:
        tokenizer = Tokenizer.train((document.text for document in documents(source)), vocab_size)
    entries = tokenizer.vocab_size
    require(entries <= vocab_size, f"the tokenizer has {entries} entries; the model's vocabulary has {vocab_size}")
    ids = np.fromiter(_ids(source, tokenizer, count), np.int32)
    return Text("the Python standard library" if path is None else str(path), np.resize(ids, count), len(ids))


def _ids(source: Source, tokenizer: Tokenizer, count: int) -> Iterator[int]:
    """At most `count` ids; documents are encoded as they are needed."""
    encoder, left, read = TextEncoder(tokenizer), count, documents(source)
    while left and (together := list(islice(read, _TOGETHER))):
        for encoded in (one for found in encoder.encode(together) for one in found):
            yield from encoded.ids[:left]
            left -= min(left, len(encoded.ids))
