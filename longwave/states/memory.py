"""The protocols of memory: `Memory`, by which a part speaks to its state, and `Store`, in which a state keeps it.

A part never speaks of slots: it appends, recalls and replaces once for the whole stream, wherever the entries lie
(extents here; pages or another server's pools behind the same protocol).

Legend: `T` tokens of the stream, `R` runs, `G` heads of an entry, `K` its size, `N` entries of an array.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from longwave.states.spec import StateSpec
from longwave.streams import Located, Places, Stream


@runtime_checkable
class Memory(Protocol):
    """The memory of one part for the stream at hand."""

    @property
    def places(self) -> Places:
        """Where the per-token entries of each run lie, those of the stream included."""
        ...

    @property
    def fresh(self) -> Bool[Tensor, " R"]:
        """Whether no token of a run's sequence has reached the part before."""
        ...

    def append(self, **entries: Shaped[Tensor, "T _G _K"]) -> tuple[Shaped[Tensor, "_G _N _K"], ...]:
        """Adds the stream's entries, and returns each array; run `r` has what lies at `places`.

        With a window that is at least every token that the stream's own can see.
        """
        ...

    def sum_up(
        self, name: str, of: str, make: Callable[[Float[Tensor, "G n K"]], Float[Tensor, "G m K"]]
    ) -> tuple[Float[Tensor, "G N K"], Located]:
        """Completes an array whose entries sum up tokens of the array `of`; that array, and where each run's lie.

        make: the entries of the tokens that exactly these sum up.
        """
        ...

    def recall(self, name: str) -> Tensor | None:
        """A per-sequence array as the newest token left it, zeros before the first; None where nothing is kept.

        It may be a view of the store, so it is not to be changed.
        """
        ...

    def replace(self, **arrays: Tensor) -> None:
        """Per-sequence arrays after the stream's tokens; those of an empty run are the ones that were recalled."""
        ...


class NoMemory:
    """A pass without a state: nothing came before, and nothing is kept."""

    def __init__(self, stream: Stream) -> None:
        self._runs = stream.runs

    @property
    def places(self) -> Places:
        bounds = self._runs.bounds
        return Places(bounds[:-1], bounds[1:])

    @property
    def fresh(self) -> Bool[Tensor, " R"]:
        return torch.ones(self._runs.count, dtype=torch.bool, device=self._runs.bounds.device)

    def append(self, **entries: Shaped[Tensor, "T _G _K"]) -> tuple[Shaped[Tensor, "_G T _K"], ...]:
        return tuple(entry.transpose(0, 1) for entry in entries.values())

    def sum_up(self, name: str, of: str, make: Callable[[Tensor], Tensor]) -> tuple[Tensor, Located]:
        raise LookupError("nothing is summed up without a state")

    def recall(self, name: str) -> None:
        return None

    def replace(self, **arrays: Tensor) -> None:
        return None


@runtime_checkable
class Store(Protocol):
    """Keeps what a group of parts remember that live on one level and see one window, a row for each sequence.

    Rows are numbered from 0; a sequence keeps its row whatever slot it stands in. Lengths change when a step closes, so
    a step that fails has happened nowhere.
    """

    specs: dict[str, StateSpec]
    window: int | None

    def __init__(
        self, specs: Mapping[str, StateSpec], rows: int, *, dtype: torch.dtype, device: torch.device
    ) -> None: ...

    def begin(self) -> None:
        """Ready for a step; one that was begun and not closed has not happened."""
        ...

    def memory(self, part: str, stream: Stream) -> Memory:
        """The memory of one part for a stream that continues sequences (`stream.continued` has their rows)."""
        ...

    def close(self, undone: Collection[int] = ()) -> None:
        """Counts the tokens of the step as remembered, but for those of the rows in `undone`."""
        ...

    def length(self, row: int) -> int:
        """Tokens that were ever appended and not cut off again."""
        ...

    def held(self, row: int) -> int:
        """Tokens that are still held."""
        ...

    def kept_before(self, row: int, place: int) -> int:
        """The number of remembered tokens that stand before a place of their sequence (see `StateSpec.places`)."""
        ...

    def view(self, part: str, name: str, row: int) -> Tensor:
        """The held entries (G, n, K) of a per-token array, or a per-sequence array."""
        ...

    def check_truncation(self, row: int, length: int) -> None:
        """ValueError if there are fewer tokens than `length`, or if what would be visible again is forgotten."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Forgets every token from `length` on."""
        ...

    def hold(self, row: int) -> None:
        """From now on `truncate` can return to any length not below the present one, except in what recurs."""
        ...

    def clear(self, row: int) -> None:
        """Makes a row ready for another sequence."""
        ...

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Makes the second row of each pair what the first is."""
        ...

    def extend(self, rows: int) -> None:
        """Makes room for so many rows in all."""
        ...

    def reserve(self, tokens: Mapping[int, int]) -> None:
        """Makes room for `tokens[row]` held tokens in all, so that appending moves nothing."""
        ...

    def save(self, row: int) -> Any:
        """A copy of what truncation could not bring back, for `load`; None where it brings back all."""
        ...

    def load(self, row: int, saved: Any, length: int) -> None:
        """Returns a row to where `save` was called, at `length` tokens."""
        ...

    def used_bytes(self, row: int) -> int:
        """Bytes of what later tokens can see: the declared formula."""
        ...

    def reserved_bytes(self, row: int | None = None) -> int:
        """Bytes allocated, for one row or in all."""
        ...
