"""Loss on held-out text, with tokens selected as at inference (or, for comparison, as in training)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from longwave.checkpoints import find, load
from longwave.data.packed import PackedTokens
from longwave.data.shards import PreparedInfo
from longwave.data.tokenizer import Tokenizer
from longwave.errors import require, shown
from longwave.machine import device_of, not_finite
from longwave.model import Decoder
from longwave.resamplers import Kept


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
) -> HeldOut:
    """The mean loss over the first `windows` windows of the data (0 for all), `batch_windows` at a time.

    selection: how a SUBLLM selects tokens: "threshold" as at inference, or "training". The latter may look at later
    tokens, so its loss says nothing about quality; the gap between the two shows whether training prepares for
    inference.
    """
    known = selection in ("threshold", "training")
    require(known, f"selection = {shown(selection)}: threshold, as at inference, or training")
    count = len(data) if windows == 0 else min(windows, len(data))
    device = model.embed.weight.device
    kept = Kept.of(model.resamplers)
    with model.mode(training=selection == "training"), model.watching(kept), torch.no_grad():
        total, tokens = 0.0, 0
        for start in range(0, count, batch_windows):
            batch = data.batch(range(start, min(start + batch_windows, count)))
            total += float(model.loss(*batch.inputs(device)))
            tokens += batch.predicted
    return HeldOut(total / max(tokens, 1), tokens, kept.shares)


def evaluate_folder(model: str, data: str, window: int | None, device: str) -> dict[str, Any]:
    """Loss, perplexity, bits per byte and retention of a model folder on the held-out split of prepared data.

    In conversations only learned tokens count: the answers, unless the data was prepared with the loss on all.
    window: tokens of an evaluation window; the model's context window by default.
    """
    folder = find(model)
    decoder = load(folder, device=device_of(device))
    info = PreparedInfo.read(data)
    if (tokenizer := Tokenizer.find(folder)) is not None:
        info.require_tokenizer(tokenizer)
    info.require_vocab(decoder.config.vocab_size)
    packed = PackedTokens(data, "held_out", decoder.config.context_window if window is None else window, keep_last=True)
    result = held_out_loss(decoder, packed)
    require(result.tokens > 0, f"{data}: nothing in its held-out split is to be predicted; prepare more of it")
    if not math.isfinite(result.loss):
        raise not_finite(f"{model}: held-out loss", result.loss, decoder.embed.weight.dtype)
    return {
        "loss": result.loss,
        "loss_on": "all" if info.held_out.learned is None else "assistant",
        "perplexity": result.perplexity,
        "bits_per_byte": bits_per_byte(result, info),
        "tokens": result.tokens,
        "retention": list(result.retention),
    }


def bits_per_byte(result: HeldOut, info: PreparedInfo) -> float:
    """The loss in bits per byte of learned text, which can be compared between models with different tokenizers."""
    return result.loss / math.log(2) * info.held_out.targets / max(info.held_out.bytes, 1)
