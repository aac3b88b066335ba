"""The models of a conversion: the config of a student at every stage, and the model with which a stage begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from longwave.blocks import BLOCKS, PARTS, kind_of
from longwave.config import ModelConfig, build
from longwave.conversion.heads import order_for
from longwave.conversion.recipe import Table, merged
from longwave.conversion.transfer import assembled, mixer_of, transferred
from longwave.errors import require
from longwave.layout import Blocks, Bracketed, Layout, parse
from longwave.mixers import FullAttention, InfllmAttention, LightningAttention
from longwave.mixers.lightning import slopes
from longwave.model import Decoder
from longwave.resamplers import BRACKETS

Gate = Literal["open", "random"]


def letters_of(layout: Layout) -> list[str]:
    """The letter of every block, in order."""
    return [item.letter for item in layout.walk() if isinstance(item, Blocks) for _ in range(item.count)]


def require_convertible(source: ModelConfig) -> None:
    """Raises UserError unless every block of a source has softmax attention, and none lies in a bracket."""
    advice = "a conversion begins with softmax attention in every layer, such as a Llama's"
    plain = all(isinstance(item, Blocks) for item in source.parsed.items)
    require(plain, f"source: layout = {source.layout}: has brackets; {advice}")
    for letter in dict.fromkeys(letters_of(source.parsed)):
        parts = kind_of(source, letter).parts
        softmax = any(issubclass(PARTS[part], FullAttention) for part in parts if part in PARTS)
        require(softmax, f"source: layout = {source.layout}: {letter} is no softmax attention; {advice}")


def converted_layout(
    source: ModelConfig, template: str | None, keep: Collection[int], linear: str, softmax: str | None
) -> str:
    """A student's layout: the layers of `keep` have the letter `softmax` (the source's by default), others `linear`.

    template: the source's layout with brackets around some blocks. UserError where its blocks are not the source's.
    """
    layout, letters = parse(template or source.layout), letters_of(source.parsed)
    same = letters_of(layout) == letters
    require(same, f"student.layout = {layout}: its blocks are not those of the source, {source.layout}")
    ours = iter([(softmax or letter) if depth in keep else linear for depth, letter in enumerate(letters)])
    return str(_relettered(layout, ours))


def _relettered(layout: Layout, letters: Iterable[str]) -> Layout:
    """The layout with other letters, equal neighbours counted together."""
    found: list[Blocks | Bracketed] = []
    rest = iter(letters)
    for item in layout.items:
        if isinstance(item, Bracketed):
            found.append(Bracketed(item.name, item.arguments, _relettered(item.body, rest)))
            continue
        for _ in range(item.count):
            letter, last = next(rest), found[-1] if found else None
            if isinstance(last, Blocks) and last.letter == letter:
                found[-1] = Blocks(last.count + 1, letter)
            else:
                found.append(Blocks(1, letter))
    return Layout(tuple(found))


def student_config(source: ModelConfig, layout: str, tables: Iterable[Table]) -> ModelConfig:
    """The source's config with another layout and tables added; those that the layout does not read are left out."""
    values: Any = source.to_dict()
    for table in tables:
        values = merged(values, table)
    return _without_idle(build(ModelConfig, values | {"layout": layout}, "model"))


def _without_idle(config: ModelConfig) -> ModelConfig:
    """The config without the tables, and the blocks of its own, that its layout does not have."""
    letters = set(letters_of(config.parsed))
    brackets = {one.name for one in config.parsed.walk() if isinstance(one, Bracketed)}
    read = {table for name in brackets & BRACKETS.keys() for table in BRACKETS[name].tables}
    for letter in letters & {*BLOCKS, *config.blocks}:
        own = config.blocks[letter].tables if letter in config.blocks else {}
        read |= {table for part in kind_of(config, letter).parts for table in PARTS[part].tables} - own.keys()
    return dataclasses.replace(
        config,
        tables={name: table for name, table in config.tables.items() if name in read},
        blocks={letter: block for letter, block in config.blocks.items() if letter in letters},
    )


# Their weights --------------------------------------------------------------------------------------------------------


def next_model(before: Decoder, aligned: Decoder | None, config: ModelConfig, gate: Gate, seed: int) -> Decoder:
    """The model with which a stage begins: the one before it, with layers that it converts taken from aligned ones.

    aligned: None where no layer was aligned; converted layers then begin with their softmax layers' projections. gate:
    how output gates begin that softmax layers did not have before: `open` leaves the function as it was, for a gate of
    sigmoid(0) on twice the output; `random` gates at first halve it, as published.
    """
    model = transferred(before, config, seed) if aligned is None else assembled(before, aligned, config, seed)
    for ours, theirs in zip(model.blocks, before.blocks, strict=True):
        mixer, old = mixer_of(ours), mixer_of(theirs)
        if gate == "open" and isinstance(mixer, InfllmAttention) and getattr(old, "o_gate", None) is None:
            _open(mixer)
    return model


@torch.no_grad()
def _open(mixer: InfllmAttention) -> None:
    if mixer.o_gate is not None:
        mixer.o_gate.weight.zero_()
        mixer.o_proj.weight.mul_(2)  # a power of two, which rounds nothing


def head_orders(distances: Mapping[int, Sequence[float]], model: Decoder) -> dict[int, list[int]]:
    """For each layer of linear attention with decays, which head stands where, from how far back the teacher's look."""
    mixers = {block.site.depth: mixer_of(block) for block in model.blocks}
    return {
        depth: order_for(list(distances[depth]), [-slope for slope in _slopes(mixer)])
        for depth, mixer in mixers.items()
        if isinstance(mixer, LightningAttention) and depth in distances
    }


def _slopes(mixer: LightningAttention) -> Sequence[float]:
    """How fast each head forgets; known of a model without memory, too."""
    return slopes(mixer.config.slopes, mixer.heads, mixer.site.depth, mixer.site.layers)
