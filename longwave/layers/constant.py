"""Fixed numbers of a model, such as the decays of its heads: neither learned nor saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Constant(nn.Module):
    """A vector of fixed numbers that moves to the model's device, but stays in double precision whatever its dtype."""

    value: Tensor

    def __init__(self, numbers: Sequence[float]) -> None:
        super().__init__()
        self._numbers = tuple(numbers)
        self.register_buffer("value", torch.tensor(self._numbers, dtype=torch.float64), persistent=False)

    def restore(self, device: torch.device) -> None:
        """Writes the numbers to a device; a model that was built on `meta` has only their shape until then."""
        self.value = torch.tensor(self._numbers, dtype=torch.float64, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Every `.to(...)` comes through here. Writing the numbers again undoes a rounding, and fills a `meta` vector.
        super()._apply(fn, recurse)
        self.restore(self.value.device)
        return self
