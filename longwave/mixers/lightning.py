"""Lightning attention: linear attention with a constant decay per head and a recurrent matrix as its whole memory.

The layer of MiniCPM-SALA (arXiv 2602.11761) and HypeNet (arXiv 2601.22156), and by configuration of MiniMax-01
(arXiv 2501.08313) and TransNormerLLM (arXiv 2307.14995).

Legend: `T` tokens of the stream, `D` hidden size, `H` heads, `G` KV heads, `K` head size, `R` runs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from longwave.config import LightningConfig, ModelConfig
from longwave.errors import require
from longwave.layers.linear import Linear
from longwave.layers.norm import RMSNorm
from longwave.layers.rotary import Rotation
from longwave.layout import parse
from longwave.mixers.base import Mixer, Site
from longwave.ops.decay_linear import FORMS, choose, decay_linear_attention
from longwave.states import PerSequence, State, StateSpec
from longwave.stream import Stream

_SCALES = {"1/sqrt(d)": lambda size: size**-0.5, "1/d": lambda size: 1 / size, "1": lambda size: 1.0}


class LightningAttention(Mixer):
    """Every head keeps one (K, K) matrix, to which tokens add key times value and which fades with each of them."""

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__(config, site)
        self.config = shape = config.lightning or LightningConfig()
        width = config.hidden_size
        self.heads, self.head_size = shape.heads or config.attention.heads, shape.head_size or config.head_size
        self.kv_heads = shape.kv_heads or self.heads
        groups = f"lightning.kv_heads = {self.kv_heads} does not divide lightning.heads = {self.heads}"
        require(self.heads % self.kv_heads == 0, groups)
        channels = self.heads * self.head_size
        self.q_proj = Linear(width, channels, bias=False)
        self.k_proj = Linear(width, self.kv_heads * self.head_size, bias=False)
        self.v_proj = Linear(width, self.kv_heads * self.head_size, bias=False)
        self.o_proj = Linear(channels, width, bias=False)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, config.norm_eps) if shape.qk_norm else None
        self.o_norm = RMSNorm(channels, config.norm_eps) if shape.output_norm else None
        self.z_proj = Linear(width, channels, bias=False) if shape.output_gate else None
        self.rotation = Rotation(self.head_size, precise=True) if shape.rotary else None
        self.scale = _SCALES[shape.scale](self.head_size)
        self.slopes = slopes(shape.slopes, self.heads, site.depth, parse(config.layout).depth)
        self.by_place = shape.distance == "original" and site.level >= 0
        self.form, _ = choose()

    def forward(self, hidden: Float[Tensor, "T D"], stream: Stream, state: State | None) -> Float[Tensor, "T D"]:
        query, key, value = self.queries_keys_and_values(hidden, stream)
        decay = self._log_decay(stream, state)
        past = None if state is None else self._recall(stream, state)
        mixed, finals = decay_linear_attention(
            query, key, value, decay, stream.lengths, scale=self.scale, states=past, form=self.form
        )
        if state is not None:
            self._remember(finals, stream, state)
        return self.o_proj(self._gated(mixed.flatten(1), hidden))

    def queries_keys_and_values(
        self, hidden: Float[Tensor, "T D"], stream: Stream
    ) -> tuple[Float[Tensor, "T H K"], Float[Tensor, "T H K"], Float[Tensor, "T H K"]]:
        """What the recurrence reads, adds under, and adds: norm before rotation, and a KV head for every head."""
        query = self.q_proj(hidden).unflatten(-1, (self.heads, self.head_size))
        key = self.k_proj(hidden).unflatten(-1, (self.kv_heads, self.head_size))
        value = self.v_proj(hidden).unflatten(-1, (self.kv_heads, self.head_size))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if "q" in self.config.silu:
            query, key = torch.nn.functional.silu(query), torch.nn.functional.silu(key)
        if "v" in self.config.silu:
            value = torch.nn.functional.silu(value)
        if self.rotation is not None:
            query, key = self.rotation(query, stream), self.rotation(key, stream)
        group = self.heads // self.kv_heads
        return query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)

    def _gated(self, mixed: Float[Tensor, "T HK"], hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T HK"]:
        if self.o_norm is not None:
            mixed = self.o_norm(mixed)
        return mixed if self.z_proj is None else mixed * torch.sigmoid(self.z_proj(hidden))

    def _log_decay(self, stream: Stream, state: State | None) -> Float[Tensor, "E H"]:
        """Per head, or per token and head where distances are those of the original sequence."""
        dtype = torch.float64 if self.q_proj.weight.dtype == torch.float64 else torch.float32
        decay = -torch.tensor([self.slopes], dtype=dtype, device=stream.order.device)
        if not self.by_place:
            return decay
        return decay * self._distances(stream, state).to(dtype).unsqueeze(1)

    def _distances(self, stream: Stream, state: State | None) -> Tensor:
        """(T,) how far each token stands behind the one that was kept before it; the first one fades nothing."""
        pieces, slots = stream.order.split(stream.lengths), stream.slots or ()
        parts = [None] * len(pieces) if state is None else [state.of(self.site.name, slot) for slot in slots]
        earlier = [
            part.recall("place") if part is not None and part.length else piece[:1]
            for piece, part in zip(pieces, parts, strict=True)
        ]
        gaps = [piece.diff(prepend=before[: len(piece)]) for piece, before in zip(pieces, earlier, strict=True)]
        return torch.cat(gaps) if gaps else stream.order

    def _recall(self, stream: Stream, state: State) -> Float[Tensor, "R H K K"]:
        assert stream.slots is not None
        return torch.stack([state.of(self.site.name, slot).recall("memory") for slot in stream.slots])

    def _remember(self, finals: Float[Tensor, "R H K K"], stream: Stream, state: State) -> None:
        assert stream.slots is not None
        orders = stream.order.split(stream.lengths)
        for slot, memory, order in zip(stream.slots, finals, orders, strict=True):
            if order.numel():
                place = {"place": order[-1:]} if self.by_place else {}
                state.of(self.site.name, slot).replace(order.numel(), memory=memory, **place)

    def use_form(self, form: str) -> None:
        self.form = form if form in FORMS else self.form

    def state_spec(self) -> StateSpec:
        matrix = (self.heads, self.head_size, self.head_size)
        wider = torch.float64 if self.config.state_dtype == "float64" else None
        entries = {"memory": PerSequence(matrix, wider)}
        if self.by_place:
            entries["place"] = PerSequence((1,), torch.int64)
        return StateSpec(level=self.site.level, per_sequence=entries)

    def prefill_flops(self, tokens: int) -> int:
        """Of the recurrence; chunks spend more on products within themselves, to need fewer steps."""
        return tokens * self.decode_flops(0)

    def decode_flops(self, context: int) -> int:
        width, channels = self.q_proj.in_features, self.heads * self.head_size
        wide = 2 + (self.z_proj is not None)
        linear = 2 * width * (wide * channels + 2 * self.kv_heads * self.head_size)
        return linear + 4 * channels * self.head_size


def slopes(kind: str, heads: int, depth: int, layers: int) -> tuple[float, ...]:
    """How fast each head forgets: minus the log of its decay per token. The first head is the fastest of ALiBi's.

    kind: `alibi`, `minimax` or `transnormer`, as in `LightningConfig`; depth: of the layer, among `layers`.
    """
    if kind == "transnormer":
        return tuple(8 * head / heads * (1 - depth / layers) for head in range(heads))
    factor = 1 - depth / max(1, layers - 1) + 1e-5 if kind == "minimax" else 1.0
    return tuple(slope * factor for slope in _alibi(heads))


def _alibi(heads: int) -> list[float]:
    """2 ** (-8 h / H) for h = 1 ... H; the ALiBi rule (arXiv 2108.12409) where H is no power of two."""
    power = 1 << (heads.bit_length() - 1)
    even = [2 ** (-8 * head / power) for head in range(1, power + 1)]
    return even if power == heads else even + _alibi(2 * power)[0 : 2 * (heads - power) : 2]
