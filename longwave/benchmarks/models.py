"""Models, timed: prefill, decoding and training steps, beside another model, against what is possible.

Legend: `B` sequences, `N` tokens of a context, `S` steps of decoding.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from longwave import api, checkpoints, plan
from longwave.benchmarks.checks import check_forms, check_logits, check_loss
from longwave.benchmarks.profile import Watch
from longwave.benchmarks.results import Model, Options, Results, Row, against, hardware
from longwave.benchmarks.roofline import decode_work, measure_peaks, prefill_work, training_work
from longwave.benchmarks.subjects import Longwave, Subject, force_retention, one_pass, retention_in
from longwave.benchmarks.timing import Task, interleaved, swift_collections
from longwave.config import require
from longwave.costs import Peaks, Work, count
from longwave.device import device_of, dtype_of
from longwave.model import Decoder
from longwave.progress import say

Kind = Literal["inference", "training"]


@dataclass(frozen=True)
class BenchOptions(Options):
    """How models are measured.

    batches: sequences that decode together, or windows of a training step; prefill is always of one sequence.
    dtype: of weights and activations; in training, bf16 computes in bf16 over fp32 weights. retention: `forced` moves
    every level's threshold so that it keeps its nominal share. decode_steps: tokens of one round of decoding.
    """

    retention: Literal["forced", "real"] = "real"
    decode_steps: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.decode_steps > 0, f"decode_steps = {self.decode_steps}: 1 or more")


@dataclass(frozen=True)
class _Bench:
    """What every measurement of a run shares. watch: looks at what was timed, where that is wanted."""

    subjects: Sequence[Subject]
    peaks: Peaks
    options: BenchOptions
    watch: Watch | None

    def seen(self, row: Row, task: Task, subject: Subject, memory: bool = True) -> Row:
        """Keeps what was timed for a trace, and adds the peak memory of one more run to its row."""
        return row if self.watch is None else self.watch.look(row, task, subject.parts(), memory)


def run(
    kind: Kind, model: str | Path, other: str | Path | None, options: BenchOptions, trace: bool = False
) -> tuple[Results, Watch]:
    """Times a model, a recipe with random weights or a folder, against `transformers`, another model, or nothing.

    Two recipes of one shape share the weights that both have. The watch that is returned has what a trace will show.
    UserError for what does not fit; MachineError where an output is wrong.
    """
    device = device_of(options.device)
    dtype = torch.float32 if kind == "training" else dtype_of(options.dtype)
    subjects = _subjects(model, other, lambda path: _model(path, dtype, device, options.seed))
    _check_fit(subjects, max(options.contexts) + (options.decode_steps if kind == "inference" else 0))
    for one in {id(one.model): one.model for one in subjects}.values():
        check_forms(one, sample_tokens(one, min(options.contexts), options.seed))
    with swift_collections():
        peaks, watch = measure_peaks(dtype_of(options.dtype), device), Watch(device, trace)
        rows = (bench_inference if kind == "inference" else bench_training)(subjects, peaks, options, watch)
    models = {one.name: Model(one.model.config.layout, count(one.model)) for one in subjects}
    return Results(kind, options, hardware(options), peaks, rows, models), watch


def bench_inference(
    subjects: Sequence[Subject], peaks: Peaks, options: BenchOptions, watch: Watch | None = None
) -> list[Row]:
    """Prefill and decoding at each context; the last of several subjects is what the others are held against."""
    rows, steps, bench = [], options.decode_steps, _Bench(subjects, peaks, options, watch)
    models = {id(one.model): one.model for one in subjects}
    for context in options.contexts:
        say(f"prefill and decoding at {context:,} tokens")
        tokens = sample_tokens(subjects[0].model, context + max(options.batches) * steps, options.seed)
        sequence = tokens[: context + steps]
        if options.retention == "forced":
            for model in models.values():
                force_retention(model, sequence)
        right = {key: one_pass(model, sequence, steps + 1) for key, model in models.items()}
        rows += _prefill_rows(bench, tokens[:context], right)
        rows += _decode_rows(bench, tokens[:context], tokens[context:].view(-1, steps), right)
    return rows


def bench_training(
    subjects: Sequence[Subject], peaks: Peaks, options: BenchOptions, watch: Watch | None = None
) -> list[Row]:
    """Training steps at each window and batch; the last of several subjects is the reference. Changes the weights."""
    rows, bench = [], _Bench(subjects, peaks, options, watch)
    for window, batch in product(options.contexts, options.batches):
        say(f"training steps of {window:,} tokens, batch {batch}")
        tokens = sample_tokens(subjects[0].model, window * batch, options.seed).view(batch, window)
        _check_losses(subjects, tokens, options.dtype)
        tasks = {one.name: one.trainer(tokens, options.dtype) for one in subjects}
        timings = interleaved(tasks, options.repeats)
        found = []
        for one in subjects:
            work, place = training_work(one.model, window, batch), (window, batch, one.name)
            figures = (timings[one.name], window * batch, work, work.seconds(peaks), peaks)
            found.append(bench.seen(Row("training step", *place, *figures), tasks[one.name], one))
        rows += against(found, found[-1])
    return rows


def sample_tokens(model: Decoder, count: int, seed: int) -> Int64[Tensor, " {count}"]:
    """Tokens of English text where the model has a tokenizer, else random ones."""
    device = model.embed.weight.device
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, model.config.vocab_size, (count,), generator=generator).to(device)
    tokens = torch.tensor(model.tokenizer.encode("\n\n".join(pydoc_data.topics.topics.values())))
    return tokens.repeat(-(-count // len(tokens)))[:count].to(device)


def _prefill_rows(bench: _Bench, context: Tensor, right: dict[int, Tensor]) -> list[Row]:
    subjects, peaks = bench.subjects, bench.peaks
    tasks = {one.name: one.prefill(context) for one in subjects}
    retention = {}
    for one in subjects:
        logits, retention[one.name] = retention_in(one.model, tasks[one.name])
        check_logits(f"{one.name}, prefill", logits, right[id(one.model)][0])
    timings = interleaved(tasks, bench.options.repeats, warmup=0)  # the check has warmed up
    found = []
    for one in subjects:
        name, work = one.name, prefill_work(one.model, len(context), retention[one.name])
        figures = (timings[name], len(context), work, work.seconds(peaks), peaks, retention[name])
        found.append(bench.seen(Row("prefill", len(context), 1, name, *figures), tasks[name], one))
    return against(found, found[-1])


def _decode_rows(bench: _Bench, context: Tensor, following: Tensor, right: dict[int, Tensor]) -> list[Row]:
    rows, options, peaks = [], bench.options, bench.peaks
    prefilled = [(one, one.after(context)) for one in bench.subjects]
    for batch in options.batches:
        by_subject = [(one, start(following[:batch])) for one, start in prefilled]
        decodings = {name: (one, decoding) for one, named in by_subject for name, decoding in named.items()}
        for name, (one, decoding) in decodings.items():
            check_logits(f"{name}, decoding", decoding.run()[0], right[id(one.model)][1:])
        tasks = {name: decoding.run for name, (_, decoding) in decodings.items()}
        timings = interleaved(tasks, options.repeats, warmup=0)
        found = []
        for name, (one, decoding) in decodings.items():
            parts = decode_work(one.model, decoding.load)
            work, bound = sum(parts, Work(0, 0)), sum(part.seconds(peaks) for part in parts)
            figures = (timings[name].per(options.decode_steps), batch, work, bound, peaks)
            state = (decoding.load.retention, decoding.used, decoding.reserved)
            row = Row("decode", len(context), batch, name, *figures, *state)
            found.append(bench.seen(row, decoding.run, one, memory=False))
        references = [row for row in found if row.subject in by_subject[-1][1]]
        rows += against(found, min(references, key=lambda row: row.timing.median))
    return rows


def _check_losses(subjects: Sequence[Subject], tokens: Tensor, precision: str) -> None:
    right: dict[int, float] = {}
    for one in subjects:
        loss = one.loss(tokens, precision)
        check_loss(one.name, loss, right.setdefault(id(one.model), loss), precision)


def _subjects(model: str | Path, other: str | Path | None, read: Callable[[str | Path], Decoder]) -> list[Subject]:
    first = Longwave("longwave" if str(other) == "transformers" else Path(model).stem, read(model))
    if other is None:
        return [first]
    if str(other) == "transformers":
        from longwave.benchmarks.yardstick import Transformers

        return [first, Transformers(first.model)]
    name = Path(other).stem
    return [first, Longwave(name if name != first.name else str(other), read(other))]


def _model(path: str | Path, dtype: torch.dtype, device: torch.device, seed: int) -> Decoder:
    if Path(path).is_dir() or checkpoints.is_hub_id(path):
        return api.load(path, dtype=dtype, device=device)
    return Decoder(plan.model_config(path), seed).to(device, dtype)


def _check_fit(subjects: Sequence[Subject], tokens: int) -> None:
    """UserError for a sequence that a model is not meant for, or models that do not read the same tokens."""
    for config in (one.model.config for one in subjects):
        fits = tokens <= config.context_window
        require(fits, f"contexts: {tokens} tokens with decoding; the model's context_window is {config.context_window}")
    sizes = {one.model.config.vocab_size for one in subjects}
    require(len(sizes) == 1, f"vocab_size: the models have {sorted(sizes)}; they must read the same tokens")
