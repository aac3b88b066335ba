"""Which blocks of keys a query sees: compression, scores and choice, in every form, as InfLLM-V2 promises it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse import (
    PUBLISHED,
    SCALE,
    TINY,
    Peak,
    chosen,
    close,
    compressed,
    denominators,
    fast_forms,
    forms,
    geometries,
    normals,
    random,
)
from torch import Tensor

from longwave.errors import UserError
from longwave.ops.block_sparse import (
    BLOCK_SPARSE,
    Geometry,
    attended_pairs,
    compress,
    compressed_count,
    reference,
    scored_pairs,
    select,
    tiles,
)

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
    assert {n: compressed_count(n, *PUBLISHED.fine) for n in fine} == fine
    assert {n: compressed_count(n, *PUBLISHED.coarse) for n in coarse} == coarse
    assert [compressed_count(t + 1, *PUBLISHED.fine) for t in (30, 31, 46, 47)] == [0, 1, 1, 2]


@pytest.mark.parametrize("geometry", [PUBLISHED, TINY, replace(TINY, init_blocks=0, local_blocks=0, topk=1)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 31, 130, 500])
def test_pairs_are_those_of_every_query(geometry: Geometry, tokens: int):
    """Counted one query at a time: its own keys, or of a full list all but those of its block that come later."""
    for below in (0, 60):
        dense = [t < max(geometry.topk * geometry.block_size, below - 1) for t in range(tokens)]
        size = geometry.block_size
        seen = [t + 1 if d else geometry.topk * size - (size - 1 - t % size) for t, d in enumerate(dense)]
        assert attended_pairs(tokens, geometry, below) == sum(seen)
        compared = [
            compressed_count(t + 1, *geometry.fine) + compressed_count(t + 1, *geometry.coarse) for t in range(tokens)
        ]
        assert scored_pairs(tokens, geometry, below) == sum(c for c, d in zip(compared, dense, strict=True) if not d)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_entries_are_the_means_of_their_windows(dtype):
    keys = random(2, 200, 8, dtype=dtype)
    for width, stride in (PUBLISHED.fine, PUBLISHED.coarse, TINY.fine):
        found = compress(keys, width, stride)
        right = keys.double().unfold(1, width, stride).mean(-1).to(dtype)
        assert found.dtype == dtype
        assert found.shape == (2, compressed_count(200, width, stride), 8)
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
            assert torch.equal(kept, whole[:, : compressed_count(end, width, stride)])
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
        query, *compressed(keys, TINY), torch.arange(61), 61, TINY, SCALE, denominator == "exact"
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
    count = compressed_count(tokens, 2 * stride, stride)
    for j in range(strides * (blocks - 1) - 1):
        raised = [b for b in range(blocks) if strides * b - 1 <= j <= strides * b + strides - 1]
        geometry = Geometry(2 * stride, stride, strides * stride, 0, 0, 1 + len(raised))
        fine = torch.zeros(1, count, 32)
        fine[:, j] = 1.0
        coarse = torch.zeros(1, compressed_count(tokens, *geometry.coarse), 32)
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
    for form in BLOCK_SPARSE.forms:
        assert not chosen(query, keys, TINY, form=form).requires_grad
    assert not compress(keys, 4, 2).requires_grad


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
