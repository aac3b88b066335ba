"""The text to inspect: read from a file, stdin or the command line, and as tokens with the text that each shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longwave.config import ModelConfig
from longwave.data.tokenizer import StreamDecoder, Tokenizer
from longwave.errors import require
from longwave.files.textfile import read_text


@dataclass(frozen=True)
class Piece:
    """The text that a token shows, or a `label` in its place where the token completes no character."""

    text: str
    label: str = ""


def text_of(path: str | None, literal: str | None) -> tuple[str, str]:
    """The name of a text, and the text.

    path: a file, or `-` for stdin; literal: the text itself, in place of a path.
    """
    require((path is None) != (literal is None), "give one text: a file, - for stdin, or --text 'the text itself'")
    if path is None:
        return "text of the command line", str(literal)
    name = "stdin" if path == "-" else path
    return name, read_text(path, name, "give a text file, or --text")


def encode(text: str, name: str, tokenizer: Tokenizer, config: ModelConfig, first: int | None) -> list[int]:
    """The ids of a text, after what the tokenizer puts before one (bos as a rule).

    first: the number of tokens to keep, or None for all.

    UserError for an empty text, for more tokens than the context window, and for ids beyond the model's vocabulary.
    """
    require(bool(text), f"{name}: holds no text")
    require(first is None or first > 0, f"--first {first}: 1 or more tokens")
    ids = tokenizer.encode(text, add_bos=True)
    chosen, window = ids[:first], config.context_window
    fits = f"--first {window} takes the beginning"
    require(len(chosen) <= window, f"{name}: {len(chosen):,} tokens; the model's context window is {window:,}: {fits}")
    highest = max(chosen)
    known = highest < config.vocab_size
    require(known, f"the tokenizer gives id {highest}; the model's vocabulary has {config.vocab_size} entries")
    return chosen


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Piece]:
    """The piece of text of each token; joined they are the decoded text. A character belongs to its last token."""
    decoder = StreamDecoder(tokenizer)
    texts = [decoder.push(id) for id in ids]
    texts[-1] += decoder.finish()
    found: list[Piece] = []
    whole = ""  # the next text that a token completes
    for id, text in zip(reversed(ids), reversed(texts), strict=True):
        whole = text or whole
        found.append(Piece(text, "" if text else _label(id, whole, tokenizer)))
    return found[::-1]


def _label(id: int, whole: str, tokenizer: Tokenizer) -> str:
    if id in tokenizer.special_ids:
        return "start of the text" if id == tokenizer.bos_id else "special token"
    return f"part of “{whole[:1]}”" if whole else "no text"
