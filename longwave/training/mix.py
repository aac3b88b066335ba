"""The order in which windows come from several folders: each by its share, and known for any position by itself.

At every moment each folder has given its share of the windows, within one window. The order repeats after 10,000
windows, of which each folder gives a whole number, so a position tells its folder and its place there without a
history. Windows are scheduled by earliest deadlines, as products on one assembly line are (Steiner and Yeomans 1993,
"Level schedules for mixed-model, just-in-time processes").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longwave.errors import require

PERIOD = 10_000


class MixOrder:
    """Which folder gives the window at a position, and which of its windows that is.

    shares: of each folder, above 0; what counts is their ratio. Raises UserError for one that would give less than one
    window in 10,000.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares = [share / sum(shares) for share in shares]
        self._counts = np.array(_whole(self.shares, PERIOD))
        self._folders = _schedule(self._counts)
        self._places = np.empty(PERIOD, np.int64)
        for folder, count in enumerate(self._counts):
            self._places[self._folders == folder] = np.arange(count)

    def at(self, position: int) -> tuple[int, int]:
        """The number of the folder that gives the window at a position, and the place in that folder's own order."""
        period, place = divmod(position, PERIOD)
        folder = int(self._folders[place])
        return folder, int(period * self._counts[folder] + self._places[place])


def _whole(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total` in the ratio of the shares, by largest remainders."""
    exact = [share * total for share in shares]
    counts = [int(one) for one in exact]
    largest = sorted(range(len(shares)), key=lambda number: counts[number] - exact[number])
    for number in largest[: total - sum(counts)]:
        counts[number] += 1
    for number, count in enumerate(counts):
        given = f"data.mix: folder {number + 1} gives {shares[number]:.2g} of the windows"
        require(count > 0, f"{given}: at least one in {total:,} would do")
    return counts


def _schedule(counts: np.ndarray) -> np.ndarray:
    """The folder of each window of a period, in which each gives as many as its count.

    A folder may give its next window as soon as its quota (its share of the turns so far) is above what it gave, and
    has to before the quota is a whole window above that. Of those that may, the one with the earliest deadline does.
    """
    given, folders = np.zeros_like(counts), np.empty(PERIOD, np.int64)
    for turn in range(1, PERIOD + 1):
        # Whole numbers throughout: the quota is counts * turn / PERIOD.
        deadlines = np.where(given * PERIOD < counts * turn, -(-(given + 1) * PERIOD // counts), PERIOD + 1)
        folder = int(deadlines.argmin())
        folders[turn - 1] = folder
        given[folder] += 1
    return folders
