"""Full causal softmax attention with grouped KV heads and rotary positions.

Legend: `T` tokens of the stream, `D` hidden size, `H` query heads, `G` KV heads, `K` head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from longwave.config import MOST, ModelConfig, Strict
from longwave.costs import visible_pairs
from longwave.errors import require
from longwave.layers.linear import Linear
from longwave.layers.norm import RMSNorm
from longwave.layers.rotary import Rotation
from longwave.ops.attention import ATTENTION, CAUSAL, Pattern, attention
from longwave.part import Part, Site
from longwave.states import Memory, PerToken, State, StateSpec, memory_of
from longwave.streams import Places, Runs, Stream


@dataclass(frozen=True)
class AttentionConfig(Strict):
    """Softmax attention.

    heads: query heads. kv_heads: heads of keys and values; as many as query heads by default. head_size: channels of a
    head; hidden_size / heads by default. qkv_bias, output_bias: whether the projections add a bias. qk_norm: whether
    queries and keys are RMS-normed per head (Qwen3).
    """

    heads: int
    kv_heads: int | None = None
    head_size: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        require(self.heads > 0, f"attention.heads = {self.heads}: 1 or more")
        groups = self.heads if self.kv_heads is None else self.kv_heads
        divides = groups > 0 and self.heads % groups == 0
        require(divides, f"attention.kv_heads = {groups}: a divisor of attention.heads = {self.heads}")
        size = self.head_size
        require(
            size is None or (size > 0 and size % 2 == 0), f"attention.head_size = {size}: an even number, for rotation"
        )

    @property
    def groups(self) -> int:
        """The number of heads of keys and values."""
        return self.kv_heads or self.heads

    def size_in(self, hidden_size: int) -> int:
        """The number of channels of one head in a model of this hidden size; UserError where they would not be even."""
        even = self.head_size is not None or hidden_size % (2 * self.heads) == 0
        problem = f"hidden_size = {hidden_size}: an even multiple of attention.heads = {self.heads}"
        require(even, f"{problem}, or give attention.head_size")
        size = self.head_size or hidden_size // self.heads
        require(self.heads * size <= MOST, f"attention.heads = {self.heads} of {size}: at most {MOST} in all")
        return size


class FullAttention(Part):
    """Softmax attention in which every token sees its whole past (Vaswani et al. 2017; GQA: Ainslie et al. 2023)."""

    tables: ClassVar[Mapping[str, type]] = {"attention": AttentionConfig}
    ops = (ATTENTION,)
    reads_trees = True
    pattern: Pattern = CAUSAL
    sees_all = True  # softmax attention over all visible keys (of the sliding window, if there is one), none left out

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__(config, site)
        shape: AttentionConfig = config.table("attention")
        width = config.hidden_size
        self.heads, self.kv_heads, self.head_size = shape.heads, shape.groups, shape.size_in(width)
        self.q_proj = Linear(width, self.heads * self.head_size, bias=shape.qkv_bias)
        self.k_proj = Linear(width, self.kv_heads * self.head_size, bias=shape.qkv_bias)
        self.v_proj = Linear(width, self.kv_heads * self.head_size, bias=shape.qkv_bias)
        self.o_proj = Linear(self.heads * self.head_size, width, bias=shape.output_bias)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, config.norm_eps) if shape.qk_norm else None
        self.rotation = Rotation(self.head_size)
        self.scale = self.head_size**-0.5

    def forward(self, hidden: Float[Tensor, "T D"], stream: Stream, state: State | None) -> Float[Tensor, "T D"]:
        query, key = self.queries_and_keys(hidden, stream)
        value = self.v_proj(hidden).unflatten(-1, (self.kv_heads, self.head_size))
        memory = memory_of(state, self.site.name, stream)
        keys, values = memory.append(key=key, value=value)
        places = None if state is None else memory.places
        mixed = self._mix(query, keys, values, stream.runs, places, memory)
        return self.o_proj(self._gated(mixed.flatten(1), hidden))

    def _mix(
        self, query: Tensor, key: Tensor, value: Tensor, runs: Runs, places: Places | None, memory: Memory
    ) -> Tensor:
        options = {"pattern": self.pattern, "scale": self.scale, "form": self.forms["attention"]}
        return attention(query, key, value, runs, places, **options).output

    def _gated(self, mixed: Float[Tensor, "T HK"], hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T HK"]:
        return mixed

    def queries_and_keys(
        self, hidden: Float[Tensor, "T D"], stream: Stream
    ) -> tuple[Float[Tensor, "T H K"], Float[Tensor, "T G K"]]:
        """The queries and keys of new tokens as attention compares them: normed and rotated, if the config says so."""
        query = self.q_proj(hidden).unflatten(-1, (self.heads, self.head_size))
        key = self.k_proj(hidden).unflatten(-1, (self.kv_heads, self.head_size))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotation is not None:
            query, key = self.rotation(query, stream), self.rotation(key, stream)
        return query, key

    def state_spec(self) -> StateSpec:
        entry = PerToken(self.kv_heads, self.head_size)
        return StateSpec({"key": entry, "value": entry}, self.pattern.window, self.site.level)

    def prefill_flops(self, tokens: int) -> int:
        pairs = visible_pairs(tokens, self.pattern.window)
        return tokens * self._linear_flops() + 4 * self.heads * self.head_size * pairs

    def decode_flops(self, context: int) -> int:
        seen = min(self.pattern.window or context + 1, context + 1)
        return self._linear_flops() + 4 * self.heads * self.head_size * seen

    def _linear_flops(self) -> int:
        width = self.q_proj.in_features
        return 4 * width * self.head_size * (self.heads + self.kv_heads)
