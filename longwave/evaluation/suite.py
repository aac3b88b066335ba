"""What a model is asked, by the names that people give: recall tasks, few-shot tasks, tasks of lm-eval.

| name | what it is |
|---|---|
| a family of recall tasks, such as `single`; `ruler` for seven of them | `recall.py` |
| `questions:FILE` | the recall family of one's own questions |
| `lm-eval:NAME` | a task of lm-eval, or a file that defines one |
| `synthetic`, or a file of rows with a label | `few_shot.py` |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longwave import trial
from longwave.data.recall import FAMILIES, RULER, Family, read_questions
from longwave.data.recall.questions import family_of_questions
from longwave.errors import require, shown, within
from longwave.evaluation.few_shot import SHOTS, FewShot, few_shot, named_task
from longwave.evaluation.harness import HarnessScore, harness_scores
from longwave.evaluation.recall import DEPTHS, SAMPLES, Recall, RecallAsked, default_lengths, recall
from longwave.evaluation.synthetic import NAME as SYNTHETIC
from longwave.evaluation.tasks import Task
from longwave.model import Decoder
from longwave.units import parse_sizes

ALL_OF_RULER, QUESTIONS, HARNESS = "ruler", "questions:", "lm-eval:"
Lengths = int | str | Sequence[int | str]


@dataclass(frozen=True)
class Asked:
    """The options of tasks; None where one was not given.

    shots, template, limit: of few-shot tasks. lengths, samples, depths: of recall tasks. seed: of both.
    """

    shots: int | None = None
    template: str | None = None
    limit: int | None = None
    lengths: Lengths | None = None
    samples: int | None = None
    depths: int | None = None
    seed: int | None = None

    def require_effect(self, few_shot: bool, from_file: bool, recall: bool, harness: bool) -> None:
        """UserError for an option that none of the tasks reads."""
        read = {
            "template": (from_file, "a file of rows"),
            "shots": (few_shot, "a few-shot task"),
            "limit": (few_shot or harness, "a few-shot task or one of lm-eval"),
            "seed": (few_shot or recall, "a task of longwave's"),
            "lengths": (recall, "a recall task"),
            "samples": (recall, "a recall task"),
            "depths": (recall, "a recall task"),
        }
        for name, (has_effect, of) in read.items():
            value = getattr(self, name)
            require(value is None or has_effect, f"{name} = {shown(value)}: has no effect without {of}; leave it out")


@dataclass(frozen=True)
class Suite:
    """Tasks that have been read and can be run on a model."""

    asked: Asked
    tasks: tuple[Task, ...]
    families: tuple[Family, ...]
    harness: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether no task was named."""
        return not (self.tasks or self.families or self.harness)

    def few_shot(self, model: Decoder) -> tuple[FewShot, ...]:
        """The outcome of each few-shot task."""
        shots, seed = SHOTS if self.asked.shots is None else self.asked.shots, self.asked.seed or 0
        return tuple(few_shot(model, task, shots=shots, seed=seed, limit=self.asked.limit) for task in self.tasks)

    def recall(self, model: Decoder) -> tuple[Recall, ...]:
        """The outcome of each family of recall tasks."""
        asked = self.recall_asked(model)
        return tuple(recall(model, family, asked) for family in self.families)

    def lm_eval(self, model: Decoder) -> tuple[HarnessScore, ...]:
        """The figures of each task of lm-eval."""
        return harness_scores(model, self.harness, self.asked.limit)

    def recall_asked(self, model: Decoder) -> RecallAsked:
        """What is asked of every family of recall tasks."""
        asked = self.asked
        lengths = default_lengths(model) if asked.lengths is None else sizes_of(asked.lengths, "lengths")
        samples = SAMPLES if asked.samples is None else asked.samples
        samples = trial.at_most(samples, max(DEPTHS, asked.depths or 0))
        depths = min(DEPTHS, samples) if asked.depths is None else asked.depths
        return RecallAsked(lengths, samples, depths, asked.seed or 0)


def sizes_of(given: Lengths, field: str) -> tuple[int, ...]:
    """Numbers of tokens from what people write: `512`, `"512,4k"`, or a list of them. field: named in errors."""
    several = [given] if isinstance(given, int | str) else given
    with within(f"{field} = {','.join(map(str, several))}"):
        return tuple(size for one in several for size in parse_sizes(str(one)))


def suite_of(names: Sequence[str | Path], asked: Asked) -> Suite:
    """The tasks of these names. Raises UserError for one that cannot be read, and for an option that none reads."""
    texts = [str(name) for name in names]
    families, others = list[Family](), list[str]()
    for name in texts:
        if name in (ALL_OF_RULER, *FAMILIES):
            families += [FAMILIES[one] for one in (RULER if name == ALL_OF_RULER else [name])]
        elif name.startswith(QUESTIONS):
            families.append(family_of_questions(read_questions(name.removeprefix(QUESTIONS))))
        else:
            others.append(name)
    repeated = next((one for place, one in enumerate(texts) if one in texts[:place]), None)
    require(repeated is None, f"tasks = {shown(repeated)}: named twice")
    harness = tuple(name.removeprefix(HARNESS) for name in others if name.startswith(HARNESS))
    labelled = [name for name in others if not name.startswith(HARNESS)]
    from_file = any(name != SYNTHETIC for name in labelled)
    asked.require_effect(bool(labelled), from_file, bool(families), bool(harness))
    tasks = tuple(named_task(name, asked.template, asked.seed or 0) for name in labelled)
    return Suite(asked, tasks, tuple(dict.fromkeys(families)), harness)
