"""Decay linear attention: its forms against each other and against what the recurrence has to give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longwave.ops.decay_linear import DECAY_LINEAR, chunked, decay_linear_attention
from longwave.streams import Runs

HEADS, SIZE = 4, 16
FORMS = DECAY_LINEAR.forms_on(torch.device("cpu"), torch.float64, SIZE)
LENGTHS = [1, 2, 63, 64, 65, 127, 200]
SLOPES = torch.tensor([[2.0 ** (-2 * head) for head in range(1, HEADS + 1)]], dtype=torch.float64)

every_decay = pytest.mark.parametrize("per_token", [False, True], ids=["constant", "per token"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens: int, per_token: bool = False, size: int = SIZE, seed: int = 0) -> tuple[Tensor, ...]:
    """Queries and keys of length 1, values, and log-decays."""
    q, k, v = (random(tokens, HEADS, size, seed=3 * seed + part) for part in range(3))
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    decay = -random(tokens, HEADS, seed=seed + 50).abs() * SLOPES if per_token else -SLOPES
    return q, k, v, decay


def run(given: tuple[Tensor, ...], lengths: tuple[int, ...], form: str = "torch", **more) -> tuple[Tensor, Tensor]:
    q, k, v, decay = given
    return decay_linear_attention(q, k, v, decay, Runs.of(lengths), scale=SIZE**-0.5, form=form, **more)


def parallel(given: tuple[Tensor, ...], scale: float = SIZE**-0.5) -> Tensor:
    """o_t = scale sum_{s <= t} exp(g_{s+1} + ... + g_t) (q_t . k_s) v_s, with the whole matrix of decays."""
    q, k, v, decay = given
    total = decay.expand(len(q), -1).cumsum(0)
    between = (total.unsqueeze(1) - total.unsqueeze(0)).exp()
    seen = torch.ones(len(q), len(q), dtype=torch.bool).tril().unsqueeze(2)
    weights = torch.einsum("thk,shk->tsh", q, k) * between.masked_fill(~seen, 0)
    return scale * torch.einsum("tsh,shv->thv", weights, v)


def far(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item() if one.numel() else 0.0


# --- checks 1 to 9 of the specification -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 16, 64, 1000])
@pytest.mark.parametrize("tokens", LENGTHS)
@every_decay
def test_check_1_recurrent_parallel_and_chunked_agree(
    per_token: bool, tokens: int, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    double = inputs(tokens, per_token)
    single = tuple(tensor.float() for tensor in double)
    assert far(run(double, (tokens,))[0], parallel(double)) <= 1e-10
    assert far(run(double, (tokens,), "reference")[0], parallel(double)) <= 1e-10
    assert far(run(single, (tokens,))[0], run(single, (tokens,), "reference")[0]) <= 1e-5
    final = run(double, (tokens,))[1]
    assert far(run(single, (tokens,))[1].double(), final) <= 2e-6 * final.abs().max().item()


@given(tokens=st.integers(0, 200), data=st.data(), per_token=st.booleans())
def test_check_2_pieces_through_a_memory_are_one_run(tokens: int, data: st.DataObject, per_token: bool):
    whole = inputs(tokens, per_token)
    cut = data.draw(st.integers(0, tokens))
    output, final = run(whole, (tokens,))
    before, after = (
        (*(x[rows] for x in whole[:3]), whole[3][rows] if per_token else whole[3])
        for rows in (slice(cut), slice(cut, None))
    )
    first, memory = run(before, (cut,))
    second, last = run(after, (tokens - cut,), states=memory)
    assert far(torch.cat([first, second]), output) <= 1e-10
    assert far(last, final) <= 1e-10


@pytest.mark.parametrize("slope", [0.84, 0.25, 2**-8])
def test_check_3_constant_inputs_make_a_geometric_sum(slope: float):
    ones, decay = torch.ones(500, 1, 1), torch.tensor([[-slope]])
    output, _ = decay_linear_attention(ones, ones, ones, decay, Runs.of([500]), scale=1.0)
    gamma, t = math.exp(decay.item()), torch.arange(500, dtype=torch.float64)
    assert torch.allclose(output.flatten().double(), (1 - gamma ** (t + 1)) / (1 - gamma), rtol=1e-6, atol=0)


@every_decay
def test_check_4_the_first_token_sees_itself_undecayed(per_token: bool):
    q, k, v, decay = inputs(70, per_token)
    expected = SIZE**-0.5 * (q[0] * k[0]).sum(-1, keepdim=True) * v[0]
    assert far(run((q, k, v, decay), (70,))[0][0], expected) <= 1e-14


@pytest.mark.slow
def test_check_6_a_memory_stays_bounded_over_a_hundred_thousand_steps():
    steps, slopes = 100_000, torch.tensor([[2.0**-8, 0.84, 0.5, 0.1]])
    ones = torch.ones(steps, HEADS, 1)
    output, final = decay_linear_attention(ones, ones, ones, -slopes, Runs.of([steps]), scale=1.0)
    bound = 1 / (1 - torch.exp(-slopes.double()))
    assert output.isfinite().all()
    assert (output.flatten(1).double() <= bound * (1 + 1e-5)).all()
    assert (final.flatten().double() <= bound.flatten() * (1 + 1e-5)).all()
    assert (final.flatten().double() >= bound.flatten() * (1 - 1e-4)).all()


@every_decay
@pytest.mark.parametrize("lengths", [(7,), (3, 0, 5), (1, 1)])
def test_check_7_gradients_are_right(per_token: bool, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Of query, key, value, the decays and the memory at the start, through outputs and the memory at the end."""
    monkeypatch.setattr(chunked, "CHUNK", 4)
    tokens = sum(lengths)
    learned = [*(x.requires_grad_() for x in inputs(tokens, per_token, size=3)), random(len(lengths), HEADS, 3, 3)]

    def op(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        return decay_linear_attention(q, k, v, decay, Runs.of(lengths), scale=0.7, states=states)

    assert torch.autograd.gradcheck(op, [*learned[:4], learned[4].requires_grad_()])


@every_decay
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4), span=st.sampled_from([64, 128, 2048]))
def test_forms_agree_forward_and_backward(per_token: bool, lengths: list[int], span: int):
    """Over ragged runs that are worked on in several spans; check 8's packed runs among them."""
    tokens, runs = sum(lengths), tuple(lengths)
    states, slope = random(len(runs), HEADS, SIZE, SIZE, seed=9), random(tokens, HEADS, SIZE, seed=8)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "SPAN", span)
        for form in FORMS:
            learned = [x.clone().requires_grad_() for x in (*inputs(tokens, per_token), states)]
            output, final = run(tuple(learned[:4]), runs, form, states=learned[4])
            total = (output * slope).sum() + (final * states).sum()
            found.append([output, final, *torch.autograd.grad(total, learned, allow_unused=True)])
    pairs = [pair for mine in found[1:] for pair in zip(mine, found[0], strict=True)]
    for one, other in pairs:
        if one is None or other is None:  # nothing but empty runs: decays are then not used
            assert not tokens
        else:
            assert far(one, other) <= 1e-9


@given(lengths=st.lists(st.integers(0, 100), min_size=2, max_size=5), per_token=st.booleans())
def test_check_8_packed_runs_are_the_runs_by_themselves(lengths: list[int], per_token: bool):
    each = [inputs(length, per_token, seed=run_) for run_, length in enumerate(lengths)]
    packed = tuple(torch.cat(parts) for parts in zip(*each, strict=True))
    packed = packed if per_token else (*packed[:3], each[0][3])
    output, finals = run(packed, tuple(lengths))
    for mine, final, one, length in zip(output.split(lengths), finals, each, lengths, strict=True):
        alone, memory = run(one, (length,))
        assert far(mine, alone) <= 1e-12
        assert far(final, memory[0]) <= 1e-12


def test_check_8_a_run_without_tokens_leaves_its_memory_untouched():
    """Padding after a prompt is no token here: it neither decays nor updates."""
    states = random(3, HEADS, SIZE, SIZE)
    for lengths in [(0, 5, 0), (0, 1, 0), (0, 0, 0)]:
        with torch.no_grad():
            _, finals = run(inputs(sum(lengths)), lengths, states=states)
        assert torch.equal(finals[0], states[0])
        assert torch.equal(finals[2], states[2])


def test_check_9_low_precision_over_a_long_sequence():
    tokens = 32768
    exact = inputs(tokens, size=SIZE)
    low = tuple(x.bfloat16() for x in exact[:3])
    expected, memory = run((*(x.double() for x in low), exact[3]), (tokens,))
    output, final = run((*low, exact[3]), (tokens,))
    assert output.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    # Each head by itself: fast ones read what few tokens have added, slow ones the sum of thousands.
    for found, right, bound in ((output, expected, 2e-3), (final, memory, 1e-5)):
        off, size = ((one.transpose(0, 1).flatten(1).norm(dim=1)) for one in (found.double() - right, right))
        assert (off / size).max() <= bound


# --- what else is promised --------------------------------------------------------------------------------------------


def test_single_tokens_in_company_are_one_step_each():
    given, states = inputs(5), random(5, HEADS, SIZE, SIZE)
    with torch.no_grad():
        stepped = run(given, (1,) * 5, states=states)
    recurred = run(given, (1,) * 5, "reference", states=states)
    for one, other in zip(stepped, recurred, strict=True):
        assert far(one, other) <= 1e-12


@pytest.mark.parametrize("decay", [-1e4, -700.0, 0.0])
def test_no_decay_is_too_fast_or_too_slow(decay: float):
    q, k, v, _ = (x.float() for x in inputs(200))
    fast = torch.full((1, HEADS), decay)
    output, final = run((q, k, v, fast), (200,))
    assert output.isfinite().all()
    assert final.isfinite().all()
    if decay < -100:
        assert far(output, SIZE**-0.5 * (q * k).sum(-1, keepdim=True) * v) <= 1e-4


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            self.elements = max(self.elements, one.numel() if isinstance(one, Tensor) else 0)
        return made


def test_no_tensor_is_larger_than_the_inputs():
    """Never tokens times tokens, and the products within chunks exist for one span at a time."""
    tokens = 16384
    learned = [x.float().requires_grad_() for x in inputs(tokens)]
    with Largest() as largest:
        output, _ = run(tuple(learned), (tokens,))
        torch.autograd.grad(output.sum(), learned)
    assert largest.elements <= tokens * HEADS * SIZE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_memory_in_low_precision_is_refused(dtype: torch.dtype):
    states = torch.zeros(1, HEADS, SIZE, SIZE, dtype=dtype)
    low = tuple(x.to(dtype) for x in inputs(3))
    with pytest.raises(ValueError, match=f"states.dtype = {dtype}: torch.float32 or wider"):
        run(low, (3,), states=states)
