"""The tokenizer of a GGUF file: llama.cpp's `gpt2` for byte-level BPE, its `llama` for BPE over letters with a byte
fallback (SentencePiece's)."""

from __future__ import annotations

import json
from typing import Any

from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError, shown

# The names that llama.cpp has for the patterns by which byte-level tokenizers cut a text first (llama-vocab.cpp).
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}": "qwen2",
}


def write_vocabulary(writer: Any, gguf: Any, tokenizer: Tokenizer, size: int) -> None:
    """Adds the entries, merges, special tokens and chat template of a tokenizer; `size` entries in all.

    UserError for a tokenizer that llama.cpp has no name for.
    """
    definition = json.loads(tokenizer.twin().to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise UserError(f"tokenizer: a model of type {model['type']}; a GGUF of ours holds BPE")
    fallback = bool(model.get("byte_fallback"))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    entries = _entries(definition, size)
    writer.add_tokenizer_model("llama" if fallback else "gpt2")
    writer.add_token_list([text for text, _ in entries])
    writer.add_token_types([_type(gguf, text, special, fallback) for text, special in entries])
    if fallback:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores([text for text, _ in entries], merges))
        writer.add_add_space_prefix("Prepend" in json.dumps(definition["normalizer"]))
    else:
        writer.add_tokenizer_pre(_cut_by(definition["pre_tokenizer"]))
        writer.add_token_merges(merges)
    _name_special(writer, tokenizer)


def _name_special(writer: Any, tokenizer: Tokenizer) -> None:
    for id, add in (
        (tokenizer.bos_id, writer.add_bos_token_id),
        (tokenizer.eos_id, writer.add_eos_token_id),
        (tokenizer.pad_id, writer.add_pad_token_id),
    ):
        if id is not None:
            add(id)
    writer.add_add_bos_token(tokenizer.bos_id in tokenizer.opening)
    writer.add_add_eos_token(tokenizer.eos_id in tokenizer.closing)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _entries(definition: dict[str, Any], size: int) -> list[tuple[str, bool | None]]:
    """The text of every id, and whether it is special; None for an id that the embedding has and no text."""
    entries: list[tuple[str, bool | None]] = [(f"[PAD{id}]", None) for id in range(size)]
    for text, id in definition["model"]["vocab"].items():
        entries[id] = (text, False)
    for token in definition["added_tokens"]:
        entries[token["id"]] = (token["content"], bool(token["special"]))
    return entries


def _type(gguf: Any, text: str, special: bool | None, fallback: bool) -> int:
    kinds = gguf.TokenType
    if special is None:
        return kinds.UNUSED
    if special:
        return kinds.UNKNOWN if text == "<unk>" else kinds.CONTROL
    is_byte = fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return kinds.BYTE if is_byte else kinds.NORMAL


def _scores(entries: list[str], merges: list[str]) -> list[float]:
    """Scores by which SentencePiece merges in the order of the merges: the earlier, the higher."""
    first = dict[str, int]()
    for rank, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", ""), rank)
    return [-float(first.get(text, len(merges))) for text in entries]


def _cut_by(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name for the way in which a text is cut before it is merged."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [part and part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True) and not parts[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"]:
        pattern = parts[0]["pattern"].get("Regex")
        if pattern in _PATTERNS:
            return _PATTERNS[pattern]
    raise UserError(f"tokenizer: llama.cpp has no name for its pre_tokenizer, {shown(pre_tokenizer)}")
