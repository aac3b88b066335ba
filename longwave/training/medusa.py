"""The objective of Medusa's heads: the tokens after the next one, from the hidden states of a frozen model.

The model reads text as at inference, without a gradient, in the run's precision. Head k (from 1) learns the token k
places beyond the next by cross-entropy, which counts 0.8 to the power of k (Medusa-1: Cai et al. 2024, arXiv
2401.10774, section 2.2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from longwave import files
from longwave.checkpoints import load
from longwave.checkpoints.located import WEIGHTS
from longwave.checkpoints.weights import WeightFiles
from longwave.data.packed import NO_TARGET, Batch, PackedTokens
from longwave.errors import UserError
from longwave.evaluation.held_out import batches
from longwave.machine import device_of
from longwave.medusa import Medusa, shifted, write_medusa
from longwave.model import Decoder
from longwave.training.data import TrainingData
from longwave.training.divergence import require_finite
from longwave.training.next_token import HELD_OUT
from longwave.training.objective import plain_backward
from longwave.training.recipe import Recipe, require_start

_RANKS = 10  # of a head's guesses whose accuracy is measured


class MedusaTraining:
    """Heads that learn on a frozen model (`training.objective.Objective`).

    checkpoint: the folder to go on from. Raises UserError for a model that does not fit the recipe or the data.
    """

    def __init__(self, recipe: Recipe, data: TrainingData, checkpoint: Path | None) -> None:
        if recipe.medusa is None or recipe.training.start_from is None:
            raise UserError(
                "medusa: heads are trained on a model; give [medusa], and the folder as training.start_from"
            )
        self._recipe, self._data, self._folder = recipe, data, recipe.training.start_from
        self.model = self._frozen(recipe)
        self.trained = Medusa(self.model, recipe.medusa).train()
        if checkpoint is not None:
            self._load(checkpoint)

    def weights(self) -> dict[str, Tensor]:
        """Every weight of the heads."""
        return self.trained.state_dict(keep_vars=True)

    def begin(self) -> None:
        """Nothing has to be made ready."""

    def set_step(self, step: int, seed: int) -> None:
        """Nothing follows from the step."""

    def targets(self, batch: Batch) -> int:
        """Number of tokens that have a next one."""
        return batch.predicted

    def step(self, logged: bool) -> _Step:
        """Begins a step."""
        return _Step(self)

    def evaluate(self) -> dict[str, Any]:
        """On held-out text: the loss, summed over the heads by their weights, and each one's share of right guesses."""
        found = self._measured(1)
        return {HELD_OUT: found.loss, "accuracy": [float(row[0]) for row in found.shares]}

    def write(self, folder: Path, facts: Mapping[str, str | int | float | None]) -> None:
        """Writes the heads alone."""
        told = {name: fact for name, fact in facts.items() if fact is not None}
        write_medusa(self.trained, folder, {"training": told} if told else None)

    def write_result(self, folder: Path, place: Path, facts: Mapping[str, str | int | float | None]) -> None:
        """Writes the heads with their measured accuracies, by which drafts are laid out as a tree."""
        ranks = min(_RANKS, self.model.config.vocab_size)
        shares = self._measured(ranks).shares
        self.trained.accuracies = tuple(tuple(round(float(one), 6) for one in row) for row in shares)
        self.write(folder, facts)

    def losses(self, batch: Batch) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """The summed loss of each head over a batch, the model's hidden states, and the targets of each head."""
        tokens, following, stream = batch.inputs(self.model.embed.weight.device)
        with torch.no_grad():
            hidden = self.model.hidden(tokens, replace(stream, outputs=None))
        heads = range(len(self.trained.heads))
        targets = [shifted(following, batch.runs, number + 1) for number in heads]
        return [self.trained.loss(number, hidden, targets[number]) for number in heads], hidden, targets

    def weighted(self, losses: list[Tensor]) -> Tensor:
        """The losses of the heads, each counted by its weight."""
        weight = self.trained.config.weight
        return torch.stack([weight ** (number + 1) * loss for number, loss in enumerate(losses)]).sum()

    def flops(self, batch: Batch) -> int:
        """FLOPs of a batch: the model's forward pass, and forward and backward of the heads."""
        read = sum(part.prefill_flops(length) for part in self.model.parts for length in batch.runs)
        return read + 3 * batch.predicted * self.trained.row_flops

    @torch.no_grad()
    def _measured(self, ranks: int) -> _Measured:
        """The loss and the accuracy of the first guesses of every head on the held-out text of all folders."""
        run, sources = self._recipe.training, self._data.sources
        found = [self._measured_on(one.held_out, run.evaluate_windows, ranks) for one in sources]
        shares = sum(one.share * its.shares for one, its in zip(sources, found, strict=True))
        assert isinstance(shares, Tensor)
        return _Measured(self._data.mean([one.loss for one in found]), shares)

    def _measured_on(self, data: PackedTokens, windows: int, ranks: int) -> _Measured:
        loss, rows = 0.0, 0
        right = torch.zeros(len(self.trained.heads), ranks, dtype=torch.float64)
        counts = torch.zeros(len(right), 1, dtype=torch.float64)
        for batch in batches(data, windows):
            losses, hidden, targets = self.losses(batch)
            loss, rows = loss + float(self.weighted(losses)), rows + batch.predicted
            for number, wanted in enumerate(targets):
                right[number] += self._right(number, hidden, wanted, ranks)
                counts[number] += int((wanted != NO_TARGET).sum())
        return _Measured(loss / max(rows, 1), right / counts.clamp(min=1))

    def _right(self, number: int, hidden: Float[Tensor, "T D"], wanted: Tensor, ranks: int) -> Float[Tensor, " ranks"]:
        """How often each of a head's first guesses is right; its logits are made for some rows at a time."""
        found = torch.zeros(ranks, dtype=torch.float64)
        for piece, targets in zip(hidden.split(256), wanted.split(256), strict=True):
            guesses = self.trained.logits_of(number, piece).topk(ranks).indices
            found += (guesses == targets.unsqueeze(1)).sum(0).cpu()
        return found

    def _frozen(self, recipe: Recipe) -> Decoder:
        """The model of `training.start_from`, which nothing changes."""
        device = device_of(recipe.training.device)
        model = load(self._folder, dtype=torch.float32, device=device, tokenizer=True)
        require_start(recipe.model, model.config, self._folder)
        require_finite(model, f"training.start_from = {self._folder}", "give another folder")
        if model.tokenizer is not None:
            self._data.require_tokenizer(model.tokenizer)
        return model.eval().requires_grad_(False)

    def _load(self, checkpoint: Path) -> None:
        with files.OpenFolder(checkpoint) as opened:
            saved = WeightFiles(opened, WEIGHTS)
            self.trained.load_state_dict(saved.load(saved.names()))


class _Measured(NamedTuple):
    """Figures on held-out text. shares: (K, ranks), how often each guess of each head is right."""

    loss: float
    shares: Tensor


class _Step:
    """The losses of one step (`training.objective.StepLoss`)."""

    def __init__(self, objective: MedusaTraining) -> None:
        self._objective, self._flops = objective, 0

    def backward(self, batch: Batch, targets: int) -> Tensor:
        """The losses of all heads by their weights, as this batch's share of the step's mean."""
        losses, _, _ = self._objective.losses(batch)
        self._flops += self._objective.flops(batch)
        return plain_backward(self._objective.weighted(losses) / targets)

    @property
    def flops(self) -> int:
        """FLOPs of the step."""
        return self._flops

    @property
    def figures(self) -> dict[str, list[float]]:
        """Nothing beside the loss."""
        return {}
