"""HypeNet's logit scaling, fitted on long held-out text once a model is trained (arXiv 2601.22156, section on HyPE)."""

from __future__ import annotations

import dataclasses

import torch

from longwave.conversion.recipe import ScalingConfig
from longwave.data.packed import PackedTokens
from longwave.evaluation.held_out import held_out_loss
from longwave.model import Decoder
from longwave.training.recipe import Recipe

_NONE = "none"


def fitted_scaling(model: Decoder, recipe: Recipe, asked: ScalingConfig) -> tuple[Decoder, dict[str, float]]:
    """The model with the base of the logit scaling that has the lowest loss, and the loss with each base.

    recipe: of the last stage, whose held-out text is read in windows of `asked.window` tokens.
    """
    data = [PackedTokens(one.folder, "held_out", asked.window, keep_last=True) for one in recipe.data.folders]
    shares = [one.share / sum(each.share for each in recipe.data.folders) for one in recipe.data.folders]
    losses = dict[str, float]()
    for base in (None, *asked.bases):
        candidate = with_scaling(model, base, asked.window)
        found = [held_out_loss(candidate, one, windows=asked.windows, batch_windows=1).loss for one in data]
        losses[_NONE if base is None else f"{base:g}"] = sum(a * b for a, b in zip(shares, found, strict=True))
    best = min(losses, key=lambda name: losses[name])
    return with_scaling(model, None if best == _NONE else float(best)), losses


def with_scaling(model: Decoder, base: float | None, window: int = 0) -> Decoder:
    """A model of the same weights whose queries grow by log_base(position + base). window: that it is to hold."""
    config = model.config
    softmax = dataclasses.replace(config.table("infllm"), logit_scaling=base)
    room = max(window, config.context_window)
    config = dataclasses.replace(config, context_window=room, tables={**config.tables, "infllm": softmax})
    with torch.device("meta"):
        scaled = Decoder(config)
    scaled.adopt(model.state_dict())
    scaled.tokenizer, scaled.origin.generation = model.tokenizer, model.origin.generation
    return scaled.eval()
