"""The prepared data of a run: its training windows in their order, and the windows that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from longwave import draws
from longwave.data.packed import Batch, PackedTokens, WindowSampler
from longwave.data.prepared import PreparedInfo
from longwave.data.tokenizer import Tokenizer
from longwave.errors import require
from longwave.training.mix import MixOrder
from longwave.training.notes import FolderWindows, notes
from longwave.training.pose import with_jumps
from longwave.training.recipe import MixedFolder, Recipe


@dataclass(frozen=True)
class Source:
    """One prepared folder among a run's data. name: for people. share: of the training windows, 1 where it is alone."""

    name: str
    share: float
    info: PreparedInfo
    train: PackedTokens
    sampler: WindowSampler
    held_out: PackedTokens


class TrainingData:
    """The folders that a recipe names, opened and checked.

    tokenizer: the one that made the ids of all. sources: the folders, one or several. Raises UserError for data that
    are damaged, do not fit the model, or have different tokenizers.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, folders = recipe, recipe.data.folders
        self._order = MixOrder([one.share for one in folders]) if len(folders) > 1 else None
        shares = [1.0] if self._order is None else self._order.shares
        names = _names([one.folder for one in folders])
        infos = [_checked(one, recipe) for one in folders]
        self.tokenizer = Tokenizer.load(folders[0].folder)
        infos[0].require_tokenizer(self.tokenizer)
        _require_one_tokenizer(folders, infos)
        opened = enumerate(zip(names, shares, infos, folders, strict=True))
        self.sources = [_source(number, recipe, *facts) for number, facts in opened]

    def batch(self, positions: range) -> Batch:
        """The training windows at positions of the data order, laid end to end."""
        run, batch = self.recipe.training, self._laid(positions)
        return batch if run.pose is None else with_jumps(batch, run.pose, run.window, run.seed)

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step, which is counted from 0."""
        run = self.recipe.training
        first, size = step * run.batch_windows, run.micro_windows or run.batch_windows
        starts = range(first, first + run.batch_windows, size)
        return [self.batch(range(start, start + size)) for start in starts]

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError unless the data was made with this tokenizer."""
        self.sources[0].info.require_tokenizer(tokenizer)

    def mean(self, of_sources: Sequence[float]) -> float:
        """The mean of a figure over the folders, by their shares."""
        return sum(one.share * figure for one, figure in zip(self.sources, of_sources, strict=True))

    def words(self) -> str:
        """The folders by name, with their shares where there are several."""
        alone = len(self.sources) == 1
        return ", ".join(one.name if alone else f"{one.name} {one.share:.0%}" for one in self.sources)

    def notes(self) -> list[str]:
        """Lines for people about the data, and about settings that do less with them than they seem to."""
        of_folders = chain.from_iterable(one.train.notes() for one in self.sources)
        counted = [FolderWindows(one.name, one.share, len(one.train), len(one.held_out)) for one in self.sources]
        return [*of_folders, *notes(self.recipe, counted)]

    def _laid(self, positions: range) -> Batch:
        if self._order is None:
            return self.sources[0].train.batch(positions, self.sources[0].sampler)
        return _joined([self._window(position) for position in positions], positions)

    def _window(self, position: int) -> Batch:
        assert self._order is not None
        folder, place = self._order.at(position)
        return self.sources[folder].train.batch([place], self.sources[folder].sampler)


def _source(number: int, recipe: Recipe, name: str, share: float, info: PreparedInfo, mixed: MixedFolder) -> Source:
    run = recipe.training
    train = PackedTokens(mixed.folder, "train", run.window)
    # The first folder of a mix has the order that it has alone; the others have orders of their own.
    sampler = WindowSampler(len(train), draws.key(run.seed, number) if number else run.seed)
    return Source(name, share, info, train, sampler, PackedTokens(mixed.folder, "held_out", run.window, keep_last=True))


def _checked(mixed: MixedFolder, recipe: Recipe) -> PreparedInfo:
    info = PreparedInfo.read(mixed.folder)
    info.require_vocab(recipe.model.vocab_size)
    return info


def _names(folders: Sequence[str]) -> list[str]:
    """The last part of each folder's path; the paths themselves where two would be called alike."""
    last = [Path(folder).name for folder in folders]
    return last if len(set(last)) == len(last) else [str(folder) for folder in folders]


def _require_one_tokenizer(folders: Sequence[MixedFolder], infos: Sequence[PreparedInfo]) -> None:
    first = folders[0].folder
    for mixed, info in zip(folders, infos, strict=True):
        same = info.tokenizer == infos[0].tokenizer
        advice = f"has another tokenizer than {first}; prepare it with --tokenizer {first}"
        require(same, f"data.mix.folder = {mixed.folder}: {advice}")


def _joined(windows: Sequence[Batch], positions: range) -> Batch:
    """Windows of several folders laid end to end. Documents are numbered within their folders."""
    return Batch(
        tokens=torch.cat([one.tokens for one in windows]),
        targets=torch.cat([one.targets for one in windows]),
        runs=tuple(chain.from_iterable(one.runs for one in windows)),
        windows=tuple(chain.from_iterable(one.windows for one in windows)),
        samples=tuple(positions),
        documents=tuple(chain.from_iterable(one.documents for one in windows)),
    )
