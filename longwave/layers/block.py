"""Blocks and stacks: what the letters of a layout stand for, and the one protocol that layers obey."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longwave.config import ModelConfig
from longwave.costs import Cost, count, weight_bytes
from longwave.layers.mlp import MLP
from longwave.layers.norm import RMSNorm
from longwave.mixers import MIXERS, Site
from longwave.states import State
from longwave.stream import Stream


@dataclass(frozen=True)
class BlockKind:
    """A row of the block table: which mixer stands in front of the MLP."""

    mixer: str


BLOCKS: dict[str, BlockKind] = {
    "F": BlockKind("full"),
    "W": BlockKind("window"),
    "L": BlockKind("lightning"),
    "S": BlockKind("infllm"),
}


@runtime_checkable
class Layer(Protocol):
    """A block or a resampler: hidden (T, D) in, hidden (T, D) out, with its costs."""

    def __call__(self, hidden: Tensor, stream: Stream, state: State | None) -> Tensor: ...

    def costs(self, tokens: int, chance: float, dtype: torch.dtype) -> list[Cost]:
        """What the layer and all it holds cost at `tokens` tokens, of which a new one gets here with `chance`."""
        ...


class Block(nn.Module):
    """norm, mixer, residual, norm, MLP, residual."""

    def __init__(self, config: ModelConfig, letter: str, site: Site) -> None:
        super().__init__()
        self.letter = letter
        self.site, self.scale = site, config.scales.residual
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = MIXERS[BLOCKS[letter].mixer](config, site)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Float[Tensor, "T D"], stream: Stream, state: State | None) -> Float[Tensor, "T D"]:
        hidden = self._add(hidden, self.mixer(self.mixer_norm(hidden), stream, state))
        return self._add(hidden, self.mlp(self.mlp_norm(hidden)))

    def _add(self, hidden: Tensor, branch: Tensor) -> Tensor:
        return hidden + (branch if self.scale == 1 else self.scale * branch)

    def decode_flops(self, context: int) -> int:
        """FLOPs of a token that reaches the block after `context` others."""
        return self.mixer.decode_flops(context) + self.mlp.flops()

    def costs(self, tokens: int, chance: float, dtype: torch.dtype) -> list[Cost]:
        """What the block costs at `tokens` tokens, of which a new one gets here with `chance`."""
        parameters, state = count(self), self.mixer.state_spec().bytes(tokens, dtype)
        return [
            Cost(
                f"{self.letter} in level {self.site.level + 1}" if self.site.level >= 0 else self.letter,
                parameters,
                self.mixer.prefill_flops(tokens) + tokens * self.mlp.flops(),
                chance * self.decode_flops(tokens),
                chance * (weight_bytes(parameters, dtype) + self.mixer.read_bytes(tokens, dtype)),
                state,
                self.mixer.unlearned_flops(tokens),
            )
        ]


class Stack(nn.Module):
    """Layers in order. With `recompute`, blocks keep only their inputs for the backward pass (Chen et al. 2016)."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.recompute = False

    def forward(self, hidden: Float[Tensor, "T D"], stream: Stream, state: State | None) -> Float[Tensor, "T D"]:
        for layer in self.layers:
            if self.recompute and self.training and isinstance(layer, Block):
                hidden = checkpoint(layer, hidden, stream, state, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                hidden = layer(hidden, stream, state)
        return hidden

    def costs(self, tokens: int, chance: float, dtype: torch.dtype) -> list[Cost]:
        """What each layer costs at `tokens` tokens, of which a new one gets here with `chance`."""
        layers: list[Layer] = list(self.layers)  # pyright: ignore[reportAssignmentType]
        return [cost for layer in layers for cost in layer.costs(tokens, chance, dtype)]
