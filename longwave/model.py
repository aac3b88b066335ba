"""The decoder.

- One model for every system: embed, layers, norm, head; `config.layout` says which layers. Llama is `12F`; SUBLLM
  (arXiv 2406.06571) is `5F subllm(0.64: 5F subllm(0.64: 4F) 5F) 5F`.
- Inside there are only streams: token runs laid end to end without padding (`stream.py`), hidden (T, D).
- Training, prefill, chunked prefill and decoding are the same forward over different pieces of a sequence; what is
  remembered between pieces lies in a `State` outside the model.
- RMSNorm, rotary positions, SwiGLU, grouped KV heads, optional biases and QK norm, muP-style scales; logits only for
  the rows that ask for them, and a loss that never holds them all.

Legend: `T` tokens of the stream, `D` hidden size, `V` vocabulary, `O` rows whose outputs are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from longwave.config import ModelConfig, require
from longwave.costs import Cost, count, total, weight_bytes
from longwave.initialise import initialise
from longwave.layers.block import BLOCKS, Block, Stack
from longwave.layers.norm import RMSNorm
from longwave.layout import Blocks, Layout, check_names, parse
from longwave.mixers import Site
from longwave.ops.attention import choose
from longwave.ops.cross_entropy import cross_entropy
from longwave.ops.linear import linear
from longwave.origin import Origin
from longwave.resamplers import RESAMPLERS, Clock, Subllm
from longwave.states import State
from longwave.stream import Stream

if TYPE_CHECKING:
    from longwave.data.tokenizer import Tokenizer


class Decoder(nn.Module):
    """A causal language model over streams.

    `checkpoint_blocks(True)` recomputes blocks in the backward pass; `set_step` tells step-driven parts the step.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.origin = Origin()
        self.layout = parse(config.layout)
        check_names(config.layout, self.layout, BLOCKS, RESAMPLERS)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = _Builder(config).stack(self.layout, level=-1)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._rotations = {block.mixer.rotation for block in self.blocks if block.mixer.rotation is not None}
        unused = config.subllm is not None and not self.resamplers
        require(not unused, "subllm has no effect: the layout has no subllm(...)")
        used = {
            f"attention.window = {config.attention.window}": (config.attention.window, "W"),
            "lightning": (config.lightning, "L"),
            "infllm": (config.infllm, "S"),
        }
        for name, (value, letter) in used.items():
            idle = value is not None and all(block.letter != letter for block in self.blocks)
            require(not idle, f"{name} has no effect: the layout has no {letter} block")
        if not self.embed.weight.is_meta:
            initialise(self, seed)

    def forward(self, tokens: Int64[Tensor, " T"], stream: Stream, state: State | None = None) -> Float[Tensor, "O V"]:
        """Logits of the rows in `stream.outputs`, of all rows by default."""
        return self.logits(self.hidden(tokens, stream, state))

    def hidden(self, tokens: Int64[Tensor, " T"], stream: Stream, state: State | None = None) -> Float[Tensor, "O D"]:
        """What the head reads: normalised hidden states of the rows whose outputs are needed.

        With a state, `stream` comes from `state.stream(...)`, and the tokens count as seen afterwards.
        """
        hidden = self.embed(tokens)
        if self.config.scales.embedding != 1:
            hidden = hidden * self.config.scales.embedding
        hidden = self.stack(hidden, stream.carrying(**self._turns(stream)), state)
        if state is not None:
            state.advance(stream)
        return self.norm(hidden if stream.outputs is None else hidden.index_select(0, stream.outputs))

    def logits(self, hidden: Float[Tensor, "O D"]) -> Float[Tensor, "O V"]:
        """The head on what `hidden` gives."""
        return linear(hidden, self.head_weight) * self.config.scales.logits

    def loss(self, tokens: Int64[Tensor, " T"], targets: Int64[Tensor, " T"], stream: Stream) -> Float[Tensor, ""]:
        """Sum of next-token cross-entropies in nats, made in chunks; rows with target -100 do not count."""
        return cross_entropy(self.hidden(tokens, stream), self.head_weight, targets, self.config.scales.logits)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the model's folder, for `longwave.generate`; the model itself speaks token ids."""
        return self.origin.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        self.origin.tokenizer = tokenizer

    @property
    def head_weight(self) -> Tensor:
        """The (V, D) matrix of the head, which may be the embedding's."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def blocks(self) -> list[Block]:
        """Every block in the order of the layout, at any level."""
        return [module for module in self.stack.modules() if isinstance(module, Block)]

    @property
    def resamplers(self) -> list[Subllm]:
        """Every resampler in the order of the layout, outer ones first."""
        return [module for module in self.stack.modules() if isinstance(module, Subllm)]

    def state(self, slots: int = 1) -> State:
        """An empty state for `slots` sequences."""
        parts = [
            *((b.site.name, b.mixer.state_spec()) for b in self.blocks),
            *((r.site.name, r.state_spec()) for r in self.resamplers),
        ]
        return State(dict(parts), slots, dtype=self._activation_dtype(), device=self.embed.weight.device)

    def set_step(self, step: int, seed: int = 0) -> None:
        """Tells every step-driven schedule the optimizer step about to run, and every draw its seed."""
        for resampler in self.resamplers:
            resampler.set_clock(Clock(step, seed))

    def checkpoint_blocks(self, on: bool) -> None:
        """Trades compute for memory in training: blocks keep only their inputs and run again in the backward pass."""
        for module in self.modules():
            if isinstance(module, Stack):
                module.recompute = on

    def use_form(self, form: str) -> None:
        """Runs attention in the given form everywhere: `torch`, or `reference` to see the plain maths."""
        name, _ = choose(form)
        for block in self.blocks:
            block.mixer.use_form(name)

    def describe(self) -> list[str]:
        """Lines for people: the shape, and the form that each kind of part runs."""
        weight, parameters = self.embed.weight, total(self.costs(1)).parameters
        shape = f"{self.config.layout}  {parameters:,} parameters"
        forms = sorted({f"{block.letter}: {block.mixer.form}" for block in self.blocks})
        return [f"{shape}, {str(weight.dtype).removeprefix('torch.')} on {weight.device}; attention {', '.join(forms)}"]

    def costs(self, tokens: int, dtype: torch.dtype | None = None) -> list[Cost]:
        """What each part costs at a context of `tokens`, with weights and activations in `dtype` (the model's own)."""
        dtype = dtype or self.embed.weight.dtype
        own, flops = count(self.norm) + (0 if self.head is None else count(self.head)), self.head_flops()
        head_bytes = weight_bytes(count(self.norm) + self.head_weight.numel(), dtype)
        row = self.config.hidden_size * dtype.itemsize
        return [
            Cost("embedding", count(self.embed), decode_bytes=row),
            *self.stack.costs(tokens, 1.0, dtype),
            Cost("norm and head", own, flops, flops, head_bytes),
        ]

    def prefill_flops(self, tokens: int) -> int:
        """FLOPs of one sequence of `tokens`, logits of the last row only."""
        return total(self.costs(tokens)).prefill_flops

    def training_flops(self, tokens: int) -> int:
        """FLOPs of forward and backward over one sequence, logits at every row."""
        costs = total(self.costs(tokens))
        return 3 * (costs.prefill_flops + (tokens - 1) * self.head_flops()) - 2 * costs.unlearned_flops

    def decode_flops(self, context: int) -> float:
        """Expected FLOPs of the token that follows `context` others."""
        return total(self.costs(context)).decode_flops

    def head_flops(self) -> int:
        """FLOPs of one row of logits."""
        return 2 * self.config.hidden_size * self.config.vocab_size

    def _turns(self, stream: Stream) -> dict[str, Tensor]:
        """The cosines and sines that the mixers will turn heads by."""
        dtype, carried = self._activation_dtype(), dict[str, Tensor]()
        for rotation in self._rotations:
            carried |= rotation.passengers(self.config, stream.positions, dtype)
        return carried

    def _activation_dtype(self) -> torch.dtype:
        weight = self.embed.weight
        device = weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@dataclass
class _Builder:
    """Builds layers from a layout; depth and resampler indices are flat, whatever the nesting."""

    config: ModelConfig
    depth: int = 0
    index: int = 0

    def stack(self, layout: Layout, level: int) -> Stack:
        return Stack(self._layers(layout, level))

    def _layers(self, layout: Layout, level: int) -> Iterator[nn.Module]:
        for item in layout.items:
            if isinstance(item, Blocks):
                for _ in range(item.count):
                    yield Block(self.config, item.letter, Site(f"blocks.{self.depth}", self.depth, level))
                    self.depth += 1
            else:
                index, self.index = self.index, self.index + 1
                body = self.stack(item.body, level=index)
                yield RESAMPLERS[item.name](
                    self.config, item.arguments, body, Site(f"resamplers.{index}", self.depth, level), index
                )
