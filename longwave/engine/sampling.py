"""Choosing the next token from logits.

Draws are keyed by seed, sequence and place, so that the other sequences of a batch change nothing.

Legend: `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from longwave.config import Strict
from longwave.draws import uniform_row
from longwave.errors import require
from longwave.machine import not_finite

LEAST_REPETITION = 0.01  # of the penalty for it, which divides logits: with far less they would not be finite


@dataclass(frozen=True)
class Sampling(Strict):
    """How tokens are drawn.

    temperature: divides the logits; 0 takes the most likely token. top_k: only the k most likely tokens; None for all.
    top_p: only the fewest most likely tokens whose probabilities add up to this (Holtzman et al. 2020). min_p: only
    tokens at least this times as likely as the likeliest. seed: the same seed gives the same text.

    presence_penalty, frequency_penalty: taken off the logit of a token that was chosen before, once, and as often as it
    was. repetition_penalty: the logits of tokens of the prompt and the text so far are divided by it where they are
    positive, and multiplied by it elsewhere (CTRL, Keskar et al. 2019). logit_bias: added to the logits of tokens.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])

    def __post_init__(self) -> None:
        finite = 0 <= self.temperature < math.inf
        require(finite, f"temperature = {self.temperature}: 0 (greedy) or a larger number")
        require(self.top_k is None or self.top_k > 0, f"top_k = {self.top_k}: 1 or more")
        require(0 < self.top_p <= 1, f"top_p = {self.top_p}: more than 0, at most 1")
        require(0 <= self.min_p <= 1, f"min_p = {self.min_p}: between 0 and 1")
        for name in ("presence_penalty", "frequency_penalty"):
            require(math.isfinite(getattr(self, name)), f"{name} = {getattr(self, name)}: a finite number")
        repetition = self.repetition_penalty
        within = LEAST_REPETITION <= repetition <= 1 / LEAST_REPETITION
        bounds = f"{LEAST_REPETITION} to {1 / LEAST_REPETITION:g}; 1 changes nothing"
        require(within, f"repetition_penalty = {repetition}: {bounds}")
        for token, bias in self.logit_bias.items():
            require(math.isfinite(bias), f"logit_bias of token {token} = {bias}: a finite number")
        greedy = self.temperature == 0
        narrowed = "top_k, top_p and min_p have no effect at temperature = 0; give a temperature above 0"
        require(not (greedy and self.narrows), narrowed)
        unused = f"seed = {self.seed} has no effect at temperature = 0, where nothing is drawn"
        require(not greedy or self.seed == 0, f"{unused}; give a temperature above 0")

    @property
    def narrows(self) -> bool:
        """Whether tokens are left out of the draw."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0

    @property
    def penalises(self) -> bool:
        """Whether the text so far changes the logits."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


class History:
    """How often each token has come, for the penalties of one sequence.

    prompt: the tokens that only the penalty for repetition counts.
    """

    def __init__(self, prompt: Sequence[int], chosen: Sequence[int], vocabulary: int, device: torch.device) -> None:
        self._met = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._met[torch.tensor(prompt, device=device)] = True
        self._counts = torch.zeros(vocabulary, device=device)
        for token in chosen:
            self.add(token)

    def add(self, token: int) -> None:
        """Counts a token that was chosen."""
        self._met[token] = True
        self._counts[token] += 1

    def penalised(self, logits: Float[Tensor, " V"], sampling: Sampling) -> Float[Tensor, " V"]:
        """The logits less the penalties."""
        factor = sampling.repetition_penalty
        repeated = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(self._met, repeated, logits)
        taken = self._counts * sampling.frequency_penalty + (self._counts > 0) * sampling.presence_penalty
        return logits - taken.to(logits.dtype)


def biased(logits: Float[Tensor, " V"], bias: Mapping[int, float]) -> Float[Tensor, " V"]:
    """The logits with numbers added to those of some tokens."""
    tokens = torch.tensor(list(bias), device=logits.device)
    return logits.index_add(0, tokens, torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device))


def choose_token(logits: Float[Tensor, " V"], sampling: Sampling, sequence: int, place: int) -> int:
    """The next token of a sequence. sequence, place: its index, and the token's place in it; they key the draw.

    Every token has a waiting time of its own, drawn by the key and its id, and the first to come, at a rate that is its
    probability, is taken (the Gumbel-max trick). So two models that expect nearly the same draw the same token nearly
    always, however they rank the tokens: with a chance of (1 - d) / (1 + d) or more, where d is the total variation
    distance of the two distributions (Daliri et al. 2024, arXiv 2408.07978).

    MachineError for logits that hold NaN, or of which the largest is infinite.
    """
    likeliest = int(logits.argmax())
    peak = float(logits[likeliest])  # NaN if any of them is
    if not math.isfinite(peak):
        raise not_finite(f"largest logit for token {place + 1} of prompt {sequence + 1}", peak, logits.dtype)
    return likeliest if sampling.temperature == 0 else int(_coming(logits, sampling, sequence, place).argmax())


def first_tokens(logits: Float[Tensor, " V"], sampling: Sampling, sequence: int, place: int, count: int) -> list[int]:
    """The token that `choose_token` takes, and those that come after it; without a draw, the likeliest ones."""
    order = logits if sampling.temperature == 0 else _coming(logits, sampling, sequence, place)
    tokens: list[int] = order.topk(min(count, len(order))).indices.tolist()
    return tokens


def _coming(logits: Float[Tensor, " V"], sampling: Sampling, sequence: int, place: int) -> Float64[Tensor, " V"]:
    """A number for every token, the larger the sooner it comes; minus infinity for those that may not."""
    # Differences from the peak cannot overflow upwards, however small the temperature.
    scaled = (logits.double() - logits.max()) / sampling.temperature
    if sampling.narrows:
        scaled = _narrowed(scaled, sampling)
    return scaled - _waiting_times(sampling.seed, sequence, place, like=scaled).log()


def _waiting_times(*keys: int, like: Float64[Tensor, " V"]) -> Float64[Tensor, " V"]:
    """An exponential waiting time for every token; never 0 or infinite."""
    return -(uniform_row(*keys, count=len(like), device=like.device) + 2.0**-54).log()


def _narrowed(scaled: Float64[Tensor, " V"], sampling: Sampling) -> Float64[Tensor, " V"]:
    """The logits, with minus infinity for tokens that `top_k`, `top_p` or `min_p` leave out."""
    ranked, tokens = torch.sort(scaled, descending=True, stable=True)
    probabilities = torch.softmax(ranked[: sampling.top_k], dim=0)
    kept = int((probabilities.cumsum(0) - probabilities < sampling.top_p).sum())
    if sampling.min_p:
        kept = min(kept, int((probabilities >= sampling.min_p * probabilities[0]).sum()))
    return torch.full_like(scaled, -math.inf).index_copy(0, tokens[:kept], ranked[:kept])
