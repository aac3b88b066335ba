"""The benchmarks: prefill, decoding and training steps of a model, beside another one, against what is possible.

Legend: `B` sequences, `N` tokens of a context, `S` steps of decoding.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from longwave import api, plan
from longwave.benchmarks.checks import check_logits, check_loss
from longwave.benchmarks.roofline import (
    Peaks,
    Work,
    decode_work,
    measure_peaks,
    prefill_work,
    total,
    training_work,
)
from longwave.benchmarks.subjects import Longwave, Subject, force_retention, one_pass, retention_in
from longwave.benchmarks.timing import Timing, interleaved
from longwave.config import Strict, require
from longwave.device import device_of, dtype_of
from longwave.model import Decoder

Kind = Literal["inference", "training"]


@dataclass(frozen=True)
class BenchOptions(Strict):
    """What is measured.

    contexts: tokens of a prompt, or of a training window. batches: sequences that decode together, or windows of a
    training step; prefill is always of one sequence. dtype: of weights and activations; in training, bf16 computes in
    bf16 over fp32 weights. retention: `forced` moves every level's threshold so that it keeps its nominal share.
    repeats: interleaved rounds, of which medians are taken. decode_steps: tokens of one round of decoding.
    """

    contexts: tuple[int, ...] = (2048, 8192)
    batches: tuple[int, ...] = (1,)
    dtype: Literal["fp32", "bf16"] = "fp32"
    retention: Literal["forced", "real"] = "real"
    repeats: int = 5
    decode_steps: int = 32
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("contexts", "batches"):
            values = getattr(self, name)
            require(bool(values) and min(values) > 0, f"{name} = {list(values)}: one or more, each 1 or more")
        for name in ("repeats", "decode_steps"):
            require(getattr(self, name) > 0, f"{name} = {getattr(self, name)}: 1 or more")


@dataclass(frozen=True)
class Row:
    """One quantity of one subject.

    timing: seconds of one prefill, one decode step of the whole batch, or one training step, which is of so many
    `tokens`. work: what it takes, and `bound` the least seconds for that at the machine's peaks. ratio: the time
    relative to the reference's, as the median over rounds; bound_ratio: the same of the bounds. retention: the share of
    the tokens entering each level that it kept; in decoding, the share of all tokens that got through it.
    state_used, state_reserved: bytes of the context, of the whole batch.
    """

    quantity: Literal["prefill", "decode", "training step"]
    context: int
    batch: int
    subject: str
    timing: Timing
    tokens: int
    work: Work
    bound: float
    peaks: Peaks
    retention: tuple[float, ...] = ()
    state_used: int | None = None
    state_reserved: int | None = None
    ratio: float | None = None
    bound_ratio: float | None = None

    @property
    def mfu(self) -> float:
        """FLOPs per second relative to the machine's measured peak."""
        return self.work.flops / self.timing.median / self.peaks.flops

    @property
    def mbu(self) -> float:
        """Bytes per second relative to the machine's measured peak."""
        return self.work.bytes / self.timing.median / self.peaks.bandwidth

    @property
    def of_bound(self) -> float:
        """1 where nothing faster is possible at the machine's peaks."""
        return self.bound / self.timing.median

    @property
    def gain_of_bound(self) -> float | None:
        """The speed-up over the reference as a share of the one that the bounds promise."""
        return self.bound_ratio / self.ratio if self.ratio and self.bound_ratio else None


@dataclass(frozen=True)
class Results:
    """All rows of a run, with what it ran on. models: the layout of each."""

    kind: Kind
    options: BenchOptions
    models: dict[str, str]
    peaks: Peaks
    rows: list[Row]


def run(kind: Kind, model: str | Path, against: str | Path | None, options: BenchOptions) -> Results:
    """Times a model, a recipe with random weights or a folder, against `transformers`, another model, or nothing.

    Two recipes of one shape share the weights that both have. UserError for what does not fit; MachineError where an
    output is wrong.
    """
    device = device_of(options.device)
    dtype = torch.float32 if kind == "training" else dtype_of(options.dtype)
    subjects = _subjects(model, against, lambda path: _model(path, dtype, device, options.seed))
    _check_fit(subjects, max(options.contexts) + (options.decode_steps if kind == "inference" else 0))
    peaks = measure_peaks(dtype_of(options.dtype), device)
    rows = (bench_inference if kind == "inference" else bench_training)(subjects, peaks, options)
    return Results(kind, options, {one.name: one.model.config.layout for one in subjects}, peaks, rows)


def bench_inference(subjects: Sequence[Subject], peaks: Peaks, options: BenchOptions) -> list[Row]:
    """Prefill and decoding at each context; the last of several subjects is what the others are held against."""
    rows, steps = [], options.decode_steps
    models = {id(one.model): one.model for one in subjects}
    for context in options.contexts:
        tokens = sample_tokens(subjects[0].model, context + max(options.batches) * steps, options.seed)
        sequence = tokens[: context + steps]
        if options.retention == "forced":
            for model in models.values():
                force_retention(model, sequence)
        right = {key: one_pass(model, sequence, steps + 1) for key, model in models.items()}
        rows += _prefill_rows(subjects, tokens[:context], right, peaks, options)
        rows += _decode_rows(subjects, tokens[:context], tokens[context:].view(-1, steps), right, peaks, options)
    return rows


def bench_training(subjects: Sequence[Subject], peaks: Peaks, options: BenchOptions) -> list[Row]:
    """Training steps at each window and batch; the last of several subjects is the reference. Changes the weights."""
    rows = []
    for window, batch in product(options.contexts, options.batches):
        tokens = sample_tokens(subjects[0].model, window * batch, options.seed).view(batch, window)
        _check_losses(subjects, tokens, options.dtype)
        tasks = {one.name: one.trainer(tokens, options.dtype) for one in subjects}
        timings = interleaved(tasks, options.repeats)
        found = []
        for one in subjects:
            work, timing = training_work(one.model, window, batch), timings[one.name]
            place, tokens_run = (window, batch, one.name), window * batch
            found.append(Row("training step", *place, timing, tokens_run, work, work.seconds(peaks), peaks))
        rows += _against(found, found[-1], len(subjects))
    return rows


def sample_tokens(model: Decoder, count: int, seed: int) -> Int64[Tensor, " {count}"]:
    """Tokens of English text where the model has a tokenizer, else random ones."""
    device = model.embed.weight.device
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, model.config.vocab_size, (count,), generator=generator).to(device)
    tokens = torch.tensor(model.tokenizer.encode("\n\n".join(pydoc_data.topics.topics.values())))
    return tokens.repeat(-(-count // len(tokens)))[:count].to(device)


def _prefill_rows(
    subjects: Sequence[Subject], context: Tensor, right: dict[int, Tensor], peaks: Peaks, options: BenchOptions
) -> list[Row]:
    tasks = {one.name: one.prefill(context) for one in subjects}
    retention = {}
    for one in subjects:
        logits, retention[one.name] = retention_in(one.model, tasks[one.name])
        check_logits(f"{one.name}, prefill", logits, right[id(one.model)][0])
    timings = interleaved(tasks, options.repeats, warmup=0)  # the check has warmed up
    found = []
    for one in subjects:
        work = prefill_work(one.model, len(context), retention[one.name])
        place, timing = (len(context), 1, one.name), timings[one.name]
        found.append(
            Row("prefill", *place, timing, len(context), work, work.seconds(peaks), peaks, retention[one.name])
        )
    return _against(found, found[-1], len(subjects))


def _decode_rows(
    subjects: Sequence[Subject],
    context: Tensor,
    following: Tensor,
    right: dict[int, Tensor],
    peaks: Peaks,
    options: BenchOptions,
) -> list[Row]:
    rows, steps = [], options.decode_steps
    prefilled = [(one.model, one.after(context)) for one in subjects]
    for batch in options.batches:
        by_subject = [(model, start(following[:batch])) for model, start in prefilled]
        decodings = {name: (model, one) for model, named in by_subject for name, one in named.items()}
        for name, (model, one) in decodings.items():
            check_logits(f"{name}, decoding", one.run()[0], right[id(model)][1:])
        timings = interleaved({name: one.run for name, (_, one) in decodings.items()}, options.repeats, warmup=0)
        found = []
        for name, (model, one) in decodings.items():
            parts = decode_work(model, one.load)
            work, bound = total(parts), sum(part.seconds(peaks) for part in parts)
            place, timing = (len(context), batch, name), timings[name].per(steps)
            state = (one.load.retention, one.used, one.reserved)
            found.append(Row("decode", *place, timing, batch, work, bound, peaks, *state))
        references = [row for row in found if row.subject in by_subject[-1][1]]
        rows += _against(found, min(references, key=lambda row: row.timing.median), len(subjects))
    return rows


def _against(rows: list[Row], reference: Row, subjects: int) -> list[Row]:
    """The rows with their ratios to the reference, if there is more than one subject."""
    if subjects < 2:
        return rows
    return [
        replace(row, ratio=row.timing.ratio(reference.timing), bound_ratio=row.bound / reference.bound) for row in rows
    ]


def _check_losses(subjects: Sequence[Subject], tokens: Tensor, precision: str) -> None:
    right: dict[int, float] = {}
    for one in subjects:
        loss = one.loss(tokens, precision)
        check_loss(one.name, loss, right.setdefault(id(one.model), loss), precision)


def _subjects(model: str | Path, against: str | Path | None, read: Callable[[str | Path], Decoder]) -> list[Subject]:
    first = Longwave("longwave" if str(against) == "transformers" else Path(model).stem, read(model))
    if against is None:
        return [first]
    if str(against) == "transformers":
        from longwave.benchmarks.yardstick import Transformers

        return [first, Transformers(first.model)]
    name = Path(against).stem
    return [first, Longwave(name if name != first.name else str(against), read(against))]


def _model(path: str | Path, dtype: torch.dtype, device: torch.device, seed: int) -> Decoder:
    if Path(path).is_dir():
        return api.load(path, dtype=dtype, device=device)
    return Decoder(plan.model_config(path), seed).to(device, dtype)


def _check_fit(subjects: Sequence[Subject], tokens: int) -> None:
    """UserError for a sequence that a model is not meant for, or models that do not read the same tokens."""
    for config in (one.model.config for one in subjects):
        fits = tokens <= config.context_window
        require(fits, f"contexts: {tokens} tokens with decoding; the model's context_window is {config.context_window}")
    sizes = {one.model.config.vocab_size for one in subjects}
    require(len(sizes) == 1, f"vocab_size: the models have {sorted(sizes)}; they must read the same tokens")
