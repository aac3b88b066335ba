"""Recall measured by generation: a model continues the prompt, and the answer is looked for in what it says.

Likelihood would flatter: a converted model within 0.2 points of its teacher by log-probability was 20.8 behind when it
generated (GenDistill, arXiv 2603.26556). What counts is the first line with anything on it, and of that only a few
tokens more than the answer has, so that naming everything is not knowing; answers are whole words (`scoring.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longwave.checkpoints.generation import end_ids
from longwave.data.recall import Family, Sample
from longwave.data.recall.scoring import found_in
from longwave.data.tokenizer import StreamDecoder
from longwave.engine.generation import Generation
from longwave.errors import require
from longwave.evaluation.sample_sets import sample_set
from longwave.intervals import wilson
from longwave.model import Decoder
from longwave.units import LAST_PLACE

SAMPLES, DEPTHS = 100, 5
LONGEST = 4096  # tokens, where no length is asked for and the window is longer
_MORE = 8  # tokens beyond the answer, by which one that goes on (123 in place of 12) is told from it
_MORE_OF_ANY = 32  # where several answers would do, which may be longer
_BATCH_TOKENS, _BATCH = 1 << 14, 32  # of prompts that run together


@dataclass(frozen=True)
class RecallScore:
    """How many samples of a length, and of a depth where there is one, are answered right.

    right: samples of which every answer was said (of questions, any one). accuracy: their share. interval: of the
    accuracy, 95 % (Wilson's). found: mean share of a sample's answers that were said, as RULER scores. chance: of a
    guess that knows what answers look like.
    """

    length: int
    depth: float | None
    samples: int
    right: int
    accuracy: float
    interval: tuple[float, float]
    found: float
    chance: float


@dataclass(frozen=True)
class Recall:
    """A model's scores at one family of recall tasks.

    by_length: at each length. by_depth: at each length and depth, of families in which one needle is asked for.
    hits: of every sample in order, length by length, whether it was answered right.
    """

    task: str
    seed: int
    by_length: tuple[RecallScore, ...]
    by_depth: tuple[RecallScore, ...]
    hits: tuple[bool, ...]

    @property
    def samples(self) -> int:
        """The number of all samples."""
        return len(self.hits)


@dataclass(frozen=True)
class RecallAsked:
    """What is asked of every family. lengths: tokens of prompt and answer together. samples: at each of them."""

    lengths: tuple[int, ...]
    samples: int = SAMPLES
    depths: int = DEPTHS
    seed: int = 0

    def __post_init__(self) -> None:
        distinct = 0 < len(self.lengths) == len(set(self.lengths))
        require(distinct, f"lengths = {','.join(map(str, self.lengths))}: name one or more, each once")
        require(0 < self.samples <= LAST_PLACE, f"samples = {self.samples}: 1 sample or more")
        fits = 0 < self.depths <= self.samples
        require(fits, f"depths = {self.depths}: from 1 to the samples of a length ({self.samples:,})")

    @property
    def places(self) -> list[float]:
        """The depths, evenly from the beginning of the text (0) to its end (1); a single one lies in the middle."""
        return [0.5] if self.depths == 1 else [place / (self.depths - 1) for place in range(self.depths)]


def default_lengths(model: Decoder) -> tuple[int, ...]:
    """The context window, if it is no longer than `LONGEST`."""
    return (min(model.config.context_window, LONGEST),)


def sets_of(model: Decoder, family: Family, asked: RecallAsked) -> list[Sample]:
    """All samples of a family, length by length. Raises UserError for a length beyond the context window."""
    require(model.tokenizer is not None, "this model has no tokenizer, which recall tasks need: set model.tokenizer")
    assert model.tokenizer is not None
    longest, window = max(asked.lengths), model.config.context_window
    require(longest <= window, f"lengths = {longest:,}: the model's context_window is {window:,}")
    rest = asked.places, asked.samples, asked.seed
    return [one for length in asked.lengths for one in sample_set(family, model.tokenizer, length, *rest)]


def recall(model: Decoder, family: Family, asked: RecallAsked) -> Recall:
    """Scores a model by what it generates.

    Raises UserError for lengths beyond the context window or too short for the task; MachineError for logits that are
    not finite.
    """
    return scored(family.name, asked.seed, samples := sets_of(model, family, asked), said(model, samples))


def scored(task: str, seed: int, samples: Sequence[Sample], texts: Sequence[str]) -> Recall:
    """The scores of texts that were said in answer to samples."""
    found = [found_in(one.answers, text, one.needed) for one, text in zip(samples, texts, strict=True)]
    pairs = list(zip(samples, found, strict=True))
    by_length = tuple(_score(pairs, length, None) for length in dict.fromkeys(one.length for one in samples))
    cells = dict.fromkeys((one.length, one.depth) for one in samples if one.depth is not None)
    by_depth = tuple(_score(pairs, *cell) for cell in cells)
    return Recall(task, seed, by_length, by_depth, tuple(share == 1 for share in found))


def _score(pairs: Sequence[tuple[Sample, float]], length: int, depth: float | None) -> RecallScore:
    chosen = [pair for pair in pairs if pair[0].length == length and depth in (None, pair[0].depth)]
    count, right = len(chosen), sum(share == 1 for _, share in chosen)
    means = [sum(share for _, share in chosen) / count, sum(one.chance for one, _ in chosen) / count]
    return RecallScore(length, depth, count, right, right / count, wilson(right, count), *means)


def said(model: Decoder, samples: Sequence[Sample]) -> list[str]:
    """What the model says after each prompt, greedily: the first line that has anything on it."""
    texts = list[str]()
    while len(texts) < len(samples):
        step = max(1, min(_BATCH, _BATCH_TOKENS // samples[len(texts)].length))
        texts += _said_together(model, samples[len(texts) : len(texts) + step])
    return texts


def _said_together(model: Decoder, batch: Sequence[Sample]) -> list[str]:
    """What the model says after the prompts of a batch."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    prompts = [tokenizer.encode(one.prompt, add_bos=True) for one in batch]
    limits, ends = [_limit(one) for one in batch], end_ids(model.origin.generation, tokenizer)
    generation = Generation(model, prompts, max_new_tokens=max(limits), stop_tokens=ends)
    decoders, texts = [StreamDecoder(tokenizer, after=prompt) for prompt in prompts], [""] * len(batch)
    for place, token in generation:
        texts[place] += decoders[place].push(token)
        limits[place] -= 1
        if limits[place] == 0 or "\n" in texts[place].lstrip():
            generation.stop(place)
    whole = [text + decoder.finish() for text, decoder in zip(texts, decoders, strict=True)]
    return [text.lstrip().split("\n")[0] for text in whole]


def _limit(sample: Sample) -> int:
    """The most tokens that may be said in answer."""
    return sample.length - sample.prompt_tokens + (_MORE if sample.needed == "all" else _MORE_OF_ANY)
