"""Block-sparse attention: its forms against each other, alone and in company, given blocks and with its own choice."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels import Calls, needs_kernels
from op_inputs import of_runs, of_stream
from sparse import (
    ERROR,
    PUBLISHED,
    SCALE,
    TINY,
    Peak,
    all_compressed,
    chosen,
    close,
    compressed,
    denominators,
    dtypes,
    fast_forms,
    forms,
    geometries,
    gqa,
    lists,
    normals,
    random,
)
from torch import Tensor

from longwave.ops.attention import attention
from longwave.ops.block_sparse import (
    Geometry,
    attend,
    block_sparse_attention,
    select,
    tiles,
)

# --- attention to given blocks ----------------------------------------------------------------------------------------


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
    close(found, attention(query, *of_runs([keys], [values], (90,)), scale=SCALE, form="reference").output)


@forms
def test_the_published_sizes_are_dense_up_to_6144_tokens(form):
    normal = normals(form)
    query, keys, values = normal(3, 2, 32), normal(1, 6144, 32, seed=1), normal(1, 6144, 32, seed=2)
    blocks = chosen(query, keys, PUBLISHED, form=form)
    assert torch.equal(blocks, torch.arange(96, dtype=torch.int32).expand(1, 3, 96))
    found = attend(query, keys, values, blocks, 6141, 64, scale=SCALE, form=form)
    close(found, attention(query, *of_runs([keys], [values], (3,)), scale=SCALE, form="reference").output)


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
        options["compressed"] = all_compressed(keys, geometry)
    outputs = [
        block_sparse_attention(query, *of_runs(keys, values, lengths), geometry, form=form, **options)
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
        found = block_sparse_attention(
            fast[0], *of_stream(*fast[1:], lengths), geometry, scale=size**-0.5, form="compiled"
        )
        gradients = torch.autograd.grad(found, fast, slope)
    assert {"block_sparse_select", "block_sparse_attend", "block_sparse_attend_backward"} <= set(calls.names)
    own = all_compressed([key.transpose(0, 1) for key in inputs[1].split(lengths)], geometry)
    rounded = replace(own, fine=own.fine.double(), coarse=own.coarse.double())
    laid, options = of_stream(*plain[1:], lengths), {"scale": size**-0.5, "compressed": rounded}
    right = block_sparse_attention(plain[0], *laid, geometry, **options, form="reference")
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
    laid = of_runs(keys, values, lengths)
    found = block_sparse_attention(query, *laid, geometry, scale=SCALE, form="compiled")
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
        laid = of_stream(*wanted[1:], (300,))
        output = block_sparse_attention(wanted[0], *laid, TINY, scale=SCALE, dense_below=-1, form="compiled")
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
    found = block_sparse_attention(query, *of_stream(key, value, lengths), TINY, scale=SCALE, form=form)
    alone = [
        block_sparse_attention(q, *of_stream(k, v, (len(q),)), TINY, scale=SCALE, form=form)
        for q, k, v in zip(*(one.split(lengths) for one in (query, key, value)), strict=True)
    ]
    close(found, torch.cat(alone))
    assert all(one is not None for one in torch.autograd.grad(found.sum(), (query, key, value)))


@fast_forms
@given(cuts=st.lists(st.integers(1, 119), max_size=4, unique=True))
def test_any_chunking_gives_the_same(form, cuts):
    normal = normals(form)
    query, keys, values = normal(120, 4, 32), normal(2, 120, 32, seed=1), normal(2, 120, 32, seed=2)
    whole = block_sparse_attention(query, *of_runs([keys], [values], (120,)), TINY, scale=SCALE, form=form)
    bounds = [0, *sorted(cuts), 120]
    pieces = [
        block_sparse_attention(
            query[start:stop],
            *of_runs([keys[:, :stop]], [values[:, :stop]], (stop - start,)),
            TINY,
            scale=SCALE,
            form=form,
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
    output = block_sparse_attention(query, *of_runs([keys], [values], (80,)), TINY, scale=SCALE, form=form)
    for place in range(0, 79, 1 if form != "reference" else 9):
        later = [one.clone() for one in (keys, values)]
        for one in later:
            one[:, place + 1 :] = 7 * normal(2, 79 - place, 32, seed=5)
        found = chosen(query, later[0], TINY, form=form)
        assert torch.equal(found[:, : place + 1], right[:, : place + 1])
        changed = block_sparse_attention(query, *of_runs(later[:1], later[1:], (80,)), TINY, scale=SCALE, form=form)
        close(changed[: place + 1], output[: place + 1])


@forms
def test_dense_below_counts_the_query_itself(form):
    """A query is dense while place + 1 < dense_below, and beyond only where its list holds all its blocks."""
    normal = normals(form)
    query, keys, values = normal(100, 4, 32), normal(2, 100, 32, seed=1), normal(2, 100, 32, seed=2)
    dense = attention(query, *of_runs([keys], [values], (100,)), scale=SCALE, form="reference").output
    for below, until in ((0, 48), (49, 48), (50, 49), (70, 69), (1000, 100)):
        found = block_sparse_attention(
            query, *of_runs([keys], [values], (100,)), TINY, scale=SCALE, dense_below=below, form=form
        )
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
    found = block_sparse_attention(
        query, *of_runs([keys], [values], (1,)), replace(PUBLISHED, topk=40), scale=SCALE, form=form
    )
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
    found = block_sparse_attention(query, *of_runs([keys], [values], (80,)), TINY, scale=SCALE, form=form)
    wide = query.repeat_interleave(16 // ratio, dim=1)
    repeated = block_sparse_attention(wide, *of_runs([keys], [values], (80,)), TINY, scale=SCALE, form=form)
    close(repeated.unflatten(1, (ratio, -1)).mean(2), found)
    assert torch.equal(chosen(wide, keys, TINY, form=form), chosen(query, keys, TINY, form=form))


@forms
def test_order_of_the_past_does_not_matter_while_dense(form):
    normal = normals(form)
    query, keys, values = normal(1, 4, 32), normal(2, 48, 32, seed=1), normal(2, 48, 32, seed=2)
    order = torch.randperm(47, generator=torch.Generator().manual_seed(3))
    found = block_sparse_attention(query, *of_runs([keys], [values], (1,)), TINY, scale=SCALE, form=form)
    moved = [torch.cat([one[:, order], one[:, 47:]], dim=1) for one in (keys, values)]
    close(block_sparse_attention(query, *of_runs(moved[:1], moved[1:], (1,)), TINY, scale=SCALE, form=form), found)


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
        with pytest.raises(AssertionError, match="compressed keys are missing"):
            select(query, *few, 58, TINY, scale=SCALE, form=form)
    with pytest.raises(AssertionError, match="keys of the last queries are missing"):
        attend(query, keys, keys, lists(2, 2, 59, 8, 3), 59, 8, scale=SCALE, form=form)
