"""InfLLM-V2 (arXiv 2509.24663): block-sparse softmax attention, every query choosing the blocks of keys that it sees.

It is the sparse layer of MiniCPM-SALA (arXiv 2602.11761), and with regime `dense` the softmax layer of HypeNet (arXiv
2601.22156): no rotation, a gated output, and queries that may grow with their position.

Two things here are called windows in the papers. Blocks are scored by *compressed keys*, each the mean of a window of
keys; and `window_size` is the sliding window of keys just before a query, which it always sees.

Legend: `T` tokens of the stream, `D` hidden size, `H` query heads, `G` KV heads, `K` head size, `N` keys of one run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from longwave.config import MOST, ModelConfig, Strict
from longwave.errors import require
from longwave.laws import ALL, Law, Laws
from longwave.layers.linear import Gate
from longwave.mixers.full import FullAttention
from longwave.ops.attention import ATTENTION
from longwave.ops.block_sparse import (
    BLOCK_SPARSE,
    Compressed,
    Geometry,
    block_sparse_attention,
    compress,
    compressed_count,
)
from longwave.ops.block_sparse.geometry import attended_pairs, scored_pairs
from longwave.ops.gated import GATED, gated
from longwave.part import Site
from longwave.states import Memory, PerToken, StateSpec
from longwave.streams import Located, Places, Runs, Stream
from longwave.units import counted

_LONGER_THAN_ANY = 1 << 62  # tokens; as the threshold below which queries attend densely, it makes all of them dense


@dataclass(frozen=True)
class InfllmConfig(Strict):
    """Block-sparse attention (InfLLM-V2, arXiv 2509.24663), for `S` blocks; the defaults are MiniCPM-SALA's.

    kernel_size, kernel_stride: a compressed key is the mean of kernel_size keys, and one begins every kernel_stride
        tokens. The coarse compressed keys of the denominator are four times as wide and as far apart.
    block_size: tokens of a block of keys. Each query sees topk + window_size / block_size blocks: always the first
        init_blocks, its own, and the window_size / block_size before its own; the others by score.
    dense_len: with regime `auto`, a query whose context, itself included, is shorter than this attends to all of it.
    regime: `auto` decides between dense and sparse for each query, and so keeps every law; `auto_published` decides for
        each call by the sequence's length, as the published code does, which breaks the law of chunking; `sparse` and
        `dense` always do the one or the other.
    denominator: the sum that block scores are divided by: over the `coarse` compressed keys (published), or the `exact`
        softmax over the fine ones.
    rotary, output_gate: whether queries and keys are rotated, and the output is gated by the input.
    logit_scaling: base a of HypeNet's factor log_a(place + a) of the queries (arXiv 2601.22156); none by default.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    init_blocks: int = 1
    dense_len: int = 8192
    regime: Literal["auto", "sparse", "dense", "auto_published"] = "auto"
    denominator: Literal["coarse", "exact"] = "coarse"
    rotary: bool = False
    output_gate: bool = True
    logit_scaling: float | None = None

    def __post_init__(self) -> None:
        for name in ("kernel_stride", "block_size", "topk"):
            require(0 < getattr(self, name) <= MOST, f"infllm.{name} = {getattr(self, name)}: 1 or more")
        for name in ("window_size", "init_blocks", "dense_len"):
            require(0 <= getattr(self, name) <= MOST, f"infllm.{name} = {getattr(self, name)}: 0 or more")
        kernel, stride, block, window = self.kernel_size, self.kernel_stride, self.block_size, self.window_size
        require(kernel == 2 * stride, f"infllm.kernel_size = {kernel}: twice kernel_stride, {2 * stride}")
        require(block % stride == 0, f"infllm.block_size = {block}: a multiple of kernel_stride = {stride}")
        require(window % block == 0, f"infllm.window_size = {window}: a multiple of block_size = {block}")
        enough, forced = self.topk + self.local_blocks, self.init_blocks + self.local_blocks + 1
        problem = f"infllm.topk = {self.topk}: with window_size / block_size it makes {counted(enough, 'block')}"
        require(enough >= forced, f"{problem}, fewer than the {forced} forced ones; {self.init_blocks + 1} or more")
        base = self.logit_scaling
        require(base is None or 1 < base < math.inf, f"infllm.logit_scaling = {base}: more than 1, or left out")

    @property
    def local_blocks(self) -> int:
        """The number of blocks just before its own that a query always sees."""
        return self.window_size // self.block_size


class InfllmAttention(FullAttention):
    """Block-sparse softmax attention (see `InfllmConfig`).

    Inside a resampler, only the kept tokens count: blocks are made of them, and `dense_len` is compared with them.
    """

    tables: ClassVar[Mapping[str, type]] = {**FullAttention.tables, "infllm": InfllmConfig}
    ops = (BLOCK_SPARSE, ATTENTION, GATED)
    reads_trees = False  # blocks are chosen, and entries summed up, by the order of keys

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__(config, site)
        self.config: InfllmConfig = config.table("infllm")
        shape = self.config
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
        self.o_gate = Gate(config.hidden_size, self.heads * self.head_size, bias=False) if shape.output_gate else None
        if shape.regime == "auto_published":  # dense or sparse depends on a call's length, so chunking changes results
            self.laws = Laws(inference=ALL - {Law.CHUNKING})

    def queries_and_keys(
        self, hidden: Float[Tensor, "T D"], stream: Stream
    ) -> tuple[Float[Tensor, "T H K"], Float[Tensor, "T G K"]]:
        """Queries and keys; queries times log_a(place + a) where the config gives a base a (HypeNet's HyPE).

        The factor answers the number of keys that a query sees, so it goes by the order and not by positions.
        """
        query, key = super().queries_and_keys(hidden, stream)
        base = self.config.logit_scaling
        if base is not None:
            places = stream.order.to(torch.promote_types(query.dtype, torch.float32))
            growth = (places + base).log() / math.log(base)
            query = (query * growth.view(-1, 1, 1)).to(query.dtype)
        return query, key

    def _mix(
        self, query: Tensor, key: Tensor, value: Tensor, runs: Runs, places: Places | None, memory: Memory
    ) -> Tensor:
        if self.sees_all:
            return super()._mix(query, key, value, runs, places, memory)
        totals = runs.lengths if places is None else [end - begin for begin, end in places.spans]
        return block_sparse_attention(
            query,
            key,
            value,
            runs,
            places,
            self.geometry,
            scale=self.scale,
            compressed=None if places is None else self._compressed(key, runs.count, memory),
            dense_below=tuple([self._threshold(total) for total in totals]),
            denominator=self.config.denominator,
            form=self.forms["block_sparse"],
            dense_form=self.forms["attention"],
        )

    def _gated(self, mixed: Float[Tensor, "T HK"], hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T HK"]:
        if self.o_gate is None:
            return mixed
        return gated(self.o_gate(hidden), mixed, act="sigmoid", form=self.forms["gated"])

    def _threshold(self, total: int) -> int:
        """The number of tokens below which a query's context is seen whole.

        total: tokens of the sequence after the call, by which only the published code decides.
        """
        shape = self.config
        match shape.regime:
            case "dense":
                return _LONGER_THAN_ANY
            case "sparse":
                return 0
            case "auto":
                return shape.dense_len
            case "auto_published":
                return _LONGER_THAN_ANY if total < shape.dense_len else 0

    def _compressed(self, key: Tensor, runs: int, memory: Memory) -> Compressed:
        """The compressed keys of every run; the memory adds those whose windows the newest keys have completed."""
        none = (key[:, :0], Located([(0, 0)] * runs))
        found = {
            name: memory.sum_up(name, "key", partial(compress, width=width, stride=stride))
            for name, (width, stride) in self._compressed_sizes().items()
        }
        return Compressed(*found["fine"], *found.get("coarse", none))

    def _compressed_sizes(self) -> dict[str, tuple[int, int]]:
        """Width and stride, in keys, of the compressed keys that the denominator needs."""
        fine, coarse = {"fine": self.geometry.fine}, {"coarse": self.geometry.coarse}
        return fine | coarse if self.config.denominator == "coarse" else fine

    def state_spec(self) -> StateSpec:
        entries = dict(super().state_spec().per_token)
        for name, (width, stride) in self._compressed_sizes().items() if not self.sees_all else ():
            entries[name] = PerToken(self.kv_heads, self.head_size, width=width, every=stride)
        return StateSpec(entries, None, self.site.level)

    def read_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes that a query reads: all keys and values while dense; else its blocks and the compressed keys."""
        spec = self.state_spec()
        if context < self.geometry.dense(self._threshold(context + 1)):
            return sum(spec.per_token[name].bytes(context, dtype) for name in ("key", "value"))
        chosen = (self.geometry.topk - 1) * self.geometry.block_size + context % self.geometry.block_size
        sizes = {"key": chosen, "value": chosen, **dict.fromkeys(self._compressed_sizes(), context + 1)}
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
            scored = sum(compressed_count(context + 1, *size) for size in self._compressed_sizes().values())
        return self._linear_flops() + self.heads * self.head_size * (4 * seen + 2 * scored)

    def _linear_flops(self) -> int:
        gate = 0 if self.o_gate is None else 2 * self.o_gate.in_features * self.o_gate.out_features
        return super()._linear_flops() + gate
