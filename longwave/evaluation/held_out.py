"""Loss on held-out text, with tokens selected as at inference (or, for comparison, as in training)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from longwave.data.packed import Batch, PackedTokens
from longwave.data.prepared import PreparedInfo
from longwave.errors import require, shown
from longwave.evaluation.breakdown import AtContext, ByContext, BySource, OfSource
from longwave.evaluation.few_shot import FewShot
from longwave.evaluation.likelihood import log_probabilities
from longwave.evaluation.recall import Recall
from longwave.machine import not_finite
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
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


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
    count = len(data) if windows == 0 else min(windows, len(data))
    kept = Kept.of(model.resamplers)
    with model.mode(training=selection == "training"), model.watching(kept), torch.no_grad():
        total, tokens = 0.0, 0
        for start in range(0, count, batch_windows):
            batch = data.batch(range(start, min(start + batch_windows, count)))
            losses = token_losses(model, batch)
            for watcher in watchers:
                watcher(batch, losses)
            total += float(losses.sum())
            tokens += losses.numel()
    return HeldOut(total / max(tokens, 1), tokens, kept.shares)


def token_losses(model: Decoder, batch: Batch) -> Float64[Tensor, " N"]:
    """The loss, in nats, of every token of a batch that has a target, in order; on the CPU."""
    tokens, targets, stream = batch.inputs(model.embed.weight.device)
    assert stream.outputs is not None
    hidden = model.hidden(tokens, stream)
    return -log_probabilities(model, hidden, targets.index_select(0, stream.outputs)).cpu()


@dataclass(frozen=True, kw_only=True)
class Probes:
    """What a model was asked beside held-out text.

    tasks: the outcome of each few-shot task. recall: that of each family of recall tasks. command: the command line
    that does the same. versions: of longwave and what it runs on.
    """

    tasks: tuple[FewShot, ...] = ()
    recall: tuple[Recall, ...] = ()
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Evaluation(Probes):
    """How well a model predicts held-out text, and the outcome of the tasks that it was given beside it, if any.

    loss: mean nats per predicted token. loss_on: what counts: the `assistant` of conversations, the `answers` of recall
    tasks, or `all`.
    perplexity: e to the loss; infinite where no number of double precision is as large. bits_per_byte: of the text,
    which can be compared between tokenizers. tokens: number of predicted tokens. retention: for each level of
    resampling the share of the tokens entering it that it kept. by_context: the loss by how much of its document a
    prediction sees. by_source: the loss by where documents come from, if the data say so.
    """

    loss: float
    loss_on: Literal["assistant", "answers", "all"]
    perplexity: float
    bits_per_byte: float
    tokens: int
    retention: tuple[float, ...]
    by_context: tuple[AtContext, ...]
    by_source: tuple[OfSource, ...]


def evaluate(model: Decoder, data: str | Path, window: int | None = None) -> Evaluation:
    """How well a model predicts the held-out split of prepared data, run as at inference.

    In conversations only learned tokens count: the answers, unless the data was prepared with the loss on all.
    window: tokens of an evaluation window; the model's context window by default. Raises UserError for data of another
    tokenizer than the model's, MachineError for a loss that is not finite.
    """
    info = PreparedInfo.read(data)
    if model.tokenizer is not None:
        info.require_tokenizer(model.tokenizer)
    info.require_vocab(model.config.vocab_size)
    packed = PackedTokens(data, "held_out", model.config.context_window if window is None else window, keep_last=True)
    by_context, by_source = ByContext(), BySource(packed.source_names, packed.sources())
    watchers = [by_context, by_source] if packed.source_names else [by_context]
    result = held_out_loss(model, packed, watchers=watchers)
    require(result.tokens > 0, f"{data}: nothing in its held-out split is to be predicted; prepare more of it")
    if not math.isfinite(result.loss):
        raise not_finite(f"{data}: held-out loss", result.loss, model.embed.weight.dtype)
    loss_on = "all" if info.held_out.learned is None else "answers" if info.kind == "recall" else "assistant"
    figures = result.perplexity, bits_per_byte(result, info), result.tokens, result.retention
    return Evaluation(result.loss, loss_on, *figures, by_context.found(), by_source.found())


def bits_per_byte(result: HeldOut, info: PreparedInfo) -> float:
    """The loss in bits per byte of learned text, which can be compared between models with different tokenizers."""
    return result.loss / math.log(2) * info.held_out.targets / max(info.held_out.bytes, 1)
