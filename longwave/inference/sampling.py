"""Choosing the next token from logits.

Draws are keyed by seed, sequence and place, so that the other sequences of a batch change nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from longwave.config import Strict
from longwave.draws import uniform
from longwave.errors import require
from longwave.machine import not_finite


@dataclass(frozen=True)
class Sampling(Strict):
    """How tokens are drawn.

    temperature: divides the logits; 0 takes the most likely token. top_k: only the k most likely tokens; None for all.
    top_p: only the fewest most likely tokens whose probabilities add up to this (Holtzman et al. 2020). seed: the same
    seed gives the same text.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        finite = 0 <= self.temperature < math.inf
        require(finite, f"temperature = {self.temperature}: 0 (greedy) or a larger number")
        require(self.top_k is None or self.top_k > 0, f"top_k = {self.top_k}: 1 or more")
        require(0 < self.top_p <= 1, f"top_p = {self.top_p}: more than 0, at most 1")
        greedy = self.temperature == 0
        idle = greedy and (self.top_k is not None or self.top_p < 1)
        require(not idle, "top_k and top_p have no effect at temperature = 0; give a temperature above 0")
        unused = f"seed = {self.seed} has no effect at temperature = 0, where nothing is drawn"
        require(not greedy or self.seed == 0, f"{unused}; give a temperature above 0")


def choose_token(logits: Float[Tensor, " V"], sampling: Sampling, sequence: int, place: int) -> int:
    """The next token of a sequence. sequence, place: its index, and the token's place in it; they key the draw.

    MachineError for logits that hold NaN, or of which the largest is infinite.
    """
    likeliest = int(logits.argmax())
    peak = float(logits[likeliest])  # NaN if any of them is
    if not math.isfinite(peak):
        raise not_finite(f"largest logit for token {place + 1} of prompt {sequence + 1}", peak, logits.dtype)
    if sampling.temperature == 0:
        return likeliest
    # Differences from the peak cannot overflow upwards, however small the temperature.
    scaled = (logits.double() - peak) / sampling.temperature
    ranked, tokens = torch.sort(scaled, descending=True, stable=True)
    probabilities = torch.softmax(ranked[: sampling.top_k], dim=0)
    cumulated = probabilities.cumsum(0)
    kept = int((cumulated - probabilities < sampling.top_p).sum())
    draw = uniform(sampling.seed, sequence, place) * float(cumulated[kept - 1])
    return int(tokens[min(kept - 1, int(torch.searchsorted(cumulated[:kept], draw, right=True)))])
