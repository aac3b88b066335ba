"""What the tests of compiled kernels share: whether there are any here, and which ones a call reaches."""

from __future__ import annotations

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from longwave.ops import compiled

needs_kernels = pytest.mark.skipif(not compiled.is_available(), reason=f"no compiled kernels: {compiled.why_not()}")


class Calls(TorchDispatchMode):
    """The names of the kernels of ours that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "longwave":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))
