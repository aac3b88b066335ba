"""Inputs, tolerances and watchers of the tests of block-sparse attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longwave.ops.block_sparse import BLOCK_SPARSE, Compressed, Geometry, compress, select
from longwave.ops.forms import REFERENCE
from longwave.streams import Located, Spans

PUBLISHED = Geometry(kernel_size=32, stride=16, block_size=64, init_blocks=1, local_blocks=32, topk=96)
TINY = Geometry(kernel_size=4, stride=2, block_size=8, init_blocks=1, local_blocks=2, topk=6)
SCALE = 0.3
HERE = BLOCK_SPARSE.forms_on(torch.device("cpu"), torch.float32, head_size=32)
forms = pytest.mark.parametrize("form", HERE)
fast_forms = pytest.mark.parametrize("form", [form for form in HERE if form != REFERENCE])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ERROR = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}  # of the largest entry, or of one
gqa = pytest.mark.parametrize(("heads", "groups"), [(4, 2), (16, 1), (3, 3), (12, 2)], ids=str)
denominators = pytest.mark.parametrize("denominator", ["coarse", "exact"])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def normals(form: str) -> Callable[..., Tensor]:
    """`random`, in the best type that a form has of its own."""
    return partial(random, dtype=torch.float32 if form == "compiled" else torch.float64)


def close(found: Tensor, right: Tensor) -> None:
    """Within what the type of `found` explains."""
    assert found.shape == right.shape
    if found.numel():
        error = (found.double() - right.double()).abs().max()
        assert error <= ERROR[found.dtype] * right.abs().max().clamp(min=1)


def compressed(keys: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    return compress(keys, *geometry.fine), compress(keys, *geometry.coarse)


def all_compressed(keys: Sequence[Tensor], geometry: Geometry) -> Compressed:
    """The windows of the keys of several runs, one run after the other."""
    (fine, fine_spans), (coarse, coarse_spans) = (
        _joined([compress(key, *size) for key in keys]) for size in (geometry.fine, geometry.coarse)
    )
    return Compressed(fine, Located(fine_spans), coarse, Located(coarse_spans))


def _joined(pieces: Sequence[Tensor]) -> tuple[Tensor, Spans]:
    ends = list(accumulate(piece.shape[1] for piece in pieces))
    return torch.cat(list(pieces), dim=1), list(zip([0, *ends], ends, strict=False))


def chosen(query: Tensor, keys: Tensor, geometry: Geometry, form: str = "torch", **options) -> Tensor:
    """The lists of queries that are the last of the keys."""
    first = keys.shape[1] - query.shape[0]
    return select(query, *compressed(keys, geometry), first, geometry, scale=SCALE, form=form, **options)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    stride, init, local = draw(st.integers(1, 4)), draw(st.integers(0, 2)), draw(st.integers(0, 3))
    block = stride * draw(st.integers(1, 5))
    return Geometry(2 * stride, stride, block, init, local, init + local + 1 + draw(st.integers(0, 4)))


def lists(groups: int, tokens: int, first: int, block_size: int, topk: int) -> Tensor:
    """Random lists (G, T, topk) of blocks up to a query's own, which is among them."""
    generator, found = torch.Generator().manual_seed(7), torch.full((groups, tokens, topk), -1, dtype=torch.int32)
    for row, own in ((row, (first + i) // block_size) for group in found for i, row in enumerate(group)):
        others = torch.randperm(own, generator=generator)[: topk - 1]
        row[: len(others) + 1] = torch.cat([others.sort().values, torch.tensor([own])])
    return found


class Peak(TorchDispatchMode):
    """The most elements that any one tensor made under it holds."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result
