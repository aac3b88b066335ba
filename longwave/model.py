"""The decoder.

- One model for every system: embed, layers, norm, head; `config.layout` says which layers. Llama is `12F`; SUBLLM
  (arXiv 2406.06571) is `5F subllm(0.64: 5F subllm(0.64: 4F) 5F) 5F`.
- Inside there are only streams: token runs laid end to end without padding (`streams.py`), hidden (T, D).
- Training, prefill, chunked prefill and decoding are the same forward over different pieces of a sequence; what is
  remembered between pieces lies in a `State` outside the model.
- RMSNorm, rotary positions, SwiGLU, grouped KV heads, optional biases and QK norm, muP-style scales; logits only for
  the rows that ask for them, and a loss that never holds them all.

Legend: `T` tokens of the stream, `D` hidden size, `V` vocabulary, `O` rows whose outputs are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from longwave.blocks import BLOCKS, Block, Stack, reading
from longwave.config import ModelConfig
from longwave.costs import At, Cost, count, total, weight_bytes
from longwave.errors import UserError, require
from longwave.layers.constant import Constant
from longwave.layers.head import Head, TiedHead
from longwave.layers.linear import Linear
from longwave.layers.norm import RMSNorm
from longwave.layout import Blocks, Bracketed, Layout, check_names
from longwave.ops.forms import Call
from longwave.ops.linear import LINEAR, LINEAR_INT8
from longwave.origin import Origin
from longwave.part import InitialDraws, Part, Site
from longwave.resamplers import BRACKETS, Bracket, Clock, Resampler, Selection
from longwave.states import PageOptions, State
from longwave.streams import Stream

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
        self.layout = config.parsed
        check_names(config.layout, self.layout, {*BLOCKS, *config.blocks}, BRACKETS)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = _Builder(config, self.layout.depth).stack(self.layout, level=-1)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = TiedHead(self.embed) if config.tie_embeddings else Head(config.hidden_size, config.vocab_size)
        self._check_tables()
        self._rotations = {part.rotation for part in self.parts if part.rotation is not None}
        for rotation in self._rotations:
            rotation.check(config)
        self.clock: Clock | None = None
        self._asked: dict[str, str] = {}
        self._placed: tuple[torch.device, torch.dtype] | None = None
        if not self.embed.weight.is_meta:
            self._draw(seed)

    def forward(self, tokens: Int64[Tensor, " T"], stream: Stream, state: State | None = None) -> Float[Tensor, "O V"]:
        """Logits of the rows in `stream.outputs`, of all rows by default."""
        return self.logits(self.hidden(tokens, stream, state))

    def hidden(self, tokens: Int64[Tensor, " T"], stream: Stream, state: State | None = None) -> Float[Tensor, "O D"]:
        """Normalised hidden states of the rows whose outputs are needed: the input of the head.

        With a state, `stream` comes from `state.stream(...)`, and the tokens count as seen afterwards.
        UserError for tokens that do not fit the stream or, on a CPU, the vocabulary; a GPU would have to be waited for.
        """
        self._place()
        self._check_call(tokens, stream, state)
        return self.hidden_of(self._embedded(tokens), stream, state)

    def hidden_of(
        self, embedded: Float[Tensor, "T D"], stream: Stream, state: State | None = None
    ) -> Float[Tensor, "O D"]:
        """The same from rows of the embedding, or from any others in their place."""
        self._place()
        hidden = embedded
        if self.config.scales.embedding != 1:
            hidden = hidden * self.config.scales.embedding
        hidden = self.stack(hidden, stream.carrying(**self.passengers(stream)), state)
        if state is not None:
            state.advance(stream)
        return self.norm(hidden if stream.outputs is None else hidden.index_select(0, stream.outputs))

    def logits(self, hidden: Float[Tensor, "O D"]) -> Float[Tensor, "O V"]:
        """The head applied to the result of `hidden`."""
        return self.head(hidden) * self.config.scales.logits

    def loss(self, tokens: Int64[Tensor, " T"], targets: Int64[Tensor, " T"], stream: Stream) -> Float[Tensor, ""]:
        """Sum of next-token cross-entropies in nats, made in chunks; rows with target -100 do not count.

        `stream.outputs` may name the rows that count, which spares the host to wait for the targets.
        """
        if targets.shape != tokens.shape:
            raise UserError(f"targets of shape {tuple(targets.shape)}: one for each of {tuple(tokens.shape)} tokens")
        known = targets[targets != -100] if targets.device.type == "cpu" else targets[:0]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < self.config.vocab_size:
            raise self._outside("targets", known)
        hidden = self.hidden(tokens, replace(stream, outputs=None))
        return self.head(hidden, targets, self.config.scales.logits, stream.outputs)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the model's folder, for `longwave.generate`; the model itself speaks token ids."""
        return self.origin.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        self.origin.tokenizer = tokenizer

    def __setattr__(self, name: str, value: Any) -> None:
        """A tied head follows whatever becomes the embedding, such as a larger one or an adapter around it."""
        super().__setattr__(name, value)
        if name == "embed" and isinstance(self._modules.get("head"), TiedHead):
            self.head = TiedHead(value)

    @property
    def head_weight(self) -> Tensor:
        """The (V, D) matrix of the head, which may be the embedding's."""
        return self.head.weight

    @property
    def blocks(self) -> list[Block]:
        """Every block in the order of the layout, at any level."""
        return [module for module in self.stack.modules() if isinstance(module, Block)]

    @property
    def brackets(self) -> list[Bracket]:
        """Every bracket in the order of the layout, outer ones first."""
        return [module for module in self.stack.modules() if isinstance(module, Bracket)]

    @property
    def resamplers(self) -> list[Resampler]:
        """The brackets that are resamplers."""
        return [bracket for bracket in self.brackets if isinstance(bracket, Resampler)]

    @property
    def parts(self) -> list[Part]:
        """The parts of every block, and every bracket."""
        return [*(part for block in self.blocks for part in block.parts), *self.brackets]

    @property
    def reads_trees(self) -> bool:
        """Whether drafts on several paths can run together: every part has to see which token leads to which."""
        return all(part.reads_trees for part in self.parts)

    def state(self, slots: int = 1, *, pages: PageOptions | None = None) -> State:
        """An empty state for `slots` sequences; with `pages`, one that keeps tokens in pages (see `State`)."""
        specs = {part.site.name: part.state_spec() for part in self.parts}
        kept = {name: spec for name, spec in specs.items() if spec.per_token or spec.per_sequence}
        return State(kept, slots, dtype=self._activation_dtype(), device=self.embed.weight.device, pages=pages)

    def beginning(self, layers: int) -> Decoder:
        """A model of the first outermost layers with this one's norm and head: an early exit, which shares all weights.

        UserError unless it has fewer layers than this one.
        """
        every = self.stack.layers
        require(0 < layers < len(every), f"layers = {layers}: from 1 to {len(every) - 1}, fewer than the model has")
        short = copy(self)
        short._modules = {**self._modules, "stack": Stack(every[:layers])}
        return short

    def set_step(self, step: int, seed: int = 0) -> None:
        """Tells every step-driven schedule the optimizer step about to run, and every draw its seed."""
        self.clock = Clock(step, seed)
        for bracket in self.brackets:
            bracket.follow(self.clock)

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes these tensors as its weights and buffers, without a copy; the model is then where they lie."""
        self.load_state_dict(tensors, assign=True)
        for module in self.modules():
            if isinstance(module, Constant):  # which no folder holds
                module.restore(self.embed.weight.device)

    def pack(self) -> Decoder:
        """Rounds the weights of all products in blocks to int8, for inference only; returns the model.

        Gates, norms, routers, the embedding and the head stay as they are. A packed model cannot be saved or trained.
        """
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        self._placed = None
        return self

    @property
    def is_packed(self) -> bool:
        """Whether weights are held in int8."""
        return any(isinstance(module, Linear) and module.scale is not None for module in self.modules())

    def checkpoint_blocks(self, on: bool, reentrant: bool = False) -> None:
        """Trades compute for memory in training: blocks keep only their inputs and run again in the backward pass.

        reentrant: which of torch's two ways of doing so is taken.
        """
        for module in self.modules():
            if isinstance(module, Stack):
                module.recompute, module.reentrant = on, reentrant

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """While the block runs, the model is in training or in inference mode; then as before."""
        before = self.training
        if before != training:
            self.train(training)
        try:
            yield
        finally:
            if before != training:
                self.train(before)

    @contextmanager
    def watching(self, watcher: Callable[[Resampler, Stream, Selection], None]) -> Iterator[None]:
        """While the block runs, the watcher is told of every level's selections."""
        with ExitStack() as watched:
            for resampler in self.resamplers:
                watched.enter_context(resampler.watched_by(watcher))
            yield

    def use_form(self, form: str | None, op: str | None = None) -> None:
        """Runs an op, or every op that has such a form, in the given one: `torch`, or `reference` for the plain maths.

        None gives the choice back. UserError for a form that no op of the model has, or that cannot run here.
        """
        ops = {one.name: one for one in (LINEAR, LINEAR_INT8, *(one for part in self.parts for one in part.ops))}
        ops = {name: one for name, one in ops.items() if op in (None, name)}
        asked = [name for name, one in ops.items() if form in one.forms]
        if form is not None and ops and not asked:
            known = sorted({name for one in ops.values() for name in one.forms})
            raise UserError(f"form = {form!r}: use one of {', '.join(known)}")
        before = self._asked
        self._asked = {} if form is None else {**before, **dict.fromkeys(asked, form)}
        try:
            self._resolve()
        except UserError:
            self._asked = before
            raise

    @contextmanager
    def using_form(self, form: str) -> Iterator[None]:
        """While the block runs, every op that has such a form runs in it, as `use_form` says; then as before."""
        before = self._asked
        self.use_form(form)
        try:
            yield
        finally:
            self._asked = before
            self._resolve()

    def describe(self) -> list[str]:
        """Lines for people: the shape, and the form that each kind of block runs each of its ops in."""
        self._place()
        weight, parameters = self.embed.weight, total(self.costs(1)).parameters
        dtype = str(weight.dtype).removeprefix("torch.")
        forms = sorted(
            {f"{b.letter}: {name} {form}" for b in self.blocks for part in b.parts for name, form in part.forms.items()}
        )
        dtype += " with products of int8" if self.is_packed else ""
        return [f"{self.config.layout}  {parameters:,} parameters, {dtype} on {weight.device}; {', '.join(forms)}"]

    def costs(
        self, tokens: int, dtype: torch.dtype | None = None, kept: Mapping[int, float] | None = None
    ) -> list[Cost]:
        """The costs of each part at a context of `tokens`, with weights and activations in `dtype` (the model's own).

        kept: by the index of a resampler, the share of its tokens that it really keeps; its nominal one by default.
        """
        at = At(tokens, dtype or self.embed.weight.dtype, kept=kept or {})
        own = 0 if isinstance(self.head, TiedHead) else count(self.head)
        head_bytes = weight_bytes(count(self.norm) + self.head_weight.numel(), at.dtype)
        flops = self.head_flops()
        return [
            Cost("embedding", count(self.embed), decode_bytes=self.config.hidden_size * at.dtype.itemsize),
            *self.stack.costs(at),
            Cost("norm and head", count(self.norm) + own, flops, flops, head_bytes),
        ]

    def prefill_flops(self, tokens: int, kept: Mapping[int, float] | None = None) -> int:
        """FLOPs of one sequence of `tokens`, logits of the last row only."""
        return total(self.costs(tokens, kept=kept)).prefill_flops

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

    def _place(self) -> None:
        """Resolves the forms of all ops for where the model is, and the type it computes in, if either has changed."""
        if self._placed != (self.embed.weight.device, self._activation_dtype()):
            self._resolve()

    def _resolve(self) -> None:
        device, dtype = self.embed.weight.device, self._activation_dtype()
        for part in self.parts:
            part.resolve(device, dtype, self._asked)
        for module in self.modules():
            if isinstance(module, Linear | Head | TiedHead):
                module.form = self._asked.get(module.op.name)
                if module.form is not None:
                    module.op.resolve(Call(device, dtype), module.form)
        self._placed = (device, dtype)

    def _draw(self, seed: int) -> None:
        """Fills every weight with its initial draws, as `config.init` says."""
        draws = InitialDraws(self.config.init, self.config.hidden_size, seed)
        draws.normal(self.embed.weight, self.config.init.embedding_std or draws.width**-0.5, "embed")
        if isinstance(self.head, Head):
            draws.uniform(self.head.weight, draws.width**-0.5, "head")
        for part in self.parts:
            part.draw(draws)
        draws.fill()

    def _check_tables(self) -> None:
        """UserError for a table of the config that no part reads, since it has one of its own or is not there."""
        own = {letter: block.tables.keys() for letter, block in self.config.blocks.items()}
        read = {name for bracket in self.brackets for name in bracket.tables}
        for block in self.blocks:
            read |= {name for part in block.parts for name in part.tables} - own.get(block.letter, set())
        for name in self.config.tables:
            where = f"{name}(...)" if name in BRACKETS else reading(name)
            require(name in read, f"{name} has no effect: the layout has no {where}")
        for letter in self.config.blocks:
            used = any(block.letter == letter for block in self.blocks)
            require(used, f"blocks.{letter} has no effect: the layout has no {letter} block")

    def _check_call(self, tokens: Tensor, stream: Stream, state: State | None) -> None:
        """UserError for arguments of a forward that do not fit each other or the model; nothing is read from a GPU."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise UserError(f"tokens of {tokens.dtype}: give integers, torch.int64")
        if tokens.shape != (stream.tokens,):
            shape = tuple(tokens.shape)
            raise UserError(f"tokens of shape {shape}: the stream is one row of {stream.tokens} tokens, end to end")
        for name, device in (("tokens", tokens.device), ("stream", stream.order.device)):
            if device != self.embed.weight.device:
                raise UserError(f"{name} on {device}: the model is on {self.embed.weight.device}")
        if state is not None:
            self._check_state(state, stream)
        elif stream.continued is not None:
            raise UserError("state: the stream continues one; give it too")

    def _check_state(self, state: State, stream: Stream) -> None:
        place, dtype = self.embed.weight.device, self._activation_dtype()
        if stream.continued is None:
            raise UserError("stream: not of this state; take it from state.stream(...)")
        if (state.device, state.dtype) != (place, dtype):
            ours = f"{dtype} on {place}; take one from model.state(...)"
            raise UserError(f"state in {state.dtype} on {state.device}: the model computes in {ours}")

    def _embedded(self, tokens: Tensor) -> Tensor:
        try:
            return self.embed(tokens)
        except IndexError:
            raise self._outside("tokens", tokens) from None

    def _outside(self, name: str, ids: Tensor) -> UserError:
        """The error for ids that the vocabulary does not have."""
        lowest, highest = int(ids.min()), int(ids.max())
        return UserError(
            f"{name} from {lowest} to {highest}: the model's vocabulary has 0 to {self.config.vocab_size - 1}"
        )

    def passengers(self, stream: Stream) -> dict[str, Tensor]:
        """Tensors that a stream carries to this model's parts: the angles by which they turn heads, once for all."""
        dtype, carried = self._activation_dtype(), dict[str, Tensor]()
        for rotation in self._rotations:
            carried |= rotation.passengers(self.config, stream.positions, dtype)
        return carried

    def _activation_dtype(self) -> torch.dtype:
        weight = self.embed.weight
        device = weight.device.type
        mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # `meta` has no autocast
        return torch.get_autocast_dtype(device) if mixed else weight.dtype


@dataclass
class _Builder:
    """Builds layers from a layout; blocks, resamplers and other brackets are numbered flat, whatever the nesting."""

    config: ModelConfig
    layers: int
    depth: int = 0
    levels: int = 0
    others: int = 0

    def stack(self, layout: Layout, level: int) -> Stack:
        return Stack(self._layers(layout, level))

    def _layers(self, layout: Layout, level: int) -> Iterator[nn.Module]:
        for item in layout.items:
            if isinstance(item, Blocks):
                for _ in range(item.count):
                    yield Block(self.config, item.letter, self._site(f"blocks.{self.depth}", level))
                    self.depth += 1
            else:
                yield self._bracket(item, level)

    def _bracket(self, item: Bracketed, level: int) -> Bracket:
        kind = BRACKETS[item.name]
        if not issubclass(kind, Resampler):
            index, self.others = self.others, self.others + 1
            bracket = kind(self.config, item.arguments, self._site(f"brackets.{index}", level))
        else:
            index, self.levels = self.levels, self.levels + 1
            bracket = kind(self.config, item.arguments, self._site(f"resamplers.{index}", level), index)
            level = index
        bracket.body = self.stack(item.body, level)  # last, so that its tensors stand behind the bracket's own
        return bracket

    def _site(self, name: str, level: int) -> Site:
        return Site(name, self.depth, self.layers, level)
