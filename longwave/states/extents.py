"""Contiguous head-major arrays that grow: where the CPU keeps what one part remembers of one sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longwave.states.spec import StateSpec

_SMALLEST = 64


class Extents:
    """The per-token arrays of one part for one sequence, each (heads, capacity, size), and its per-sequence arrays.

    `length` tokens were ever appended, of which those from `start` on are still held (all of them without a window).
    After `hold` at some length, a window forgets nothing that a return to that length, or to a later one, would need.
    """

    def __init__(self, spec: StateSpec, dtype: torch.dtype, device: torch.device) -> None:
        assert spec.window is None or not any(entry.sums_up for entry in spec.per_token.values())
        self.spec, self.dtype, self.device = spec, dtype, device
        self.length = self.start = self.capacity = 0
        self._held_length: int | None = None
        self._arrays: dict[str, Tensor] = {}
        self._summed_up = {name: 0 for name, entry in spec.per_token.items() if entry.sums_up}
        self._current: dict[str, Tensor] = {}  # never changed in place, so that copies can share it
        self.reserve(0)

    @property
    def held(self) -> int:
        """Tokens that are still held."""
        return self.length - self.start

    def append(self, **entries: Tensor) -> list[Tensor]:
        """Adds (heads, n, size) entries and returns each array's held part (heads, held, size), in the same order.

        With a window the result still holds every token that the n new ones can see.
        """
        count = next(iter(entries.values())).shape[1]
        self._make_room(count)
        begin, end = self.held, self.held + count
        for name, entry in entries.items():
            self._arrays[name][:, begin:end] = entry
        self.length += count
        return [self._arrays[name][:, :end] for name in entries]

    def sum_up(self, name: str, of: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Completes an array whose entries sum up tokens of array `of`, and returns it (heads, count, size).

        make: the entries (heads, n, size) of the tokens (heads, m, size) that exactly these sum up.
        """
        entry, begin = self.spec.per_token[name], self._summed_up[name]
        end = entry.count(self.length)
        if end > begin:
            tokens = self.view(of)[:, begin * entry.every : (end - 1) * entry.every + entry.width]
            self._arrays[name][:, begin:end] = make(tokens)
            self._summed_up[name] = end
        return self._arrays[name][:, :end]

    def recall(self, name: str) -> Tensor:
        """A per-sequence array as the newest token left it, zeros before the first one; not to be changed in place."""
        if name not in self._current:
            entry = self.spec.per_sequence[name]
            return torch.zeros(entry.shape, dtype=entry.of(self.dtype), device=self.device)
        return self._current[name]

    def replace(self, count: int, **arrays: Tensor) -> None:
        """Per-sequence arrays after `count` more tokens."""
        self._current |= arrays
        self.length += count

    def view(self, name: str) -> Tensor:
        """The held part (heads, count, size) of a per-token array."""
        entries = self._summed_up.get(name, self.held)
        return self._arrays[name][:, :entries]

    def check_truncation(self, length: int) -> None:
        """ValueError if there are fewer tokens than `length`, or what would be visible again is forgotten."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length {length} is outside the {self.length} tokens remembered")
        window = self.spec.window
        if window is not None and self.start > max(0, length - window + 1):
            raise ValueError(f"length {length} cannot be returned to: a window of {window} has forgotten it; snapshot")
        if self.spec.per_sequence and length not in (0, self.length):
            raise ValueError(f"length {length} cannot be returned to: a recurrent state has forgotten it; snapshot")

    def truncate(self, length: int) -> None:
        """Forgets every token from `length` on."""
        self.check_truncation(length)
        if length == 0:
            self._current = {}
        for name, complete in self._summed_up.items():
            self._summed_up[name] = min(complete, self.spec.per_token[name].count(length))
        self.length = length

    def hold(self) -> None:
        """From now on `truncate` can return to any length that is not below the present one, but for what recurs."""
        self._held_length = self.length

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` held tokens in all, so that appending does not copy."""
        if tokens > self.capacity or (self.spec.per_token and not self._arrays):
            self._allocate(tokens)

    def _allocate(self, tokens: int) -> None:
        for name, entry in self.spec.per_token.items():
            room, dtype = entry.count(tokens), entry.dtype or self.dtype
            array = torch.empty(entry.heads, room, entry.size, dtype=dtype, device=self.device)
            if self.held:
                kept = self.view(name)
                array[:, : kept.shape[1]] = kept
            self._arrays[name] = array
        self.capacity = tokens

    def copy(self) -> Extents:
        """An independent copy of what is held."""
        other = Extents(self.spec, self.dtype, self.device)
        other.reserve(self.held)
        for name, array in other._arrays.items():
            kept = self.view(name)
            array[:, : kept.shape[1]] = kept
        other.length, other.start, other._held_length = self.length, self.start, self._held_length
        other._summed_up, other._current = dict(self._summed_up), dict(self._current)
        return other

    @property
    def used_bytes(self) -> int:
        """Bytes of what later queries can see: the declared formula."""
        return self.spec.bytes(self.length, self.dtype)

    @property
    def reserved_bytes(self) -> int:
        """Bytes allocated."""
        return sum(array.nbytes for array in [*self._arrays.values(), *self._current.values()])

    def _make_room(self, count: int) -> None:
        window, idle = self.spec.window or 0, self._forgettable()
        needed = max(window, self.held - idle) + count
        if window and self.capacity > 4 * max(_SMALLEST, needed):  # a long prefill has left it too large
            self._forget(idle)
            self._allocate(max(_SMALLEST, self.held + count + window))
        if self.held + count <= self.capacity:
            return
        if window:
            self._forget(self._forgettable())
        if self.held + count + window // 2 > self.capacity:  # slack, so that a window moves once in window/2 tokens
            self.reserve(max(_SMALLEST, self.held + count + window, self.capacity + self.capacity // 2))

    def _forgettable(self) -> int:
        """How many of the oldest tokens no later query can see, nor one after a return to the length that is held."""
        if self.spec.window is None:
            return 0
        length = self.length if self._held_length is None else min(self.length, self._held_length)
        return max(0, length - self.spec.window - self.start)

    def _forget(self, count: int) -> None:
        """Drops the oldest `count` tokens by moving the rest to the front."""
        for name, array in self._arrays.items():
            kept = self.view(name)[:, count:].clone()
            array[:, : kept.shape[1]] = kept
        self.start += count
