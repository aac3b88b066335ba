"""Keys and values of runs, laid out as ops take them: (key, value, runs, places)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longwave.streams import Places, Runs, Table

_GAP = 3  # entries between two runs


def of_stream(key: Tensor, value: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Runs, None]:
    """The stream's own keys and values (T, G, K), as projections give them, head-major."""
    return key.transpose(0, 1), value.transpose(0, 1), Runs.of(lengths, key.device), None


def of_runs(
    keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int]
) -> tuple[Tensor, Tensor, Runs, Places]:
    """Keys and values (G, n, K) of each run, its past included, as a state holds them.

    The last run lies first, and NaN lies around each, so that whoever reads what is not a run's own is found out.
    """
    device, spans, end = keys[0].device, list[tuple[int, int]](), 0
    for key in reversed(keys):
        begin, end = end + _GAP, end + _GAP + key.shape[1]
        spans.append((begin, end))
    begins, ends = torch.tensor(spans[::-1], device=device).T.contiguous()
    return _array(keys), _array(values), Runs.of(lengths, device), Places(begins, ends, spans[::-1])


def in_pages(
    keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int], size: int = 8
) -> tuple[Tensor, Tensor, Runs, Places]:
    """The same in pages of `size` entries that lie anywhere, each run from place 3 on, with NaN around."""
    counts = [-(-(_GAP + key.shape[1]) // size) for key in keys]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(len(keys)))
    tables = [Table(numbers.int().numpy()) for numbers in order.split(counts)]
    begins = torch.full((len(keys),), _GAP)
    places = Places(begins, begins + torch.tensor([key.shape[1] for key in keys]), None, tables, size)
    laid = []
    for side in (keys, values):
        array = side[0].new_full((side[0].shape[0], sum(counts) * size, side[0].shape[2]), torch.nan)
        for run, entries in enumerate(side):
            array[:, places.entries(run)] = entries
        laid.append(array)
    return laid[0], laid[1], Runs.of(lengths), places


def _array(entries: Sequence[Tensor]) -> Tensor:
    first = entries[0]
    gap = first.new_full((first.shape[0], _GAP, first.shape[2]), torch.nan)
    return torch.cat([*(part for entry in reversed(entries) for part in (gap, entry)), gap], dim=1)
