"""Loss on held-out text, in the mode in which the model will run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from longwave.checkpoints import find, load
from longwave.data.packed import PackedTokens
from longwave.data.shards import PreparedInfo
from longwave.data.tokenizer import Tokenizer
from longwave.machine import device_of
from longwave.model import Decoder
from longwave.resamplers import Kept


@dataclass(frozen=True)
class HeldOut:
    """loss: nats per predicted token. retention: share of the tokens entering each level that it kept."""

    loss: float
    tokens: int
    retention: tuple[float, ...]


def held_out_loss(
    model: Decoder, data: PackedTokens, *, windows: int = 0, batch_windows: int = 8, selection: str = "threshold"
) -> HeldOut:
    """Mean loss over the first `windows` windows (0 for all).

    selection: "threshold", as the model runs, or "training", with the choice that training makes (it may see later
    tokens, so its loss is no quality figure; the gap between the two is worth watching).
    """
    count = len(data) if windows == 0 else min(windows, len(data))
    device = model.embed.weight.device
    kept = Kept.of(model.resamplers)
    with _mode(model, training=selection == "training"), model.watching(kept), torch.no_grad():
        total, tokens = 0.0, 0
        for start in range(0, count, batch_windows):
            batch = data.batch(range(start, min(start + batch_windows, count)))
            total += float(model.loss(*batch.inputs(device)))
            tokens += batch.predicted
    return HeldOut(total / max(tokens, 1), tokens, kept.shares)


def evaluate_folder(model: str, data: str, window: int | None, device: str) -> dict[str, Any]:
    """Loss, perplexity, bits per byte and retention of a model folder on the held-out split of prepared data.

    Of conversations only what is learned counts: the answers, unless the data was prepared with the loss on all.
    """
    folder = find(model)
    decoder = load(folder, device=device_of(device))
    info = PreparedInfo.read(data)
    if (folder / "tokenizer.json").exists():
        info.require_tokenizer(Tokenizer.load(folder))
    info.require_vocab(decoder.config.vocab_size)
    packed = PackedTokens(data, "held_out", decoder.config.context_window if window is None else window, keep_last=True)
    result = held_out_loss(decoder, packed)
    return {
        "loss": result.loss,
        "loss_on": "all" if info.held_out.learned is None else "assistant",
        "perplexity": math.exp(result.loss),
        "bits_per_byte": bits_per_byte(result, info),
        "tokens": result.tokens,
        "retention": list(result.retention),
    }


def bits_per_byte(result: HeldOut, info: PreparedInfo) -> float:
    """Loss in bits per byte of what is learned, which other tokenizers' losses can be compared with."""
    return result.loss / math.log(2) * info.held_out.targets / max(info.held_out.bytes, 1)


@contextmanager
def _mode(model: Decoder, training: bool) -> Iterator[None]:
    """Puts the model into a mode, and back."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
