"""Log-probabilities as OpenAI's clients read them, with the text and bytes of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longwave.data.tokenizer import Tokenizer
from longwave.engine import Event

_LEAST = -9999.0  # what OpenAI tells for a probability of 0, which JSON has no logarithm of


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token, a special token's name too; half characters are U+FFFD."""
    special = tokenizer.special_tokens.get(token)
    return tokenizer.decode([token]) if special is None else special


def chat_logprobs(tokenizer: Tokenizer, events: Sequence[Event]) -> dict[str, Any]:
    """The tokens of a piece as chat completions tell them."""
    content = [
        _entry(tokenizer, event.token, event.logprob)
        | {"top_logprobs": [_entry(tokenizer, token, value) for token, value in event.likeliest]}
        for event in events
        if event.token is not None
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def completion_logprobs(tokenizer: Tokenizer, events: Sequence[Event], offset: int) -> dict[str, Any]:
    """The tokens of a piece as completions tell them. offset: characters of the text before it."""
    names = [token_text(tokenizer, event.token) for event in events if event.token is not None]
    offsets, place = list[int](), offset
    for name in names:
        offsets.append(place)
        place += len(name)
    likeliest = [_likeliest(tokenizer, event) for event in events]
    return {
        "tokens": names,
        "token_logprobs": [_finite(event.logprob) for event in events],
        "top_logprobs": likeliest,
        "text_offset": offsets,
    }


def _likeliest(tokenizer: Tokenizer, event: Event) -> dict[str, float]:
    """By text; of tokens with one text, such as halves of characters, the likeliest counts."""
    found = dict[str, float]()
    for token, value in event.likeliest:
        found.setdefault(token_text(tokenizer, token), _finite(value))
    return found


def _finite(logprob: float | None) -> float:
    return _LEAST if logprob is None else max(logprob, _LEAST)
