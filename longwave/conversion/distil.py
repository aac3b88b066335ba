"""The stage of a conversion in which the whole student learns what its teacher says, at every token.

The loss is the Kullback-Leibler divergence between the two distributions of the next token (Hybrid Linear Attention,
arXiv 2601.22156, stage 2: forward, at temperature 1), in fp32, over all rows. Logits are made in chunks of rows,
forward and backward, so that no (N, V) array exists.

Legend: `N` rows, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

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


class Distillation(NextToken):
    """A model that learns a teacher's distribution of the next token (`training.objective.Objective`).

    teacher: stays as it is, and has the student's vocabulary. direction: `forward` for KL(teacher || student), or
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
        teacher: Decoder,
        direction: Direction = "forward",
        rows: Rows = "all",
        hidden: float = 0.0,
    ) -> None:
        super().__init__(recipe, data, checkpoint)
        ours, theirs = self.model.config, teacher.config
        fits = (
            f"teacher.vocab_size = {theirs.vocab_size}: the student's is {ours.vocab_size}; give one of its vocabulary"
        )
        require(ours.vocab_size == theirs.vocab_size, fits)
        wide = f"hidden = {hidden}: the hidden sizes differ ({theirs.hidden_size}, {ours.hidden_size}); leave it out"
        require(hidden == 0 or ours.hidden_size == theirs.hidden_size, wide)
        require(0 <= hidden < float("inf"), f"hidden = {hidden}: a weight of 0 or more")
        self.teacher = teacher.eval().requires_grad_(False)
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
        return {**super().evaluate(), "held_out_kl": self._mean([self._divergence(one.held_out) for one in sources])}

    def inputs(self, batch: Batch) -> tuple[Int64[Tensor, " T"], Stream]:
        """The tokens of a batch, and their stream, whose outputs are the rows that count."""
        tokens, _, stream = batch.inputs(self.model.embed.weight.device)
        return tokens, replace(stream, outputs=None) if self._rows == "all" else stream

    def hidden_states(
        self, tokens: Int64[Tensor, " T"], stream: Stream
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N d"]]:
        """The final hidden states of the student, and of the teacher, of the rows that count."""
        with torch.no_grad():
            theirs = self.teacher.hidden(tokens, stream)
        return self.model.hidden(tokens, stream), theirs

    def backward(self, own: Float[Tensor, "N D"], theirs: Float[Tensor, "N d"], targets: int) -> Tensor:
        """Adds the gradient of the loss of these rows to the student's parameters; returns that loss."""
        chunk = _chunk(self.model)
        pieces = [piece.detach().requires_grad_() for piece in own.split(chunk)]
        total = own.new_zeros((), dtype=torch.float32)
        for piece, other in zip(pieces, theirs.split(chunk), strict=True):
            total = total + plain_backward(self._loss(piece, other) / targets)
        with torch.autocast(own.device.type, enabled=False):
            own.backward(torch.cat([piece.grad for piece in pieces if piece.grad is not None]))
        return total

    def teacher_flops(self, batch: Batch) -> int:
        """FLOPs of the teacher's forward pass."""
        read = sum(part.prefill_flops(n) for part in self.teacher.parts for n in batch.runs)
        return read + self.targets(batch) * self.teacher.head_flops()

    def _loss(self, own: Float[Tensor, "N D"], theirs: Float[Tensor, "N d"]) -> Float[Tensor, ""]:
        """The loss of some rows, summed."""
        with torch.no_grad():
            wanted = self.teacher.logits(theirs)
        loss = divergence(wanted, self.model.logits(own), self._direction)
        apart = (own.float() - theirs.float()).square().mean(1).sum() if self._hidden else 0.0
        return loss + self._hidden * apart

    @torch.no_grad()
    def _divergence(self, data: PackedTokens) -> float:
        """The mean divergence over the first held-out windows, with tokens selected as at inference."""
        total, rows = 0.0, 0
        with self.model.mode(training=False):
            for batch in batches(data, self._recipe.training.evaluate_windows):
                own, theirs = self.hidden_states(*self.inputs(batch))
                total += summed_divergence(self.teacher, self.model, theirs, own, self._direction)
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
    wide = torch.promote_types(teacher.dtype, torch.float32)
    theirs, ours = teacher.to(wide).log_softmax(-1), student.to(wide).log_softmax(-1)
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
        with self.watching(stream):
            own, theirs = self._objective.hidden_states(tokens, stream)
        self._read += self._objective.teacher_flops(batch)
        return self._objective.backward(own, theirs, targets)

    @property
    def flops(self) -> int:
        """FLOPs of the step: the student's, forward and backward, and the teacher's forward pass."""
        return super().flops + self._read
