"""Figures by which layers are selected, each a function from a model to a number: accuracies, and a divergence.

Every measure tells its settings as plain values, so that figures which other settings gave are never taken for its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from longwave.conversion.distil import summed_divergence
from longwave.data.packed import Batch, PackedTokens
from longwave.errors import require
from longwave.evaluation import sample_sets
from longwave.evaluation.harness import HarnessScore, task_name
from longwave.evaluation.held_out import batches, held_out_accuracy
from longwave.evaluation.suite import QUESTIONS, Asked, suite_of
from longwave.model import Decoder

WINDOWS = 32  # of held-out text, where no number is given
SAMPLES = 200  # of a recall task at a length, where no number is given
_METRICS = ("acc_norm,", "acc,", "exact_match,")  # of lm-eval, the first that a task has; their filter follows


@runtime_checkable
class Measure(Protocol):
    """A figure of a model. settings: what it is measured with, as plain values."""

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def __call__(self, model: Decoder) -> float: ...


class TaskAccuracy:
    """The mean accuracy over tasks, which count alike: HALO's R by recall tasks, its C by tasks of lm-eval.

    tasks: as `longwave eval --tasks` takes them. asked: their options. Recall tasks are answered by generation, with
    `SAMPLES` samples at each length by default. Of lm-eval, `acc_norm` counts where a task has it, or else `acc` or
    `exact_match`. UserError for a task that cannot be read, and for an option that none of them reads.
    """

    def __init__(self, tasks: Sequence[str | Path], asked: Asked | None = None) -> None:
        require(bool(tasks), "tasks: none; name one or more, such as single")
        self._names, found = [str(one) for one in tasks], suite_of(tasks, asked or Asked())
        unset = bool(found.families) and found.asked.samples is None
        self._suite = replace(found, asked=replace(found.asked, samples=SAMPLES)) if unset else found

    @property
    def settings(self) -> dict[str, Any]:
        """The tasks, what is asked of them, and the checksum of every file that defines one."""
        digests = {name: _digest(path) for name in self._names if (path := _path(name)).is_file()}
        return {"tasks": self._names, **asdict(self._suite.asked), "files": digests, "sets": sample_sets.VERSION}

    def __call__(self, model: Decoder) -> float:
        suite = self._suite
        labelled = [one.accuracy for one in suite.few_shot(model)]
        recalled = [fmean(score.accuracy for score in one.by_length) for one in suite.recall(model)]
        scores = suite.lm_eval(model)
        return fmean([*labelled, *recalled, *(_accuracy(scores, task_name(name)) for name in suite.harness)])


class NextTokenAccuracy:
    """The share of the next tokens of held-out text that a model finds likeliest; a cheap stand-in for C.

    texts: several count alike. windows: the first so many of each (0 for all).
    """

    def __init__(self, texts: Sequence[PackedTokens], windows: int = WINDOWS) -> None:
        self._texts = _HeldOut(texts, windows)

    @property
    def settings(self) -> dict[str, Any]:
        """The windows, and a checksum of their tokens."""
        return self._texts.settings()

    def __call__(self, model: Decoder) -> float:
        return fmean(held_out_accuracy(model, one, self._texts.windows) for one in self._texts.texts)


class Divergence:
    """KL(teacher || model) in nats per token of held-out text, over all rows, by which layers are restored one by one.

    texts, windows: as of `NextTokenAccuracy`. The teacher reads them once; its final hidden states, of every
    token, stay in memory.
    """

    def __init__(self, teacher: Decoder, texts: Sequence[PackedTokens], windows: int = WINDOWS) -> None:
        self._teacher, self._texts = teacher, _HeldOut(texts, windows)

    @property
    def settings(self) -> dict[str, Any]:
        """The windows, and a checksum of their tokens."""
        return self._texts.settings()

    @torch.no_grad()
    def __call__(self, model: Decoder) -> float:
        return fmean(self._of_text(model, *pair) for pair in zip(self._texts.texts, self._read, strict=True))

    def _of_text(self, model: Decoder, text: PackedTokens, read: Sequence[Tensor]) -> float:
        total = 0.0
        for batch, theirs in zip(self._texts.batches(text), read, strict=True):
            total += summed_divergence(self._teacher, model, theirs, _hidden(model, batch))
        return total / sum(map(len, read))

    @cached_property
    def _read(self) -> list[list[Tensor]]:
        """The teacher's final hidden states of every text, batch by batch."""
        return [[_hidden(self._teacher, batch) for batch in self._texts.batches(text)] for text in self._texts.texts]


class _HeldOut:
    """The first windows of texts."""

    def __init__(self, texts: Sequence[PackedTokens], windows: int) -> None:
        require(bool(texts), "texts: none; give one or more")
        require(windows >= 0, f"windows = {windows}: 1 or more, or 0 for all")
        self.texts, self.windows = list(texts), windows

    def batches(self, text: PackedTokens) -> Iterator[Batch]:
        return batches(text, self.windows)

    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for batch in (batch for text in self.texts for batch in self.batches(text)):
            digest.update(f"{batch.runs} {batch.windows}".encode())
            digest.update(batch.tokens.numpy().tobytes() + batch.targets.numpy().tobytes())
        return {"windows": self.windows, "tokens": digest.hexdigest()}


@torch.no_grad()
def _hidden(model: Decoder, batch: Batch) -> Tensor:
    """The final hidden states of all rows of a batch."""
    tokens, _, stream = batch.inputs(model.embed.weight.device)
    with model.mode(training=False):
        return model.hidden(tokens, replace(stream, outputs=None))


def _accuracy(scores: Sequence[HarnessScore], task: str) -> float:
    """The accuracy among the figures that lm-eval gives of a task."""
    found = {score.metric: score.value for score in scores if score.task == task}
    chosen = next((name for kind in _METRICS for name in found if name.startswith(kind)), None)
    require(chosen is not None, f"tasks = lm-eval:{task}: has no acc_norm, acc or exact_match; name another")
    return found[chosen or ""]


def _path(name: str) -> Path:
    """The file that defines a task, where one does."""
    return Path(name.removeprefix(QUESTIONS).removeprefix("lm-eval:"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
