"""From the fields of a request to what the engine is asked for."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from longwave.engine import Sampling
from longwave.inference.grammar import Grammar, Grammars
from longwave.serving.bodies import AnyFormat, FlatSchemaFormat, ObjectFormat, Sampled, SchemaFormat
from longwave.serving.errors import ApiError

Held = ObjectFormat | SchemaFormat | FlatSchemaFormat
_GUIDES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


def sampling_of(body: Sampled, vocabulary: int) -> Sampling:
    """How tokens are drawn: by default as OpenAI does, at temperature 1 and with a seed of chance.

    Raises ApiError for a bias of a token outside the vocabulary.
    """
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    if beyond := [token for token in bias if token >= vocabulary]:
        raise ApiError(400, f"logit_bias has token {beyond[0]}; the vocabulary has {vocabulary:,}", param="logit_bias")
    return Sampling(
        **_draw(body),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=bias,
    )


def _draw(body: Sampled) -> Mapping[str, Any]:
    """The options of a draw; none at temperature 0, where nothing is drawn."""
    temperature = 1.0 if body.temperature is None else body.temperature
    if temperature == 0 or body.top_p == 0:
        return {"temperature": 0.0}
    return {
        "temperature": temperature,
        "top_k": body.top_k if body.top_k is not None and body.top_k > 0 else None,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "min_p": body.min_p or 0.0,
        "seed": secrets.randbits(63) if body.seed is None else body.seed & ((1 << 63) - 1),
    }


def grammar_of(body: Sampled, form: AnyFormat | Held | None, grammars: Grammars) -> Grammar | None:
    """What the output is held to; None for text of any kind. Raises ApiError where two things are asked for."""
    asked = [name for name in _GUIDES if getattr(body, name) is not None]
    if body.min_tokens and (asked or form is not None):
        raise ApiError(400, "min_tokens: output that is held to a format ends where that does", param="min_tokens")
    held = None if isinstance(form, AnyFormat) else form
    if len(asked) + (held is not None) > 1:
        raise ApiError(400, "the output can be held to one thing: a response format or one guided_ field")
    if held is not None:
        return _of_format(held, grammars)
    if not asked:
        return None
    value = getattr(body, asked[0])
    make = {"guided_json": grammars.json, "guided_regex": grammars.regex, "guided_choice": grammars.choice}
    return make.get(asked[0], grammars.lark)(value)


def _of_format(form: Held, grammars: Grammars) -> Grammar:
    if isinstance(form, ObjectFormat):
        return grammars.json({"type": "object"})
    named = form.json_schema if isinstance(form, SchemaFormat) else form
    return grammars.json({"type": "object"} if named.schema_ is None else named.schema_)
