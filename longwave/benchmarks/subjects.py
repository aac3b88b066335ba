"""What is timed: a longwave model, and `transformers`' Llama with the same weights, behind one face.

Legend: `B` sequences of `N` tokens each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from longwave.model import Decoder
from longwave.states import State
from longwave.stream import Stream, Windows

Task = Callable[[], object]


class Subject(Protocol):
    """A model to time."""

    name: str

    def last_logits(self, tokens: Int64[Tensor, "B N"]) -> Float[Tensor, "B V"]:
        """Logits after the last token of each sequence, from an empty cache."""
        ...

    def decoder(self, tokens: Int64[Tensor, "B N"], steps: int) -> Task:
        """Prefills all but the last `steps` tokens; the task runs those one by one and can be repeated."""
        ...

    def trainer(self, tokens: Int64[Tensor, "B N"], precision: str) -> Task:
        """A task that runs forward, backward and an AdamW step over next-token prediction."""
        ...


class Longwave:
    """A longwave decoder."""

    def __init__(self, name: str, model: Decoder) -> None:
        self.name, self.model = name, model

    @torch.no_grad()
    def last_logits(self, tokens: Int64[Tensor, "B N"]) -> Float[Tensor, "B V"]:
        self.model.eval()
        return self._run(tokens, self._state(tokens))

    def decoder(self, tokens: Int64[Tensor, "B N"], steps: int) -> Task:
        self.model.eval()
        state, context = self._state(tokens), tokens.shape[1] - steps
        self._run(tokens[:, :context], state)

        def task() -> None:
            for place in range(context, tokens.shape[1]):
                self._run(tokens[:, place : place + 1], state)
            for slot in range(state.slots):
                state.truncate(slot, context)

        return task

    def trainer(self, tokens: Int64[Tensor, "B N"], precision: str) -> Task:
        sizes = (tokens.shape[1],) * tokens.shape[0]
        stream = Stream.of(sizes, windows=Windows(sizes, tuple(range(len(sizes)))), device=tokens.device)
        flat, targets = tokens.flatten(), next_tokens(tokens).flatten()
        step = [0]

        def loss() -> Tensor:
            step[0] += 1
            self.model.set_step(step[0])
            return self.model.loss(flat, targets, stream) / (targets != -100).sum()

        return training_task(self.model, loss, precision, tokens.device.type)

    def _state(self, tokens: Tensor) -> State:
        state = self.model.state(tokens.shape[0])
        state.reserve(tokens.shape[1])
        return state

    @torch.no_grad()
    def _run(self, tokens: Tensor, state: State) -> Tensor:
        stream = state.stream([tokens.shape[1]] * tokens.shape[0]).last_rows()
        return self.model(tokens.flatten(), stream, state)


def next_tokens(tokens: Int64[Tensor, "B N"]) -> Int64[Tensor, "B N"]:
    """The target of each token; -100 at the end of a sequence."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)


def training_task(model: torch.nn.Module, loss: Callable[[], Tensor], precision: str, device: str) -> Task:
    """Forward, backward, AdamW; `bf16` computes in bf16 over fp32 weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def task() -> None:
        model.train()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return task


@torch.no_grad()
def force_retention(model: Decoder, tokens: Int64[Tensor, "B N"]) -> tuple[float, ...]:
    """Sets every level's threshold so that it keeps its nominal share of these tokens; returns the shares kept.

    Outer levels come first, since what they keep decides what inner ones meet.
    """
    model.eval()
    stream = Stream.of([tokens.shape[1]] * tokens.shape[0], device=tokens.device)
    for resampler in model.resamplers:
        seen: list[Tensor] = []
        hook = resampler.score.register_forward_hook(lambda module, inputs, scores, seen=seen: seen.append(scores))
        model.hidden(tokens.flatten(), stream)
        hook.remove()
        ordered = seen[0].double().sort(descending=True).values
        kept = min(round(ordered.numel() * float(resampler.retention)), ordered.numel() - 1)
        resampler.threshold.low.copy_((ordered[kept - 1] + ordered[kept]) / 2 if kept else ordered[0])
    return measured_retention(model, tokens)


@torch.no_grad()
def measured_retention(model: Decoder, tokens: Int64[Tensor, "B N"]) -> tuple[float, ...]:
    """The share of the tokens entering each level that it keeps."""
    model.eval()
    for resampler in model.resamplers:
        resampler.kept_of = [0, 0]
    model.hidden(tokens.flatten(), Stream.of([tokens.shape[1]] * tokens.shape[0], device=tokens.device))
    return tuple(kept / max(met, 1) for kept, met in (resampler.kept_of for resampler in model.resamplers))
