"""Blocks: the parts that there are, what the letters of a layout stand for, and how a block's parts are wired.

A new mixer is a file and a line in `PARTS`; a letter for it is a line in `BLOCKS`, or a table in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longwave.config import ModelConfig
from longwave.costs import At, Cost, count, weight_bytes
from longwave.errors import UserError
from longwave.layers.mlp import MLP
from longwave.layers.norm import RMSNorm
from longwave.mixers import FullAttention, InfllmAttention, LightningAttention, WindowAttention
from longwave.part import Layer, Part, Site
from longwave.states import State
from longwave.streams import Stream

PARTS: dict[str, type[Part]] = {
    "full": FullAttention,
    "window": WindowAttention,
    "lightning": LightningAttention,
    "infllm": InfllmAttention,
    "mlp": MLP,
}


@dataclass(frozen=True)
class Kind:
    """A row of the block table: the parts of a block in order, and how they are wired."""

    parts: tuple[str, ...]
    wiring: str = "residual"


BLOCKS: dict[str, Kind] = {
    "F": Kind(("full", "mlp")),
    "W": Kind(("window", "mlp")),
    "L": Kind(("lightning", "mlp")),
    "S": Kind(("infllm", "mlp")),
}


DENSE = "F"  # the letter of what other layouts are compared with


class Block(nn.Module):
    """A row of parts, each behind a norm of its own.

    A part lies under its role, with its norm beside it: `mixer` and `mixer_norm`, then `mlp` and `mlp_norm`; a second
    part of one role is `mixer2`.
    """

    def __init__(self, config: ModelConfig, letter: str, site: Site) -> None:
        super().__init__()
        self.letter, self.site, self.scale = letter, site, config.scales.residual
        kind, own = kind_of(config, letter), config.of_block(letter)
        self.wire, self.names = WIRINGS[kind.wiring], list[str]()
        for part in kind.parts:
            name = self._free_name(PARTS[part].role)
            self.names.append(name)
            setattr(self, f"{name}_norm", RMSNorm(config.hidden_size, config.norm_eps))
            setattr(self, name, PARTS[part](own, replace(site, name=f"{site.name}.{name}")))

    def forward(self, hidden: Float[Tensor, "T D"], stream: Stream, state: State | None) -> Float[Tensor, "T D"]:
        return self.wire(self, hidden, stream, state)

    @property
    def parts(self) -> list[Part]:
        """The parts in order."""
        return [self.get_submodule(name) for name in self.names]  # pyright: ignore[reportReturnType]

    def branches(self) -> Iterator[tuple[nn.Module, Part]]:
        """Each part with its norm, in order."""
        for name in self.names:
            yield self._modules[f"{name}_norm"], self._modules[name]  # pyright: ignore[reportReturnType]

    def scaled(self, branch: Tensor) -> Tensor:
        """A branch as it is added to the residual stream: times the residual scale."""
        return branch if self.scale == 1 else self.scale * branch

    def decode_flops(self, context: int) -> int:
        """FLOPs of a token that reaches the block after `context` others."""
        return sum(part.decode_flops(context) for part in self.parts)

    def costs(self, at: At) -> list[Cost]:
        """The costs of the block, as one."""
        parameters, parts = count(self), self.parts
        state = sum(part.read_bytes(at.tokens, at.dtype) for part in parts)
        return [
            Cost(
                f"{self.letter} in level {self.site.level + 1}" if self.site.level >= 0 else self.letter,
                parameters,
                sum(part.prefill_flops(at.tokens) for part in parts),
                at.chance * self.decode_flops(at.tokens),
                at.chance * (weight_bytes(parameters, at.dtype) + state),
                sum(part.state_spec().bytes(at.tokens, at.dtype) for part in parts),
                sum(part.unlearned_flops(at.tokens) for part in parts),
            )
        ]

    def _free_name(self, role: str) -> str:
        taken = sum(name.rstrip("0123456789") == role for name in self.names)
        return f"{role}{taken + 1}" if taken else role


Wiring: TypeAlias = Callable[[Block, Tensor, Stream, "State | None"], Tensor]


def residual(block: Block, hidden: Tensor, stream: Stream, state: State | None) -> Tensor:
    """hidden + part(norm(hidden)), one part after the other (pre-norm, Xiong et al. 2020)."""
    for norm, part in block.branches():
        hidden = hidden + block.scaled(part(norm(hidden), stream, state))
    return hidden


def parallel(block: Block, hidden: Tensor, stream: Stream, state: State | None) -> Tensor:
    """hidden + the sum of part(norm(hidden)), all from the same hidden (GPT-J, Wang and Komatsuzaki 2021)."""
    branches = [block.scaled(part(norm(hidden), stream, state)) for norm, part in block.branches()]
    return hidden + sum(branches[1:], start=branches[0])


WIRINGS: dict[str, Wiring] = {"residual": residual, "parallel": parallel}


class Stack(nn.Module):
    """Layers in order. With `recompute`, blocks keep only their inputs for the backward pass (Chen et al. 2016).

    reentrant: which of torch's two ways of recomputing is taken; the gradients are the same.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.recompute = self.reentrant = False

    def forward(self, hidden: Float[Tensor, "T D"], stream: Stream, state: State | None) -> Float[Tensor, "T D"]:
        for layer in self.layers:
            if self.recompute and self.training and isinstance(layer, Block):
                hidden = checkpoint(layer, hidden, stream, state, use_reentrant=self.reentrant)  # pyright: ignore[reportAssignmentType]
            else:
                hidden = layer(hidden, stream, state)
        return hidden

    def costs(self, at: At) -> list[Cost]:
        """The costs of each layer."""
        layers: list[Layer] = list(self.layers)  # pyright: ignore[reportAssignmentType]
        return [cost for layer in layers for cost in layer.costs(at)]


def kind_of(config: ModelConfig, letter: str) -> Kind:
    """The kind of a letter: the model's own, or that of the block table. UserError for one that makes no sense."""
    if letter not in config.blocks:
        return BLOCKS[letter]
    own, field = config.blocks[letter], f"blocks.{letter}"
    if letter in BLOCKS:
        raise UserError(f"{field}: {letter} is a block of longwave's own; take another letter")
    for part in own.parts:
        if part not in PARTS:
            raise UserError(f"{field}.parts: no part {part!r}; known: {', '.join(sorted(PARTS))}")
    if not own.parts:
        raise UserError(f"{field}.parts is empty: name one part or more, such as 'full' and 'mlp'")
    if own.wiring not in WIRINGS:
        raise UserError(f"{field}.wiring = {own.wiring!r}: use one of {', '.join(WIRINGS)}")
    for table in own.tables:
        if not any(table in PARTS[part].tables for part in own.parts):
            raise UserError(f"{field}.{table} has no effect: none of its parts reads it")
    return Kind(own.parts, own.wiring)


def tables_of(letter: str) -> set[str]:
    """The tables of a config that the parts of a block read."""
    return {table for part in BLOCKS[letter].parts for table in PARTS[part].tables}


def reading(table: str) -> str:
    """The blocks of the table that read a table of the config, for an error message."""
    letters = [letter for letter in BLOCKS if table in tables_of(letter)]
    return f"{' or '.join(letters)} block"
