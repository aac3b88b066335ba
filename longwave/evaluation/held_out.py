"""Loss and accuracy on held-out text, with tokens selected as at inference (or, for comparison, as in training)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from longwave.data.packed import Batch, PackedTokens
from longwave.data.prepared import PreparedInfo
from longwave.errors import require, shown
from longwave.evaluation.breakdown import perplexity_of
from longwave.evaluation.likelihood import log_probabilities, most_likely
from longwave.model import Decoder
from longwave.resamplers import Kept

Watcher = Callable[[Batch, Tensor], None]


@dataclass(frozen=True)
class HeldOut:
    """The result of an evaluation.

    loss: mean nats per predicted token. tokens: number of predicted tokens. retention: for each level of resampling the
    share of the tokens entering it that it kept.
    """

    loss: float
    tokens: int
    retention: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where no number of double precision is as large."""
        return perplexity_of(self.loss)


def held_out_loss(
    model: Decoder,
    data: PackedTokens,
    *,
    windows: int = 0,
    batch_windows: int = 8,
    selection: Literal["threshold", "training"] = "threshold",
    watchers: Sequence[Watcher] = (),
) -> HeldOut:
    """The mean loss over the first `windows` windows of the data (0 for all), `batch_windows` at a time.

    selection: how a SUBLLM selects tokens: "threshold" as at inference, or "training". The latter may look at later
    tokens, so its loss says nothing about quality; the gap between the two shows whether training prepares for
    inference.
    watchers: told of every batch, and of the loss of each of its tokens that has a target.
    """
    known = selection in ("threshold", "training")
    require(known, f"selection = {shown(selection)}: threshold, as at inference, or training")
    kept = Kept.of(model.resamplers)
    with model.mode(training=selection == "training"), model.watching(kept), torch.no_grad():
        total, tokens = 0.0, 0
        for batch in batches(data, windows, batch_windows):
            losses = token_losses(model, batch)
            for watcher in watchers:
                watcher(batch, losses)
            total += float(losses.sum())
            tokens += losses.numel()
    return HeldOut(total / max(tokens, 1), tokens, kept.shares)


def batches(data: PackedTokens, windows: int = 0, batch_windows: int = 8) -> Iterator[Batch]:
    """The first `windows` windows of the data (0 for all), `batch_windows` at a time."""
    count = len(data) if windows == 0 else min(windows, len(data))
    return (data.batch(range(at, min(at + batch_windows, count))) for at in range(0, count, batch_windows))


@torch.no_grad()
def held_out_accuracy(model: Decoder, data: PackedTokens, windows: int = 0) -> float:
    """The share of the tokens that have a target for which the model finds that target likeliest; windows: as above.

    MachineError for logits that are not finite.
    """
    right, count = 0, 0
    with model.mode(training=False):
        for batch in batches(data, windows):
            tokens, targets, stream = batch.inputs(model.embed.weight.device)
            assert stream.outputs is not None
            wanted = targets.index_select(0, stream.outputs)
            right += int((most_likely(model, model.hidden(tokens, stream)) == wanted).sum())
            count += len(wanted)
    return right / max(count, 1)


def token_losses(model: Decoder, batch: Batch) -> Float64[Tensor, " N"]:
    """The loss, in nats, of every token of a batch that has a target, in order; on the CPU."""
    tokens, targets, stream = batch.inputs(model.embed.weight.device)
    assert stream.outputs is not None
    hidden = model.hidden(tokens, stream)
    return -log_probabilities(model, hidden, targets.index_select(0, stream.outputs)).cpu()


def bits_per_byte(result: HeldOut, info: PreparedInfo) -> float:
    """The loss in bits per byte of learned text, which can be compared between models with different tokenizers."""
    return result.loss / math.log(2) * info.held_out.targets / max(info.held_out.bytes, 1)
