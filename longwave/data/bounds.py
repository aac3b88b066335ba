"""Bounds of what a `tokenizer.json` may ask for, so that time and memory of a text follow from its length.

A definition is data, but some of it works like a program: replacements that each double a text, a thousand steps one
after the other, words of any length that are looked up letter by letter. What no published tokenizer comes near is
refused before a text is encoded. Patterns (regular expressions) are not looked at, since how long one takes depends on
the text: `patience.py` bounds the time of both.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from math import prod
from typing import Any

from longwave.errors import require

GROWTH = 150  # times; T5's reaches 132: a table with a word of 33 bytes for one character, and a replacement
STEPS = 64  # of normalizer, pre-tokenizer and decoder each; published ones have up to ten
AFFIX = 64  # characters of what marks the beginning or the end of a word
WORD = 256  # letters of a word that WordPiece looks up in time of their cube; 100 everywhere
PIECE = 256  # letters of Unigram's longest piece, each of which is looked up at every letter of a text; 16 as a rule
_WITH_LENGTH = 2  # the kind of a field in a protocol buffer
_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_INNER = ("normalizers", "pretokenizers", "decoders")


def require_bounded(definition: dict[str, Any]) -> None:
    """UserError for a definition with which a short text would take long, or much memory.

    definition: the content of a `tokenizer.json` that the `tokenizers` library has read.
    """
    for name in _PARTS:
        steps = list(_steps(definition.get(name)))
        require(len(steps) <= STEPS, f"{name}: has {len(steps):,} steps; at most {STEPS} are followed")
        growth = prod(map(_growth, steps))
        longer = f"{name}: may make a text {growth:,.0f} times as long; at most {GROWTH} times is followed"
        require(growth <= GROWTH, longer)
    _require_bounded_words(definition["model"])


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part in their order, those of sequences within sequences too."""
    inner = next((part[name] for name in _INNER if name in part), None) if isinstance(part, dict) else ()
    if inner is None:
        yield part
    for one in inner or ():
        yield from _steps(one)


def _growth(step: dict[str, Any]) -> float:
    """How many times as long, in bytes, a step can make a text.

    Unicode's own forms count as 1: a character becomes up to eleven times as long, but only once.
    """
    if step["type"] == "Replace":
        pattern, size = step["pattern"], _size(step["content"])
        found = _size(pattern.get("String", ""))
        return max(1.0, size / found) if found else 1.0 + size  # a regular expression may find nothing everywhere
    if step["type"] == "Prepend":
        return 1.0 + _size(step["prepend"])
    if step["type"] == "Precompiled":
        return max(1.0, _longest_word(step["precompiled_charsmap"]))
    return 1.0


def _longest_word(table: str) -> int:
    """The bytes of the longest word of SentencePiece's table: the size of a search tree, the tree, words ended by 0."""
    try:
        content = base64.b64decode(table)
    except (binascii.Error, ValueError):
        return len(table)
    words = content[4 + int.from_bytes(content[:4], "little") :]
    return max(map(len, words.split(b"\0")))


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _require_bounded_words(model: dict[str, Any]) -> None:
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        affix = len(model.get(name) or "")
        require(affix <= AFFIX, f"model.{name}: {affix:,} characters; at most {AFFIX} are followed")
    word = model.get("max_input_chars_per_word") or 0
    require(word <= WORD, f"model.max_input_chars_per_word = {word}: at most {WORD} letters are looked up")


def longest_piece(content: bytes) -> int:
    """The bytes of the longest piece in a file of SentencePiece (`tokenizer.model`), and a few more.

    Such a file is a protocol buffer: pieces are its first field, and each has its length in front.
    """
    longest = at = 0
    while at < len(content):
        tag, at = _number(content, at)
        size, at = _number(content, at)
        if tag & 7 != _WITH_LENGTH:  # no field of SentencePiece's
            break
        longest = max(longest, size if tag >> 3 == 1 else 0)
        at += size
    return longest


def _number(content: bytes, at: int) -> tuple[int, int]:
    """A number of a protocol buffer, seven bits a byte, and the place behind it."""
    number = shift = 0
    for place in range(at, min(at + 10, len(content))):
        number |= (content[place] & 0x7F) << shift
        shift += 7
        if content[place] < 0x80:
            return number, place + 1
    return number, len(content)
