"""Full causal softmax attention with grouped KV heads and rotary positions."""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from longwave.config import ModelConfig
from longwave.costs import visible_pairs
from longwave.layers.linear import Linear
from longwave.layers.norm import RMSNorm
from longwave.layers.rotary import Rotation
from longwave.mixers.base import Mixer, Site
from longwave.ops.attention import attention, choose
from longwave.states import PerToken, State, StateSpec
from longwave.stream import Stream

Keys: TypeAlias = "Tensor | list[Tensor]"  # in the layout of the stream, or head-major per run where a state holds more


class FullAttention(Mixer):
    """Every token sees its whole past (Vaswani et al. 2017; GQA: Ainslie et al. 2023)."""

    window: int | None = None
    sees_all = True  # within the window, if there is one

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__(config, site)
        shape, width = config.attention, config.hidden_size
        self.heads, self.kv_heads, self.head_size = shape.heads, config.kv_heads, config.head_size
        self.q_proj = Linear(width, self.heads * self.head_size, bias=shape.qkv_bias)
        self.k_proj = Linear(width, self.kv_heads * self.head_size, bias=shape.qkv_bias)
        self.v_proj = Linear(width, self.kv_heads * self.head_size, bias=shape.qkv_bias)
        self.o_proj = Linear(self.heads * self.head_size, width, bias=shape.output_bias)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, config.norm_eps) if shape.qk_norm else None
        self.rotation = Rotation(self.head_size)
        self.scale = self.head_size**-0.5
        self.form, _ = choose()

    def forward(self, hidden: Float[Tensor, "T D"], stream: Stream, state: State | None) -> Float[Tensor, "T D"]:
        query, key = self.queries_and_keys(hidden, stream)
        value = self.v_proj(hidden).unflatten(-1, (self.kv_heads, self.head_size))
        keys, values = (key, value) if state is None else self._remember(key, value, stream, state)
        mixed = self._mix(query, keys, values, stream, state)
        return self.o_proj(self._gated(mixed.flatten(1), hidden))

    def _mix(self, query: Tensor, keys: Keys, values: Keys, stream: Stream, state: State | None) -> Tensor:
        return attention(query, keys, values, stream.lengths, window=self.window, scale=self.scale, form=self.form)

    def _gated(self, mixed: Float[Tensor, "T HK"], hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T HK"]:
        return mixed

    def queries_and_keys(
        self, hidden: Float[Tensor, "T D"], stream: Stream
    ) -> tuple[Float[Tensor, "T H K"], Float[Tensor, "T G K"]]:
        """The queries and keys of new tokens as attention compares them: normed and rotated if the shape says so."""
        query = self.q_proj(hidden).unflatten(-1, (self.heads, self.head_size))
        key = self.k_proj(hidden).unflatten(-1, (self.kv_heads, self.head_size))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotation is not None:
            query, key = self.rotation(query, stream), self.rotation(key, stream)
        return query, key

    def _remember(self, key: Tensor, value: Tensor, stream: Stream, state: State) -> tuple[list[Tensor], list[Tensor]]:
        """Appends the new keys and values (T, G, K) to the state; returns all of each run, head-major (G, N, K)."""
        assert stream.slots is not None
        pieces = zip(stream.slots, key.split(stream.lengths), value.split(stream.lengths), strict=True)
        held = [
            state.of(self.site.name, slot).append(key=k.transpose(0, 1), value=v.transpose(0, 1))
            for slot, k, v in pieces
        ]
        return [k for k, _ in held], [v for _, v in held]

    def use_form(self, form: str) -> None:
        self.form = form

    def state_spec(self) -> StateSpec:
        entry = PerToken(self.kv_heads, self.head_size)
        return StateSpec({"key": entry, "value": entry}, self.window, self.site.level)

    def prefill_flops(self, tokens: int) -> int:
        pairs = visible_pairs(tokens, self.window)
        return tokens * self._linear_flops() + 4 * self.heads * self.head_size * pairs

    def decode_flops(self, context: int) -> int:
        seen = min(self.window or context + 1, context + 1)
        return self._linear_flops() + 4 * self.heads * self.head_size * seen

    def _linear_flops(self) -> int:
        width = self.q_proj.in_features
        return 4 * width * self.head_size * (self.heads + self.kv_heads)
