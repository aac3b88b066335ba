"""Contiguous head-major arrays that grow: where the CPU keeps what one part remembers of one sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from longwave.states.spec import StateSpec

_SMALLEST = 64


class Extents:
    """The per-token arrays of one part for one sequence, each (heads, capacity, size).

    `length` tokens were ever appended, of which those from `start` on are still held (all of them without a window).
    After `hold` at some length, a window forgets nothing that a return to that length, or to a later one, would need.
    """

    def __init__(self, spec: StateSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self.length = self.start = self.capacity = 0
        self._held_length: int | None = None
        self._arrays: dict[str, Tensor] = {}
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

    def view(self, name: str) -> Tensor:
        """The held part (heads, held, size) of one array."""
        return self._arrays[name][:, : self.held]

    def check_truncation(self, length: int) -> None:
        """ValueError if there are fewer tokens than `length`, or a window has forgotten what would be visible."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length {length} is outside the {self.length} tokens remembered")
        window = self.spec.window
        if window is not None and self.start > max(0, length - window + 1):
            raise ValueError(f"length {length} cannot be returned to: a window of {window} has forgotten it; snapshot")

    def truncate(self, length: int) -> None:
        """Forgets every token from `length` on."""
        self.check_truncation(length)
        self.length = length

    def hold(self) -> None:
        """From now on `truncate` can return to any length that is not below the present one."""
        self._held_length = self.length

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` held tokens in all, so that appending does not copy."""
        if tokens > self.capacity or not self._arrays:
            self._allocate(tokens)

    def _allocate(self, tokens: int) -> None:
        for name, entry in self.spec.per_token.items():
            array = torch.empty(entry.heads, tokens, entry.size, dtype=entry.dtype or self.dtype, device=self.device)
            if self.held:
                array[:, : self.held] = self.view(name)
            self._arrays[name] = array
        self.capacity = tokens

    def copy(self) -> Extents:
        """An independent copy of what is held."""
        other = Extents(self.spec, self.dtype, self.device)
        other.reserve(self.held)
        for name, array in other._arrays.items():
            array.copy_(self.view(name))
        other.length, other.start, other._held_length = self.length, self.start, self._held_length
        return other

    @property
    def used_bytes(self) -> int:
        """Bytes of what later queries can see: the declared formula."""
        return self.spec.bytes(self.length, self.dtype)

    @property
    def reserved_bytes(self) -> int:
        """Bytes allocated."""
        return sum(array.numel() * array.element_size() for array in self._arrays.values())

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
