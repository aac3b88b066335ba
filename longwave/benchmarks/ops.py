"""`longwave bench ops`: times every op in each of its forms, forward and backward, after a check against its reference.

To time a new op, write a `benchmark.py` with its cases (`longwave.ops.benchmark`) beside it and add a line to `OPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longwave import planning
from longwave.benchmarks.measure.checks import check_form
from longwave.benchmarks.measure.memory import peak_memory
from longwave.benchmarks.measure.profile import Profiler, Traced
from longwave.benchmarks.measure.roofline import measure_peaks
from longwave.benchmarks.measure.timing import Timing, interleaved, seconds_of, swift_collections
from longwave.benchmarks.results.results import Options, Results, Row, against, hardware
from longwave.config import build
from longwave.costs import Peaks, Work
from longwave.errors import require
from longwave.machine import device_of, dtype_of
from longwave.ops.attention import benchmark as attention
from longwave.ops.benchmark import WHOLE, Case, Shape
from longwave.ops.block_sparse import benchmark as block_sparse
from longwave.ops.cross_entropy import benchmark as cross_entropy
from longwave.ops.decay_linear import benchmark as decay_linear
from longwave.ops.linear import benchmark as linear
from longwave.progress import say
from longwave.units import counted

OPS: dict[str, Callable[[Shape], list[Case]]] = {
    "attention": attention.cases,
    "cross_entropy": cross_entropy.cases,
    "linear": linear.cases,
    "decay_linear": decay_linear.cases,
    "block_sparse": block_sparse.cases,
}
_COLD, _ROUND, _MOST_COPIES = 1 << 28, 0.05, 256  # bytes beyond any cache, seconds that make a round


@dataclass(frozen=True)
class OpsOptions(Options):
    """Options of `bench ops`: the sizes of a layer of a model, of `longwave/recipes/bench-llama.toml` by default.

    ops: names of the ops, all by default. kv_heads: as many as heads by default. window: of a sliding window to time as
    well. blocks: blocks of 64 keys that a query of block-sparse attention sees. forms: the forms to time beside the one
    that models run, all by default. backward: whether the backward pass is timed too.
    """

    ops: tuple[str, ...] = tuple(OPS)
    heads: int = 12
    kv_heads: int = 4
    head_size: int = 64
    hidden_size: int = 768
    vocab_size: int = 32000
    window: int | None = None
    blocks: int = 96
    forms: tuple[str, ...] = ()
    backward: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "kv_heads", "head_size", "hidden_size", "vocab_size"):
            require(getattr(self, name) > 0, f"{name} = {getattr(self, name)}: 1 or more")
        require(self.heads % self.kv_heads == 0, f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}")
        require(self.window is None or self.window > 0, f"window = {self.window}: 1 or more tokens")
        require(self.blocks >= 34, f"blocks = {self.blocks}: 34 or more, since so many are always seen")
        unknown = [name for name in self.ops if name not in OPS]
        require(not unknown, f"ops: {', '.join(unknown)} does not exist; use {', '.join(OPS)}")

    def shape(self, context: int, batch: int) -> Shape:
        """The sizes at one context and batch."""
        heads = (self.heads, self.kv_heads, self.head_size)
        place = (dtype_of(self.dtype), device_of(self.device), self.seed, self.blocks)
        return Shape(context, batch, *heads, self.hidden_size, self.vocab_size, self.window, *place)


def ops_options(model: str | Path | None, chosen: Mapping[str, Any]) -> OpsOptions:
    """Options from the values chosen, and for the rest from a model (a recipe or a folder) where one is given."""
    sizes: dict[str, Any] = {}
    if model is not None:
        config = planning.model_config(model)
        heads, window = config.table("attention"), config.tables.get("window")
        sizes = {"heads": heads.heads, "kv_heads": heads.groups, "head_size": heads.size_in(config.hidden_size)}
        sizes |= {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
        sizes |= {"window": window.size} if window else {}
    elif "heads" in chosen:
        sizes = {"kv_heads": chosen["heads"]}
    return build(OpsOptions, sizes | dict(chosen), "bench ops")


def run_ops(options: OpsOptions, trace: bool = False) -> tuple[Results, Profiler]:
    """Times the ops; MachineError for a form that is wrong.

    trace: whether the profiler that is returned keeps the calls for a trace.
    """
    device, rows, done = device_of(options.device), [], set[tuple[str, int, int]]()
    with swift_collections():
        peaks, profiler = measure_peaks(dtype_of(options.dtype), device), Profiler(device, trace)
        setup = _Setup(options, peaks, profiler)
        for name, context, batch in product(options.ops, options.contexts, options.batches):
            say(f"{name} at {counted(context, 'token')}, batch {batch}")
            shape = options.shape(context, batch)
            small = OPS[name](replace(shape, context=min(context, WHOLE)))
            for case, other in zip(_chosen(OPS[name](shape), options), _chosen(small, options), strict=True):
                if (place := (case.quantity, case.context, batch)) not in done:
                    rows += _rows(case, other, batch, setup)
                    done.add(place)
    return Results("ops", options, hardware(options), peaks, rows), profiler


def _chosen(cases: list[Case], options: OpsOptions) -> list[Case]:
    """The cases with only the forms that are asked for, and the form that models run."""
    if not options.forms:
        return cases
    kept = {*options.forms}
    return [
        replace(case, forms={name: form for name, form in case.forms.items() if name in kept | {case.default}})
        for case in cases
    ]


def _rows(case: Case, small: Case, batch: int, setup: _Setup) -> list[Row]:
    """A row for every form and pass of one case; all forms are checked before any is timed."""
    errors = {form: max(check_form(one, form) for one in _to_check(case, small)) for form in case.forms}
    passes = _passes(case) if setup.options.backward else _passes(case)[:1]
    return [row for one in passes for row in _pass_rows(case, one, errors, batch, setup)]


def _to_check(case: Case, small: Case) -> list[Case]:
    """The case, and the small one too where only some rows of a long case are compared with the reference."""
    return [case] if case.rows is None else [case, small]


@dataclass(frozen=True)
class _Setup:
    """The options, peaks and profiler of all measurements of a run."""

    options: OpsOptions
    peaks: Peaks
    profiler: Profiler


@dataclass(frozen=True)
class _Pass:
    """Forward, or forward and backward. work: of each form; run: calls a form with inputs."""

    name: str
    work: Mapping[str, Work]
    run: Callable[[Callable[..., Tensor], Sequence[Tensor]], object]


def _passes(case: Case) -> list[_Pass]:
    ways = {**dict.fromkeys(case.forms, case), **case.beside}
    forward = _Pass("forward", {name: way.forward for name, way in ways.items()}, _forward)
    if case.backward is None:
        return [forward]
    both = {name: way.forward + way.backward for name, way in ways.items() if way.backward is not None}
    return [forward, _Pass("forward + backward", both, _forward_and_backward)]


def _runs(case: Case) -> dict[str, Callable[..., Tensor]]:
    """Every form of a case, and the other functions that are timed beside them, by name."""
    return {**case.forms, **{name: other.run for name, other in case.beside.items()}}


@torch.no_grad()
def _forward(form: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    return form(*inputs)


def _forward_and_backward(form: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    learned = [one for one in inputs if one.is_floating_point()]
    output = form(*[one.requires_grad_() if one.is_floating_point() else one for one in inputs])
    return torch.autograd.grad(output, learned, torch.ones_like(output))


def _pass_rows(case: Case, one: _Pass, errors: dict[str, float], batch: int, setup: _Setup) -> list[Row]:
    quantity, rows = f"{case.quantity}, {one.name}", {}
    timings = _timed(case, one, setup.options.repeats)
    for form, timing in timings.items():
        figures = (timing, case.tokens, one.work[form], one.work[form].seconds(setup.peaks), setup.peaks)
        checked = {"error": errors.get(form), "checked": case.checked if form in errors else "another function"}
        row = Row(quantity, case.context, batch, form, *figures, **checked)
        call = partial(one.run, _runs(case)[form], case.inputs)
        setup.profiler.keep(quantity, form, Traced(f"{row.place}: {form}", call))
        rows[form] = replace(row, peak_memory=peak_memory(call, setup.profiler.device))
    return against(list(rows.values()), rows[case.default])


def _timed(case: Case, one: _Pass, repeats: int) -> dict[str, Timing]:
    """Seconds of one call of each form, over so many copies of the inputs that the CPU's caches do not hold them."""
    seconds = seconds_of(partial(one.run, case.forms[case.default], case.inputs))
    fitting = _COLD // sum(tensor.nbytes for tensor in case.inputs)
    count = max(1, min(fitting, int(_ROUND / seconds), _MOST_COPIES))
    copies = [case.inputs, *([tensor.detach().clone() for tensor in case.inputs] for _ in range(count - 1))]
    tasks = {name: partial(_each, one, form, copies) for name, form in _runs(case).items()}
    return {name: timing.per(count) for name, timing in interleaved(tasks, repeats).items()}


def _each(one: _Pass, form: Callable[..., Tensor], copies: Sequence[Sequence[Tensor]]) -> None:
    for inputs in copies:
        one.run(form, inputs)
