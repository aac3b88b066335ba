"""The stage of a conversion in which the whole student learns what its teacher says, at every token.

The loss is the Kullback-Leibler divergence between the two distributions of the next token (Hybrid Linear Attention,
arXiv 2601.22156, stage 2: forward, at temperature 1), in fp32, over all rows. Logits are made in chunks of rows,
forward and backward, so that no (N, V) array exists.

Legend: `N` rows, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from longwave.data.packed import Batch, PackedTokens
from longwave.errors import require
from longwave.evaluation.held_out import batches
from longwave.model import Decoder
from longwave.streams import Stream
from longwave.training.data import TrainingData
from longwave.training.next_token import NextToken, NextTokenStep
from longwave.training.objective import plain_backward
from longwave.training.recipe import Recipe

Direction = Literal["forward", "reverse"]
Rows = Literal["all", "targets"]
_CHUNK_ELEMENTS = 1 << 24  # logits of each model that are held at a time: 64 MiB in fp32
_KEPT_ELEMENTS = 1 << 26  # log-probabilities of a batch that are kept for the next student: 256 MiB in fp32


class Taught:
    """What a teacher says of the rows of one batch. hidden: its final hidden states."""

    def __init__(self, model: Decoder, tokens: Tensor, hidden: Float[Tensor, "N D"], keeps: bool) -> None:
        self.tokens, self.hidden, self._model, self._keeps = tokens, hidden, model, keeps
        self._known: dict[int, Tensor] = {}

    def log_probabilities(self, number: int, chunk: int) -> Float[Tensor, "n V"]:
        """The log-probabilities of every next token in a chunk of so many rows, in fp32 or wider."""
        if number in self._known:
            return self._known[number]
        with torch.no_grad():
            found = _logs(self._model.logits(self.hidden[number * chunk : (number + 1) * chunk]))
        if self._keeps:
            self._known[number] = found
        return found


class Teacher:
    """A model from which others learn, that reads a batch once for all of them.

    batches: that are remembered, so that students which take their steps in turn find what was read for the first.
    """

    def __init__(self, model: Decoder, batches: int = 0) -> None:
        self.model = model.eval().requires_grad_(False)
        self._last: deque[Taught] = deque(maxlen=batches)

    @torch.no_grad()
    def read(self, tokens: Int64[Tensor, " T"], stream: Stream) -> Taught:
        """What the teacher says of the rows of a stream whose outputs are wanted."""
        for known in self._last:
            if known.tokens.shape == tokens.shape and bool((known.tokens == tokens).all()):
                return known
        hidden = self.model.hidden(tokens, stream)
        shared = self._last.maxlen != 0 and len(hidden) * self.model.config.vocab_size <= _KEPT_ELEMENTS
        taught = Taught(self.model, tokens, hidden, shared)
        self._last.append(taught)
        return taught


class Distillation(NextToken):
    """A model that learns a teacher's distribution of the next token (`training.objective.Objective`).

    teacher: stays as it is, and has the student's vocabulary; one `Teacher` can serve several students that learn side
    by side. direction: `forward` for KL(teacher || student), or
    `reverse`. rows: `all` tokens, or `targets` for those alone whose next token is to be learned, such as the answers
    of conversations. hidden: weight of the mean squared difference of the final hidden states, which is added.
    `training.start_from` names the folder in which the student begins. UserError for a teacher of another vocabulary.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        checkpoint: Path | None,
        *,
        teacher: Decoder | Teacher,
        direction: Direction = "forward",
        rows: Rows = "all",
        hidden: float = 0.0,
        start: Callable[[], Decoder] | None = None,
    ) -> None:
        super().__init__(recipe, data, checkpoint, start=start)
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        ours, theirs = self.model.config, self.teacher.model.config
        fits = (
            f"teacher.vocab_size = {theirs.vocab_size}: the student's is {ours.vocab_size}; give one of its vocabulary"
        )
        require(ours.vocab_size == theirs.vocab_size, fits)
        wide = f"hidden = {hidden}: the hidden sizes differ ({theirs.hidden_size}, {ours.hidden_size}); leave it out"
        require(hidden == 0 or ours.hidden_size == theirs.hidden_size, wide)
        require(0 <= hidden < float("inf"), f"hidden = {hidden}: a weight of 0 or more")
        self._direction: Direction = direction
        self._rows, self._hidden = rows, hidden

    def targets(self, batch: Batch) -> int:
        """Number of rows that count."""
        return batch.tokens.numel() if self._rows == "all" else batch.predicted

    def step(self, logged: bool) -> _Step:
        """Begins a step."""
        return _Step(self, logged)

    def evaluate(self) -> dict[str, Any]:
        """The next-token loss on held-out text, as for every model, and beside it the divergence in nats per row."""
        sources = self._data.sources
        apart = self._data.mean([self._divergence(one.held_out) for one in sources])
        return {**super().evaluate(), "held_out_kl": apart}

    def inputs(self, batch: Batch) -> tuple[Int64[Tensor, " T"], Stream]:
        """The tokens of a batch, and their stream, whose outputs are the rows that count."""
        tokens, _, stream = batch.inputs(self.model.embed.weight.device)
        return tokens, replace(stream, outputs=None) if self._rows == "all" else stream

    def backward(self, own: Float[Tensor, "N D"], theirs: Taught, targets: int) -> Tensor:
        """Adds the gradient of the loss of these rows to the student's parameters; returns that loss."""
        pieces = [piece.detach().requires_grad_() for piece in own.split(_chunk(self.model))]
        total = own.new_zeros((), dtype=torch.float32)
        for number, piece in enumerate(pieces):
            total = total + plain_backward(self._loss(piece, theirs, number) / targets)
        with torch.autocast(own.device.type, enabled=False):
            own.backward(torch.cat([piece.grad for piece in pieces if piece.grad is not None]))
        return total

    def teacher_flops(self, batch: Batch) -> int:
        """FLOPs of the teacher's forward pass."""
        read = sum(part.prefill_flops(n) for part in self.teacher.model.parts for n in batch.runs)
        return read + self.targets(batch) * self.teacher.model.head_flops()

    def _loss(self, own: Float[Tensor, "n D"], theirs: Taught, number: int) -> Float[Tensor, ""]:
        """The loss of a chunk of rows, summed."""
        chunk = _chunk(self.model)
        loss = _apart(theirs.log_probabilities(number, chunk), _logs(self.model.logits(own)), self._direction)
        if not self._hidden:
            return loss
        other = theirs.hidden.split(chunk)[number]
        return loss + self._hidden * (own.float() - other.float()).square().mean(1).sum()

    @torch.no_grad()
    def _divergence(self, data: PackedTokens) -> float:
        """The mean divergence over the first held-out windows, with tokens selected as at inference."""
        total, rows = 0.0, 0
        with self.model.mode(training=False):
            for batch in batches(data, self._recipe.training.evaluate_windows):
                tokens, stream = self.inputs(batch)
                own, theirs = self.model.hidden(tokens, stream), self.teacher.model.hidden(tokens, stream)
                total += summed_divergence(self.teacher.model, self.model, theirs, own, self._direction)
                rows += len(own)
        return total / max(rows, 1)


@torch.no_grad()
def summed_divergence(
    teacher: Decoder,
    student: Decoder,
    theirs: Float[Tensor, "N d"],
    own: Float[Tensor, "N D"],
    direction: Direction = "forward",
) -> float:
    """The divergence, summed over rows, from the final hidden states of teacher and student; no gradient."""
    chunk, total = _chunk(student), 0.0
    for other, piece in zip(theirs.split(chunk), own.split(chunk), strict=True):
        total += float(divergence(teacher.logits(other), student.logits(piece), direction))
    return total


def divergence(teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"], direction: Direction) -> Float[Tensor, ""]:
    """The Kullback-Leibler divergence of next-token distributions, from logits, in nats, summed over rows.

    It is computed in fp32, or wider where logits are.
    """
    return _apart(_logs(teacher), _logs(student), direction)


def _logs(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _apart(theirs: Float[Tensor, "N V"], ours: Float[Tensor, "N V"], direction: Direction) -> Float[Tensor, ""]:
    first, second = (theirs, ours) if direction == "forward" else (ours, theirs)
    return (first.exp() * (first - second)).sum()


def _chunk(model: Decoder) -> int:
    """The rows whose logits are held at a time."""
    return max(1, _CHUNK_ELEMENTS // model.config.vocab_size)


class _Step(NextTokenStep):
    """The losses of one step (`training.objective.StepLoss`)."""

    def __init__(self, objective: Distillation, logged: bool) -> None:
        super().__init__(objective.model, logged)
        self._objective, self._read = objective, 0

    def backward(self, batch: Batch, targets: int) -> Tensor:
        """The divergence from the teacher, as this batch's share of the step's mean."""
        tokens, stream = self._objective.inputs(batch)
        theirs = self._objective.teacher.read(tokens, stream)
        with self.watching(stream):
            own = self._objective.model.hidden(tokens, stream)
        self._read += self._objective.teacher_flops(batch)
        return self._objective.backward(own, theirs, targets)

    @property
    def flops(self) -> int:
        """FLOPs of the step: the student's, forward and backward, and the teacher's forward pass."""
        return super().flops + self._read
