"""`longwave inspect`: runs a text through a model, and collects kept tokens, attention and FLOPs of every token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from longwave.api import load
from longwave.blocks import Block
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError, require
from longwave.inspection.agreement import Agreement, agreement
from longwave.inspection.attention import BlockAttention, has_weights, softmax_of, watching_attention
from longwave.inspection.flops import Passage, TokenFlops, extremes, token_flops
from longwave.inspection.source import Piece, encode, pieces
from longwave.inspection.trace import LevelTrace, TracedToken, by_token, watching_levels
from longwave.machine import not_finite
from longwave.model import Decoder
from longwave.progress import say
from longwave.resamplers import Resampler
from longwave.streams import Stream

_MOST_MAPS, _FEW_LAYERS, _FEW_HEADS = 64, 4, 2
_PASSAGES, _PASSAGE_TOKENS = 3, 32


@dataclass(frozen=True)
class Choice:
    """Options: blocks and heads to draw maps of (a few by default), and a model to compare with."""

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    against: str | None = None


@dataclass(frozen=True)
class Level:
    """A level's scores and kept tokens, and their agreement with attention.

    target: the share it was trained to keep. threshold: the score above which it keeps a token, if it goes by one.
    own, other: agreement with the attention of a block of its own model, and of the other model's block at that depth.
    """

    trace: LevelTrace
    target: float
    threshold: float | None
    own: Agreement
    other: Agreement | None

    @property
    def name(self) -> str:
        return f"level {self.trace.index + 1}"

    @property
    def retention(self) -> float | None:
        """The share of the tokens reaching the level that it kept; None if no token reached it."""
        return float(self.trace.kept.double().mean()) if len(self.trace.kept) else None

    def plain(self) -> dict[str, Any]:
        """The figures as plain values."""
        scores = self.trace.scores
        return {
            "entered": len(self.trace.kept),
            "kept": int(self.trace.kept.sum()),
            "target": self.target,
            "mean_score": float(scores.mean()) if len(scores) else None,
            "own": self.own.plain(),
            "other": self.other and self.other.plain(),
        }


@dataclass(frozen=True)
class Inspection:
    """Everything that is shown of one text of T tokens.

    layers: depths of the blocks whose maps are shown. blocks: the attention of these blocks and of the blocks that
    levels are compared with, by depth. cheap, dear: the passages that cost the smallest and the largest share of the
    dense model's FLOPs; none for a model without levels.
    """

    source: str
    model: str
    layout: str
    against: str | None
    tokens: list[Piece]
    traced: list[TracedToken]
    levels: list[Level]
    layers: tuple[int, ...]
    blocks: dict[int, BlockAttention]
    flops: TokenFlops
    cheap: list[Passage]
    dear: list[Passage]

    def plain(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {
            "tokens": len(self.tokens),
            "flops": float(self.flops.spent.sum()),
            "dense_flops": float(self.flops.dense.sum()),
            "levels": [level.plain() for level in self.levels],
            "cheapest": [asdict(passage) for passage in self.cheap],
            "dearest": [asdict(passage) for passage in self.dear],
        }


def inspect(path: str, name: str, text: str, first: int | None, choice: Choice, device: torch.device) -> Inspection:
    """Inspects a text (called `name`) with the model of a folder. UserError for options that do not fit the model."""
    model, tokenizer = _load(path, device)
    layers, heads = _layers(model, choice.layers), _heads(model, choice.heads)
    maps, idle = len(layers) * (1 + len(heads)), choice.against is not None and not model.resamplers
    require(maps <= _MOST_MAPS, f"--layers and --heads: {maps} maps with the mean of all heads; at most {_MOST_MAPS}")
    require(not idle, f"--against {choice.against}: no effect, since {path} has no levels; inspect the model that has")
    ids = encode(text, name, tokenizer, model.config, first)
    before = [block_before(model, level) for level in model.resamplers]
    depths = {block.site.depth for block in before if block is not None}
    traces, blocks = _run(path, model, ids, {*layers, *depths}, (None, *heads))
    others = _against(choice.against, tokenizer, ids, depths, device) if choice.against else None
    levels = [_level(model, trace, block, blocks, others) for trace, block in zip(traces, before, strict=True)]
    flops = token_flops(model, traces, len(ids))
    size = max(1, min(_PASSAGE_TOKENS, len(ids) // 8))
    cheap, dear = extremes(flops, size, _PASSAGES) if levels else ([], [])
    return Inspection(
        source=name,
        model=path,
        layout=model.config.layout,
        against=choice.against,
        tokens=pieces(tokenizer, ids),
        traced=by_token(traces, len(ids)),
        levels=levels,
        layers=layers,
        blocks=dict(sorted(blocks.items())),
        flops=flops,
        cheap=cheap,
        dear=dear,
    )


def block_before(model: Decoder, level: Resampler) -> Block | None:
    """The last block with softmax attention before a level, which sees all tokens that enter the level."""
    around = [level.site.level]
    while around[-1] >= 0:
        around.append(model.resamplers[around[-1]].site.level)
    earlier = [block for block in model.blocks if block.site.depth < level.site.depth and block.site.level in around]
    return next((block for block in reversed(earlier) if has_weights(block)), None)


def _load(path: str, device: torch.device) -> tuple[Decoder, Tokenizer]:
    model = load(path, device=device)
    if model.tokenizer is None:
        raise UserError(f"{path}: no tokenizer.json; inspecting a text needs one")
    for line in model.describe():
        say(line)
    return model, model.tokenizer


@torch.no_grad()
def _run(
    path: str, model: Decoder, ids: Sequence[int], depths: set[int], heads: Sequence[int | None] = ()
) -> tuple[list[LevelTrace], dict[int, BlockAttention]]:
    device = model.embed.weight.device
    with watching_levels(model) as levels, watching_attention(model, depths, heads) as blocks, model.mode(False):
        hidden = model.hidden(torch.tensor(ids, device=device), Stream.of([len(ids)], device=device))
    peak = float(hidden.abs().amax())  # NaN if any is
    if not math.isfinite(peak):
        raise not_finite(f"{path}: largest hidden state", peak, hidden.dtype)
    return levels, blocks


def _against(
    path: str, tokenizer: Tokenizer, ids: Sequence[int], depths: set[int], device: torch.device
) -> dict[int, BlockAttention]:
    """The attention of another model's blocks at the same depths, on the same tokens."""
    model, other = _load(path, device)
    same = other.fingerprint == tokenizer.fingerprint
    require(same, f"--against {path}: another tokenizer; only models with the same one read the same tokens")
    window = model.config.context_window
    require(len(ids) <= window, f"--against {path}: its context window is {window:,} tokens: give --first {window}")
    return _run(path, model, ids, depths)[1]


def _level(
    model: Decoder,
    trace: LevelTrace,
    block: Block | None,
    blocks: dict[int, BlockAttention],
    others: dict[int, BlockAttention] | None,
) -> Level:
    resampler = model.resamplers[trace.index]
    own = _compared(trace, block, blocks, "no token got this far")
    other = None if others is None else _compared(trace, block, others, "the other model ran no attention there")
    return Level(trace, float(resampler.retention), resampler.cutoff, own, other)


def _compared(trace: LevelTrace, block: Block | None, blocks: dict[int, BlockAttention], absent: str) -> Agreement:
    if block is None:
        return Agreement(None, reason="no block before this level weighs all that it could see")
    depth = block.site.depth
    return agreement(trace, blocks[depth]) if depth in blocks else Agreement(depth, reason=absent)


def _layers(model: Decoder, asked: tuple[int, ...] | None) -> tuple[int, ...]:
    """The blocks asked for; by default those before the levels, the first, one in the middle and the last."""
    shown = {block.site.depth for block in model.blocks if has_weights(block)}
    if asked is None:
        before = [block.site.depth for level in model.resamplers if (block := block_before(model, level))]
        wanted = [*before, len(model.blocks) // 2, len(model.blocks) - 1, 0]
        return tuple(sorted([one for one in dict.fromkeys(wanted) if one in shown][:_FEW_LAYERS]))
    for one in asked:
        require(one < len(model.blocks), f"--layers {one}: the model has blocks 0 to {len(model.blocks) - 1}")
        require(one in shown, f"--layers {one}: that block has no softmax attention")
    return tuple(dict.fromkeys(asked))


def _heads(model: Decoder, asked: tuple[int, ...] | None) -> tuple[int, ...]:
    count = max([part.heads for block in model.blocks if (part := softmax_of(block))], default=0)
    if asked is None:
        return tuple(range(min(count, _FEW_HEADS)))
    for one in asked:
        there = f"heads 0 to {count - 1}" if count else "no softmax attention"
        require(one < count, f"--heads {one}: the model has {there}")
    return tuple(dict.fromkeys(asked))
