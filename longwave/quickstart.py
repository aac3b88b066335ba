"""`longwave quickstart`: a Llama and a SUBLLM of one shape, trained on real text, compared by measurement.

Every stage leaves its result in the output folder, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
import zlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from longwave import files, machine
from longwave.api import load
from longwave.benchmarks.measure.others import OtherWork, other_work
from longwave.benchmarks.measure.roofline import measure_peaks
from longwave.benchmarks.models import BenchOptions, Longwave, TimedModel, Transformers, bench_inference, bench_training
from longwave.benchmarks.results.results import Row
from longwave.data.packed import PackedTokens
from longwave.data.prepared import PreparedInfo, iter_documents
from longwave.data.shards import prepare
from longwave.data.sources import Source, documents, standard_library
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError, require
from longwave.evaluation.held_out import HeldOut, bits_per_byte, held_out_loss
from longwave.files.jsonfile import to_json
from longwave.inference.sampling import Sampling
from longwave.inference.text import complete
from longwave.inspection.source import pieces
from longwave.inspection.trace import by_token, trace_levels
from longwave.machine import dtype_of
from longwave.model import Decoder
from longwave.progress import TrainingProgress, say
from longwave.recipes import recipe_path
from longwave.reports import content as page
from longwave.reports.curves import final_gap
from longwave.reports.report import write_report
from longwave.reports.words import headline
from longwave.training.clock import Seconds, read_seconds
from longwave.training.loop import Trainer
from longwave.training.metrics import read_metrics, write_metrics
from longwave.training.recipe import Recipe, read_recipe

NAMES = {"llama": "Llama", "subllm": "SUBLLM"}
TIMED = {"transformers": "transformers Llama", "llama": "longwave Llama", "subllm": "SUBLLM"}
_PROMPT_TOKENS, _NEW_TOKENS, _PASSAGE_TOKENS = 48, 64, 700
_DECODE_STEPS, _REPEATS = 64, 5


def quickstart(
    text: str | None, output: Path, overrides: Sequence[str] = (), measure_again: bool = False
) -> dict[str, Any]:
    """Runs or continues the comparison and returns its figures.

    text: the user's file or folder of text, or None for the Python standard library. measure_again: times the models
    anew, where an earlier run has timed them, on a machine that was busy for example.
    Raises UserError for text that cannot be used, and for an output folder that holds another comparison or to which
    another process is writing.
    """
    with files.locked(output):
        return _quickstart(text, output, overrides, measure_again)


def _quickstart(text: str | None, output: Path, overrides: Sequence[str], measure_again: bool) -> dict[str, Any]:
    started = time.monotonic()
    info = _prepared(text, output / "data", overrides)
    recipes = {name: _recipe(name, output / "data", overrides) for name in NAMES}
    seconds = {name: _train(name, recipe, output) for name, recipe in recipes.items()}
    say("evaluating, generating and timing both, and transformers' Llama with the same weights")
    models = {name: load(output / name / "model") for name in NAMES}
    results = {name: _evaluate(models[name], recipes[name], info) for name in NAMES}
    speed = _measured(models, recipes["llama"], output, measure_again)
    facts = _run_facts(text, info, recipes, seconds, time.monotonic() - started)
    data = _report(models, recipes, results, speed, output, facts, _command(text, output, overrides))
    write_report(data, output / "report.html")
    _merge_metrics(output)
    figures = _figures(data)
    files.write_file(output / "results.json", f"{to_json(figures, indent=2)}\n".encode())
    for line in headline(data):
        print(f"{line.title}: {line.value}. {line.sentence}")
    if speed.disturbed:
        print(f"{speed.note} {_again(output)}")
    print(f"{output / 'report.html'}: open it in a browser ({time.monotonic() - started:.0f} s in all)")
    return figures


def _recipe(name: str, data: Path, overrides: Sequence[str]) -> Recipe:
    bf16 = ["training.precision=bf16"] if machine.fast_bf16() else []
    return read_recipe(recipe_path(f"quickstart-{name}"), [*bf16, *overrides, f"data.folder={data}"])


def _prepared(text: str | None, folder: Path, overrides: Sequence[str]) -> PreparedInfo:
    """The prepared data. `source.txt` beside it tells of which text, so that it is not taken up again for another."""
    source = "the Python standard library" if text is None else str(files.resolved(text))
    documents_of = standard_library if text is None else text
    note = folder.parent / "source.txt"
    if (folder / "meta.json").exists():
        _require_same_text(note, source, documents_of)
        return PreparedInfo.read(folder)
    vocabulary = _recipe("llama", folder, overrides).model.vocab_size
    say(f"preparing {source}: tokenizer of {vocabulary:,} entries, packed tokens")
    folder.parent.mkdir(parents=True, exist_ok=True)
    files.write_file(note, f"{source}\n{_checksum(documents_of)}\n".encode("utf8", "surrogateescape"))
    return prepare(documents_of, folder, vocab_size=vocabulary)


def _require_same_text(note: Path, source: str, documents_of: Source) -> None:
    """UserError where the data were prepared from another text, or the text has changed since."""
    name, _, checksum = note.read_text(encoding="utf8", errors="surrogateescape").strip().partition("\n")
    require(name == source, f"{note.parent / 'data'}: made of {name}; give another --output")
    is_there = callable(documents_of) or Path(documents_of).exists()
    if checksum and is_there and checksum != _checksum(documents_of):
        raise UserError(f"{source}: has changed since {note.parent / 'data'} was made of it; give another --output")


def _checksum(source: Source) -> str:
    """The CRC-32 of all names and texts of a source; the standard library takes 0.2 s."""
    found = 0
    for document in documents(source):
        for part in (document.name, document.text):
            found = zlib.crc32(part.encode("utf8", "surrogatepass"), found)
    return f"{found:08x}"


def _train(name: str, recipe: Recipe, output: Path) -> Seconds:
    """Trains one of the two models, or continues; returns the time that passed, over all sessions."""
    folder = output / name
    trainer = Trainer(recipe, folder)
    for line in trainer.notes():
        say(f"{NAMES[name]}: {line}")
    if not (trainer.finished and (folder / "model" / files.MANIFEST).exists()):
        trainer.watch(TrainingProgress(NAMES[name], recipe.steps, trainer.step))
        trainer.run()
    return read_seconds(folder)


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """Held-out losses: `threshold` selects tokens as at inference, `training` as in training (None for a Llama)."""

    threshold: HeldOut
    training: HeldOut | None
    bits_per_byte: float
    generations: list[page.Generation]


def _evaluate(model: Decoder, recipe: Recipe, info: PreparedInfo) -> _Evaluation:
    """The loss on all held-out text as the model runs at inference, and for a SUBLLM with training's selection too."""
    data = PackedTokens(recipe.data.folder, "held_out", recipe.training.window, keep_last=True)
    threshold = held_out_loss(model, data)
    by_training = None
    if model.resamplers:
        model.set_step(recipe.steps, recipe.training.seed)
        by_training = held_out_loss(model, data, selection="training")
    return _Evaluation(threshold, by_training, bits_per_byte(threshold, info), _generations(model, recipe))


def _generations(model: Decoder, recipe: Recipe) -> list[page.Generation]:
    tokenizer = Tokenizer.load(recipe.data.folder)
    prompts = [tokenizer.decode(document[1:][:_PROMPT_TOKENS].tolist()) for document in _held_out(recipe, 2)]
    sampling = Sampling(temperature=0.7, top_p=0.95)
    texts = complete(model, tokenizer, prompts, max_new_tokens=_NEW_TOKENS, sampling=sampling)
    return [page.Generation(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def _held_out(recipe: Recipe, count: int) -> list[Any]:
    """The first `count` held-out documents that are twice as long as a prompt; shorter ones where these are too few."""
    documents = iter_documents(recipe.data.folder)
    some = [document for _, document in zip(range(200), documents, strict=False)]
    return sorted(some, key=lambda document: len(document) < 2 * _PROMPT_TOKENS)[:count]


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What was timed, as `speed.json` keeps it. models: the checksums of the folders of the models."""

    when: str
    models: dict[str, dict[str, str]]
    speed: page.Speed


def _measured(models: dict[str, Decoder], recipe: Recipe, output: Path, again: bool) -> page.Speed:
    """The speed of the models: as it was measured before, or measured now, which takes a minute."""
    path, checksums = output / "speed.json", {name: files.checksums(output / name / "model") for name in NAMES}
    earlier = None if again else _measured_before(path)
    if earlier is not None and earlier.models == checksums:
        say(f"speed: as measured {earlier.when}; {_again(output)}")
        return earlier.speed
    found = _Measured(_now(), checksums, _speed(models, recipe))
    files.write_file(path, TypeAdapter(_Measured).dump_json(found, indent=1) + b"\n")
    return found.speed


def _measured_before(path: Path) -> _Measured | None:
    """What the file holds; None for none, and for one that another version wrote."""
    try:
        return TypeAdapter(_Measured).validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _again(output: Path) -> str:
    return f"`longwave quickstart --output {shlex.quote(str(output))} --measure-again` measures it again"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _speed(models: dict[str, Decoder], recipe: Recipe) -> page.Speed:
    """Times prefill, decoding and the training step of the three models in turn, once their outputs are checked."""
    run = recipe.training
    steps = min(_DECODE_STEPS, run.window // 4)
    options = BenchOptions(contexts=(run.window - steps,), decode_steps=steps, repeats=_REPEATS)
    llama = Longwave("llama", models["llama"])
    compared: list[TimedModel] = [Longwave("subllm", models["subllm"]), Transformers(models["llama"]), llama]
    trained = dataclasses.replace(options, contexts=(run.window,), dtype=run.precision)
    with other_work() as others:
        rows = bench_inference(compared, measure_peaks(torch.float32), options)
        rows += bench_training(compared, measure_peaks(dtype_of(run.precision)), trained)
    by_quantity = {row.quantity: [one for one in rows if one.quantity == row.quantity] for row in rows}
    shown = [_speed_row(found) for found in by_quantity.values()]
    return page.Speed(TIMED, [*shown, _memory_row(by_quantity["decode"])], _load_words(others), others.disturbs)


def _load_words(others: OtherWork) -> str:
    """A sentence on how busy the machine was while it timed the models."""
    found = others.words()
    if not others.disturbs:
        return f"{found[0].upper()}{found[1:]}."
    return (
        f"This machine was busy: {found}. Ratios are taken within rounds and suffer least; times, shares of bounds and "
        "small differences are not to be trusted."
    )


def _speed_row(rows: list[Row]) -> page.SpeedRow:
    """One quantity of the three models in milliseconds; of transformers' two caches the faster counts."""
    quantity, context = rows[0].quantity, rows[0].context
    label = {"prefill": "Prefill, {:,} tokens", "decode": "Per token, after {:,}"}.get(quantity, "Step, {:,} tokens")
    figures = {name: _figure(_fastest(rows, name)) for name in TIMED}
    kind: Any = quantity.split()[0]
    return page.SpeedRow(kind, label.format(context), context, figures)


def _fastest(rows: list[Row], name: str) -> Row:
    return min((row for row in rows if row.subject.startswith(name)), key=lambda row: row.timing.median)


def _figure(row: Row) -> page.Figure:
    timing = row.timing
    bound = None
    if row.subject == "subllm" and row.bound_ratio:
        bound = page.Bound(1 / row.bound_ratio, f"least FLOPs and bytes{_kept_words(row)}")
    rounds = [1e3 * seconds for seconds in timing.seconds]
    return page.Figure(1e3 * timing.median, 1e3 * timing.low, 1e3 * timing.high, bound, rounds)


def _kept_words(row: Row) -> str:
    """The retention that a bound is of, in words: measured, but for training, whose work follows from the layout."""
    shares = " and ".join(f"{share:.0%}" for share in row.retention)
    if not shares:
        return ", at the retention in the layout"
    if row.quantity == "decode":
        return f"; of all tokens that were timed {shares} came to the levels"
    return f"; of the text that was timed each level kept {shares} of what entered it"


def _memory_row(rows: list[Row]) -> page.SpeedRow:
    """The bytes of each model's state after the context; a SUBLLM's middle layers hold only the tokens they keep."""
    used = {name: _fastest(rows, name).state_used for name in TIMED}
    figures = {name: page.Missing("not counted") if n is None else page.Figure(n, n, n) for name, n in used.items()}
    return page.SpeedRow("memory", f"State, {rows[0].context:,} tokens", rows[0].context, figures)


def _report(
    models: dict[str, Decoder],
    recipes: dict[str, Recipe],
    results: dict[str, _Evaluation],
    speed: page.Speed,
    output: Path,
    facts: list[page.Fact],
    command: str,
) -> page.Report:
    metrics = {name: read_metrics(output / name / "metrics.jsonl") for name in NAMES}
    return page.Report(
        title="longwave quickstart",
        created=_now(),
        machine=[page.Fact(label, value) for label, value in machine.facts().items()],
        run=facts,
        models=[_model_run(name, models[name], recipes[name], metrics[name], results[name]) for name in NAMES],
        baseline="llama",
        speed=speed,
        passage=_passage(models["subllm"], recipes["subllm"]),
        notes=_notes(recipes["subllm"], results),
        curve_note=_curve_note(recipes["llama"]),
        command=command,
        subtitle="A Llama and a SUBLLM of one shape, trained on the same tokens.",
    )


def _model_run(
    name: str, model: Decoder, recipe: Recipe, metrics: list[dict[str, Any]], result: _Evaluation
) -> page.ModelRun:
    causal = model.config.subllm is not None and model.config.subllm.selection == "causal"
    return page.ModelRun(
        key=name,
        name=NAMES[name],
        parameters=sum(weight.numel() for weight in model.parameters()),
        layout=model.config.layout,
        runs=[_seed_run(recipe, metrics, result)],
        levels=_levels(model, metrics, result),
        selection="threshold" if causal else "top-k",
        selected_loss=result.training and result.training.loss,
        generations=result.generations,
    )


def _seed_run(recipe: Recipe, metrics: list[dict[str, Any]], result: _Evaluation) -> page.SeedRun:
    train, held_out = (_curve(metrics, field) for field in ("loss", "held_out_loss"))
    return page.SeedRun(recipe.training.seed, train, held_out, result.threshold.loss, result.bits_per_byte)


def _curve(metrics: list[dict[str, Any]], field: str) -> list[page.LossPoint]:
    return [
        page.LossPoint(one["step"], one["tokens"], one.get("flops", 0), one.get("seconds", 0.0), one[field])
        for one in metrics
        if field in one
    ]


def _levels(model: Decoder, metrics: list[dict[str, Any]], result: _Evaluation) -> list[page.RetentionLevel]:
    watched = [entry for entry in metrics if "positive" in entry]
    return [
        page.RetentionLevel(
            name=f"level {level + 1}",
            target=float(resampler.retention),
            steps=[entry["step"] for entry in watched],
            kept=[entry["positive"][level] for entry in watched],
            live=[entry["live"][level] for entry in watched],
            falsely_kept=[entry["false_keep"][level] for entry in watched],
            falsely_dropped=[entry["false_drop"][level] for entry in watched],
            final=result.threshold.retention[level],
        )
        for level, resampler in enumerate(model.resamplers)
    ]


def _passage(model: Decoder, recipe: Recipe) -> page.Passage:
    tokenizer = Tokenizer.load(recipe.data.folder)
    ids = _held_out(recipe, 1)[0][: min(_PASSAGE_TOKENS, model.config.context_window)].tolist()
    shown = zip(pieces(tokenizer, ids), by_token(trace_levels(model, ids), len(ids)), strict=True)
    tokens = [page.PassageToken(piece.text, token.kept, token.scores, piece.label) for piece, token in shown]
    return page.Passage("held-out text", tokens, code=True)


def _notes(recipe: Recipe, results: dict[str, _Evaluation]) -> list[str]:
    trained = recipe.steps * recipe.training.batch_windows * recipe.training.window
    kept = ", ".join(f"{share:.0%}" for share in results["subllm"].threshold.retention)
    return [
        f"Both models saw the same {trained:,} tokens in the same order. That is a few minutes of training: enough to "
        "show that everything works and what it costs, not what either model can learn.",
        "SUBLLM ran in threshold mode, as it does when it generates: of the tokens entering each level it kept "
        f"{kept} of all held-out text. The retention charts follow training windows, and the bounds of speed count "
        "what was kept of the text that was timed: other texts, so the shares differ a little.",
        "Timings are medians of interleaved repeats on this machine; a model this small spends much of its time "
        "outside matrix products, so gains lie below those of a larger one.",
    ]


def _curve_note(recipe: Recipe) -> str:
    """Why the last points of the held-out curves are not the final figures, where they are not."""
    run, total = (
        recipe.training,
        len(PackedTokens(recipe.data.folder, "held_out", recipe.training.window, keep_last=True)),
    )
    reasons = []
    if 0 < run.evaluate_windows < total:
        reasons.append(f"of the first {run.evaluate_windows} of {total} held-out windows")
    if run.precision != "fp32":
        reasons.append(f"computed in {run.precision}")
    words = "The held-out curves and the gap are {}; the table, the cards and longwave eval take all, in fp32."
    return words.format(" and ".join(reasons)) if reasons else ""


def _run_facts(
    text: str | None, info: PreparedInfo, recipes: dict[str, Recipe], seconds: dict[str, Seconds], session: float
) -> list[page.Fact]:
    run, shape, steps = recipes["llama"].training, recipes["llama"].model, recipes["llama"].steps
    facts = {
        "text": text or "Python standard library, sources and docstrings",
        "documents": f"{info.train.documents:,} for training, {info.held_out.documents:,} held out",
        "tokens": f"{info.train.tokens:,} for training, {info.held_out.tokens:,} held out",
        "vocabulary": f"{info.vocab_size:,}",
        "training": f"{steps:,} steps of {run.batch_windows} windows of {run.window:,} tokens, {run.precision}",
        "optimizer": f"{recipes['llama'].optimizer.kind}, {recipes['llama'].schedule.kind}",
        "shape": f"hidden {shape.hidden_size}, {shape.attention.heads} heads, MLP {shape.mlp.size}",
        **{f"time, {NAMES[name]}": spent.words() for name, spent in seconds.items()},
        "time, last session": f"{session:.0f} s up to this page, whatever it did of all this",
    }
    return [page.Fact(label, value) for label, value in facts.items()]


def _command(text: str | None, output: Path, overrides: Sequence[str]) -> str:
    parts = ["longwave", "quickstart", *([text] if text else []), "--output", str(output), *overrides]
    return shlex.join(parts)


def _merge_metrics(output: Path) -> None:
    """Writes `metrics.jsonl`: the entries of both runs, each with the model's name."""
    entries = [{"model": name, **entry} for name in NAMES for entry in read_metrics(output / name / "metrics.jsonl")]
    write_metrics(output / "metrics.jsonl", entries)


def _figures(data: page.Report) -> dict[str, Any]:
    """The figures of the comparison as plain values."""
    speed = data.speed
    llama, subllm = data.models
    gap = final_gap(subllm, llama, comparable=True)
    return {
        "held_out_loss": {model.name: model.runs[0].final_loss for model in data.models},
        "relative_gap": gap and gap.mean,
        "retention": [level.final for level in subllm.levels],
        "training_selection_loss": subllm.selected_loss,
        "speed": [_speed_figures(row) for row in speed.rows],
        "machine_was_busy": speed.disturbed,
    }


def _speed_figures(row: page.SpeedRow) -> dict[str, Any]:
    """A row of the speed table as plain values, with the figure of each model under its key."""
    figures = {name: dataclasses.asdict(figure) for name, figure in row.figures.items()}
    return {"kind": row.kind, "label": row.label, "tokens": row.tokens, **figures}
