"""All that an evaluation finds, and the part of it that is of held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from longwave.data.packed import PackedTokens
from longwave.data.prepared import PreparedInfo
from longwave.errors import require
from longwave.evaluation.ablation import Ablation
from longwave.evaluation.breakdown import AtContext, AtWindow, ByContext, BySource, OfSource
from longwave.evaluation.few_shot import FewShot
from longwave.evaluation.harness import HarnessScore
from longwave.evaluation.held_out import HeldOut, bits_per_byte, held_out_loss
from longwave.evaluation.recall import Recall
from longwave.machine import not_finite
from longwave.model import Decoder


@dataclass(frozen=True, kw_only=True)
class Probes:
    """What a model was asked beside held-out text.

    tasks: the outcome of each few-shot task. recall: that of each family of recall tasks. lm_eval:
    the figures of its tasks. ablation: what each mixer
    does, if that was asked. command: the command line
    that does the same. versions: of longwave and what it runs on.
    """

    tasks: tuple[FewShot, ...] = ()
    recall: tuple[Recall, ...] = ()
    lm_eval: tuple[HarnessScore, ...] = ()
    ablation: Ablation | None = None
    command: str = field(default="", compare=False)
    versions: Mapping[str, str] = field(default_factory=dict[str, str], compare=False)


@dataclass(frozen=True)
class Evaluation(Probes):
    """How well a model predicts held-out text, and the outcome of the tasks that it was given beside it, if any.

    loss: mean nats per predicted token. loss_on: what counts: the `assistant` of conversations, the `answers` of recall
    tasks, or `all`.
    perplexity: e to the loss; infinite where no number of double precision is as large. bits_per_byte: of the text,
    which can be compared between tokenizers. tokens: number of predicted tokens. retention: for each level of
    resampling the share of the tokens entering it that it kept. by_context: the loss by how much of its document a
    prediction sees. by_source: the loss by where documents come from, if the data say so.
    by_window: the loss in windows of several sizes, if several were asked for.
    """

    loss: float
    loss_on: Literal["assistant", "answers", "all"]
    perplexity: float
    bits_per_byte: float
    tokens: int
    retention: tuple[float, ...]
    by_context: tuple[AtContext, ...]
    by_source: tuple[OfSource, ...]
    by_window: tuple[AtWindow, ...] = ()


def evaluate(model: Decoder, data: str | Path, windows: Sequence[int] = ()) -> Evaluation:
    """How well a model predicts the held-out split of prepared data, run as at inference.

    In conversations only learned tokens count: the answers, unless the data was prepared with the loss on all.
    windows: tokens of an evaluation window; the model's context window by default. All figures are of the longest one;
    of several, the loss in each is told too. Raises UserError for data of another
    tokenizer than the model's, MachineError for a loss that is not finite.
    """
    info = PreparedInfo.read(data)
    if model.tokenizer is not None:
        info.require_tokenizer(model.tokenizer)
    info.require_vocab(model.config.vocab_size)
    packed = held_out_windows(model, data, windows)
    by_context, by_source = ByContext(), BySource(packed.source_names, packed.sources())
    watchers = [by_context, by_source] if packed.source_names else [by_context]
    result = held_out_loss(model, packed, watchers=watchers)
    require(result.tokens > 0, f"{data}: nothing in its held-out split is to be predicted; prepare more of it")
    if not math.isfinite(result.loss):
        raise not_finite(f"{data}: held-out loss", result.loss, model.embed.weight.dtype)
    loss_on = "all" if info.held_out.learned is None else "answers" if info.kind == "recall" else "assistant"
    figures = result.perplexity, bits_per_byte(result, info), result.tokens, result.retention
    parts = by_context.found(), by_source.found(), _by_window(model, data, windows, result)
    return Evaluation(result.loss, loss_on, *figures, *parts)


def _by_window(model: Decoder, data: str | Path, windows: Sequence[int], longest: HeldOut) -> tuple[AtWindow, ...]:
    """The loss in windows of each size, of which the longest has been measured; none where there is but one."""
    found = list[AtWindow]()
    for size in sorted(set(windows)) if len(windows) > 1 else ():
        result = longest if size == max(windows) else held_out_loss(model, held_out_windows(model, data, [size]))
        found.append(AtWindow(size, result.tokens, result.loss))
    return tuple(found)


def held_out_windows(model: Decoder, data: str | Path, windows: Sequence[int] = ()) -> PackedTokens:
    """The windows of a held-out split of the longest of these sizes; as long as the context window by default."""
    return PackedTokens(data, "held_out", max(windows, default=model.config.context_window), keep_last=True)
