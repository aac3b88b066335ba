"""Numbers of a model that are neither learned nor saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Constant(nn.Module):
    """A vector of fixed numbers: it moves with the model, but always stays in double precision."""

    value: Tensor

    def __init__(self, numbers: Sequence[float]) -> None:
        super().__init__()
        self._numbers = tuple(numbers)
        self.register_buffer("value", torch.tensor(self._numbers, dtype=torch.float64), persistent=False)

    def restore(self, device: torch.device) -> None:
        """Puts the numbers on a device; a model that was built without memory has none yet."""
        self.value = torch.tensor(self._numbers, dtype=torch.float64, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.restore(self.value.device)
        return self
