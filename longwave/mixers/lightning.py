"""Lightning attention: linear attention with a constant decay per head, whose only memory is a matrix per head.

The layer of MiniCPM-SALA (arXiv 2602.11761) and HypeNet (arXiv 2601.22156), and by configuration of MiniMax-01
(arXiv 2501.08313) and TransNormerLLM (arXiv 2307.14995).

Legend: `T` tokens of the stream, `D` hidden size, `H` heads, `G` KV heads, `K` head size, `R` runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from longwave.config import MOST, ModelConfig, Strict
from longwave.errors import require
from longwave.layers.constant import Constant
from longwave.layers.linear import Gate, Linear
from longwave.layers.norm import RMSNorm
from longwave.layers.rotary import Rotation
from longwave.mixers.full import AttentionConfig
from longwave.ops.decay_linear import DECAY_LINEAR, decay_linear_attention
from longwave.ops.gated import GATED, gated
from longwave.part import Part, Site
from longwave.states import PerSequence, State, StateSpec, memory_of
from longwave.streams import Runs, Stream

_SCALES = {"1/sqrt(d)": lambda size: size**-0.5, "1/d": lambda size: 1 / size, "1": lambda size: 1.0}


@dataclass(frozen=True)
class LightningConfig(Strict):
    """Linear attention with a constant decay per head, for `L` blocks; the defaults are MiniCPM-SALA's and HypeNet's.

    heads, kv_heads, head_size: by default those of `attention`, with as many KV heads as heads.
    slopes: how fast head h of H forgets in layer l of N, as minus the log of its decay per token: `alibi` is
        2 ** (-8 h / H) in every layer, `minimax` that times (1 - l / (N - 1) + 1e-5), `transnormer`
        8 (h - 1) / H * (1 - l / N).
    silu: which of queries, keys and values go through SiLU: `none`, `qk` (TransNormer), `qkv` (MiniMax-01).
    qk_norm, rotary: whether queries and keys are RMS-normed per head, and then rotated.
    scale: factor of the outputs, d being the head size.
    output_norm: whether outputs are RMS-normed over the channels of all heads. output_gate: whether they are then
        multiplied by the sigmoid of a projection of the input.
    distance: the tokens by which a head forgets inside a resampler: all of the `original` sequence, also those not kept
        there, or only those `kept`.
    state_dtype: dtype of the recurrent matrices, in models whose activations are not wider.
    """

    heads: int | None = None
    kv_heads: int | None = None
    head_size: int | None = None
    slopes: Literal["alibi", "minimax", "transnormer"] = "alibi"
    silu: Literal["none", "qk", "qkv"] = "none"
    qk_norm: bool = True
    rotary: bool = True
    scale: Literal["1/sqrt(d)", "1/d", "1"] = "1/sqrt(d)"
    output_norm: bool = True
    output_gate: bool = True
    distance: Literal["kept", "original"] = "original"
    state_dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_size"):
            value = getattr(self, name)
            require(value is None or 0 < value <= MOST, f"lightning.{name} = {value}: 1 or more, at most {MOST}")
        odd = self.rotary and self.head_size is not None and self.head_size % 2
        require(not odd, f"lightning.head_size = {self.head_size}: an even number, for rotation")


class LightningAttention(Part):
    """Linear attention with decay (see `LightningConfig`).

    Every head has one (K, K) matrix as its memory. Each token multiplies it by the head's decay and adds the product of
    key and value; its output is its query times the matrix.
    """

    tables: ClassVar[Mapping[str, type]] = {"attention": AttentionConfig, "lightning": LightningConfig}
    ops = (DECAY_LINEAR, GATED)
    reads_trees = True

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__(config, site)
        self.config: LightningConfig = config.table("lightning")
        shape = self.config
        width = config.hidden_size
        self.heads = shape.heads or config.table("attention").heads
        self.head_size = shape.head_size or config.table("attention").size_in(width)
        self.kv_heads = shape.kv_heads or self.heads
        groups = f"lightning.kv_heads = {self.kv_heads}: a divisor of lightning.heads = {self.heads}"
        require(self.heads % self.kv_heads == 0, groups)
        channels = self.heads * self.head_size
        self.q_proj = Linear(width, channels, bias=False)
        self.k_proj = Linear(width, self.kv_heads * self.head_size, bias=False)
        self.v_proj = Linear(width, self.kv_heads * self.head_size, bias=False)
        self.o_proj = Linear(channels, width, bias=False)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, config.norm_eps) if shape.qk_norm else None
        self.o_norm = RMSNorm(channels, config.norm_eps) if shape.output_norm else None
        self.z_proj = Gate(width, channels, bias=False) if shape.output_gate else None
        self.rotation = Rotation(self.head_size, precise=True) if shape.rotary else None
        self.scale = _SCALES[shape.scale](self.head_size)
        forgetting = slopes(shape.slopes, self.heads, site.depth, site.layers)
        self.log_decay = Constant([-slope for slope in forgetting])
        self.by_place = shape.distance == "original" and site.level >= 0

    def forward(self, hidden: Float[Tensor, "T D"], stream: Stream, state: State | None) -> Float[Tensor, "T D"]:
        query, key, value = self.queries_keys_and_values(hidden, stream)
        memory = memory_of(state, self.site.name, stream)
        decay = self.log_decay.value.to(torch.promote_types(self.q_proj.weight.dtype, torch.float32)).unsqueeze(0)
        if self.by_place:  # a head forgets by distance in the original sequence, so the place of the last token is kept
            earlier = memory.recall("place")
            decay = decay * distances(stream, memory.fresh, earlier).to(decay.dtype).unsqueeze(1)
            memory.replace(place=last_places(stream, earlier))
        options = {"scale": self.scale, "states": memory.recall("memory"), "form": self.forms["decay_linear"]}
        mixed, finals = decay_linear_attention(query, key, value, decay, stream.runs, **options)
        memory.replace(memory=finals)
        return self.o_proj(self._gated(mixed.flatten(1), hidden))

    def queries_keys_and_values(
        self, hidden: Float[Tensor, "T D"], stream: Stream
    ) -> tuple[Float[Tensor, "T H K"], Float[Tensor, "T H K"], Float[Tensor, "T H K"]]:
        """Queries, keys and values of the recurrence: keys and values repeated so that every head has its own."""
        query = self.q_proj(hidden).unflatten(-1, (self.heads, self.head_size))
        key = self.k_proj(hidden).unflatten(-1, (self.kv_heads, self.head_size))
        value = self.v_proj(hidden).unflatten(-1, (self.kv_heads, self.head_size))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if "q" in self.config.silu:
            query, key = (gated(one, act="silu", form=self.forms["gated"]) for one in (query, key))
        if "v" in self.config.silu:
            value = gated(value, act="silu", form=self.forms["gated"])
        if self.rotation is not None:
            query, key = self.rotation(query, stream), self.rotation(key, stream)
        group = self.heads // self.kv_heads
        return query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)

    def _gated(self, mixed: Float[Tensor, "T HK"], hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T HK"]:
        if self.o_norm is not None:
            mixed = self.o_norm(mixed)
        if self.z_proj is None:
            return mixed
        return gated(self.z_proj(hidden), mixed, act="sigmoid", form=self.forms["gated"])

    def state_spec(self) -> StateSpec:
        matrix = (self.heads, self.head_size, self.head_size)
        wider = torch.float64 if self.config.state_dtype == "float64" else None
        entries = {"memory": PerSequence(matrix, wider)}
        if self.by_place:
            entries["place"] = PerSequence((1,), torch.int64)
        return StateSpec(level=self.site.level, per_sequence=entries)

    def prefill_flops(self, tokens: int) -> int:
        """FLOPs of the plain recurrence; the chunked form spends more, within chunks, to take fewer steps."""
        return tokens * self.decode_flops(0)

    def decode_flops(self, context: int) -> int:
        width, channels = self.q_proj.in_features, self.heads * self.head_size
        wide = 2 + (self.z_proj is not None)
        linear = 2 * width * (wide * channels + 2 * self.kv_heads * self.head_size)
        return linear + 4 * channels * self.head_size


def distances(stream: Stream, fresh: Bool[Tensor, " R"], earlier: Int64[Tensor, "R 1"] | None) -> Int64[Tensor, " T"]:
    """The distance, in tokens of the original sequence, from each token to the kept token before it.

    It is 0 for the first token of a sequence, whose memory is still empty.
    fresh: whether a run begins its sequence. earlier: for the other runs, the place of the last token before them.
    """
    order, runs = stream.order, stream.runs
    if not runs.tokens:
        return order
    firsts = order.index_select(0, runs.bounds[:-1].clamp(max=runs.tokens - 1))
    if earlier is not None:
        firsts = torch.where(fresh, firsts, earlier.flatten())
    firsts = firsts.index_select(0, runs.of_token)
    if runs.tree is not None:
        return order - _leading(order, firsts, runs)
    return order - torch.where(runs.places == 0, firsts, F.pad(order[:-1], (1, 0)))


def _leading(order: Int64[Tensor, " T"], firsts: Int64[Tensor, " T"], runs: Runs) -> Int64[Tensor, " T"]:
    """The place of the token that leads to each one in a tree; of the first tokens of a run, that of `firsts`."""
    found = list[Tensor]()
    for places, first, seen in zip(order.split(runs.lengths), firsts.split(runs.lengths), runs.visible(), strict=True):
        others = seen.tril(-1)
        last = torch.where(others, places, -1).amax(1) if len(places) else places
        found.append(torch.where(others.any(1), last, first) if len(places) else places)
    return torch.cat(found)


def last_places(stream: Stream, earlier: Int64[Tensor, "R 1"] | None) -> Int64[Tensor, "R 1"]:
    """The place of the newest token of each run's sequence; a run without tokens keeps its place in `earlier`."""
    order, runs = stream.order, stream.runs
    if earlier is None or not runs.tokens:
        return order.new_zeros(runs.count, 1) if earlier is None else earlier
    lasts = order.index_select(0, (runs.bounds[1:] - 1).clamp(min=0)).unsqueeze(1)
    return torch.where(runs.sizes.unsqueeze(1) > 0, lasts, earlier)


def slopes(kind: str, heads: int, depth: int, layers: int) -> tuple[float, ...]:
    """How fast each head forgets: minus the log of its decay per token. With `alibi` the first head is the fastest.

    kind: `alibi`, `minimax` or `transnormer`, as in `LightningConfig`. depth: number of the layer, from 0, of `layers`.
    """
    if kind == "transnormer":
        return tuple(8 * head / heads * (1 - depth / layers) for head in range(heads))
    factor = 1 - depth / max(1, layers - 1) + 1e-5 if kind == "minimax" else 1.0
    return tuple(slope * factor for slope in _alibi(heads))


def _alibi(heads: int) -> list[float]:
    """2 ** (-8 h / H) for h = 1 ... H; where H is not a power of two, ALiBi's rule (arXiv 2108.12409).

    That rule takes the slopes of the next lower power of two, and fills up with every second slope of the next higher.
    """
    power = 1 << (heads.bit_length() - 1)
    even = [2 ** (-8 * head / power) for head in range(1, power + 1)]
    return even if power == heads else even + _alibi(2 * power)[0 : 2 * (heads - power) : 2]
