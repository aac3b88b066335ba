"""Models between a teacher and the one that was aligned to it: some mixers of one, some of the other, without a copy.

Selecting layers asks hundreds of such models one question each. They hold no weights of their own, so that building one
takes milliseconds and no memory.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from string import ascii_uppercase

import torch
from torch import Tensor

from longwave.blocks import BLOCKS, PARTS, kind_of
from longwave.checkpoints.names import flat_names
from longwave.config import BlockConfig, ModelConfig
from longwave.conversion.transfer import is_softmax, transfers
from longwave.errors import require
from longwave.model import Decoder

_SHARED = ("rotary", "scales", "norm_eps")  # settings of the model by which its mixers compute, beside their own


def convertible(teacher: Decoder, aligned: Decoder) -> list[int]:
    """The numbers of the layers that are softmax in the teacher, and something else in the model aligned to it.

    UserError for models that do not belong together, and where there is no such layer.
    """
    levels = next((one.config.layout for one in (teacher, aligned) if one.brackets), None)
    require(levels is None, f"layout = {levels}: has levels; layers are selected before they are put in")
    plan = transfers(teacher.config, aligned.config)
    both = enumerate(zip(teacher.blocks, aligned.blocks, strict=True))
    found = [depth for depth, (one, other) in both if is_softmax(one) and not is_softmax(other)]
    require(bool(found), f"aligned.layout = {aligned.config.layout}: every layer is the teacher's; align some first")
    apart = [one.name for one in plan if one.how != "copied" and not one.name.startswith(mixers(found))]
    require(not apart, f"aligned.{apart[:1]}: not as in the teacher; only mixers of converted layers may differ")
    for name in _SHARED:
        ours, theirs = getattr(aligned.config, name), getattr(teacher.config, name)
        require(ours == theirs, f"aligned.{name} = {ours}: the teacher's is {theirs}; align to this teacher")
    return found


def swapped(teacher: Decoder, aligned: Decoder, linear: Collection[int]) -> Decoder:
    """The teacher with the mixers of some layers taken from the model aligned to it; for inference.

    linear: the numbers of these layers, of those that `convertible` names. All weights are shared with the two models;
    the result computes to the bit what that of `transfer.assembled` does.
    """
    with torch.device("meta"):
        model = Decoder(_config(teacher, aligned, linear))
    theirs, ours, place = _tensors(teacher), _tensors(aligned), teacher.embed.weight
    new, names = mixers(linear), flat_names(model)
    origins = {inside: (ours if name.startswith(new) else theirs)[name] for inside, name in names.items()}
    model.adopt({inside: tensor.to(place) for inside, tensor in origins.items()})  # a copy only of another type
    model.origin = teacher.origin
    return model.eval()


def mixers(layers: Collection[int]) -> tuple[str, ...]:
    """How the names of the tensors of these layers' mixers begin."""
    return tuple(f"blocks.{depth}.mixer." for depth in layers)


def _tensors(model: Decoder) -> dict[str, Tensor]:
    """The tensors of a model by their names in a folder, detached."""
    state = model.state_dict()
    return {name: state[inside] for inside, name in flat_names(model).items()}


def _config(teacher: Decoder, aligned: Decoder, linear: Collection[int]) -> ModelConfig:
    """The config of such a model: every kind of block gets a letter and tables of its own, so that none meet."""
    both = enumerate(zip(teacher.blocks, aligned.blocks, strict=True))
    origins = [(True, other.letter) if depth in linear else (False, one.letter) for depth, (one, other) in both]
    free = (letter for letter in ascii_uppercase if letter not in BLOCKS)
    names = dict(zip(dict.fromkeys(origins), free, strict=False))
    kinds = {name: _kind((aligned if new else teacher).config, letter) for (new, letter), name in names.items()}
    return replace(teacher.config, layout=" ".join(names[one] for one in origins), blocks=kinds, tables={})


def _kind(config: ModelConfig, letter: str) -> BlockConfig:
    """A kind of block with all the tables that its parts read."""
    kind, own = kind_of(config, letter), config.of_block(letter)
    tables = {name: own.table(name) for part in kind.parts for name in PARTS[part].tables}
    return BlockConfig(kind.parts, wiring=kind.wiring, tables=tables)
