"""What every token mixer is: a module over streams that declares its state, its cost and the laws it keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longwave.config import ModelConfig
from longwave.laws import Laws
from longwave.layers.rotary import Rotation
from longwave.states import State, StateSpec
from longwave.stream import Stream


@dataclass(frozen=True)
class Site:
    """Where a part stands in the model.

    name: its key in a state; unique. depth: blocks before it, in the order of the layout. level: the resampler that
    holds it, as its index, or -1.
    """

    name: str
    depth: int
    level: int


class Mixer(nn.Module, ABC):
    """Moves information between the tokens of each run."""

    laws: Laws = Laws()
    form: str = "torch"
    rotation: Rotation | None = None

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__()
        self.site = site

    @abstractmethod
    def forward(self, hidden: Float[Tensor, "T D"], stream: Stream, state: State | None) -> Float[Tensor, "T D"]:
        """Mixes the tokens of each run, after the past that `state` holds of its sequence."""

    def use_form(self, form: str) -> None:
        """Runs the mixer's op in the given form; one whose op has no such form passes over it."""
        return

    @abstractmethod
    def state_spec(self) -> StateSpec:
        """What the mixer remembers of a sequence."""

    def read_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes of its state that the token after `context` others reads."""
        return self.state_spec().bytes(context, dtype)

    @abstractmethod
    def prefill_flops(self, tokens: int) -> int:
        """FLOPs of matrix products and attention for a whole sequence of `tokens`."""

    def unlearned_flops(self, tokens: int) -> int:
        """Those of them through which no gradient flows."""
        return 0

    @abstractmethod
    def decode_flops(self, context: int) -> int:
        """The same for the one token that follows `context` others."""
