"""Parts: anything a block or a bracket is made of - a mixer, a feed-forward, a resampler.

A part is one file: its settings, the module, the state it needs, its costs, its initial weights. It declares which laws
its outputs keep (`longwave.laws`), and the contract tests prove them.

Legend: `T` tokens of the stream, `D` hidden size.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from longwave.config import InitConfig, ModelConfig, register_tables
from longwave.costs import At, Cost
from longwave.draws import key
from longwave.laws import Laws
from longwave.ops.forms import Call, Op
from longwave.states import State, StateSpec
from longwave.streams import Stream


@dataclass(frozen=True)
class Site:
    """Where a part stands in the model.

    name: of its tensors and its state; unique. depth: blocks before it, in the order of the layout. layers: blocks of
    the model. level: the resampler that holds it, as its index, or -1.
    """

    name: str
    depth: int
    layers: int
    level: int


@runtime_checkable
class Layer(Protocol):
    """A block or a bracket: hidden (T, D) in, hidden (T, D) out, with its costs."""

    def __call__(self, hidden: Tensor, stream: Stream, state: State | None) -> Tensor: ...

    def costs(self, at: At) -> list[Cost]:
        """The costs of the layer and all that it holds."""
        ...


@runtime_checkable
class Angles(Protocol):
    """The rotation of a part's heads by position. Equal rotations are worked out once for all parts that share them."""

    def check(self, config: ModelConfig) -> None:
        """UserError if the config does not fit."""
        ...

    def passengers(self, config: ModelConfig, positions: Int64[Tensor, " T"], dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors for each token, by name, in a model whose activations are `dtype`."""
        ...

    def __call__(self, heads: Float[Tensor, "T H K"], stream: Stream) -> Float[Tensor, "T H K"]:
        """The heads, turned by what the stream carries."""
        ...


@dataclass
class InitialDraws:
    """Initial weights, each drawn from a generator keyed by the seed and the tensor's own name.

    Block 7 of a Llama and block 7 of a SUBLLM of the same shape therefore begin with the same weights.
    """

    init: InitConfig
    width: int
    seed: int
    _waiting: list[Callable[[], object]] = field(default_factory=list)

    def normal(self, weight: Tensor, std: float, name: str) -> None:
        """Normal draws, truncated at three standard deviations."""
        bounds = {"a": -3 * std, "b": 3 * std}
        self._waiting.append(partial(nn.init.trunc_normal_, weight, std=std, generator=self._generator(name), **bounds))

    def uniform(self, weight: Tensor, bound: float, name: str) -> None:
        """Uniform draws between -bound and bound."""
        self._waiting.append(partial(nn.init.uniform_, weight, -bound, bound, generator=self._generator(name)))

    def zeros(self, weight: Tensor) -> None:
        """Nothing is drawn."""
        self._waiting.append(partial(nn.init.zeros_, weight))

    def fill(self) -> None:
        """Fills every weight in place, several at a time, since none waits for another's draws."""
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for drawn in [pool.submit(draw) for draw in self._waiting]:
                drawn.result()

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(key(self.seed, zlib.crc32(name.encode())) >> 1)


class Part(nn.Module, ABC):
    """A piece of a block: a module over streams that declares its state, its costs, and the laws it keeps.

    tables: the tables of a model's config that it reads, by name. role: its attribute in a block. ops: those whose form
    is resolved for it once the model is placed; `forms` then names the form of each. head_size: channels of a head, by
    which forms are resolved. rotation: how it turns heads, if it does. reads_trees: whether its outputs are right where
    a run ends in drafts on several paths (`Runs.tree`); otherwise drafts follow each other.
    """

    tables: ClassVar[Mapping[str, type]] = {}
    role: ClassVar[str] = "mixer"
    ops: ClassVar[tuple[Op[Any], ...]] = ()
    laws: Laws = Laws()
    reads_trees: ClassVar[bool] = False
    head_size: int = 0
    rotation: Angles | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        register_tables(cls.tables)

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__()
        self.site = site
        self.forms = {op.name: "torch" for op in self.ops}
        self.reasons = {op.name: "not placed yet" for op in self.ops}

    @abstractmethod
    def forward(self, hidden: Float[Tensor, "T D"], stream: Stream, state: State | None) -> Float[Tensor, "T D"]:
        """The part's contribution for each token, after the past that `state` holds of its sequence."""

    def resolve(self, device: torch.device, dtype: torch.dtype, asked: Mapping[str, str]) -> None:
        """Chooses the form of each op for activations of this type on this device; `asked` names some by op."""
        for op in self.ops:
            found = op.resolve(Call(device, dtype, self.head_size), asked.get(op.name))
            self.forms[op.name], self.reasons[op.name] = found

    def state_spec(self) -> StateSpec:
        """The memory that the part needs of a sequence; none by default."""
        return StateSpec(level=self.site.level)

    def own_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that it is made of, by their name in it."""
        return self.named_modules()

    def draw(self, draws: InitialDraws) -> None:
        """Asks for its initial weights: linear layers normal, output projections of deep blocks smaller."""
        for name, module in self.own_modules():
            if isinstance(module, nn.Linear):
                deep = math.sqrt(2 * (self.site.depth + 1)) if name.endswith(("o_proj", "down_proj")) else 1
                draws.normal(module.weight, draws.init.std / deep, f"{self.site.name}.{name}")
                if module.bias is not None:
                    draws.zeros(module.bias)

    @abstractmethod
    def prefill_flops(self, tokens: int) -> int:
        """FLOPs of matrix products and attention for a whole sequence of `tokens`."""

    @abstractmethod
    def decode_flops(self, context: int) -> int:
        """FLOPs of matrix products and attention for the one token that follows `context` others."""

    def unlearned_flops(self, tokens: int) -> int:
        """The share of `prefill_flops` through which no gradient flows, in FLOPs."""
        return 0

    def read_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes of its state that the token after `context` others reads."""
        return self.state_spec().bytes(context, dtype)
