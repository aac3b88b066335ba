"""The prepared data of a run: its training windows in their order, and the windows that are held out."""

from __future__ import annotations

from longwave.data.packed import Batch, PackedTokens, WindowSampler
from longwave.data.prepared import PreparedInfo
from longwave.data.tokenizer import Tokenizer
from longwave.training.notes import notes
from longwave.training.recipe import Recipe


class TrainingData:
    """The data that a recipe names, opened and checked.

    tokenizer: the one that made the ids. held_out: the windows for the held-out measure. Raises UserError for data that
    are damaged, or do not fit the model.
    """

    def __init__(self, recipe: Recipe) -> None:
        folder, run = recipe.data.folder, recipe.training
        self.recipe, self.info = recipe, PreparedInfo.read(folder)
        self.info.require_vocab(recipe.model.vocab_size)
        self.tokenizer = Tokenizer.load(folder)
        self.info.require_tokenizer(self.tokenizer)
        self._train = PackedTokens(folder, "train", run.window)
        self._sampler = WindowSampler(len(self._train), run.seed)
        self.held_out = PackedTokens(folder, "held_out", run.window, keep_last=True)

    def batch(self, positions: range) -> Batch:
        """The training windows at positions of the data order, laid end to end."""
        return self._train.batch(positions, self._sampler)

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step, which is counted from 0."""
        run = self.recipe.training
        first, size = step * run.batch_windows, run.micro_windows or run.batch_windows
        starts = range(first, first + run.batch_windows, size)
        return [self.batch(range(start, start + size)) for start in starts]

    def notes(self) -> list[str]:
        """Lines for people about the data, and about settings that do less with them than they seem to."""
        return [*self._train.notes(), *notes(self.recipe, len(self._train), len(self.held_out))]
