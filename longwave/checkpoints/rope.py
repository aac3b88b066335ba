"""Rotary positions in the `config.json` of Hugging Face folders, read and written.

Two spellings are read: `rope_parameters` (transformers 5), and `rope_theta` beside `rope_scaling` (before). Both are
written. A kind whose angles depend on how long the sequence has grown ("dynamic") is refused: a key turned early in a
generation would have other angles than in one pass over the whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from longwave.checkpoints.families import Family
from longwave.checkpoints.foreign import ForeignConfig, refuse_unless
from longwave.config import MOST, LinearScaling, LongRopeScaling, ModelConfig, RotaryScaling
from longwave.layers.rotary import attention_factor

_KEYS = {  # ours -> theirs, by kind; the remaining fields of a kind are read and written by code below
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "yarn": {"factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", "truncate": "truncate"},
    "longrope": {"short_factors": "short_factor", "long_factors": "long_factor"},
}
_OPTIONAL = ("beta_fast", "beta_slow", "truncate")
_ORIGINAL = "original_max_position_embeddings"
_STRETCHED = ("linear", "llama3", "yarn")  # kinds whose recipes may leave max_position_embeddings as it was before
_WINDOW = "max_sequence_length"  # FastChat's key beside a linear recipe, which vLLM reads too
_GIVEN = {"attention_factor", "factor"}  # what LongRoPE's factor on cosines and sines may be given by
_ALSO = {  # further keys of a kind
    "default": set(),
    "linear": set(),
    "llama3": {_ORIGINAL},
    "yarn": {_ORIGINAL, "attention_factor", "mscale", "mscale_all_dim", "finetuned"},
    "longrope": {_ORIGINAL, *_GIVEN},
}


def read_rotary(theirs: ForeignConfig, family: Family, context_window: int) -> dict[str, Any]:
    """The plain values of a `RotaryConfig`; UserError for a kind, a key or a value that is not supported."""
    key = "rope_scaling" if theirs.values.get("rope_scaling") else "rope_parameters"
    rope = ForeignConfig(theirs.get(key, dict, {}), f"{theirs.source}: {key}")
    base = rope.get("rope_theta", float, theirs.get("rope_theta", float, 10000.0))
    for config in (theirs, rope):
        config.only("partial_rotary_factor", 1.0)
    named = "type" if rope.values.get("rope_type") is None else "rope_type"
    kind = rope.get(named, str, "default")
    if kind not in ("default", *family.scalings):
        raise rope.error(named, f"supported: {', '.join(map(repr, ('default', *family.scalings)))}")
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *_KEYS.get(kind, {}).values(), *_ALSO[kind]}
    if kind == "longrope" and not family.in_transformers:  # their code reckons the factor from the windows
        known -= _GIVEN
    for unknown in sorted(rope.values.keys() - known):
        rope.only(unknown)
    return {"base": base} | ({} if kind == "default" else {"scaling": _scaling(kind, theirs, rope, context_window)})


def read_window(theirs: ForeignConfig, scaling: Mapping[str, Any], stated: int) -> int:
    """The context window of a model: `max_position_embeddings`, stretched where a recipe left it as it was before.

    Qwen's recipe for YaRN and transformers' own for linear scaling add the scaling and leave that key; transformers
    then runs past it. scaling: the plain values of a `RotaryScaling`, if any. stated: `max_position_embeddings`.
    """
    original = scaling.get("original_window", stated)
    if scaling.get("kind") not in _STRETCHED or (scaling["kind"] == "llama3" and original < stated):
        return stated
    if theirs.values.get(_WINDOW) is not None:
        return theirs.positive(_WINDOW)
    stretched = original * scaling["factor"]
    if not stretched <= MOST:
        raise theirs.error("max_position_embeddings", f"{scaling['factor']} times as much is more than {MOST}")
    return max(stated, int(stretched))


def write_window(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json` from which `read_window` reads the context window again."""
    window, scaling = config.context_window, config.rotary.scaling
    stated = math.ceil(window / scaling.factor) if isinstance(scaling, LinearScaling) else window
    written = {"max_position_embeddings": stated}
    plain = {} if scaling is None else dataclasses.asdict(scaling)
    exact = read_window(ForeignConfig(written, "config.json"), plain, stated) == window
    return written if exact else written | {_WINDOW: window}


def _scaling(kind: str, theirs: ForeignConfig, rope: ForeignConfig, context_window: int) -> dict[str, Any]:
    """The plain values of one kind of scaling."""
    present = {name for name, value in rope.values.items() if value is not None}
    found = {ours: _value(rope, name) for ours, name in _KEYS[kind].items() if name in present or name not in _OPTIONAL}
    if kind == "linear":
        return {"kind": kind, **found}
    where = theirs if theirs.values.get(_ORIGINAL) is not None else rope
    original = where.positive(_ORIGINAL, context_window)
    if kind == "llama3":
        return {"kind": kind, "original_window": original, **found}
    attention = rope.values.get("attention_factor")
    if attention is not None:
        attention = rope.get("attention_factor", float)
    elif kind == "yarn":
        attention = _yarn_attention(rope)
    else:
        if not 1 < original <= context_window:
            raise where.error(_ORIGINAL, f"more than 1, at most max_position_embeddings = {context_window}")
        attention = longrope_attention(original, rope.get("factor", float, context_window / original))
    return {"kind": kind, "original_window": original, "attention_factor": attention, **found}


def _value(rope: ForeignConfig, name: str) -> object:
    if name in ("short_factor", "long_factor"):
        return rope.numbers(name)
    return rope.get(name, bool) if name == "truncate" else rope.get(name, float)


def _yarn_attention(rope: ForeignConfig) -> float | None:
    """The ratio of the two factors that DeepSeek's keys give; None, for the paper's, without both."""
    over, under = rope.get("mscale", float, 0.0), rope.get("mscale_all_dim", float, 0.0)
    if not (over and under):
        return None
    grown = math.log(max(1.0, rope.get("factor", float))) / 10
    return (over * grown + 1) / (under * grown + 1)


def longrope_attention(original: int, factor: float) -> float:
    """LongRoPE's factor on cosines and sines for a window `factor` times the original one."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def write_rotary(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys of `config.json`, in both spellings; UserError for what the family's code would run otherwise."""
    scaling = config.rotary.scaling
    base = {"rope_theta": config.rotary.base}
    if scaling is None:
        return base | {"rope_scaling": None, "rope_parameters": base | {"rope_type": "default"}}
    written = _written(scaling)
    if not family.in_transformers:
        _refuse_other_attention(config, family, scaling)
        written = {"type": scaling.kind} | written
        written.pop("attention_factor", None)
    return base | {"rope_scaling": written, "rope_parameters": base | written}


def _written(scaling: RotaryScaling) -> dict[str, Any]:
    values = dataclasses.asdict(scaling)
    written = {"rope_type": scaling.kind} | {theirs: values[ours] for ours, theirs in _KEYS[scaling.kind].items()}
    if "original_window" in values:
        written[_ORIGINAL] = values["original_window"]
    if values.get("attention_factor") is not None:
        written["attention_factor"] = values["attention_factor"]
    return written


def _refuse_other_attention(config: ModelConfig, family: Family, scaling: RotaryScaling) -> None:
    """Code outside transformers reckons the factor from the windows, whatever the folder says."""
    found, reckoned = attention_factor(scaling), 1.0
    if isinstance(scaling, LongRopeScaling):
        reckoned = longrope_attention(scaling.original_window, config.context_window / scaling.original_window)
    same = math.isclose(found, reckoned, rel_tol=1e-6)
    refuse_unless(same, family.model_type, "rotary.scaling.attention_factor", found, f"must be {reckoned}")
