"""The hot maths against plain twins: attention's forms, the chunked cross-entropy, rotary positions and RMSNorm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import of_runs, of_stream
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longwave.config import RotaryConfig
from longwave.layers.norm import RMSNorm
from longwave.layers.rotary import angles, rotate
from longwave.ops import cross_entropy as cross_entropy_op
from longwave.ops.attention import ATTENTION, Attended, Pattern, attention, sdpa
from longwave.ops.cross_entropy import cross_entropy, reference
from longwave.ops.forms import REFERENCE
from longwave.streams import Places, Runs

SCALE = 0.4
GQA = [(4, 4), (6, 2), (4, 1)]  # query heads and KV heads: ratios 1, 3 and all
FORMS = ATTENTION.forms_on(torch.device("cpu"), torch.float32, head_size=32)
every_form = pytest.mark.parametrize("form", FORMS)
fast_forms = pytest.mark.parametrize("form", [form for form in FORMS if form != REFERENCE])
gqa = pytest.mark.parametrize(("heads", "groups"), GQA, ids=["ratio 1", "ratio 3", "one KV head"])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(
        dtype
    )


def stream_of(lengths: tuple[int, ...], heads: int, groups: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Query (T, H, K), key and value (T, G, K) that want gradients."""
    total = sum(lengths)
    shapes = [(total, heads, size), (total, groups, size), (total, groups, size)]
    query, key, value = (random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    return query, key, value


def close(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# --- attention --------------------------------------------------------------------------------------------------------


def test_reference_is_softmax_over_the_visible_keys():
    """The reference against the formula written with one (L, N) mask, so that two independent texts agree."""
    lengths, past, window = (3, 0, 4), (2, 3, 5), 3
    query = random(7, 4, 8)
    keys = [random(2, p + n, 8, seed=1) for p, n in zip(past, lengths, strict=True)]
    values = [random(2, p + n, 8, seed=2) for p, n in zip(past, lengths, strict=True)]
    laid, pattern = of_runs(keys, values, lengths), Pattern(window)
    got = attention(query, *laid, pattern=pattern, scale=SCALE, form="reference").output.split(lengths)
    for run, (length, before) in enumerate(zip(lengths, past, strict=True)):
        if length == 0:
            continue
        place = torch.arange(before, before + length).unsqueeze(1)
        visible = (torch.arange(before + length) <= place) & (torch.arange(before + length) > place - window)
        for head in range(4):
            logits = SCALE * query.split(lengths)[run][:, head] @ keys[run][head // 2].T
            weights = logits.masked_fill(~visible, -math.inf).softmax(-1)
            close(got[run][:, head], weights @ values[run][head // 2])


@fast_forms
@gqa
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 5, 100])
@pytest.mark.parametrize(
    "lengths", [(4,), (1,), (9,), (5, 5), (3, 4, 5), (0, 3, 1), (1, 1, 1), (12, 0), (8, 2)], ids=str
)
def test_parity_with_reference_forward_and_backward(form, heads, groups, window, lengths):
    """Runs of the stream itself: lengths below, at and above the window, one of 0 and 1 among them."""
    query, key, value = stream_of(lengths, heads, groups)
    slope = random(sum(lengths), heads, 8, seed=9)
    laid, options = of_stream(key, value, lengths), {"pattern": Pattern(window), "scale": SCALE}
    outputs = [attention(query, *laid, **options, form=f).output for f in (form, "reference")]
    close(*outputs)
    fast, plain = (torch.autograd.grad(output, (query, key, value), slope) for output in outputs)
    for one, other in zip(fast, plain, strict=True):
        close(one, other)


@fast_forms
@gqa
@pytest.mark.parametrize("window", [None, 1, 4, 7])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize(("length", "past"), [(1, 0), (1, 5), (2, 5), (3, 3), (7, 1), (4, 20), (5, 0), (4, 3)])
def test_parity_with_reference_of_a_chunk_after_its_past(form, heads, groups, window, grad, length, past):
    """Head-major keys as a state holds them: a chunk, or a single token, behind a past."""
    query = random(length, heads, 8).requires_grad_(grad)
    key, value = (random(groups, past + length, 8, seed=seed).requires_grad_(grad) for seed in (1, 2))
    with torch.set_grad_enabled(grad):  # without gradients the CPU merges past and chunk by their log-sum-exp
        laid, options = of_runs([key], [value], (length,)), {"pattern": Pattern(window), "scale": SCALE}
        outputs = [attention(query, *laid, **options, form=f).output for f in (form, "reference")]
    close(*outputs)
    if grad:
        slope = random(length, heads, 8, seed=9)
        fast, plain = (torch.autograd.grad(output, (query, key, value), slope) for output in outputs)
        for one, other in zip(fast, plain, strict=True):
            close(one, other)


@fast_forms
@given(
    runs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=4),
    grad=st.booleans(),
    window=st.none() | st.integers(1, 12),
    shape=st.sampled_from(GQA),
)
def test_parity_with_reference_on_ragged_runs_with_pasts(form, runs, grad, window, shape):
    heads, groups = shape
    lengths = tuple(length for length, _ in runs)
    query = random(sum(lengths), heads, 8)
    keys, values = ([random(groups, sum(run), 8, seed=seed) for run in runs] for seed in (1, 2))
    with torch.set_grad_enabled(grad):
        laid, options = of_runs(keys, values, lengths), {"pattern": Pattern(window), "scale": SCALE}
        got = [attention(query, *laid, **options, form=f).output for f in (form, "reference")]
    close(*got)


@fast_forms
def test_long_runs_cross_the_kernels_own_tiles(form):
    """A chunk and a past that are longer than any block of torch's CPU kernel."""
    query, key, value = random(530, 2, 16), random(1, 1300, 16, seed=1), random(1, 1300, 16, seed=2)
    with torch.no_grad():
        laid = of_runs([key], [value], (530,))
        got = [attention(query, *laid, scale=SCALE, form=f).output for f in (form, "reference")]
    close(*got)


@every_form
@gqa
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("lengths", [(3,), (2, 2), (1, 4)], ids=str)
def test_gradcheck(form, heads, groups, window, lengths):
    inputs = stream_of(lengths, heads, groups, size=4)

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, *of_stream(k, v, lengths), pattern=Pattern(window), scale=SCALE, form=form).output

    assert torch.autograd.gradcheck(op, inputs)


@every_form
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("past", [0, 30])
def test_bfloat16_is_close_to_the_fp64_reference(form, window, past):
    options = {"pattern": Pattern(window), "scale": SCALE}
    query, key, value = random(20, 6, 16), random(2, 20 + past, 16, seed=1), random(2, 20 + past, 16, seed=2)
    half = [part.bfloat16() for part in (query, key, value)]
    with torch.no_grad():
        got = attention(half[0], *of_runs([half[1]], [half[2]], (20,)), **options, form=form).output
        exact = [part.double() for part in half]
        true = attention(exact[0], *of_runs([exact[1]], [exact[2]], (20,)), **options, form="reference").output
    assert got.dtype == torch.bfloat16
    close(got.double(), true, 2e-2)
    assert (got.double() - true).square().mean().sqrt() < 3e-3


def test_attention_of_nothing_is_nothing_and_keeps_the_graph():
    query, key, value = stream_of((0, 0), 4, 2)
    output = attention(query, *of_stream(key, value, (0, 0)), scale=SCALE).output
    assert output.shape == (0, 4, 8)
    assert all(g is not None for g in torch.autograd.grad(output.sum(), (query, key, value)))
    past = [random(2, 9, 8, seed=1)]
    for form in FORMS:
        assert attention(query, *of_runs(past, past, (0,)), scale=SCALE, form=form).output.requires_grad


# --- what attention tells beside its output ---------------------------------------------------------------------------


WANT = ("lse", "column_sums")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-5}  # sums are in fp32 or better
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def agree_on_all(found: Attended, right: Attended, dtype: torch.dtype) -> None:
    """Found in `dtype`, right in double precision from the same inputs."""
    close(found.output.double(), right.output, 3e-2 if dtype == torch.bfloat16 else TOLERANCE[dtype])
    for name in WANT:
        one, other = getattr(found, name), getattr(right, name)
        assert one.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(one.double(), other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@every_form
@dtypes
@settings(max_examples=15)
@given(
    runs=st.lists(st.tuples(st.sampled_from([0, 1, 1, 2, 9]), st.integers(0, 12)), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 12),
    shape=st.sampled_from(GQA),
    grad=st.booleans(),
)
def test_extras_after_a_past_are_those_of_the_reference(form, dtype, runs, window, shape, grad):
    """Single queries among the runs, which kernels take without gradients, and runs without any."""
    (heads, groups), lengths = shape, tuple(length for length, _ in runs)
    query = random(sum(lengths), heads, 32, dtype=dtype)
    keys, values = ([random(groups, sum(run), 32, seed=seed, dtype=dtype) for run in runs] for seed in (1, 2))
    options = {"pattern": Pattern(window), "scale": SCALE, "want": WANT}
    with torch.set_grad_enabled(grad):
        found = attention(query, *of_runs(keys, values, lengths), **options, form=form)
    exact = [[one.double() for one in side] for side in (keys, values)]
    right = attention(query.double(), *of_runs(*exact, lengths), **options, form=REFERENCE)
    agree_on_all(found, right, dtype)


@every_form
@dtypes
@gqa
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("lengths", [(9,), (5, 5), (3, 0, 5), (1, 1, 1), (0,), (0, 0)], ids=str)
def test_extras_of_a_stream_are_those_of_the_reference(form, dtype, heads, groups, window, lengths):
    query, key, value = (random(sum(lengths), n, 32, seed=n, dtype=dtype) for n in (heads, groups, groups))
    options = {"pattern": Pattern(window), "scale": SCALE, "want": WANT}
    found = attention(query, *of_stream(key, value, lengths), **options, form=form)
    exact = of_stream(key.double(), value.double(), lengths)
    agree_on_all(found, attention(query.double(), *exact, **options, form=REFERENCE), dtype)


@every_form
@torch.no_grad()
def test_nothing_is_told_that_nobody_wants(form):
    query, key, value = random(3, 4, 32), random(2, 9, 32, seed=1), random(2, 9, 32, seed=2)
    for laid in (of_runs([key], [value], (3,)), of_stream(*(one.transpose(0, 1)[:3] for one in (key, value)), (3,))):
        for want in [(), ("lse",), ("column_sums",), WANT]:
            found = attention(query, *laid, scale=SCALE, want=want, form=form)
            assert [name for name in WANT if getattr(found, name) is not None] == list(want)
            assert torch.equal(found.output, attention(query, *laid, scale=SCALE, form=form).output)


@fast_forms
@pytest.mark.parametrize("window", [None, 3])
def test_log_sums_have_the_gradients_of_the_reference(form, window):
    query, key, value = stream_of((4, 0, 5), 6, 2)
    laid, options = of_stream(key, value, (4, 0, 5)), {"pattern": Pattern(window), "scale": SCALE, "want": ["lse"]}
    found, right = (attention(query, *laid, **options, form=f).lse for f in (form, REFERENCE))
    slope = random(9, 6, seed=9)
    for one, other in zip(*(torch.autograd.grad(lse, (query, key), slope) for lse in (found, right)), strict=True):
        close(one, other)


@every_form
@dtypes
@pytest.mark.parametrize("length", [1, 5])
@torch.no_grad()
def test_two_halves_of_the_keys_merge_to_the_whole_by_their_log_sums(form, dtype, length):
    """As ring attention does (Liu et al. 2023): every query of a chunk against the keys before it, and the chunk."""
    query, (key, value) = random(length, 6, 32, dtype=dtype), random(2, 2, 20, 32, seed=1, dtype=dtype)
    half, options = 20 - length, {"scale": SCALE, "want": ["lse"], "form": form}
    before = Places(torch.zeros(length, dtype=torch.int64), torch.full((length,), half))
    halves = [
        attention(query, key, value, Runs.of([1] * length), before, **options),  # each alone, so that it sees all
        attention(query, key, value, Runs.of([length]), Places(torch.tensor([half]), torch.tensor([20])), **options),
    ]
    whole = attention(query, *of_runs([key], [value], (length,)), **options)
    total = torch.stack([one.lse for one in halves]).logsumexp(0)
    merged = sum((one.lse - total).exp().unsqueeze(-1) * one.output for one in halves)
    close(total, whole.lse, TOLERANCE[dtype])
    close(merged, whole.output.to(merged.dtype), 2e-2 if dtype == torch.bfloat16 else TOLERANCE[dtype])


@every_form
@dtypes
@pytest.mark.parametrize("window", [None, 4])
def test_column_sums_of_a_causal_run_add_up_to_its_queries(form, dtype, window):
    lengths, pasts = (9, 0, 1, 30), (0, 5, 12, 3)
    query = random(40, 6, 32, dtype=dtype)
    keys, values = ([random(2, sum(n), 32, dtype=dtype) for n in zip(lengths, pasts, strict=True)] for _ in range(2))
    key, value, runs, places = of_runs(keys, values, lengths)
    options = {"pattern": Pattern(window), "scale": SCALE, "want": ["column_sums"], "form": form}
    sums = attention(query, key, value, runs, places, **options).column_sums
    for length, (begin, end) in zip(lengths, places.spans, strict=True):
        close(sums[:, begin:end].sum(1), torch.full((6,), length, dtype=sums.dtype), 1e-4)
    close(sums.sum(1), torch.full((6,), 40.0, dtype=sums.dtype), 1e-4)  # so what belongs to no run has none


@pytest.mark.parametrize("held", [(5, 9, 3), (7, 7, 7), (1, 12)], ids=str)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("skips", [False, True])
def test_single_queries_of_runs_side_by_side_in_one_call(held: tuple[int, ...], window: int | None, skips: bool):
    """The form of decoding on a GPU: extents of one size, of which sequences fill different shares."""
    lengths, room = [int(run == 0 or not skips) for run in range(len(held))], 12
    begins = torch.arange(len(held)) * room + 3
    places, runs = Places(begins, begins + torch.tensor(held)), Runs.of(lengths)
    query = torch.randn(runs.tokens, 4, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, room * len(held) + 3, 8, dtype=torch.float64)
    found = sdpa.single_queries(query, key, value, runs, places, window, 0.3)
    options = {"pattern": Pattern(window), "scale": 0.3, "form": "reference"}
    right = attention(query, key, value, runs, places, **options).output
    torch.testing.assert_close(found, right, rtol=0, atol=1e-14)
    assert sdpa.single_queries(query, key, value, runs, Places(begins.flip(0), begins.flip(0) + 1), window, 0.3) is None


# --- cross-entropy ----------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most elements that any one tensor made under it holds."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


TARGETS = {
    "all count": lambda t: t,
    "some ignored": lambda t: torch.where(t % 3 == 0, -100, t),
    "none counts": lambda t: t * 0 - 100,
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 24], ids=["one row", "several rows", "all rows"])
def test_parity_with_reference_cross_entropy_forward_and_backward(targets, scale, chunk, monkeypatch):
    monkeypatch.setattr(cross_entropy_op, "_CHUNK_ELEMENTS", chunk)
    hidden, weight = random(11, 6).requires_grad_(), random(13, 6, seed=1).requires_grad_()
    wanted = TARGETS[targets](torch.arange(11) * 5 % 13)
    losses = [cross_entropy(hidden, weight, wanted, scale), reference(hidden, weight, wanted, scale)]
    close(*losses)
    fast, plain = (torch.autograd.grad(3 * loss, (hidden, weight)) for loss in losses)
    for one, other in zip(fast, plain, strict=True):
        close(one, other)
    assert (losses[0] == 0) == (targets == "none counts")


def test_parity_with_reference_cross_entropy_of_a_tied_head(monkeypatch):
    """The embedding gets its gradient from both of its uses."""
    monkeypatch.setattr(cross_entropy_op, "_CHUNK_ELEMENTS", 40)
    embedding, tokens = random(13, 6).requires_grad_(), torch.arange(11) * 5 % 13
    losses = [op(embedding[tokens].tanh(), embedding, tokens.roll(-1), 1.0) for op in (cross_entropy, reference)]
    close(*(torch.autograd.grad(loss, embedding)[0] for loss in losses))


@pytest.mark.parametrize(("one", "other"), [(True, False), (False, True)], ids=["hidden", "weight"])
def test_cross_entropy_when_one_side_is_frozen(one, other):
    hidden, weight = random(11, 6).requires_grad_(one), random(13, 6, seed=1).requires_grad_(other)
    targets = torch.arange(11)
    cross_entropy(hidden, weight, targets).backward()
    fast = (hidden if one else weight).grad
    close(fast, torch.autograd.grad(reference(hidden, weight, targets, 1.0), hidden if one else weight)[0])


def test_cross_entropy_gradcheck():
    inputs = random(5, 4).requires_grad_(), random(7, 4, seed=1).requires_grad_()
    targets = torch.tensor([0, 6, -100, 3, 3])
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, targets, 0.6), inputs)


def test_cross_entropy_in_bfloat16_is_close_to_the_reference():
    hidden, weight = (random(*shape).bfloat16().requires_grad_() for shape in ((40, 16), (50, 16)))
    targets = torch.arange(40)
    loss, true = cross_entropy(hidden, weight, targets), reference(hidden, weight, targets, 1.0)
    assert loss.dtype == torch.float32
    assert abs(loss.item() / true.item() - 1) < 5e-3
    for got, exact in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(true, (hidden, weight)), strict=True
    ):
        assert (got - exact).norm() < 2e-2 * exact.norm()


def test_cross_entropy_never_holds_the_full_logits(monkeypatch):
    monkeypatch.setattr(cross_entropy_op, "_CHUNK_ELEMENTS", 4 * 97)
    hidden, weight = random(64, 8).requires_grad_(), random(97, 8).requires_grad_()
    targets = torch.arange(64)
    with Peak() as chunked:
        cross_entropy(hidden, weight, targets).backward()
    with Peak() as whole:
        reference(hidden, weight, targets, 1.0).backward()
    assert whole.elements == 64 * 97
    assert chunked.elements == max(4 * 97, 97 * 8, 64 * 8)


def test_cross_entropy_makes_no_gradient_that_nobody_wants():
    hidden, weight = random(10, 8).requires_grad_(), random(97, 8).requires_grad_()
    products = []
    with torch.no_grad(), Products(products):
        cross_entropy(hidden, weight, torch.arange(10))
    assert len(products) == 1


class Products(TorchDispatchMode):
    """Notes every matrix product."""

    def __init__(self, products: list) -> None:
        super().__init__()
        self.products = products

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.products.append(func)
        return func(*args, **(kwargs or {}))


# --- rotary positions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 8, 64])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_rotary_against_complex_numbers_in_fp64(size, base):
    """Half-split pairs (i, i + K/2) are complex numbers, turned by exp(i position base^(-2i/K))."""
    positions = torch.tensor([0, 1, 2, 7, 100, 4095])
    heads = random(6, 3, size)
    turns = angles(RotaryConfig(base), positions, size)
    assert turns.dtype == torch.float32
    frequency = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    pairs = torch.complex(*heads.chunk(2, dim=-1)) * torch.exp(1j * torch.outer(positions.double(), frequency))[:, None]
    expected = torch.cat([pairs.real, pairs.imag], dim=-1)
    got = rotate(heads, turns.cos(), turns.sin())
    close(got[:4], expected[:4], 1e-5)
    close(got, expected, 5e-3)  # fp32 angles, as published models have them: 4095 is known to 2e-4
    exact = torch.outer(positions.double(), frequency)
    close(rotate(heads, exact.cos(), exact.sin()), expected)


def test_rotary_gradcheck_and_inverse():
    heads, turns = random(5, 2, 6).requires_grad_(), random(5, 3, seed=1)
    assert torch.autograd.gradcheck(lambda x: rotate(x, turns.cos(), turns.sin()), (heads,))
    close(rotate(rotate(heads, turns.cos(), turns.sin()), turns.cos(), -turns.sin()), heads)


def test_rotary_takes_a_gradient_of_any_memory_order():
    heads, turns = random(5, 2, 6).requires_grad_(), random(5, 3, seed=1)
    slope = random(2, 6, 5).permute(2, 0, 1)
    got = torch.autograd.grad(rotate(heads, turns.cos(), turns.sin()), heads, slope)[0]
    close(got, rotate(slope.contiguous(), turns.cos(), -turns.sin()))


def test_rotary_scores_depend_on_distance_alone():
    query, key = random(1, 1, 16), random(1, 1, 16, seed=1)

    def score(one: int, other: int) -> float:
        turned = []
        for part, place in ((query, one), (key, other)):
            turns = torch.outer(torch.tensor([float(place)]).double(), 100 ** (-torch.arange(8).double() / 8))
            turned.append(rotate(part, turns.cos(), turns.sin()))
        return (turned[0] * turned[1]).sum().item()

    assert score(3, 1) == pytest.approx(score(1003, 1001), abs=1e-11)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


# --- RMSNorm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
)
def test_rms_norm_against_the_formula(dtype, tolerance):
    norm = RMSNorm(64, 1e-5)
    norm.weight.data.uniform_(0.5, 2)
    norm, hidden = norm.to(dtype), random(9, 64, dtype=dtype) * 3
    exact = hidden.double()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    got = norm(hidden)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_rms_norm_reduces_in_fp32():
    """256 ones and a large channel: in bf16 their sum of squares would stand still at 256 and miss half."""
    hidden = torch.ones(1, 512, dtype=torch.bfloat16)
    assert RMSNorm(512, 0.0).bfloat16()(hidden).eq(1).all()
    hidden[:, 0] = 64  # 4096 + 511 ones, which bf16 rounds to 4096 one by one
    expected = (hidden.double() / hidden.double().square().mean().sqrt()).bfloat16()
    assert torch.equal(RMSNorm(512, 0.0).bfloat16()(hidden), expected)


def test_rms_norm_gradcheck():
    norm = RMSNorm(6, 1e-5).double()
    weight = norm.weight.detach().clone().mul_(1.3).requires_grad_()
    run = torch.func.functional_call
    assert torch.autograd.gradcheck(lambda x, w: run(norm, {"weight": w}, x), (random(3, 6).requires_grad_(), weight))
