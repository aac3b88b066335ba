"""A pretrained model's context window made longer, by another rotation and not by other weights.

The settings that do so are `context_window`, `rotary.base` and `rotary.scaling`; the rest of a model is the start's.
What follows of a scaling from the two windows is filled in: the original window, and the factor from the new window, or
the new window from the factor. A model that is scaled already is extended from its original window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from longwave.config import LinearScaling, ModelConfig, RotaryConfig, build
from longwave.errors import require
from longwave.mixers import FullAttention
from longwave.model import Decoder
from longwave.units import counted

FIELDS = ("context_window", "rotary.base", "rotary.scaling")  # of a model, in which an extended one may differ
_BY_FACTOR = ("linear", "llama3", "yarn")  # kinds of scaling that stretch by one factor


def extend(model: Decoder, context_window: int | None = None, *, base: float | None = None, **scaling: Any) -> Decoder:
    """A model with a longer context window and the same weights, which the two then share.

    context_window: in tokens; by default the original one times the factor of the scaling. base: of the rotation,
    larger than the model's. scaling: its `kind` (`yarn`, `linear`, `llama3`, `longrope`), and other fields of that
    kind, such as `factor`, which is otherwise the ratio of the windows. UserError for a window or a base that is
    smaller, and for a scaling that cannot be.
    """
    rotary = {name: value for name, value in (("base", base), ("scaling", scaling)) if value}
    over = {"rotary": rotary} | ({} if context_window is None else {"context_window": context_window})
    config = build(ModelConfig, extended(model.config, over), "extend")
    require_extension(config, model.config, "the model")
    with torch.device("meta"):
        longer = Decoder(config)
    longer.adopt(model.state_dict())
    longer.origin, longer.tokenizer = model.origin, model.tokenizer
    return longer.train(model.training)


def extended(start: ModelConfig, over: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a model: those of the table `over`, and the start's for whatever it leaves out."""
    values = _merged(start.to_dict(), over)
    rotary = over.get("rotary")
    given = rotary.get("scaling") if isinstance(rotary, Mapping) else None
    if not isinstance(given, Mapping):
        return values
    window = over.get("context_window")
    scaling = _completed(given, start, window)
    values["rotary"] = {**values["rotary"], "scaling": scaling}
    if window is None and scaling != _plain(start):
        values["context_window"] = _reached(scaling, start)
    return values


def original_window(config: ModelConfig) -> int:
    """The context window, in tokens, that a model had before its rotation was stretched."""
    scaling = config.rotary.scaling
    if isinstance(scaling, LinearScaling):
        return max(1, round(config.context_window / scaling.factor))
    return config.context_window if scaling is None else scaling.original_window


def require_extension(model: ModelConfig, start: ModelConfig, where: str) -> None:
    """Raises UserError where a model's window or base is smaller than that of its start, or a scaling is taken back.

    where: the start, in words for the error.
    """
    for name, ours, theirs in (
        ("context_window", model.context_window, start.context_window),
        ("rotary.base", model.rotary.base, start.rotary.base),
    ):
        require(ours >= theirs, f"model.{name} = {ours!r}: {where} has {theirs!r}; give more, or leave it out")
    kept = start.rotary.scaling is None or model.rotary.scaling is not None
    require(kept, f"model.rotary.scaling = None: {where} is scaled already; leave it out, or give another scaling")


def extension_notes(model: ModelConfig, start: ModelConfig, where: str) -> Iterator[str]:
    """Lines for people: how the start was extended; a longer window whose angles the model has never seen."""
    if model.rotary != start.rotary:
        grown = f"{where}: its window of {start.context_window:,} becomes {counted(model.context_window, 'token')}"
        yield f"{grown}, by {_words(model.rotary)}"
    elif model.context_window > start.context_window and _turns_without_end(model):
        why = f"{where} knows {counted(start.context_window, 'token')}, and its rotation stays as it is"
        would = "model.rotary.scaling.kind = yarn (or linear, llama3) or a larger model.rotary.base would stretch it"
        yield f"model.context_window = {model.context_window}: {why}; {would}"


def _merged(base: Any, over: Any) -> Any:
    """Nested tables with the values of `over` in place of those of `base`."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    return {**base, **{name: _merged(base.get(name), value) for name, value in over.items()}}


def _plain(config: ModelConfig) -> dict[str, Any]:
    """The scaling of a model as plain values; none where it has none."""
    scaling = config.rotary.scaling
    return {} if scaling is None else dataclasses.asdict(scaling)


def _completed(given: Mapping[str, Any], start: ModelConfig, window: Any) -> dict[str, Any]:
    """A scaling with what it leaves out: of the same kind as the start's, its fields; else what the windows say."""
    before = _plain(start)
    kind = given.get("kind", before.get("kind"))
    known = before if kind == before.get("kind") else {}
    filled = {**known, **given}
    if kind in ("llama3", "yarn", "longrope"):
        filled.setdefault("original_window", original_window(start))
    if kind in _BY_FACTOR and "factor" not in given and _is_size(window):
        original = filled.get("original_window", original_window(start))
        filled |= {"factor": window / original} if _is_size(original) else {}
    if filled.get("factor") != known.get("factor") and "attention_factor" not in given:
        filled.pop("attention_factor", None)  # it belongs to the factor that it was given with
    return filled


def _reached(scaling: Mapping[str, Any], start: ModelConfig) -> int:
    """The window that a scaling reaches by its factor, at least the start's."""
    original, factor = scaling.get("original_window", original_window(start)), scaling.get("factor")
    sound = _is_size(original) and isinstance(factor, int | float) and 0 < factor < math.inf
    return max(start.context_window, int(original * factor)) if sound else start.context_window


def _is_size(value: Any) -> bool:
    """Whether a value of a recipe, which nothing has looked at yet, is a number of tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _turns_without_end(config: ModelConfig) -> bool:
    """Whether a part of the model rotates queries and keys at any distance."""
    with torch.device("meta"):
        parts = Decoder(config).parts
    full = (part for part in parts if isinstance(part, FullAttention))
    return any(part.rotation is not None and part.pattern.window is None for part in full)


def _words(rotary: RotaryConfig) -> str:
    """The rotation as people say it: `yarn, factor 4, base 10,000`."""
    scaling, base = rotary.scaling, f"base {rotary.base:,.10g}"
    factor = getattr(scaling, "factor", None)
    stretched = () if scaling is None else (scaling.kind,) if factor is None else (scaling.kind, f"factor {factor:g}")
    return ", ".join([*stretched, base])
