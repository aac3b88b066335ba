"""The second stage of a conversion: every layer's new mixer learns the output of the mixer that it will replace.

The teacher reads text. At every layer the student's mixer gets the same input as the teacher's, and learns its output
by squared error (Hybrid Linear Attention, arXiv 2601.22156, stage 1). The teacher's own output is what flows on, so
layers learn independently of each other, all in one pass, and only one layer's activations exist at a time.

Legend: `T` tokens of the stream, `D` hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longwave import files
from longwave.checkpoints import native
from longwave.checkpoints.weights import WeightFiles, write
from longwave.conversion.heads import reorder_heads
from longwave.conversion.transfer import is_softmax, mixer_of, transferred
from longwave.data.packed import Batch
from longwave.errors import require
from longwave.model import Decoder
from longwave.part import Part
from longwave.streams import Stream
from longwave.training.data import TrainingData
from longwave.training.flops import trained_flops
from longwave.training.objective import plain_backward
from longwave.training.recipe import Recipe

Error = Literal["mse", "relative"]
MIXERS = "mixers.safetensors"
_MEASURED = 8  # held-out windows by which the variance of a layer's outputs is known, and a batch of an evaluation
Seen = Callable[[int, Float[Tensor, "T D"], Float[Tensor, "T D"]], None]


class _Pair(NamedTuple):
    """The mixer of a layer in the teacher, and the one that learns from it."""

    teacher: Part
    student: Part


class Alignment:
    """Mixers that learn the outputs of a teacher's (`training.objective.Objective`).

    teacher: stays as it is. recipe: its model has the mixers that learn, in all layers where softmax attention
    becomes something else. error: a layer's squared error, `mse` as published, or `relative` to the variance of its
    outputs, by which all layers count alike. orders: by layer, in which order its heads begin (`conversion.heads`).
    checkpoint: the folder to go on from. Raises UserError where the models do not belong together, or no layer is to
    learn.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        checkpoint: Path | None,
        *,
        teacher: Decoder,
        error: Error = "mse",
        orders: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self._recipe, self._data, self._error = recipe, data, error
        self.teacher = teacher.eval().requires_grad_(False)
        if teacher.tokenizer is not None:
            data.require_tokenizer(teacher.tokenizer)
        self.student = _student(teacher, recipe, orders or {})
        self._pairs = _pairs(teacher, self.student)
        require(bool(self._pairs), f"model.layout = {recipe.model.layout}: every layer keeps softmax; convert some")
        self.trained = nn.ModuleDict({str(depth): pair.student for depth, pair in self._pairs.items()})
        self.trained.train().requires_grad_(True)
        if checkpoint is not None:
            self._load(checkpoint)
        self._scales = dict.fromkeys(self._pairs, 1.0)
        if error == "relative":
            self._scales = {depth: max(fit.variance, 1e-30) for depth, fit in self._fits(_MEASURED).items()}

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers that learn."""
        return list(self._pairs)

    def weights(self) -> dict[str, Tensor]:
        """Every weight that learns, by its name in a folder of the student."""
        state = self.trained.state_dict(keep_vars=True)
        return {f"blocks.{depth}.mixer.{rest}": state[f"{depth}.{rest}"] for depth, _, rest in map(_parted, state)}

    def begin(self) -> None:
        """Nothing has to be made ready."""

    def set_step(self, step: int, seed: int) -> None:
        """Nothing follows from the step."""

    def targets(self, batch: Batch) -> int:
        """Number of tokens: every output is to be learned."""
        return batch.tokens.numel()

    def step(self, logged: bool) -> _Step:
        """Begins a step."""
        return _Step(self, logged)

    def evaluate(self) -> dict[str, Any]:
        """On held-out text: the mean error as `held_out_loss`, and each layer's R2, 1 for outputs learned perfectly.

        R2 is 1 - sum (y - y')^2 / sum (y - mean of y)^2, the mean being that of each channel.
        """
        found = self._fits(self._recipe.training.evaluate_windows)
        losses = [fit.error / self._scales[depth] for depth, fit in found.items()]
        return {"held_out_loss": sum(losses) / len(losses), "r2": [fit.r2 for fit in found.values()]}

    def write(self, folder: Path, facts: Mapping[str, str | int | float | None]) -> None:
        """Writes the mixers alone: all else is the teacher's."""
        write(self.weights(), folder / MIXERS)

    def write_result(self, folder: Path, place: Path, facts: Mapping[str, str | int | float | None]) -> None:
        """Writes a model folder in which all these layers are converted; students take their layers from it."""
        native.write_model(self.student, folder)
        self._data.tokenizer.save(folder)

    def outputs(self, batch: Batch, seen: Seen, learning: bool = False) -> None:
        """Gives the teacher a batch; tells of each layer its number, the teacher's output, and the student's.

        learning: whether the student's outputs are made with what a backward pass needs.
        """
        tokens, _, stream = batch.inputs(self.teacher.embed.weight.device)
        stream = replace(stream, outputs=None)
        with torch.no_grad(), self._watching(seen, self.student.passengers(stream), learning):
            self.teacher.hidden(tokens, stream)

    def flops(self, batch: Batch) -> int:
        """FLOPs of a batch: the teacher's forward pass, and forward and backward of the mixers that learn."""
        lengths = Counter(batch.runs)
        read = sum(many * part.prefill_flops(n) for part in self.teacher.parts for n, many in lengths.items())
        return read + sum(trained_flops(pair.student, lengths) for pair in self._pairs.values())

    def scale(self, depth: int) -> float:
        """What a layer's squared error is divided by."""
        return self._scales[depth]

    @contextmanager
    def _watching(self, seen: Seen, passengers: Mapping[str, Tensor], learning: bool) -> Iterator[None]:
        hooks = [
            pair.teacher.register_forward_hook(partial(_meet, pair.student, seen, passengers, learning))
            for pair in self._pairs.values()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _fits(self, windows: int) -> dict[int, _Fit]:
        """How well each layer does on the first windows (0 for all) that each folder of the data holds out."""
        found = {depth: _Fit() for depth in self._pairs}
        for source in self._data.sources:
            count = min(windows or len(source.held_out), len(source.held_out))
            for start in range(0, count, _MEASURED):
                batch = source.held_out.batch(range(start, min(start + _MEASURED, count)))
                self.outputs(batch, lambda depth, output, own: found[depth].add(output, own))
        return found

    def _load(self, checkpoint: Path) -> None:
        with files.OpenFolder(checkpoint) as opened, torch.no_grad():
            saved = WeightFiles(opened, MIXERS)
            tensors = saved.load(saved.names())
            for name, weight in self.weights().items():
                weight.copy_(tensors[name])


class _Step:
    """The losses of one step (`training.objective.StepLoss`)."""

    def __init__(self, alignment: Alignment, logged: bool) -> None:
        self._alignment, self._logged, self._flops = alignment, logged, 0
        self._losses = dict.fromkeys(alignment.layers, 0.0)

    def backward(self, batch: Batch, targets: int) -> Tensor:
        """The error of every layer, and its gradient, one layer after the other; the mean over layers is returned."""
        total = torch.zeros((), device=self._alignment.teacher.embed.weight.device)

        def learn(depth: int, output: Tensor, own: Tensor) -> None:
            nonlocal total
            squares = (own.float() - output.float()).square().mean(1).sum()
            error = squares / (self._alignment.scale(depth) * targets)
            loss = plain_backward(error / len(self._losses))
            if self._logged:
                self._losses[depth] += float(error.detach())
            total = total + loss

        self._alignment.outputs(batch, learn, learning=True)
        self._flops += self._alignment.flops(batch)
        return total

    @property
    def flops(self) -> int:
        """FLOPs of the step."""
        return self._flops

    @property
    def figures(self) -> dict[str, list[float]]:
        """The error of every layer, in order."""
        return {"errors": list(self._losses.values())} if self._logged else {}


class _Fit:
    """Sums by which outputs y' are compared with outputs y, channel by channel."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = self._squares = self._errors = torch.zeros((), dtype=torch.float64)

    def add(self, output: Float[Tensor, "T D"], own: Float[Tensor, "T D"]) -> None:
        """Counts the outputs of more tokens."""
        wanted, found = output.double().cpu(), own.double().cpu()
        self._count += len(wanted)
        self._sum = self._sum + wanted.sum(0)
        self._squares = self._squares + wanted.square().sum(0)
        self._errors = self._errors + (wanted - found).square().sum(0)

    @property
    def variance(self) -> float:
        """The mean over channels of the variance of the outputs y."""
        return float((self._squares / self._count - (self._sum / self._count).square()).mean())

    @property
    def error(self) -> float:
        """The mean squared error."""
        return float((self._errors / self._count).mean())

    @property
    def r2(self) -> float:
        """The share of the outputs' variance that is explained; negative where their mean would be nearer."""
        return 1 - self.error / max(self.variance, 1e-300)


@torch.no_grad()
def _meet(
    student: Part,
    seen: Seen,
    passengers: Mapping[str, Tensor],
    learning: bool,
    mixer: Part,
    inputs: tuple[Tensor, Stream, Any],
    output: Tensor,
) -> None:
    """A forward hook of the teacher's mixer: gives the student's the same input."""
    hidden, stream, _ = inputs
    with torch.set_grad_enabled(learning):
        own = student(hidden, stream.carrying(**passengers), None)
        seen(mixer.site.depth, output, own)


def _student(teacher: Decoder, recipe: Recipe, orders: Mapping[int, Sequence[int]]) -> Decoder:
    """The model whose mixers learn, which holds all else together with the teacher, so that it takes no memory."""
    student = transferred(teacher, recipe.model, recipe.training.seed)
    for depth, order in orders.items():
        reorder_heads(mixer_of(student.blocks[depth]), order)
    require(
        not student.brackets, f"model.layout = {recipe.model.layout}: levels are put in after the layers are aligned"
    )
    kept = {f"stack.layers.{depth}.mixer" for depth in _pairs(teacher, student)}
    theirs = dict(teacher.named_modules())
    for name, module in student.named_modules():
        if any(name == one or name.startswith(f"{one}.") for one in kept):
            continue
        for own in [key for key, weight in module.named_parameters(recurse=False) if weight is not None]:
            module.register_parameter(own, theirs[name].get_parameter(own))
    return student


def _pairs(teacher: Decoder, student: Decoder) -> dict[int, _Pair]:
    """The mixers of the layers in which softmax attention becomes something else."""
    both = zip(teacher.blocks, student.blocks, strict=True)
    changed = [(one, other) for one, other in both if is_softmax(one) and not is_softmax(other)]
    return {one.site.depth: _Pair(mixer_of(one), mixer_of(other)) for one, other in changed}


def _parted(name: str) -> tuple[str, str, str]:
    return name.partition(".")
