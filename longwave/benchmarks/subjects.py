"""What is timed: a longwave model, and `transformers`' Llama with the same weights, behind one face.

Legend: `B` sequences of `N` tokens each, `S` steps of decoding, `V` vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mean
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from longwave.benchmarks.profile import Part
from longwave.benchmarks.roofline import Level, Load
from longwave.benchmarks.timing import Task
from longwave.model import Decoder
from longwave.states import State
from longwave.stream import Stream, Windows

T = TypeVar("T")


@dataclass(frozen=True)
class Decoding:
    """Decoding that can be repeated: every run gives the logits (B, S, V) of the same steps after the same context.

    load: what a run meets at each level. used, reserved: bytes remembered of the context, and bytes allocated for it.
    """

    run: Callable[[], Float[Tensor, "B S V"]]
    load: Load
    used: int
    reserved: int


@runtime_checkable
class Subject(Protocol):
    """A model to time. `model` holds its weights, and knows what they cost."""

    name: str
    model: Decoder

    def prefill(self, context: Int64[Tensor, " N"]) -> Callable[[], Float[Tensor, " V"]]:
        """A task that fills an empty cache and gives the logits after the last token."""
        ...

    def after(self, context: Int64[Tensor, " N"]) -> Callable[[Int64[Tensor, "B S"]], dict[str, Decoding]]:
        """Prefills a context; what it returns makes B sequences that share it run S tokens each, one by one.

        The decodings differ in how the cache is kept, and are keyed by a name for that.
        """
        ...

    def loss(self, tokens: Int64[Tensor, "B N"], precision: str) -> float:
        """The mean next-token loss in nats, as in training."""
        ...

    def trainer(self, tokens: Int64[Tensor, "B N"], precision: str) -> Task:
        """A task that runs forward, backward and a fused AdamW step; it changes the weights."""
        ...

    def parts(self) -> list[Part]:
        """The modules whose time is told apart in a trace."""
        ...


class Longwave:
    """A longwave decoder."""

    def __init__(self, name: str, model: Decoder) -> None:
        self.name, self.model = name, model

    def prefill(self, context: Int64[Tensor, " N"]) -> Callable[[], Float[Tensor, " V"]]:
        return lambda: self._filled(context)[1]

    def after(self, context: Int64[Tensor, " N"]) -> Callable[[Int64[Tensor, "B S"]], dict[str, Decoding]]:
        filled, _ = self._filled(context)
        return lambda following: {self.name: self._decoding(copy.deepcopy(filled), following)}

    def loss(self, tokens: Int64[Tensor, "B N"], precision: str) -> float:
        self.model.train().set_step(0)
        with torch.no_grad(), computing_in(precision, tokens.device):
            return float(self._mean_loss(tokens))

    def trainer(self, tokens: Int64[Tensor, "B N"], precision: str) -> Task:
        step = 0

        def loss() -> Tensor:
            nonlocal step
            step += 1
            self.model.set_step(step)
            return self._mean_loss(tokens)

        return training_task(self.model, loss, precision, tokens.device)

    def parts(self) -> list[Part]:
        model = self.model
        found = [Part("embed", "embedding", model.embed), Part("norm", "norms", model.norm)]
        for block in model.blocks:
            name = block.site.name
            found += [Part(name, "residuals", block), Part(f"{name}.mixer", f"mixers {block.letter}", block.mixer)]
            norms = {"mixer_norm": block.mixer_norm, "mlp_norm": block.mlp_norm}
            found += [Part(f"{name}.{inner}", "norms", norm) for inner, norm in norms.items()]
            found.append(Part(f"{name}.mlp", "MLPs", block.mlp))
        return found + [Part(one.site.name, "resamplers", one) for one in model.resamplers]

    def _mean_loss(self, tokens: Tensor) -> Tensor:
        sizes = (tokens.shape[1],) * tokens.shape[0]
        stream = Stream.of(sizes, windows=Windows(sizes, tuple(range(len(sizes)))), device=tokens.device)
        following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)
        return self.model.loss(tokens.flatten(), following.flatten(), stream) / (following != -100).sum()

    def _filled(self, context: Tensor) -> tuple[State, Tensor]:
        """The state after a context, and the logits of its last token."""
        state = self.model.eval().state(1)
        return state, self._run(context, state)[0]

    @torch.no_grad()
    def _run(self, tokens: Tensor, state: State) -> Tensor:
        """Logits (B, V) after the same number of new tokens for each of B slots, one slot after the other."""
        stream = state.stream([tokens.numel() // state.slots] * state.slots).last_rows()
        return self.model(tokens.flatten(), stream, state)

    def _decoding(self, state: State, following: Tensor) -> Decoding:
        context, (batch, steps) = state.seen[0], following.shape
        state.reorder([0] * batch)
        _make_room(state, steps)
        recurs = any(spec.per_sequence for spec in state.specs.values())
        snapshots = [state.snapshot(slot) for slot in range(batch)] if recurs else []
        used, reserved = state.used_bytes(), state.reserved_bytes()

        def advance() -> Tensor:
            return torch.stack([self._run(following[:, step], state) for step in range(steps)], dim=1)

        def forget() -> None:
            if recurs:
                for snapshot in snapshots:
                    state.restore(snapshot)
                _make_room(state, steps)
                return
            for slot in range(batch):
                state.truncate(slot, context)

        def run() -> Tensor:
            logits = advance()
            forget()
            return logits

        advance()
        load = met(self.model, state, context, steps)
        forget()
        return Decoding(run, load, used, reserved)


def _make_room(state: State, steps: int) -> None:
    """So that so many steps of every slot allocate nothing."""
    for slot in range(state.slots):
        for part in (state.of(name, slot) for name in state.specs):
            part.reserve(part.held + steps)


def met(model: Decoder, state: State, context: int, steps: int) -> Load:
    """What decoding has met at each level, from a state that holds the context and the steps after it."""
    levels = {-1: Level.whole(context, state.slots, steps)}
    for resampler in model.resamplers:
        kept = [state.of(resampler.site.name, slot).view("order").flatten() for slot in range(state.slots)]
        new = torch.cat([places[places >= context] for places in kept])
        levels[resampler.index] = Level(
            held=mean(int((places < context).sum()) + int((places >= context).sum()) / 2 for places in kept),
            rows=new.numel() / steps,
            runs=new.unique().numel() / steps,
        )
    return Load(levels)


def computing_in(precision: str, device: torch.device) -> torch.autocast:
    """The context of a training forward: `bf16` computes in bf16 over fp32 weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def training_task(model: nn.Module, loss: Callable[[], Tensor], precision: str, device: torch.device) -> Task:
    """Forward, backward and a fused AdamW step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def task() -> None:
        model.train()
        with computing_in(precision, device):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return task


@torch.no_grad()
def one_pass(model: Decoder, tokens: Int64[Tensor, " N"], last: int) -> Float[Tensor, "{last} V"]:
    """Logits of the last tokens, all at once and without a state: what every other way must agree with."""
    rows = torch.arange(len(tokens) - last, len(tokens), device=tokens.device)
    return model.eval()(tokens, replace(Stream.of([len(tokens)], device=tokens.device), outputs=rows))


@torch.no_grad()
def force_retention(model: Decoder, tokens: Int64[Tensor, " N"]) -> tuple[float, ...]:
    """Sets every level's threshold so that it keeps its nominal share of these tokens; returns the shares kept.

    Outer levels come first, since what they keep decides what inner ones meet.
    """
    model.eval()
    for resampler in model.resamplers:
        seen: list[Tensor] = []
        hook = resampler.score.register_forward_hook(lambda module, inputs, scores, seen=seen: seen.append(scores))
        one_pass(model, tokens, 1)
        hook.remove()
        ordered = seen[0].double().sort(descending=True).values
        kept = min(round(ordered.numel() * float(resampler.retention)), ordered.numel() - 1)
        resampler.threshold.low.copy_((ordered[kept - 1] + ordered[kept]) / 2 if kept else ordered[0])
    return retention_in(model, lambda: one_pass(model, tokens, 1))[1]


def retention_in(model: Decoder, inference: Callable[[], T]) -> tuple[T, tuple[float, ...]]:
    """What `inference` gives, and the share of the tokens entering each level that the model kept meanwhile."""
    for resampler in model.resamplers:
        resampler.kept_of = [0, 0]
    result = inference()
    return result, tuple(kept / max(met, 1) for kept, met in (resampler.kept_of for resampler in model.resamplers))
