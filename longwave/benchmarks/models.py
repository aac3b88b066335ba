"""`longwave bench inference` and `bench training`: models timed in turn, beside the least time possible.

The models that can be timed (`TimedModel`) come first, then the measurements, then what SUBLLM's levels keep meanwhile.

Legend: `B` sequences of `N` tokens each, `S` steps of decoding, `V` vocabulary.
"""

from __future__ import annotations

import copy
import pydoc_data.topics
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from longwave import api, checkpoints, planning
from longwave.benchmarks.context.options import dense_twin
from longwave.benchmarks.measure.checks import check_forms, check_logits, check_loss, one_pass
from longwave.benchmarks.measure.memory import peak_memory
from longwave.benchmarks.measure.profile import Part, Profiler, Traced
from longwave.benchmarks.measure.roofline import (
    Level,
    Load,
    decode_work,
    measure_peaks,
    prefill_work,
    training_work,
)
from longwave.benchmarks.measure.timing import Task, interleaved, swift_collections
from longwave.benchmarks.results.results import Model, Options, Results, Row, against, hardware
from longwave.checkpoints.families import family_of
from longwave.config import ModelConfig
from longwave.costs import Peaks, Work, count
from longwave.errors import require
from longwave.machine import device_of, dtype_of
from longwave.model import Decoder
from longwave.progress import say
from longwave.resamplers import Kept
from longwave.states import State
from longwave.streams import Stream, Windows
from longwave.units import counted

DENSE_TWIN = "dense"
Kind = Literal["inference", "training"]
T = TypeVar("T")


@dataclass(frozen=True)
class BenchOptions(Options):
    """Options of `bench inference` and `bench training`.

    batches: sequences that decode together, or windows of a training step; prefill is always of one sequence.
    dtype: of weights and activations; in training, bf16 computes in bf16 over fp32 weights. retention: `forced` moves
    every level's threshold so that the level keeps its nominal share. decode_steps: tokens of one round of decoding.
    """

    retention: Literal["forced", "real"] = "real"
    decode_steps: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.decode_steps > 0, f"decode_steps = {self.decode_steps}: 1 or more")


# The models that can be timed -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """Decoding of the same steps after the same context, which every run repeats.

    run: gives the logits of the steps. load: tokens that reach each level in a run. used, reserved: bytes remembered of
    the context, and bytes allocated for it.
    """

    run: Callable[[], Float[Tensor, "B S V"]]
    load: Load
    used: int
    reserved: int


@runtime_checkable
class TimedModel(Protocol):
    """A model to time. decoder: has its weights, and the formulas of their costs."""

    name: str
    decoder: Decoder

    def prefill(self, context: Int64[Tensor, " N"]) -> Callable[[], Float[Tensor, " V"]]:
        """A task that fills an empty cache and gives the logits after the last token."""
        ...

    def after(self, context: Int64[Tensor, " N"]) -> Callable[[Int64[Tensor, "B S"]], dict[str, Decoding]]:
        """Prefills a context, and returns a function that prepares the decoding of S tokens after it by B sequences.

        There is a decoding for each kind of cache that the model has, by the name of the model and the kind.
        """
        ...

    def loss(self, tokens: Int64[Tensor, "B N"], precision: str) -> float:
        """The mean next-token loss in nats, as in training."""
        ...

    def trainer(self, tokens: Int64[Tensor, "B N"], precision: str) -> Task:
        """A task that runs forward, backward and a fused AdamW step; it changes the weights."""
        ...

    def parts(self) -> list[Part]:
        """The modules to name in a trace, whose time is summed by kind."""
        ...


class Longwave:
    """A longwave decoder."""

    def __init__(self, name: str, decoder: Decoder) -> None:
        self.name, self.decoder = name, decoder

    def prefill(self, context: Int64[Tensor, " N"]) -> Callable[[], Float[Tensor, " V"]]:
        return lambda: self._filled(context)[1]

    def after(self, context: Int64[Tensor, " N"]) -> Callable[[Int64[Tensor, "B S"]], dict[str, Decoding]]:
        filled, _ = self._filled(context)
        return lambda following: {self.name: self._decoding(copy.deepcopy(filled), following)}

    def loss(self, tokens: Int64[Tensor, "B N"], precision: str) -> float:
        self.decoder.train().set_step(0)
        with torch.no_grad(), computing_in(precision, tokens.device):
            return float(self._mean_loss(tokens))

    def trainer(self, tokens: Int64[Tensor, "B N"], precision: str) -> Task:
        step = 0

        def loss() -> Tensor:
            nonlocal step
            step += 1
            self.decoder.set_step(step)
            return self._mean_loss(tokens)

        return training_task(self.decoder, loss, precision, tokens.device)

    def parts(self) -> list[Part]:
        decoder = self.decoder
        found = [Part("embed", "embedding", decoder.embed), Part("norm", "norms", decoder.norm)]
        for block in decoder.blocks:
            name = block.site.name
            found.append(Part(name, "residuals", block))
            for inner, (norm, part) in zip(block.names, block.branches(), strict=True):
                kind = "MLPs" if part.role == "mlp" else f"{part.role}s {block.letter}"
                found += [Part(f"{name}.{inner}", kind, part), Part(f"{name}.{inner}_norm", "norms", norm)]
        return found + [Part(one.site.name, "resamplers", one) for one in decoder.brackets]

    def _mean_loss(self, tokens: Tensor) -> Tensor:
        sizes = (tokens.shape[1],) * tokens.shape[0]
        stream = Stream.of(sizes, windows=Windows(sizes, tuple(range(len(sizes)))), device=tokens.device)
        following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)
        return self.decoder.loss(tokens.flatten(), following.flatten(), stream) / (following != -100).sum()

    def _filled(self, context: Tensor) -> tuple[State, Tensor]:
        """The state after a context, and the logits of its last token."""
        state = self.decoder.eval().state(1)
        return state, self._run(context, state)[0]

    @torch.no_grad()
    def _run(self, tokens: Tensor, state: State) -> Tensor:
        """Logits (B, V) after the same number of new tokens for each of B slots, one slot after the other."""
        stream = state.stream([tokens.numel() // state.slots] * state.slots).last_rows()
        return self.decoder(tokens.flatten(), stream, state)

    def _decoding(self, state: State, following: Tensor) -> Decoding:
        context, (batch, steps) = state.seen[0], following.shape
        state.reorder([0] * batch)
        state.make_room(steps)
        recurs = any(spec.per_sequence for spec in state.specs.values())
        snapshots = [state.snapshot(slot) for slot in range(batch)] if recurs else []
        used, reserved = state.used_bytes(), state.reserved_bytes()

        def advance() -> Tensor:
            return torch.stack([self._run(following[:, step], state) for step in range(steps)], dim=1)

        def forget() -> None:
            if recurs:
                for snapshot in snapshots:
                    state.restore(snapshot)
                state.make_room(steps)
                return
            for slot in range(batch):
                state.truncate(slot, context)

        def run() -> Tensor:
            logits = advance()
            forget()
            return logits

        advance()
        load = decode_load(self.decoder, state, context, steps)
        forget()
        return Decoding(run, load, used, reserved)


def computing_in(precision: str, device: torch.device) -> torch.autocast:
    """The autocast of a training forward: `bf16` computes in bf16 over fp32 weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def training_task(model: nn.Module, loss: Callable[[], Tensor], precision: str, device: torch.device) -> Task:
    """A task that runs forward, backward and a fused AdamW step of a model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def task() -> None:
        model.train()
        with computing_in(precision, device):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return task


class Transformers:
    """`transformers`' own model over the weights of a decoder; UserError if that is of no family it has."""

    name = "transformers"

    def __init__(self, decoder: Decoder) -> None:
        from longwave.hf import Yardstick  # here, since transformers takes seconds to import

        self.decoder, self._yardstick = decoder, Yardstick(decoder)

    def prefill(self, context: Int64[Tensor, " N"]) -> Callable[[], Float[Tensor, " V"]]:
        return lambda: self._yardstick.prefill(context)[1]

    def after(self, context: Int64[Tensor, " N"]) -> Callable[[Int64[Tensor, "B S"]], dict[str, Decoding]]:
        filled, _ = self._yardstick.prefill(context)

        def start(following: Tensor) -> dict[str, Decoding]:
            load = Load({-1: Level.whole(len(context), *following.shape)})
            caches = self._yardstick.caches(filled, len(context), *following.shape)
            return {
                f"{self.name}, {kind} cache": Decoding(
                    partial(self._yardstick.decode, following, cache), load, cache.used_bytes(), cache.reserved_bytes()
                )
                for kind, cache in caches.items()
            }

        return start

    def loss(self, tokens: Int64[Tensor, "B N"], precision: str) -> float:
        self._yardstick.model.train()
        with torch.no_grad(), computing_in(precision, tokens.device):
            return float(self._yardstick.loss(tokens))

    def trainer(self, tokens: Int64[Tensor, "B N"], precision: str) -> Task:
        return training_task(self._yardstick.model, lambda: self._yardstick.loss(tokens), precision, tokens.device)

    def parts(self) -> list[Part]:
        """The parts of every layer, and the modules beside the layers, by their names in `transformers`."""
        modules = [(name, module) for name, module in self._yardstick.model.named_modules() if _is_part(name)]
        return [Part(name, re.sub(r"\d+\.", "", name), module) for name, module in modules]


def _is_part(name: str) -> bool:
    """Whether a module is a part: as `lm_head`, `model.norm` and `model.layers.3.mlp` are, `model.layers` not."""
    return bool(re.fullmatch(r"(model\.)?((?!layers\b|model\b)\w+|layers\.\d+\.\w+)", name))


# The measurements -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setup:
    """The models, peaks and options of all measurements of a run; profiler: None for nothing beyond times."""

    models: Sequence[TimedModel]
    peaks: Peaks
    options: BenchOptions
    profiler: Profiler | None

    def profiled(self, row: Row, task: Task, model: TimedModel, memory: bool = True) -> Row:
        """Keeps the task of a row for the trace, and adds its peak memory to the row if that is asked for."""
        if self.profiler is None:
            return row
        self.profiler.keep(row.quantity, row.subject, Traced(f"{row.place}: {row.subject}", task, model.parts()))
        return replace(row, peak_memory=peak_memory(task, self.profiler.device)) if memory else row


def run(
    kind: Kind, model: str | Path, other: str | Path | None, options: BenchOptions, trace: bool = False
) -> tuple[Results, Profiler]:
    """Times a model, a recipe with random weights or a folder, against `transformers`, another model, or nothing.

    other: `auto` for transformers where it has such a model, else for `dense`, the model's twin with full attention in
    every block and no levels.
    Two recipes of one shape share the weights that both have. trace: whether the profiler that is returned keeps the
    tasks for a trace. UserError for contexts or vocabularies that do not fit; MachineError where an output is wrong.
    """
    device = device_of(options.device)
    dtype = torch.float32 if kind == "training" else dtype_of(options.dtype)
    models = _models(model, other, partial(decoder_of, dtype=dtype, device=device, seed=options.seed))
    _check_fit(models, max(options.contexts) + (options.decode_steps if kind == "inference" else 0))
    for decoder in _decoders(models).values():
        check_forms(decoder, sample_tokens(decoder, min(options.contexts), options.seed))
    with swift_collections():
        peaks, profiler = measure_peaks(dtype_of(options.dtype), device), Profiler(device, trace)
        rows = (bench_inference if kind == "inference" else bench_training)(models, peaks, options, profiler)
    described = {one.name: Model(one.decoder.config.layout, count(one.decoder)) for one in models}
    return Results(kind, options, hardware(options), peaks, rows, described), profiler


def bench_inference(
    models: Sequence[TimedModel], peaks: Peaks, options: BenchOptions, profiler: Profiler | None = None
) -> list[Row]:
    """Rows of prefill and decoding at each context; of several models the last is the one that ratios are to."""
    rows, steps, setup = [], options.decode_steps, _Setup(models, peaks, options, profiler)
    decoders = _decoders(models)
    for context in options.contexts:
        say(f"prefill and decoding at {counted(context, 'token')}")
        tokens = sample_tokens(models[0].decoder, context + max(options.batches) * steps, options.seed)
        sequence = tokens[: context + steps]
        if options.retention == "forced":
            for decoder in decoders.values():
                force_retention(decoder, sequence)
        right = {key: one_pass(decoder, sequence, steps + 1) for key, decoder in decoders.items()}
        rows += _prefill_rows(setup, tokens[:context], right)
        rows += _decode_rows(setup, tokens[:context], tokens[context:].view(-1, steps), right)
    return rows


def bench_training(
    models: Sequence[TimedModel], peaks: Peaks, options: BenchOptions, profiler: Profiler | None = None
) -> list[Row]:
    """Rows of training steps at each window and batch, which change the weights; ratios are to the last model."""
    rows, setup = [], _Setup(models, peaks, options, profiler)
    for window, batch in product(options.contexts, options.batches):
        say(f"training steps of {counted(window, 'token')}, batch {batch}")
        tokens = sample_tokens(models[0].decoder, window * batch, options.seed).view(batch, window)
        _check_losses(models, tokens, options.dtype)
        tasks = {model.name: model.trainer(tokens, options.dtype) for model in models}
        timings = interleaved(tasks, options.repeats)
        found = []
        for model in models:
            work, place = training_work(model.decoder, window, batch), (window, batch, model.name)
            figures = (timings[model.name], window * batch, work, work.seconds(peaks), peaks)
            found.append(setup.profiled(Row("training step", *place, *figures), tasks[model.name], model))
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


def _prefill_rows(setup: _Setup, context: Tensor, right: dict[int, Tensor]) -> list[Row]:
    models, peaks = setup.models, setup.peaks
    tasks = {model.name: model.prefill(context) for model in models}
    retention = {}
    for model in models:
        logits, retention[model.name] = retention_in(model.decoder, tasks[model.name])
        check_logits(f"{model.name}, prefill", logits, right[id(model.decoder)][0])
    timings = interleaved(tasks, setup.options.repeats, warmup=0)  # the check has warmed up
    found = []
    for model in models:
        name, work = model.name, prefill_work(model.decoder, len(context), retention[model.name])
        figures = (timings[name], len(context), work, work.seconds(peaks), peaks, retention[name])
        found.append(setup.profiled(Row("prefill", len(context), 1, name, *figures), tasks[name], model))
    return against(found, found[-1])


def _decode_rows(setup: _Setup, context: Tensor, following: Tensor, right: dict[int, Tensor]) -> list[Row]:
    rows, options, peaks = [], setup.options, setup.peaks
    prefilled = [(model, model.after(context)) for model in setup.models]
    for batch in options.batches:
        by_model = [(model, start(following[:batch])) for model, start in prefilled]
        decodings = {name: (model, decoding) for model, named in by_model for name, decoding in named.items()}
        for name, (model, decoding) in decodings.items():
            check_logits(f"{name}, decoding", decoding.run()[0], right[id(model.decoder)][1:])
        tasks = {name: decoding.run for name, (_, decoding) in decodings.items()}
        timings = interleaved(tasks, options.repeats, warmup=0)
        found = []
        for name, (model, decoding) in decodings.items():
            parts = decode_work(model.decoder, decoding.load)
            work, bound = sum(parts, Work(0, 0)), sum(part.seconds(peaks) for part in parts)
            figures = (timings[name].per(options.decode_steps), batch, work, bound, peaks)
            state = (decoding.load.retention, decoding.used, decoding.reserved)
            row = Row("decode", len(context), batch, name, *figures, *state)
            found.append(setup.profiled(row, decoding.run, model, memory=False))
        references = [row for row in found if row.subject in by_model[-1][1]]
        rows += against(found, min(references, key=lambda row: row.timing.median))
    return rows


def _check_losses(models: Sequence[TimedModel], tokens: Tensor, precision: str) -> None:
    """MachineError unless models with the same weights have the same loss."""
    right: dict[int, float] = {}
    for model in models:
        loss = model.loss(tokens, precision)
        check_loss(model.name, loss, right.setdefault(id(model.decoder), loss), precision)


def _decoders(models: Sequence[TimedModel]) -> dict[int, Decoder]:
    """The decoders of all models by their identity; models that share weights have one between them."""
    return {id(model.decoder): model.decoder for model in models}


def default_contexts(model: str | Path, steps: int) -> tuple[int, ...]:
    """The contexts to time where none are named: the usual ones that fit into the model's window with so many steps."""
    room = planning.model_config(model).context_window - steps
    return tuple(context for context in BenchOptions.contexts if context <= room) or (max(1, room),)


def _models(model: str | Path, other: str | Path | None, read: Callable[..., Decoder]) -> list[TimedModel]:
    config = planning.model_config(model)
    if str(other) == "auto":
        family = family_of(config)
        other = "transformers" if family and family.in_transformers else DENSE_TWIN
    first = Longwave("longwave" if str(other) == "transformers" else Path(model).stem, read(model))
    if other is None:
        return [first]
    if str(other) == "transformers":
        return [first, Transformers(first.decoder)]
    name = Path(other).stem
    source = dense_twin(config) if other == DENSE_TWIN else other
    return [first, Longwave(name if name != first.name else str(other), read(source))]


def decoder_of(source: str | Path | ModelConfig, dtype: torch.dtype, device: torch.device, seed: int) -> Decoder:
    """The model of a folder or hub id, or one with random weights of a recipe or config."""
    if isinstance(source, ModelConfig):
        return Decoder(source, seed).to(device, dtype)
    if Path(source).is_dir() or checkpoints.is_hub_id(source):
        return api.load(source, dtype=dtype, device=device)
    return Decoder(planning.model_config(source), seed).to(device, dtype)


def _check_fit(models: Sequence[TimedModel], tokens: int) -> None:
    """UserError for a sequence longer than a model's context window, or models with different vocabularies."""
    for config in (model.decoder.config for model in models):
        fits = tokens <= config.context_window
        asked = f"contexts: {counted(tokens, 'token')} with decoding"
        require(fits, f"{asked}; the model's context_window is {config.context_window}")
    sizes = {model.decoder.config.vocab_size for model in models}
    require(len(sizes) == 1, f"vocab_size: the models have {sorted(sizes)}; they must read the same tokens")


# What SUBLLM's levels keep --------------------------------------------------------------------------------------------


def decode_load(model: Decoder, state: State, context: int, steps: int) -> Load:
    """The tokens that reached each level while so many steps were decoded, from a state that holds all of them."""
    levels = {-1: Level.whole(context, state.slots, steps)}
    for resampler in model.resamplers:
        kept = [state.places(resampler.index, slot) for slot in range(state.slots)]
        new = torch.cat([places[places >= context] for places in kept])
        levels[resampler.index] = Level(
            held=mean(int((places < context).sum()) + int((places >= context).sum()) / 2 for places in kept),
            rows=new.numel() / steps,
            runs=new.unique().numel() / steps,
        )
    return Load(levels)


@torch.no_grad()
def force_retention(model: Decoder, tokens: Int64[Tensor, " N"]) -> tuple[float, ...]:
    """Sets every level's threshold so that it keeps its nominal share of these tokens; returns the shares kept.

    Outer levels come first, since what they keep decides what inner ones meet.
    """
    model.eval()
    for resampler in model.resamplers:
        scores: dict[int, Tensor] = {}
        with model.watching(lambda level, _, selection, seen=scores: seen.update({level.index: selection.scores})):
            one_pass(model, tokens, 1)
        resampler.force(scores[resampler.index])
    return retention_in(model, lambda: one_pass(model, tokens, 1))[1]


def retention_in(model: Decoder, inference: Callable[[], T]) -> tuple[T, tuple[float, ...]]:
    """The result of `inference`, and the share of the tokens entering each level that the model kept meanwhile."""
    kept = Kept.of(model.resamplers)
    with model.watching(kept):
        result = inference()
    return result, kept.shares
