"""Names for special tokens that no text can hold: how text is kept from becoming a special token.

`<|eos|>` in a document is seven characters of text. A tokenizer can turn it into the token in several ways: as a
special token that is looked for in text, as a word of its model (WordLevel, WordPiece, Unigram), as the result of
merges (BPE), or after a normalizer has changed another spelling into it. So the tokenizer that encodes is given another
definition, in which each special token is called by a mark: a number drawn in this process, between private-use
characters. Nothing that was written before the process began can spell a mark, whatever the tokenizer's model is.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Mapping
from typing import Any

from longwave.errors import require, shown

Definition = dict[str, Any]
"""The parsed content of a `tokenizer.json`."""

_DRAW = secrets.randbits(64)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}


def mark_of(id: int) -> str:
    """The mark of a special token."""
    return f"\ue000{_DRAW}.{id}\ue001"


def hidden(definition: Definition, ids: Mapping[str, int]) -> Definition:
    """A copy of the definition in which the special tokens go by their marks, and add nothing around a text.

    ids: of the special tokens, by their names. UserError for a special token that ordinary text is made of.
    """
    marks = {name: mark_of(id) for name, id in ids.items()}
    model = definition["model"]
    for name in marks:
        letter = _is_letter(name, definition)
        require(not letter, f"the special token {shown(name)} is a letter, which text could not do without")
    added = [_hidden_token(token, marks) for token in definition["added_tokens"]]
    known = {token["content"] for token in definition["added_tokens"]}
    added += [_hidden_token({"id": ids[name], "content": name, **_FLAGS}, marks) for name in marks if name not in known]
    added.sort(key=lambda token: token["id"])
    plain = {"truncation": None, "padding": None, "post_processor": None}
    return {**definition, **plain, "added_tokens": added, "model": _hidden_model(model, marks)}


def _hidden_token(token: dict[str, Any], marks: Mapping[str, str]) -> dict[str, Any]:
    """An added token as it is, or by its mark, which is looked for before anything changes the text."""
    name = token["content"]
    return {**token, "content": marks[name], "normalized": False, "special": True} if name in marks else token


def _hidden_model(model: dict[str, Any], marks: Mapping[str, str]) -> dict[str, Any]:
    changed = {**model, "vocab": _hidden_vocabulary(model["vocab"], marks)}
    if model.get("unk_token") in marks:
        changed["unk_token"] = marks[model["unk_token"]]
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        changed["merges"] = [(a, b) for a, b in pairs if not {a, b, a + b[prefix:]} & marks.keys()]
    return changed


def _hidden_vocabulary(vocabulary: Any, marks: Mapping[str, str]) -> Any:
    """The vocabulary with marks: by id for most models, and a list of pieces and their scores for Unigram."""
    if isinstance(vocabulary, list):
        return [[marks.get(piece, piece), score] for piece, score in vocabulary]
    return {marks.get(piece, piece): id for piece, id in vocabulary.items()}


def _is_letter(name: str, definition: Definition) -> bool:
    """Whether the name is a byte in the alphabet of a byte-level tokenizer, or stands for a byte that has no piece."""
    fallback = bool(definition["model"].get("byte_fallback")) and _BYTE.fullmatch(name) is not None
    return fallback or (len(name) == 1 and _has_bytes(definition["pre_tokenizer"]))


def _has_bytes(part: Any) -> bool:
    """Whether a pre-tokenizer, or one of those that it is a sequence of, turns text into bytes."""
    if not isinstance(part, dict):
        return False
    return part.get("type") == "ByteLevel" or any(_has_bytes(one) for one in part.get("pretokenizers", ()))


def size_of(definition: Definition) -> int:
    """The largest id plus one."""
    vocabulary = definition["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return 1 + max([*ids, *(token["id"] for token in definition["added_tokens"])], default=-1)


def unk_of(model: dict[str, Any]) -> str | None:
    """The token that a model gives for what it does not know."""
    if "unk_id" in model:
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def any_of(texts: Collection[str]) -> re.Pattern[str]:
    """A pattern that finds the longest of the texts at each place; it finds nothing where there are no texts."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
