"""Who drafts tokens for a model, as commands and Python say it: the one place where a `draft` is understood."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeAlias

from longwave import checkpoints
from longwave.engine.medusa import MedusaDrafts
from longwave.engine.speculation import DraftModel, PromptLookup, Proposer
from longwave.errors import UserError, require, shown
from longwave.medusa import is_medusa, load_medusa
from longwave.model import Decoder

Draft: TypeAlias = str | Path | Decoder | None
"""`lookup`, `layers:N` (the model's own first N), another model with the same tokens or its folder, or one of heads."""

_LAYERS = re.compile(r"layers:(\d{1,4})")


def drafter(draft: Draft, model: Decoder, sequences: int) -> Proposer | None:
    """Who drafts for a model, for so many texts at a time; None for nobody.

    Raises UserError for what is none of these, for as many layers as the model has, and for other tokens.
    """
    if draft is None:
        return None
    require(isinstance(draft, str | Path | Decoder), f"draft = {shown(draft)}: lookup, layers:N, a folder or a model")
    if draft == "lookup":
        return PromptLookup()
    if isinstance(draft, str) and (layers := _LAYERS.fullmatch(draft)):
        return DraftModel(_beginning(model, int(layers[1])), sequences)
    if not isinstance(draft, Decoder) and is_medusa(draft):
        return MedusaDrafts(load_medusa(draft, model))
    return DraftModel(_other(draft, model), sequences)


def _beginning(model: Decoder, layers: int) -> Decoder:
    try:
        return model.beginning(layers)
    except UserError as error:
        raise UserError(f"draft = layers:{layers}: {error}") from None


def _other(draft: str | Path | Decoder, model: Decoder) -> Decoder:
    """Another model, in the dtype and on the device of the one that it drafts for."""
    weight = model.embed.weight
    if isinstance(draft, Decoder):
        found, name = draft, "this model"
    else:
        found = checkpoints.load(draft, dtype=weight.dtype, device=weight.device, tokenizer=True)
        name = str(draft)
    ours, theirs = model.tokenizer, found.tokenizer
    alike = ours is not None and theirs is not None and ours.fingerprint == theirs.fingerprint
    require(alike, f"draft = {name}: it has another tokenizer; give one with the same tokens, lookup or layers:N")
    return found
