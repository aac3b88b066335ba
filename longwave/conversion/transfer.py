"""The first stage of a conversion: the weights of a pretrained model, put into one with other mixers or levels.

Blocks are matched by their number, whatever levels they stand in. A tensor that both models have under one name is
copied; projections of grouped keys and values are repeated where every head has its own in the new model (Hybrid Linear
Attention, arXiv 2601.22156, with head i taking KV head i // group); everything else starts as a new model's does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longwave.blocks import Block
from longwave.checkpoints.names import flat_names
from longwave.config import ModelConfig
from longwave.errors import require
from longwave.mixers import FullAttention
from longwave.model import Decoder
from longwave.part import Part

How = Literal["copied", "repeated", "new", "left out"]
_HEADS = re.compile(r"blocks\.\d+\.mixer\.[kv]_proj\.(weight|bias)")


@dataclass(frozen=True)
class Transfer:
    """What becomes of a tensor. name: in a folder of the new model, or of the old one where it is left out.

    shape: of that tensor. copies: of each KV head, where heads are repeated. how: `new` for a tensor that only the new
    model has, `left out` for one that only the old model has.
    """

    name: str
    shape: tuple[int, ...]
    how: How
    copies: int = 1


def transfers(teacher: ModelConfig, student: ModelConfig) -> list[Transfer]:
    """What becomes of every tensor, in the order of the new model, and then of those that are left out.

    UserError where the models do not belong together: another number of blocks, or a tensor of another shape.
    """
    with torch.device("meta"):
        theirs, ours = _tensors(Decoder(teacher)), _tensors(Decoder(student))
    depths = [1 + max(map(_block, tensors)) for tensors in (theirs, ours)]
    require(depths[0] == depths[1], f"model.layout = {student.layout}: {depths[1]} blocks; the source has {depths[0]}")
    found = [_transfer(name, tensor, theirs.get(name)) for name, tensor in ours.items()]
    left = [Transfer(name, tuple(one.shape), "left out") for name, one in theirs.items() if name not in ours]
    return [*found, *left]


def transferred(teacher: Decoder, student: ModelConfig, seed: int = 0) -> Decoder:
    """A new model with the teacher's weights in it, which own their storage, in the teacher's dtype and on its device.

    seed: of the weights that are new. UserError as of `transfers`.
    """
    plan, theirs = transfers(teacher.config, student), _tensors(teacher)
    weight, config = teacher.embed.weight, teacher.config
    size = config.table("attention").size_in(config.hidden_size)
    model = Decoder(student, seed).to(weight.device, weight.dtype)
    ours = _tensors(model)
    with torch.no_grad():
        for one in plan:
            if one.how in ("copied", "repeated"):
                ours[one.name].copy_(repeated(theirs[one.name], one.copies, size))
    model.tokenizer = teacher.tokenizer
    model.origin.generation = teacher.origin.generation
    return model


def assembled(before: Decoder, aligned: Decoder, student: ModelConfig, seed: int = 0) -> Decoder:
    """A new model with the weights of one before it; mixers that take the place of softmax come from an aligned model.

    before: the teacher, or a student in which some layers have been converted already and stay as they are. aligned:
    what `conversion.align` leaves, with all layers converted or some; several students can share it. UserError where a
    layer was not aligned, or has another shape there, and as of `transfers`.
    """
    model = transferred(before, student, seed)
    for ours, old, theirs in zip(model.blocks, before.blocks, aligned.blocks, strict=True):
        if is_softmax(old) and not is_softmax(ours):
            fits = not is_softmax(theirs) and _shapes(mixer_of(ours)) == _shapes(mixer_of(theirs))
            advice = f"align the layers that {student.layout} converts"
            require(fits, f"{ours.site.name}: was not aligned, or with other sizes; {advice}")
            mixer_of(ours).load_state_dict(mixer_of(theirs).state_dict())
    return model


def _shapes(part: Part) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in part.state_dict().items()}


def is_softmax(block: Block) -> bool:
    """Whether the mixer of a block is softmax attention, over all tokens, some blocks of them, or a window."""
    return isinstance(mixer_of(block), FullAttention)


def mixer_of(block: Block) -> Part:
    """The part of a block that mixes tokens."""
    return next(part for part in block.parts if part.role == "mixer")


def repeated(tensor: Tensor, copies: int, head_size: int) -> Tensor:
    """Rows of KV heads, each head `copies` times in a row, so that every query head has keys and values of its own."""
    if copies == 1:
        return tensor
    return tensor.unflatten(0, (-1, head_size)).repeat_interleave(copies, 0).flatten(0, 1)


def _tensors(model: Decoder) -> dict[str, Tensor]:
    """The tensors of a model by their names in a folder."""
    state = model.state_dict(keep_vars=True)
    return {name: state[inside] for inside, name in flat_names(model).items()}


def _block(name: str) -> int:
    """The number of the block that a tensor belongs to; -1 for the others."""
    kind, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if kind == "blocks" else -1


def _transfer(name: str, ours: Tensor, theirs: Tensor | None) -> Transfer:
    shape = tuple(ours.shape)
    if theirs is None:
        return Transfer(name, shape, "new")
    if theirs.shape == ours.shape:
        return Transfer(name, shape, "copied")
    rows, held = ours.shape[0], theirs.shape[0]
    fits = bool(_HEADS.fullmatch(name)) and ours.shape[1:] == theirs.shape[1:] and rows % held == 0
    require(fits, f"{name}: shape {list(shape)}; the source's is {list(theirs.shape)}; give the new model its sizes")
    return Transfer(name, shape, "repeated", rows // held)
