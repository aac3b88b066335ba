"""The benchmark of ops: it finds them by itself, checks each form before timing it, and counts what they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from kernels import needs_kernels
from op_inputs import of_stream
from torch import Tensor

import longwave.ops
from longwave.benchmarks import ops
from longwave.benchmarks.measure.checks import check_form
from longwave.benchmarks.measure.memory import peak_memory
from longwave.benchmarks.measure.timing import Timing
from longwave.benchmarks.ops import OPS, OpsOptions, ops_options, run_ops
from longwave.benchmarks.results.results import Row
from longwave.costs import Peaks, visible_pairs
from longwave.errors import MachineError, UserError
from longwave.ops import compiled
from longwave.ops.attention import ATTENTION, CAUSAL, Attended, sdpa
from longwave.ops.benchmark import Case, forms_here
from longwave.ops.block_sparse import BLOCK_SPARSE
from longwave.ops.cross_entropy import reference
from longwave.ops.forms import Call, Form

SIZES = {"heads": 4, "kv_heads": 2, "head_size": 32, "hidden_size": 32, "vocab_size": 50}
OPTIONS = OpsOptions(contexts=(24,), batches=(2,), repeats=2, device="cpu", **SIZES)
PREFILL, DECODE = "attention prefill, forward", "attention decode, forward"
LINEAR = [f"decay_linear {use}" for use in ("prefill, forward", "prefill, forward + backward", "decode, forward")]
SPARSE_PREFILL, SPARSE_DECODE = (f"block_sparse {use}, 6 blocks of 8" for use in ("prefill", "decode"))
SPARSE = [f"{SPARSE_PREFILL}, forward", f"{SPARSE_PREFILL}, forward + backward", f"{SPARSE_DECODE}, forward"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    """Peaks that need no measuring, and a single copy of the inputs."""
    monkeypatch.setattr(ops, "measure_peaks", lambda *_: Peaks(bandwidth=1e9, flops=1e9))
    monkeypatch.setattr(ops, "_MOST_COPIES", 1)


def cases(name: str, **changes: Any) -> list[Case]:
    """The cases of one op at a small size."""
    options = replace(OPTIONS, **changes)
    return OPS[name](options.shape(options.contexts[0], options.batches[0]))


def rows_of(options: OpsOptions) -> dict[tuple[str, str], Row]:
    return {(row.quantity, row.subject): row for row in run_ops(options)[0].rows}


def test_every_op_with_a_benchmark_is_timed():
    packages = [module.name for module in iter_modules(longwave.ops.__path__, "longwave.ops.") if module.ispkg]
    assert {name.split(".")[-1] for name in packages if find_spec(f"{name}.benchmark")} == set(OPS)


def test_rows_hold_to_the_formulas():
    rows = rows_of(OPTIONS)
    both = "forward + backward"
    assert [quantity for quantity, form in rows if form == "torch"] == [
        *(PREFILL, f"attention prefill, {both}", DECODE),
        *("cross_entropy, forward", f"cross_entropy, {both}", *(f"linear 32 to {size}, forward" for size in (32, 50))),
        *LINEAR,
        *SPARSE,
    ]
    beside = [quantity for quantity, form in rows if form == "dense attention"]
    assert beside == [*LINEAR[:2], *SPARSE[:2]]
    pairs, recurrence = (rows[LINEAR[0], form].work.flops for form in ("dense attention", "torch"))
    assert (pairs, recurrence) == (4 * 4 * 32 * 2 * sum(range(1, 25)), 4 * 48 * 4 * 32 * 32)
    prefill, whole = rows[PREFILL, "torch"], rows[f"attention prefill, {both}", "torch"]
    assert prefill.work.flops == 4 * 4 * 32 * 2 * sum(range(1, 25))
    assert (whole.work.flops, whole.tokens) == (3 * prefill.work.flops, 48)
    decode = rows[DECODE, "torch"]
    assert (decode.work.flops, decode.work.bytes) == (4 * 4 * 32 * 2 * 24, 2 * 2 * 2 * 24 * 32 * 4)
    loss = rows["cross_entropy, forward", "torch"]
    assert loss.work.flops == 2 * 48 * 50 * 32
    head = rows["linear 32 to 50, forward", "torch"]
    assert (head.work.flops, head.work.bytes) == (2 * 2 * 50 * 32, 4 * 32 * (2 + 50))
    for row in rows.values():
        assert row.bound == max(row.work.flops / 1e9, row.work.bytes / 1e9)
        if row.subject == "dense attention":
            assert (row.error, row.checked) == (None, "another function")
            continue
        assert row.error is not None
        assert row.error < 1e-5
        assert row.checked == "all"
        assert row.peak_memory is not None
        assert row.peak_memory >= (row.tokens * 4 * 32 * 4 if "attention" in row.quantity else 4)  # at least the output


def test_what_no_context_changes_is_timed_once():
    found = run_ops(replace(OPTIONS, contexts=(5, 9), ops=("linear", "attention")))[0].rows
    found = [row for row in found if row.subject == "torch"]
    assert [row.context for row in found if row.quantity == "linear 32 to 32, forward"] == [1]
    assert [row.context for row in found if row.quantity == DECODE] == [5, 9]


def test_a_window_is_timed_beside_the_whole_past():
    rows = rows_of(replace(OPTIONS, ops=("attention",), window=5))
    windowed = rows["attention prefill, window 5, forward", "torch"]
    assert windowed.work.flops == 4 * 4 * 32 * 2 * visible_pairs(24, 5)
    assert rows["attention decode, window 5, forward", "torch"].work.flops == 4 * 4 * 32 * 2 * 5
    assert (PREFILL, "torch") in rows


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_block_sparse_attention_is_timed_where_it_chooses(dtype: Any):
    """Work of 60 tokens, of which twelve choose 6 of their 7 or 8 blocks, and of one token after 59."""
    rows = rows_of(replace(OPTIONS, contexts=(60,), ops=("block_sparse",), dtype=dtype))
    beside = set(product(SPARSE[:2], ["dense attention"]))
    forms = forms_here(BLOCK_SPARSE, replace(OPTIONS, dtype=dtype).shape(60, 2))
    assert {(quantity, form) for quantity, form in rows} == set(product(SPARSE, forms)) | beside
    seen = [t + 1 if t < 48 else 5 * 8 + t % 8 + 1 for t in range(60)]
    compared = [(t + 1 - 4) // 2 + 1 + (t + 1 - 16) // 8 + 1 for t in range(48, 60)]
    of_head = 2 * 4 * 32  # sequences, heads, head size
    assert rows[SPARSE[0], "torch"].work.flops == of_head * (4 * sum(seen) + 2 * sum(compared))
    assert rows[SPARSE[1], "torch"].work.flops == of_head * (12 * sum(seen) + 2 * sum(compared))
    decode = rows[SPARSE[2], "torch"].work
    assert decode.flops == of_head * (4 * seen[-1] + 2 * compared[-1])
    assert decode.bytes == 2 * 2 * 32 * (2 if dtype == "bf16" else 4) * (2 * seen[-1] + compared[-1])


def test_forms_and_passes_are_chosen():
    rows = rows_of(replace(OPTIONS, ops=("block_sparse",), forms=("torch",), backward=False))
    assert {quantity for quantity, _ in rows} == {SPARSE[0], SPARSE[2]}
    call = Call(torch.device("cpu"), torch.float32, 32)
    assert {form for _, form in rows} == {"torch", "dense attention", BLOCK_SPARSE.resolve(call)[0]}


def test_the_number_of_blocks_is_chosen():
    assert "64 blocks of 64" in cases("block_sparse", contexts=(4097,), blocks=64)[0].quantity
    with pytest.raises(UserError, match="blocks = 33: 34 or more"):
        replace(OPTIONS, blocks=33)


def test_long_contexts_are_timed_at_the_published_sizes():
    assert [case.quantity for case in cases("block_sparse", contexts=(6145,))] == [
        f"block_sparse {use}, 96 blocks of 64" for use in ("prefill", "decode")
    ]


@pytest.mark.parametrize(("tokens", "window"), [(7, None), (7, 3), (7, 9), (1, 1)])
def test_visible_pairs_are_those_of_a_mask(tokens: int, window: int | None):
    mask = torch.ones(tokens, tokens).tril()
    assert visible_pairs(tokens, window) == int((mask if window is None else mask - mask.tril(-window)).sum())


def test_a_form_that_is_registered_is_timed_against_the_one_that_models_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ATTENTION.forms, "other", Form(sdpa.attention, "another"))
    monkeypatch.setattr(
        ops, "_timed", lambda case, *_: {name: Timing((1.0 + (name == "other"),)) for name in case.forms}
    )
    rows = rows_of(replace(OPTIONS, ops=("attention",)))
    for quantity in (PREFILL, DECODE):
        assert [rows[quantity, form].ratio for form in ("torch", "other")] == [1.0, 2.0]


@needs_kernels
def test_compiled_forms_are_timed_where_they_apply():
    rows = rows_of(OPTIONS)
    of_compiled = [quantity for quantity, form in rows if form == "compiled"]
    assert of_compiled == [DECODE, "linear 32 to 32, forward", "linear 32 to 50, forward", *LINEAR, *SPARSE]
    assert [rows[DECODE, form].ratio == 1 for form in ("torch", "compiled")] == [False, True]


def test_without_kernels_only_torch_is_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "why_not", lambda: "no compiler")
    assert {row.subject for row in run_ops(replace(OPTIONS, ops=("attention",)))[0].rows} == {"torch"}


def late(query: Tensor, *rest: Any) -> Attended:
    """Right but for the last query of many, which is left at zero."""
    found = sdpa.attention(query, *rest).output
    return Attended(found if len(query) < 500 else torch.cat([found[:-1], torch.zeros_like(found[-1:])]))


def without_gradient(query: Tensor, key: Tensor, *rest: Any) -> Attended:
    """Right forward; the backward pass has forgotten the keys."""
    return sdpa.attention(query, key.detach() + 0 * key, *rest)


def blind(query: Tensor, key: Tensor, *rest: Any) -> Attended:
    """The first key is not seen."""
    hidden = torch.cat([key[:, :1] - 100 * key[:, :1].sign(), key[:, 1:]], dim=1)
    return sdpa.attention(query, hidden, *rest)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("form", "contexts", "part"),
    [(late, (300,), ""), (without_gradient, (24,), "gradient of input 2"), (blind, (24,), "")],
)
def test_a_wrong_form_is_named_and_nothing_is_timed(
    form: Callable[..., Attended], contexts: tuple[int], part: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(ATTENTION.forms, "wrong", Form(form, "wrong"))
    monkeypatch.setattr(ops, "interleaved", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(MachineError, match=f"attention prefill, form wrong: its {part}.*is off by"):
        run_ops(replace(OPTIONS, contexts=contexts, dtype=dtype))


def test_a_form_that_gives_no_numbers_is_wrong():
    case = cases("cross_entropy")[0]
    broken = replace(case, forms={"broken": lambda hidden, weight, targets: hidden.sum() * weight.sum() * torch.nan})
    with pytest.raises(MachineError, match="cross_entropy, form broken"):
        check_form(broken, "broken")


def test_many_rows_are_sampled_and_the_sample_is_the_reference():
    prefill = cases("attention", contexts=(300,))[0]
    assert prefill.rows is not None
    assert prefill.checked == f"{len(prefill.rows)} rows, all of 128 tokens"
    assert 599 in prefill.rows.tolist()
    inputs = [one.double() for one in prefill.inputs]
    laid = of_stream(*inputs[1:], (300, 300))
    whole = ATTENTION.forms["reference"].run(inputs[0], *laid, CAUSAL, 32**-0.5, ()).output
    torch.testing.assert_close(prefill.reference(*inputs), whole[prefill.rows], rtol=0, atol=1e-14)
    assert check_form(prefill, "torch") < 1e-5


def test_the_chunked_reference_is_the_whole_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("longwave.ops.cross_entropy.benchmark._CHUNK_ELEMENTS", 250)  # 5 rows at a time
    case = cases("cross_entropy")[0]
    hidden, weight = (one.double().requires_grad_() for one in case.inputs[:2])
    found, expected = case.reference(hidden, weight, case.inputs[2]), reference(hidden, weight, case.inputs[2], 1.0)
    torch.testing.assert_close(found, expected)
    for mine, right in zip(*(torch.autograd.grad(one, (hidden, weight)) for one in (found, expected)), strict=True):
        torch.testing.assert_close(mine, right)


def test_inputs_are_the_same_every_time_and_differ_from_each_other():
    for name in OPS:
        for one, again in zip(cases(name), cases(name), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one.inputs, again.inputs, strict=True))
    _, key, value = cases("attention")[0].inputs
    assert not torch.equal(key, value)
    assert not torch.equal(key, cases("attention", seed=1)[0].inputs[1])


def test_short_calls_run_over_many_copies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "_MOST_COPIES", 7)
    monkeypatch.setattr(ops, "seconds_of", lambda _: 1e-6)
    seen: list[int] = []
    case = cases("attention")[1]
    form: Any = lambda query, keys, values: seen.append(keys.data_ptr()) or query  # noqa: E731
    case = replace(case, forms={"torch": form})
    timing = ops._timed(case, ops._passes(case)[0], repeats=2)["torch"]
    assert (len(set(seen)), len(seen)) == (7, 21)  # one round warms up
    assert len(timing.seconds) == 2


def test_peak_memory_is_counted_to_the_byte():
    held = torch.zeros(1000)

    def task() -> Tensor:
        one, two = torch.empty(1 << 20), torch.empty(1 << 18)
        del one
        three = torch.empty(1 << 19)
        return held + three.new_empty(1000) + two.new_empty(1000)

    assert peak_memory(task, torch.device("cpu")) == 4 * ((1 << 20) + (1 << 18))


def test_memory_of_an_earlier_run_is_not_counted_when_it_is_released():
    kept: list[Tensor] = []

    def task() -> None:
        kept.append(torch.empty(1000))
        del kept[:-1]  # what the run before has left
        torch.empty(500)

    assert [peak_memory(task, torch.device("cpu")) for _ in range(3)] == [6000] * 3


def test_sizes_come_from_a_model_and_options_go_before_them(tmp_path):
    path = tmp_path / "model.toml"
    text = '[model]\nvocab_size = 61\nhidden_size = 32\nlayout = "2W"\n[model.mlp]\nsize = 48\n'
    path.write_text(f"{text}[model.window]\nsize = 9\n[model.attention]\nheads = 4\n")
    found = ops_options(path, {"head_size": 16})
    sizes = (found.heads, found.kv_heads, found.head_size, found.hidden_size, found.vocab_size, found.window)
    assert sizes == (4, 4, 16, 32, 61, 9)
    assert ops_options(None, {"heads": 6}).kv_heads == 6


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"heads": 7, "kv_heads": 3}, "kv_heads = 3 does not divide heads = 7"),
        ({"head_size": 0}, "head_size = 0: 1 or more"),
        ({"ops": ["flash"]}, "flash does not exist; use attention, cross_entropy"),
        ({"window": 0}, "window = 0"),
        ({"threads": 4096}, "threads = 4096: 1 to"),
        ({"dtype": "fp8"}, "dtype = 'fp8'"),
    ],
)
def test_mistakes_are_named(chosen: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says):
        ops_options(None, chosen)
