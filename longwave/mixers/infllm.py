"""InfLLM-V2: softmax attention in which every query chooses, for each KV head, the blocks of keys that it sees.

The sparse layer of MiniCPM-SALA (arXiv 2602.11761; the choice is arXiv 2509.24663), and with regime `dense` the softmax
layer of HypeNet (arXiv 2601.22156): no rotation, a gated output, and queries that may grow with their position.

Legend: `T` tokens of the stream, `D` hidden size, `H` query heads, `G` KV heads, `K` head size, `N` keys of one run.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from longwave.config import InfllmConfig, ModelConfig
from longwave.laws import ALL, Law, Laws
from longwave.layers.linear import Linear
from longwave.mixers.base import Site
from longwave.mixers.full import FullAttention, Keys
from longwave.ops.block_sparse import (
    FORMS,
    Compressed,
    Geometry,
    block_sparse_attention,
    choose,
    compress,
    windows,
)
from longwave.ops.block_sparse.geometry import attended_pairs, scored_pairs
from longwave.states import PerToken, State, StateSpec
from longwave.stream import Stream

_ALWAYS = 1 << 62  # tokens: a context that no sequence reaches


class InfllmAttention(FullAttention):
    """Inside a resampler, blocks are of the tokens that are kept there; `dense_len` counts those, too."""

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__(config, site)
        self.config = shape = config.infllm or InfllmConfig()
        self.geometry = Geometry(
            shape.kernel_size,
            shape.kernel_stride,
            shape.block_size,
            shape.init_blocks,
            shape.local_blocks,
            shape.topk + shape.local_blocks,
        )
        self.sees_all = shape.regime == "dense"
        self.rotation = self.rotation if shape.rotary else None
        self.o_gate = Linear(config.hidden_size, self.heads * self.head_size, bias=False) if shape.output_gate else None
        self.form, _ = choose()
        if shape.regime == "auto_published":  # a call changes its mind with the length, about what earlier calls did
            self.laws = Laws(inference=ALL - {Law.CHUNKING})

    def queries_and_keys(
        self, hidden: Float[Tensor, "T D"], stream: Stream
    ) -> tuple[Float[Tensor, "T H K"], Float[Tensor, "T G K"]]:
        """Queries times log_a(position + a) where the config gives a base a (HypeNet, section on HyPE)."""
        query, key = super().queries_and_keys(hidden, stream)
        base = self.config.logit_scaling
        if base is not None:
            growth = (stream.positions.to(torch.promote_types(query.dtype, torch.float32)) + base).log() / math.log(
                base
            )
            query = (query * growth.view(-1, 1, 1)).to(query.dtype)
        return query, key

    def _mix(self, query: Tensor, keys: Keys, values: Keys, stream: Stream, state: State | None) -> Tensor:
        if self.sees_all:
            return super()._mix(query, keys, values, stream, state)
        return block_sparse_attention(
            query,
            keys,
            values,
            stream.lengths,
            self.geometry,
            scale=self.scale,
            compressed=None if state is None else self._compressed(stream, state),
            dense_below=self._dense_below(keys, stream),
            denominator=self.config.denominator,
            form=self.form,
        )

    def _gated(self, mixed: Float[Tensor, "T HK"], hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T HK"]:
        return mixed if self.o_gate is None else mixed * torch.sigmoid(self.o_gate(hidden))

    def _dense_below(self, keys: Keys, stream: Stream) -> tuple[int, ...]:
        """Per run, the context below which a query sees all of it."""
        totals = stream.lengths if isinstance(keys, Tensor) else [key.shape[1] for key in keys]
        return tuple(map(self._threshold, totals))

    def _threshold(self, total: int) -> int:
        """The context below which a query sees all of it, in a call after which the sequence has `total` tokens."""
        shape = self.config
        match shape.regime:
            case "dense":
                return _ALWAYS
            case "sparse":
                return 0
            case "auto":
                return shape.dense_len
            case "auto_published":
                return _ALWAYS if total < shape.dense_len else 0

    def _compressed(self, stream: Stream, state: State) -> list[Compressed]:
        """The windows of every run, of which the state makes those that the newest keys have completed."""
        assert stream.slots is not None
        return [(self._windows("fine", slot, state), self._windows("coarse", slot, state)) for slot in stream.slots]

    def _windows(self, name: str, slot: int, state: State) -> Float[Tensor, "G n K"]:
        part = state.of(self.site.name, slot)
        if name not in part.spec.per_token:
            return part.view("key")[:, :0]
        width, stride = self._sizes()[name]
        return part.sum_up(name, "key", lambda keys: compress(keys, width, stride))

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Width and stride of the windows that are needed."""
        fine, coarse = {"fine": self.geometry.fine}, {"coarse": self.geometry.coarse}
        return fine | coarse if self.config.denominator == "coarse" else fine

    def use_form(self, form: str) -> None:
        self.form = form if form in FORMS else self.form

    def state_spec(self) -> StateSpec:
        entries = dict(super().state_spec().per_token)
        for name, (width, stride) in self._sizes().items() if not self.sees_all else ():
            entries[name] = PerToken(self.kv_heads, self.head_size, width=width, every=stride)
        return StateSpec(entries, None, self.site.level)

    def read_bytes(self, context: int, dtype: torch.dtype) -> int:
        """All keys and values below the threshold, the windows and the chosen blocks above it."""
        spec = self.state_spec()
        if context < self.geometry.dense(self._threshold(context + 1)):
            return sum(spec.per_token[name].bytes(context, dtype) for name in ("key", "value"))
        chosen = (self.geometry.topk - 1) * self.geometry.block_size + context % self.geometry.block_size
        sizes = {"key": chosen, "value": chosen, **dict.fromkeys(self._sizes(), context + 1)}
        return sum(spec.per_token[name].bytes(tokens, dtype) for name, tokens in sizes.items())

    def prefill_flops(self, tokens: int) -> int:
        pairs = attended_pairs(tokens, self.geometry, self._threshold(tokens))
        return tokens * self._linear_flops() + 4 * self.heads * self.head_size * pairs + self.unlearned_flops(tokens)

    def unlearned_flops(self, tokens: int) -> int:
        exact = self.config.denominator == "exact"
        return 2 * self.heads * self.head_size * scored_pairs(tokens, self.geometry, self._threshold(tokens), exact)

    def decode_flops(self, context: int) -> int:
        seen, scored = context + 1, 0
        if context >= self.geometry.dense(self._threshold(context + 1)):
            seen = (self.geometry.topk - 1) * self.geometry.block_size + context % self.geometry.block_size + 1
            scored = sum(windows(context + 1, *size) for size in self._sizes().values())
        return self._linear_flops() + self.heads * self.head_size * (4 * seen + 2 * scored)

    def _linear_flops(self) -> int:
        gate = 0 if self.o_gate is None else 2 * self.o_gate.in_features * self.o_gate.out_features
        return super()._linear_flops() + gate
