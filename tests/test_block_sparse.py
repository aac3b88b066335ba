"""Block-sparse attention: its forms against each other, and what InfLLM-V2's selection promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longwave.errors import UserError
from longwave.ops import compiled
from longwave.ops.attention import attention
from longwave.ops.block_sparse import (
    FORMS,
    Geometry,
    attend,
    attended_pairs,
    block_sparse_attention,
    choose,
    compress,
    reference,
    scored_pairs,
    select,
    tiles,
    windows,
)

PUBLISHED = Geometry(kernel_size=32, stride=16, block_size=64, init_blocks=1, local_blocks=32, topk=96)
TINY = Geometry(kernel_size=4, stride=2, block_size=8, init_blocks=1, local_blocks=2, topk=6)
SCALE = 0.3
HERE = [form for form in FORMS if form != "compiled" or compiled.is_available()]
forms = pytest.mark.parametrize("form", HERE)
fast_forms = pytest.mark.parametrize("form", [form for form in HERE if form != "reference"])
needs_kernels = pytest.mark.skipif(not compiled.is_available(), reason=f"no compiled kernels: {compiled.why_not()}")
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


def chosen(query: Tensor, keys: Tensor, geometry: Geometry, form: str = "torch", **options) -> Tensor:
    """The lists of queries that are the last of the keys."""
    first = keys.shape[1] - query.shape[0]
    return select(query, *compressed(keys, geometry), first, geometry, scale=SCALE, form=form, **options)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    stride, init, local = draw(st.integers(1, 4)), draw(st.integers(0, 2)), draw(st.integers(0, 3))
    block = stride * draw(st.integers(1, 5))
    return Geometry(2 * stride, stride, block, init, local, init + local + 1 + draw(st.integers(0, 4)))


# --- the sizes, and compression ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kernel_size": 48}, "kernel_size = 48: twice the stride, 32, would do"),
        ({"block_size": 40}, "block_size = 40: a multiple of the stride, 16, would do"),
        ({"topk": 33}, r"topk = 33: init_blocks \+ local_blocks \+ 1 = 34 or more"),
        ({"stride": 0}, "stride = 0: 1 or more"),
        ({"local_blocks": -1}, "local_blocks = -1: 0 or more"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused(changes: dict[str, int], says: str):
    with pytest.raises(UserError, match=says):
        replace(PUBLISHED, **changes)


def test_windows_are_counted_when_they_are_complete():
    """Published sizes: those of N keys, and those that a query at place t sees of t + 1."""
    fine = {31: 0, 32: 1, 47: 1, 48: 2}
    coarse = {127: 0, 128: 1, 191: 1, 192: 2}
    assert {n: windows(n, *PUBLISHED.fine) for n in fine} == fine
    assert {n: windows(n, *PUBLISHED.coarse) for n in coarse} == coarse
    assert [windows(t + 1, *PUBLISHED.fine) for t in (30, 31, 46, 47)] == [0, 1, 1, 2]


@pytest.mark.parametrize("geometry", [PUBLISHED, TINY, replace(TINY, init_blocks=0, local_blocks=0, topk=1)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 31, 130, 500])
def test_pairs_are_those_of_every_query(geometry: Geometry, tokens: int):
    """Counted one query at a time: its own keys, or of a full list all but those of its block that come later."""
    for below in (0, 60):
        dense = [t < max(geometry.topk * geometry.block_size, below - 1) for t in range(tokens)]
        size = geometry.block_size
        seen = [t + 1 if d else geometry.topk * size - (size - 1 - t % size) for t, d in enumerate(dense)]
        assert attended_pairs(tokens, geometry, below) == sum(seen)
        compared = [windows(t + 1, *geometry.fine) + windows(t + 1, *geometry.coarse) for t in range(tokens)]
        assert scored_pairs(tokens, geometry, below) == sum(c for c, d in zip(compared, dense, strict=True) if not d)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_entries_are_the_means_of_their_windows(dtype):
    keys = random(2, 200, 8, dtype=dtype)
    for width, stride in (PUBLISHED.fine, PUBLISHED.coarse, TINY.fine):
        found = compress(keys, width, stride)
        right = keys.double().unfold(1, width, stride).mean(-1).to(dtype)
        assert found.dtype == dtype
        assert found.shape == (2, windows(200, width, stride), 8)
        torch.testing.assert_close(found, right, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 16, 31, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_entries_made_as_keys_arrive_are_those_of_all_keys_to_the_bit(chunk: int, dtype: torch.dtype):
    """From the start of the first window that was not complete, in chunks of any size, at every length to 400."""
    keys = random(2, 400, 24, dtype=dtype)
    for width, stride in (PUBLISHED.fine, PUBLISHED.coarse):
        whole, kept = compress(keys, width, stride), keys[:, :0]
        for end in range(chunk, 401, chunk):
            kept = torch.cat([kept, compress(keys[:, kept.shape[1] * stride : end], width, stride)], dim=1)
            assert torch.equal(kept, whole[:, : windows(end, width, stride)])
            assert torch.equal(kept, compress(keys[:, :end].contiguous(), width, stride))


def test_the_layout_of_the_keys_changes_no_bit():
    keys = random(100, 3, 24, dtype=torch.float32).transpose(0, 1)
    assert torch.equal(compress(keys, 8, 2), compress(keys.contiguous(), 8, 2))


def block_scores(query: Tensor, keys: Tensor, place: int, geometry: Geometry, group: int, exact: bool) -> list[float]:
    """The scores of all blocks up to its own for the heads of one group of a query (H, K)."""
    heads = query.double().unflatten(0, (keys.shape[0], -1))[group]
    fine, coarse = (one[group].double() for one in compressed(keys, geometry))
    scores = reference._window_scores(heads, fine, coarse, place, geometry, SCALE, exact)
    return reference._block_scores(scores, place // geometry.block_size, geometry)


# --- selection --------------------------------------------------------------------------------------------------------


@fast_forms
@denominators
@given(
    geometry=geometries(),
    shape=st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    past=st.integers(0, 60),
    length=st.integers(1, 40),
)
def test_parity_with_reference_of_selection(form, denominator, geometry, shape, past, length):
    normal = normals(form)
    heads, groups = shape
    query, keys = normal(length, heads, 32), normal(groups, past + length, 32, seed=1)
    found, right = (chosen(query, keys, geometry, form=f, denominator=denominator) for f in (form, "reference"))
    assert found.dtype == torch.int32
    assert found.shape == right.shape
    for group, row in (found != right).any(-1).nonzero().tolist():
        assert form == "compiled", "in double precision, scores that are all but equal do not occur"
        scores = block_scores(query[row], keys, past + row, geometry, group, denominator == "exact")
        one, other = (sorted(scores[block] for block in lists[group, row].tolist()) for lists in (found, right))
        assert one == pytest.approx(other, rel=1e-5)


def test_reference_scores_are_the_formula_with_its_maximum_and_sum():
    """p_ij = exp(a_ij - M_i) / Z_i with M and Z of the coarse windows, written out with masks."""
    query, keys, place = random(4, 16), random(1, 61, 16, seed=1), 52
    fine, coarse = (one[0] for one in compressed(keys, TINY))
    found = reference._window_scores(query, fine, coarse, place, TINY, SCALE, exact=False)
    visible = torch.tensor([4 + 2 * j <= place + 1 for j in range(len(fine))])
    among = torch.tensor([16 + 8 * c <= place + 1 for c in range(len(coarse))])
    b = (SCALE * query @ coarse.T).masked_fill(~among, -math.inf)
    most = b.max(1, keepdim=True).values
    weights = (SCALE * query @ fine.T - most).exp() / (b - most).exp().sum(1, keepdim=True)
    close(torch.tensor(found, dtype=torch.float64), weights.sum(0)[visible])
    assert len(found) == int(visible.sum())


@denominators
def test_exact_weights_of_a_head_add_up_to_one(denominator):
    query, keys = random(61, 4, 16), random(2, 61, 16, seed=1)
    scores = tiles._window_scores(
        query, *compressed(keys, TINY), torch.arange(61), TINY, SCALE, denominator == "exact"
    ).clamp(min=0)
    sums = scores.sum(-1)[:, 20:]
    assert torch.allclose(sums, torch.full_like(sums, 2.0), atol=1e-12) == (denominator == "exact")
    assert denominator == "exact" or (sums > 4).all()


@forms
@pytest.mark.parametrize("strides", [1, 2, 3, 4, 8])
def test_a_window_raises_the_blocks_that_it_overlaps(form, strides):
    """One window stands out: exactly the blocks b with r b - 1 <= j <= r b + r - 1 lead, beside the query's own."""
    blocks, stride = 9, 4
    tokens = blocks * strides * stride
    count = windows(tokens, 2 * stride, stride)
    for j in range(strides * (blocks - 1) - 1):
        raised = [b for b in range(blocks) if strides * b - 1 <= j <= strides * b + strides - 1]
        geometry = Geometry(2 * stride, stride, strides * stride, 0, 0, 1 + len(raised))
        fine = torch.zeros(1, count, 32)
        fine[:, j] = 1.0
        coarse = torch.zeros(1, windows(tokens, *geometry.coarse), 32)
        found = select(torch.ones(1, 2, 32), fine, coarse, tokens - 1, geometry, scale=SCALE, form=form)
        assert found.flatten().tolist() == [*raised, blocks - 1]


@forms
def test_of_blocks_that_score_alike_the_one_before_is_taken(form):
    """Keys that repeat: all blocks score the same but the first, whose first window does not overlap another."""
    normal = normals(form)
    keys = normal(1, 8, 32).repeat(1, 20, 1)
    found = chosen(normal(1, 4, 32, seed=3), keys, replace(TINY, init_blocks=0, local_blocks=0, topk=5), form=form)
    assert found.flatten().tolist() in ([0, 1, 2, 3, 19], [1, 2, 3, 4, 19])
    alike = chosen(torch.zeros(1, 4, 32, dtype=torch.float64), keys, TINY, form=form)
    assert alike.flatten().tolist() == [0, 1, 2, 17, 18, 19]


@forms
@denominators
@pytest.mark.parametrize("block", [2, 4])
def test_without_a_coarse_window_the_first_blocks_are_taken(form, denominator, block):
    """Small blocks, so that queries choose before the first coarse window, of 16 keys, is complete."""
    geometry = Geometry(4, 2, block, 0, 0, 3)
    query, keys = 3 * normals(form)(24, 2, 32), normals(form)(1, 24, 32, seed=1)
    found = chosen(query, keys, geometry, form=form, denominator=denominator)
    assert torch.equal(found, chosen(query, keys, geometry, form="reference", denominator=denominator))
    early = [[0, 1, place // block] for place in range(3 * block, 15)]
    assert (found[0, 3 * block : 15].tolist() == early) == (denominator == "coarse")


@forms
def test_forced_blocks_are_there_for_every_query(form):
    normal = normals(form)
    query, keys = normal(150, 4, 32), normal(2, 150, 32, seed=1)
    for place, lists in enumerate(chosen(query, keys, TINY, form=form).transpose(0, 1).tolist()):
        own = place // 8
        for blocks in lists:
            found = [block for block in blocks if block >= 0]
            assert {0, *range(max(0, own - 2), own + 1)} <= set(found)
            assert found == sorted(set(found))
            assert len(found) == min(own + 1, 6)
            assert found[-1] == own
            assert blocks[len(found) :] == [-1] * (6 - len(found))


@forms
def test_the_published_sizes_force_34_blocks_and_leave_62(form):
    normal = normals(form)
    keys = normal(1, 64 * 130, 32, seed=1)
    lists = chosen(normal(2, 2, 32), keys, PUBLISHED, form=form)[0]
    assert (lists >= 0).all()
    for blocks in lists.tolist():
        forced = {0, *range(129 - 32, 130)}
        assert len(forced) == PUBLISHED.forced == 34
        assert forced <= set(blocks)
        assert len(set(blocks) - forced) == 62


@forms
def test_a_longer_list_keeps_the_shorter_one(form):
    normal = normals(form)
    query, keys = normal(100, 4, 32), normal(2, 100, 32, seed=1)
    lists = [chosen(query, keys, replace(TINY, topk=k), form=form) for k in range(4, 14)]
    for fewer, more in pairwise(lists):
        for short, long in zip(fewer.flatten(0, 1).tolist(), more.flatten(0, 1).tolist(), strict=True):
            assert set(short) <= set(long) | {-1}


@forms
def test_heads_of_a_group_share_a_list_in_any_order_and_groups_do_not(form):
    normal = normals(form)
    query, keys = normal(100, 6, 32), normal(2, 100, 32, seed=1)
    found = chosen(query, keys, TINY, form=form)
    assert torch.equal(chosen(query[:, [2, 0, 1, 4, 5, 3]], keys, TINY, form=form), found)
    assert not torch.equal(found[0], found[1])


@forms
def test_a_score_that_is_no_number_or_too_large_hides_no_forced_block(form):
    normal = normals(form)
    keys = normal(1, 120, 32)
    keys[0, 40] = torch.nan
    keys[0, 70] = 1e30
    for blocks in chosen(normal(1, 2, 32), keys, TINY, form=form).flatten(0, 1).tolist():
        assert blocks == sorted(set(blocks))
        assert {0, 12, 13, 14} <= set(blocks)


def test_selection_has_no_history():
    query, keys = random(60, 4, 16).requires_grad_(), random(2, 60, 16, seed=1).requires_grad_()
    for form in FORMS:
        assert not chosen(query, keys, TINY, form=form).requires_grad
    assert not compress(keys, 4, 2).requires_grad


class Calls(TorchDispatchMode):
    """The names of the kernels of ours that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "longwave":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class Peak(TorchDispatchMode):
    """The most elements that any one tensor made under it holds."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@fast_forms
def test_selection_keeps_to_its_budget_and_finds_the_same(form):
    normal = normals(form)
    query, keys = normal(700, 4, 32, dtype=torch.float32), normal(2, 700, 32, seed=1, dtype=torch.float32)
    fine, coarse = compressed(keys, TINY)
    right = chosen(query, keys, TINY, form="reference")
    for budget in (1, 100_000, 1 << 30):
        with Peak() as peak:
            found = select(query, fine, coarse, 0, TINY, scale=SCALE, budget=budget, form=form)
        assert torch.equal(found, right)
        assert peak.elements <= max(budget // 4, query.numel())


# --- attention to given blocks ----------------------------------------------------------------------------------------


def lists(groups: int, tokens: int, first: int, block_size: int, topk: int) -> Tensor:
    """Random lists (G, T, topk) of blocks up to a query's own, which is among them."""
    generator, found = torch.Generator().manual_seed(7), torch.full((groups, tokens, topk), -1, dtype=torch.int32)
    for row, own in ((row, (first + i) // block_size) for group in found for i, row in enumerate(group)):
        others = torch.randperm(own, generator=generator)[: topk - 1]
        row[: len(others) + 1] = torch.cat([others.sort().values, torch.tensor([own])])
    return found


@fast_forms
@given(
    shape=st.sampled_from([(4, 2), (3, 1), (2, 2), (16, 1)]),
    block_size=st.integers(1, 20),
    topk=st.integers(1, 5),
    past=st.integers(0, 40),
    length=st.integers(1, 30),
    sizes=st.sampled_from([(32, 32), (8, 5)]),
)
def test_parity_with_reference_of_given_blocks_forward_and_backward(form, shape, block_size, topk, past, length, sizes):
    normal = normals(form)
    heads, groups = shape
    query = normal(length, heads, sizes[0]).requires_grad_()
    keys, values = (normal(groups, past + length, size, seed=size).requires_grad_() for size in sizes)
    blocks, slope = lists(groups, length, past, block_size, topk), 0.1 * normal(length, heads, sizes[1], seed=9)
    outputs = [attend(query, keys, values, blocks, past, block_size, scale=SCALE, form=f) for f in (form, "reference")]
    close(*outputs)
    fast, plain = (torch.autograd.grad(output, (query, keys, values), slope) for output in outputs)
    for one, other in zip(fast, plain, strict=True):
        close(one, other)


@pytest.mark.parametrize("form", ["reference", "torch"])
@gqa
def test_gradcheck_of_given_blocks(form, heads, groups):
    query = random(5, heads, 4).requires_grad_()
    keys, values = (random(groups, 25, 4, seed=seed).requires_grad_() for seed in (1, 2))
    blocks = lists(groups, 5, 20, 4, 3)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(q, k, v, blocks, 20, 4, scale=SCALE, form=form), (query, keys, values)
    )


@fast_forms
def test_given_blocks_are_gathered_a_few_queries_at_a_time(form, monkeypatch: pytest.MonkeyPatch):
    normal = normals(form)
    monkeypatch.setattr(tiles, "budget_of", lambda device: 1 << 16)
    query, keys, values = normal(300, 4, 16), normal(2, 300, 16, seed=1), normal(2, 300, 16, seed=2)
    blocks, inputs = lists(2, 300, 0, 8, 6), [one.requires_grad_() for one in (query, keys, values)]
    with Peak() as peak:
        output = attend(*inputs, blocks, 0, 8, scale=SCALE, form=form)
        found = torch.autograd.grad(output.sum(), inputs)
    assert peak.elements <= query.numel()
    plain = attend(*inputs, blocks, 0, 8, scale=SCALE, form="reference")
    close(output, plain)
    for one, other in zip(found, torch.autograd.grad(plain.sum(), inputs), strict=True):
        close(one, other)


@forms
def test_all_blocks_are_dense_attention(form):
    normal = normals(form)
    query, keys, values = (normal(90, 4, 32), *(normal(2, 90, 32, seed=seed) for seed in (1, 2)))
    wide = replace(TINY, topk=12)
    blocks = chosen(query, keys, wide, form=form)
    assert all((row >= 0).sum() == place // 8 + 1 for place, row in enumerate(blocks[0]))
    found = attend(query, keys, values, blocks, 0, 8, scale=SCALE, form=form)
    close(found, attention(query, [keys], [values], (90,), scale=SCALE, form="reference"))


@forms
def test_the_published_sizes_are_dense_up_to_6144_tokens(form):
    normal = normals(form)
    query, keys, values = normal(3, 2, 32), normal(1, 6144, 32, seed=1), normal(1, 6144, 32, seed=2)
    blocks = chosen(query, keys, PUBLISHED, form=form)
    assert torch.equal(blocks, torch.arange(96, dtype=torch.int32).expand(1, 3, 96))
    found = attend(query, keys, values, blocks, 6141, 64, scale=SCALE, form=form)
    close(found, attention(query, [keys], [values], (3,), scale=SCALE, form="reference"))


# --- the whole op -----------------------------------------------------------------------------------------------------


@denominators
@given(
    runs=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 60)), min_size=1, max_size=4),
    shape=st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    geometry=geometries(),
    dense_below=st.integers(0, 60),
    kept=st.booleans(),
)
def test_parity_with_reference_on_ragged_runs_with_pasts(denominator, runs, shape, geometry, dense_below, kept):
    heads, groups = shape
    lengths = tuple(length for length, _ in runs)
    query = random(sum(lengths), heads, 32).requires_grad_()
    keys, values = ([random(groups, sum(run), 32, seed=seed).requires_grad_() for run in runs] for seed in (1, 2))
    options = {"scale": SCALE, "denominator": denominator, "dense_below": dense_below}
    if kept:
        options["compressed"] = [compressed(key, geometry) for key in keys]
    outputs = [
        block_sparse_attention(query, keys, values, lengths, geometry, form=form, **options)
        for form in ("torch", "reference")
    ]
    close(*outputs)
    slope, inputs = random(sum(lengths), heads, 32, seed=9), [query, *keys, *values]
    fast, plain = (torch.autograd.grad(output, inputs, slope, allow_unused=True) for output in outputs)
    for one, other in zip(fast, plain, strict=True):
        if one is not None and other is not None:
            close(one, other)
        else:
            assert all(part is None or not part.any() for part in (one, other))


@needs_kernels
@dtypes
@gqa
@pytest.mark.parametrize("size", [32, 64, 96, 128, 256])
def test_parity_with_reference_of_compiled_forward_and_backward(dtype, heads, groups, size):
    """Ragged runs of a stream, of which the gradients are those of the queries that choose: others are not ours."""
    lengths, geometry = (70, 0, 1, 151), replace(TINY, block_size=16, topk=4)
    inputs = [random(sum(lengths), heads, size, dtype=dtype)]
    inputs += [random(sum(lengths), groups, size, seed=seed, dtype=dtype) for seed in (1, 2)]
    slope = random(sum(lengths), heads, size, seed=9, dtype=dtype)
    slope[torch.cat([torch.arange(length) for length in lengths]) < 64] = 0
    fast, plain = ([one.to(kind).requires_grad_() for one in inputs] for kind in (dtype, torch.float64))
    with Calls() as calls:
        found = block_sparse_attention(*fast, lengths, geometry, scale=size**-0.5, form="compiled")
        gradients = torch.autograd.grad(found, fast, slope)
    assert {"block_sparse_select", "block_sparse_attend", "block_sparse_attend_backward"} <= set(calls.names)
    rounded = [
        tuple(one.double() for one in compressed(key.transpose(0, 1), geometry)) for key in inputs[1].split(lengths)
    ]
    runs = [[key.transpose(0, 1) for key in side.split(lengths)] for side in plain[1:]]
    right = block_sparse_attention(
        plain[0], *runs, lengths, geometry, scale=size**-0.5, compressed=rounded, form="reference"
    )
    close(found, right)
    for one, other in zip(gradients, torch.autograd.grad(right, plain, slope.double()), strict=True):
        close(one, other)


@needs_kernels
@dtypes
@given(
    runs=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 90)), min_size=1, max_size=4),
    shape=st.sampled_from([(4, 2), (3, 1), (5, 1), (32, 2)]),
    geometry=geometries(),
    threads=st.sampled_from([1, 3]),
)
def test_a_compiled_query_is_the_same_alone_to_the_bit(dtype, runs, shape, geometry, threads):
    """In company, in a chunk or as a single token, on any number of threads."""
    heads, groups = shape
    lengths = tuple(length for length, _ in runs)
    query = random(sum(lengths), heads, 32, dtype=dtype)
    keys, values = ([random(groups, sum(run), 32, seed=seed, dtype=dtype) for run in runs] for seed in (1, 2))
    torch.set_num_threads(threads)
    try:
        found = late_queries(query, keys, values, lengths, geometry)
    finally:
        torch.set_num_threads(1)
    for run, (piece, own) in enumerate(zip(found.split(lengths), query.split(lengths), strict=True)):
        for i in range(len(own)):
            seen = [[side[run][:, : runs[run][1] + i + 1]] for side in (keys, values)]
            assert torch.equal(piece[i], late_queries(own[i : i + 1], *seen, (1,), geometry)[0])


def late_queries(
    query: Tensor, keys: list[Tensor], values: list[Tensor], lengths: tuple[int, ...], geometry: Geometry
) -> Tensor:
    """What the kernels make of the queries that choose, zeros for those that ordinary attention takes."""
    found = block_sparse_attention(query, keys, values, lengths, geometry, scale=SCALE, form="compiled")
    places = torch.cat([torch.arange(k.shape[1] - n, k.shape[1]) for k, n in zip(keys, lengths, strict=True)])
    return found.masked_fill((places < geometry.topk * geometry.block_size)[:, None, None], 0)


@needs_kernels
def test_gradients_are_the_same_every_time_and_on_any_number_of_threads():
    inputs = [random(300, 4, 32, dtype=torch.bfloat16)]
    inputs += [random(300, 2, 32, seed=seed, dtype=torch.bfloat16) for seed in (1, 2)]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        wanted = [one.clone().requires_grad_() for one in inputs]
        output = block_sparse_attention(*wanted, (300,), TINY, scale=SCALE, dense_below=-1, form="compiled")
        found.append(torch.autograd.grad(output[48:].square().sum(), wanted))
    torch.set_num_threads(1)
    for others in found[1:]:
        assert all(torch.equal(one[48:], other[48:]) for one, other in zip(found[0], others, strict=True))


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 32), (torch.float32, 24), (torch.float32, 288)], ids=["fp64", "24", "288"]
)
def test_other_types_and_sizes_go_to_torch(dtype, size):
    query, keys, values = (random(70, 4, size), *(random(2, 70, size, seed=seed) for seed in (1, 2)))
    inputs = [one.to(dtype) for one in (query, keys, values)]
    blocks = lists(2, 70, 0, 8, 5)
    with Calls() as calls:
        found = chosen(inputs[0], inputs[1], TINY, form="compiled")
        mixed = attend(*inputs, blocks, 0, 8, scale=SCALE, form="compiled")
    assert calls.names == []
    assert torch.equal(found, chosen(inputs[0], inputs[1], TINY, form="torch"))
    close(mixed, attend(query, keys, values, blocks, 0, 8, scale=SCALE, form="reference"))


@needs_kernels
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(bad):
    query, keys, values = (random(100, 4, 32), *(random(2, 100, 32, seed=seed) for seed in (1, 2)))
    values[:, 3] = bad  # in the first block, which all see
    inputs = [one.float() for one in (query, keys, values)]
    found = attend(*inputs, chosen(inputs[0], inputs[1], TINY, form="compiled"), 0, 8, scale=SCALE, form="compiled")
    assert not found[3:].isfinite().any()


@forms
@gqa
@pytest.mark.parametrize("lengths", [(70,), (70, 70), (5, 0, 61), (0,), (0, 0)], ids=str)
def test_a_stream_is_its_runs(form, heads, groups, lengths):
    """Packed runs, as in training, are each alone; every input has a gradient even of nothing."""
    normal = normals(form)
    query = normal(sum(lengths), heads, 32).requires_grad_()
    key, value = (normal(sum(lengths), groups, 32, seed=seed).requires_grad_() for seed in (1, 2))
    found = block_sparse_attention(query, key, value, lengths, TINY, scale=SCALE, form=form)
    alone = [
        block_sparse_attention(q, [k.transpose(0, 1)], [v.transpose(0, 1)], (len(q),), TINY, scale=SCALE, form=form)
        for q, k, v in zip(*(one.split(lengths) for one in (query, key, value)), strict=True)
    ]
    close(found, torch.cat(alone))
    assert all(one is not None for one in torch.autograd.grad(found.sum(), (query, key, value)))


@fast_forms
@given(cuts=st.lists(st.integers(1, 119), max_size=4, unique=True))
def test_any_chunking_gives_the_same(form, cuts):
    normal = normals(form)
    query, keys, values = normal(120, 4, 32), normal(2, 120, 32, seed=1), normal(2, 120, 32, seed=2)
    whole = block_sparse_attention(query, [keys], [values], (120,), TINY, scale=SCALE, form=form)
    bounds = [0, *sorted(cuts), 120]
    pieces = [
        block_sparse_attention(
            query[start:stop], [keys[:, :stop]], [values[:, :stop]], (stop - start,), TINY, scale=SCALE, form=form
        )
        for start, stop in pairwise(bounds)
    ]
    close(torch.cat(pieces), whole)


@forms
def test_no_query_sees_the_future(form):
    """Every token after a place may change: neither lists nor outputs up to that place do."""
    normal = normals(form)
    query, keys, values = normal(80, 4, 32), normal(2, 80, 32, seed=1), normal(2, 80, 32, seed=2)
    right = chosen(query, keys, TINY, form=form)
    output = block_sparse_attention(query, [keys], [values], (80,), TINY, scale=SCALE, form=form)
    for place in range(0, 79, 1 if form != "reference" else 9):
        later = [one.clone() for one in (keys, values)]
        for one in later:
            one[:, place + 1 :] = 7 * normal(2, 79 - place, 32, seed=5)
        found = chosen(query, later[0], TINY, form=form)
        assert torch.equal(found[:, : place + 1], right[:, : place + 1])
        changed = block_sparse_attention(query, later[:1], later[1:], (80,), TINY, scale=SCALE, form=form)
        close(changed[: place + 1], output[: place + 1])


@forms
def test_dense_below_counts_the_query_itself(form):
    """A query is dense while place + 1 < dense_below, and beyond only where its list holds all its blocks."""
    normal = normals(form)
    query, keys, values = normal(100, 4, 32), normal(2, 100, 32, seed=1), normal(2, 100, 32, seed=2)
    dense = attention(query, [keys], [values], (100,), scale=SCALE, form="reference")
    for below, until in ((0, 48), (49, 48), (50, 49), (70, 69), (1000, 100)):
        found = block_sparse_attention(query, [keys], [values], (100,), TINY, scale=SCALE, dense_below=below, form=form)
        same = (found - dense).abs().amax((1, 2)) < 5 * ERROR[found.dtype]
        assert same[:until].all()
        assert not same[until:].any()


@forms
def test_a_planted_needle_is_found_and_dominates(form):
    normal = normals(form)
    keys, values = 0.1 * normal(1, 64 * 120, 32, seed=1), normal(1, 64 * 120, 32, seed=2)
    query = normal(1, 2, 32)
    place = 64 * 50 + 17
    keys[0, place] = 40 * query[0].sum(0) / query[0].sum(0).norm()
    query[:] = keys[0, place] / 10
    found = block_sparse_attention(query, [keys], [values], (1,), replace(PUBLISHED, topk=40), scale=SCALE, form=form)
    close(found[0], values[:, place].expand(2, -1))
    flat = keys.clone()
    flat[0, place] = 0
    lost = chosen(query, flat, replace(PUBLISHED, topk=35), form=form)
    assert 50 not in lost.flatten().tolist()


@forms
@pytest.mark.parametrize("ratio", [1, 4])
def test_a_ratio_equals_heads_repeated_to_16_and_averaged(form, ratio):
    normal = normals(form)
    query, keys, values = normal(80, ratio, 32), normal(1, 80, 32, seed=1), normal(1, 80, 32, seed=2)
    found = block_sparse_attention(query, [keys], [values], (80,), TINY, scale=SCALE, form=form)
    wide = query.repeat_interleave(16 // ratio, dim=1)
    repeated = block_sparse_attention(wide, [keys], [values], (80,), TINY, scale=SCALE, form=form)
    close(repeated.unflatten(1, (ratio, -1)).mean(2), found)
    assert torch.equal(chosen(wide, keys, TINY, form=form), chosen(query, keys, TINY, form=form))


@forms
def test_order_of_the_past_does_not_matter_while_dense(form):
    normal = normals(form)
    query, keys, values = normal(1, 4, 32), normal(2, 48, 32, seed=1), normal(2, 48, 32, seed=2)
    order = torch.randperm(47, generator=torch.Generator().manual_seed(3))
    found = block_sparse_attention(query, [keys], [values], (1,), TINY, scale=SCALE, form=form)
    moved = [torch.cat([one[:, order], one[:, 47:]], dim=1) for one in (keys, values)]
    close(block_sparse_attention(query, moved[:1], moved[1:], (1,), TINY, scale=SCALE, form=form), found)


@fast_forms
@pytest.mark.parametrize("past", [0, 60])
def test_bfloat16_is_close_to_the_fp64_reference(form, past):
    """Given the same lists; the choice itself is made in fp32 from bf16 inputs."""
    half = [random(70, 4, 32, dtype=torch.bfloat16)]
    half += [random(2, 70 + past, 32, seed=seed, dtype=torch.bfloat16) for seed in (1, 2)]
    exact = [one.double() for one in half]
    fine, coarse = compressed(half[1], TINY)
    found = select(half[0], fine, coarse, past, TINY, scale=SCALE, form=form)
    right = select(exact[0], fine.double(), coarse.double(), past, TINY, scale=SCALE, form="reference")
    assert torch.equal(found, right)
    got = attend(*half, found, past, 8, scale=SCALE, form=form)
    true = attend(*exact, found, past, 8, scale=SCALE, form="reference")
    assert got.dtype == torch.bfloat16
    assert (got.double() - true).abs().max() < 2e-2
    assert (got.double() - true).square().mean().sqrt() < 3e-3


@fast_forms
def test_no_queries_have_no_lists_and_no_outputs(form):
    keys = normals(form)(2, 60, 32)
    blocks = select(keys[:, :0].transpose(0, 1), *compressed(keys, TINY), 60, TINY, scale=SCALE, form=form)
    assert blocks.shape == (2, 0, 6)
    assert attend(keys[:, :0].transpose(0, 1), keys, keys, blocks, 60, 8, scale=SCALE, form=form).shape == (0, 2, 32)


@forms
def test_missing_windows_and_keys_are_noticed(form):
    query, keys = normals(form)(2, 2, 32), normals(form)(2, 60, 32)
    fine, coarse = compressed(keys, TINY)
    for few in ((fine[:, :-1], coarse), (fine, coarse[:, :-1])):
        with pytest.raises(AssertionError, match="windows of the last keys are missing"):
            select(query, *few, 58, TINY, scale=SCALE, form=form)
    with pytest.raises(AssertionError, match="keys of the last queries are missing"):
        attend(query, keys, keys, lists(2, 2, 59, 8, 3), 59, 8, scale=SCALE, form=form)


def test_an_unknown_form_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="block_sparse form 'flash9' does not exist; use one of reference, torch"):
        choose("flash9")
