"""`longwave quickstart`: a Llama, a SUBLLM and a SALA of one shape, trained on real text and compared by measurement.

It is a comparison of three recipes (`comparison.compare`) on text that it prepares, with more to look at: samples of
text, a passage token by token, and how the costs of each model grow with the context.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longwave import files, machine, trial
from longwave.api import load
from longwave.benchmarks.growth import COMPUTED, MEASURED, Growth, measure_growth
from longwave.benchmarks.models import Transformers
from longwave.comparison.budgets import Budget
from longwave.comparison.compare import Comparing, Options
from longwave.comparison.page import report_of, run_facts
from longwave.comparison.results import Result
from longwave.comparison.runs import Candidate
from longwave.comparison.speed import SPEED, Measurement, Models, measured, now, time_models
from longwave.comparison.summary import summarised
from longwave.data.prepared import PreparedInfo, iter_documents
from longwave.data.shards import prepare
from longwave.data.sources import Source, documents, standard_library
from longwave.data.tokenizer import Tokenizer
from longwave.engine.sampling import Sampling
from longwave.errors import MachineError, UserError, require
from longwave.files.jsonfile import to_json
from longwave.inference.text import complete
from longwave.inspection.source import pieces
from longwave.inspection.trace import by_token, trace_levels
from longwave.model import Decoder
from longwave.progress import say
from longwave.recipes import recipe_path
from longwave.reports import content as page
from longwave.reports.report import write_report
from longwave.reports.words import headline
from longwave.training.metrics import METRICS, read_metrics, write_metrics
from longwave.training.recipe import Recipe, read_recipe

NAMES = {"llama": "Llama", "subllm": "SUBLLM", "sala": "SALA"}
_TITLES = {"transformers": "transformers Llama", "Llama": "longwave Llama"}  # of columns; the others have their names
_PROMPT_TOKENS, _NEW_TOKENS, _PASSAGE_TOKENS = 48, 64, 700
_GROWTH_SECONDS = 60.0
_BESIDE_TRAINING = 150.0  # seconds, about: preparing text, evaluating, generating, timing and measuring growth


def quickstart(
    text: str | None, output: Path, overrides: Sequence[str] = (), measure_again: bool = False
) -> dict[str, Any]:
    """Runs or continues the comparison and returns its figures.

    text: the user's file or folder of text, or None for the Python standard library. measure_again: times the models
    anew, where an earlier run has timed them, on a machine that was busy for example.
    Raises UserError for text that cannot be used, and for an output folder that holds another comparison or to which
    another process is writing.
    """
    started, asked = time.monotonic(), _Asked(text, output, overrides)
    with files.locked(output):
        info = _prepared(text, asked.data, overrides)
    results = _trained(asked)
    with files.locked(output):
        speed = _measured(output, results, measure_again)
        say("evaluating and generating")
        facts = _run_facts(text, info, results, time.monotonic() - started)
        data = _report(asked, results, speed, facts)
        _merge_metrics(output)
        figures = _figures(data, results)
        files.write_file(output / "results.json", f"{to_json(figures, indent=2)}\n".encode())
        write_report(data, output / "report.html")
    for line in headline(data):
        print(f"{line.title}: {line.value}. {line.sentence}")
    if data.speed.disturbed:
        print(f"{data.speed.note} {_again(output)}")
    print(f"{output / 'report.html'}: open it in a browser ({time.monotonic() - started:.0f} s in all)")
    return figures


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What the user asked for."""

    text: str | None
    output: Path
    overrides: Sequence[str]

    @property
    def data(self) -> Path:
        """The folder of the prepared text."""
        return self.output / "data"

    @property
    def command(self) -> str:
        """The command line that does the same."""
        text = [self.text] if self.text else []
        return shlex.join(["longwave", "quickstart", *text, "--output", str(self.output), *self.overrides])

    def candidate(self, name: str) -> Candidate:
        """A model of the comparison, whose only run lies in the folder of its name."""
        words = _words(self.data, self.overrides)
        found = Candidate.read(str(recipe_path(f"quickstart-{name}")), words, NAMES[name])
        return dataclasses.replace(found, place=name)


def _words(data: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides of a recipe: this machine's, then the user's, then the data.

    Muon computes in bf16, and takes longer than all the rest of a step where the hardware does not.
    """
    own = ["training.precision=bf16"] if machine.fast_bf16() else ["optimizer.kind=adamw", "optimizer.lr=1.5e-3"]
    return [*own, *overrides, f"data.folder={data}"]


def _recipe(name: str, data: Path, overrides: Sequence[str]) -> Recipe:
    return read_recipe(recipe_path(f"quickstart-{name}"), _words(data, overrides))


def _trained(asked: _Asked) -> list[Result]:
    """Trains the models, or goes on; returns their results in the order of `NAMES`."""
    recipe = _recipe("llama", asked.data, asked.overrides)
    options = Options(seeds=(recipe.training.seed,), progress=True)
    comparing = Comparing([asked.candidate(name) for name in NAMES], [_budget(recipe)], asked.output, options)
    if not any((asked.output / name).exists() for name in NAMES):
        seconds = comparing.expected().seconds + _BESIDE_TRAINING
        say(f"this will take about {max(1, round(seconds / 60))} minutes; stopped, the same command goes on")
    results = comparing.run()[0]
    for one in results:
        if one.ended:
            raise MachineError(f"{one.model}: {one.ended}; give another --output")
    return results


def _budget(recipe: Recipe) -> Budget:
    """The budget that is in the recipes: FLOPs, or a number of steps."""
    run = recipe.training
    tokens = recipe.steps * run.batch_windows * run.window
    return Budget("tokens", tokens) if run.flops is None else Budget("flops", run.flops)


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


def _generations(model: Decoder, data: Path) -> list[page.Generation]:
    tokenizer = Tokenizer.load(data)
    prompts = [tokenizer.decode(document[1:][:_PROMPT_TOKENS].tolist()) for document in _held_out(data, 2)]
    sampling = Sampling(temperature=0.7, top_p=0.95)
    texts = complete(model, tokenizer, prompts, max_new_tokens=_NEW_TOKENS, sampling=sampling)
    return [page.Generation(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def _held_out(data: Path, count: int) -> list[Any]:
    """The first `count` held-out documents that are twice as long as a prompt; shorter ones where these are too few."""
    some = [document for _, document in zip(range(200), iter_documents(data), strict=False)]
    return sorted(some, key=lambda document: len(document) < 2 * _PROMPT_TOKENS)[:count]


# Speed and growth -----------------------------------------------------------------------------------------------------


def _measured(output: Path, results: Sequence[Result], again: bool) -> Measurement:
    """The speed of the models: as it was measured before, or measured now, which takes two minutes."""
    path, folders = output / SPEED, {one.model: Path(one.folder) / "model" for one in results}
    if again:
        path.unlink(missing_ok=True)
    started = now()
    found = measured(folders, path, partial(_measure, recipe=results[0].recipe, data=output / "data"))
    if found.when < started:
        say(f"speed: as measured {found.when}; {_again(output)}")
    return found


def _again(output: Path) -> str:
    return f"`longwave quickstart --output {shlex.quote(str(output))} --measure-again` measures it again"


def _measure(models: Models, recipe: Mapping[str, Any], data: Path) -> Measurement:
    say(f"timing {', '.join(models)}, and transformers' Llama with the same weights")
    growth = _growth(models, data)  # first, since timing a training step changes the weights
    speed = time_models(models, recipe, beside=[Transformers(models["Llama"])])
    return Measurement(now(), {}, dataclasses.replace(speed, columns={**speed.columns, **_TITLES}), growth)


def _growth(models: Models, data: Path) -> Growth:
    """How times and states grow from 1k to 64k tokens, measured in a minute, and computed on to 1M."""
    say(f"reading on to {MEASURED[-1]:,} tokens, for {_GROWTH_SECONDS:.0f} s")
    ids = torch.cat([torch.from_numpy(document.astype("int64")) for document in _held_out(data, 200)])
    contexts = trial.contexts(MEASURED)
    return measure_growth(models, dict.fromkeys(models, ids), _GROWTH_SECONDS, contexts, (*contexts, *COMPUTED))


# The page -------------------------------------------------------------------------------------------------------------


def _report(asked: _Asked, results: Sequence[Result], speed: Measurement, facts: Sequence[page.Fact]) -> page.Report:
    found = report_of(summarised(results), asked.command)
    models = {name: load(asked.output / key / "model") for key, name in NAMES.items()}
    shown = [dataclasses.replace(one, generations=_generations(models[one.key], asked.data)) for one in found.models]
    return dataclasses.replace(
        found,
        title="longwave quickstart",
        subtitle="A Llama, a SUBLLM and a SALA of one shape, trained on the same tokens.",
        models=shown,
        run=facts,
        speed=speed.speed,
        growth=speed.growth,
        passage=_passage(models["SUBLLM"], asked.data),
        notes=_notes(results),
    )


def _passage(model: Decoder, data: Path) -> page.Passage:
    tokenizer = Tokenizer.load(data)
    ids = _held_out(data, 1)[0][: min(_PASSAGE_TOKENS, model.config.context_window)].tolist()
    shown = zip(pieces(tokenizer, ids), by_token(trace_levels(model, ids), len(ids)), strict=True)
    tokens = [page.PassageToken(piece.text, token.kept, token.scores, piece.label) for piece, token in shown]
    return page.Passage("held-out text", tokens, code=True)


def _notes(results: Sequence[Result]) -> list[str]:
    kept = ", ".join(f"{share:.0%}" for one in results for share in one.retention)
    return [
        f"All models saw the same {results[0].tokens:,} tokens in the same order, with one seed. That is a few minutes "
        "of training: enough to show that everything works and what it costs, not what any of the models can learn.",
        "SUBLLM ran in threshold mode, as it does when it generates: of the tokens entering each level it kept "
        f"{kept} of all held-out text. The retention charts follow training windows, and the bounds of speed count "
        "what was kept of the text that was timed: other texts, so the shares differ a little.",
        "Timings are medians of interleaved repeats on this machine; a model this small spends much of its time "
        "outside matrix products, so gains lie below those of a larger one.",
    ]


def _run_facts(text: str | None, info: PreparedInfo, results: Sequence[Result], session: float) -> list[page.Fact]:
    facts = {
        "text": text or "Python standard library, sources and docstrings",
        "documents": f"{info.train.documents:,} for training, {info.held_out.documents:,} held out",
        "tokens prepared": f"{info.train.tokens:,} for training, {info.held_out.tokens:,} held out",
        **run_facts(results[0]),
        **{f"time, {one.model}": one.seconds.words() for one in results},
        "time, last session": f"{session:.0f} s up to this page, whatever it did of all this",
    }
    return [page.Fact(label, value) for label, value in facts.items()]


def _merge_metrics(output: Path) -> None:
    """Writes `metrics.jsonl`: the entries of all runs, each with the model's name."""
    entries = [{"model": name, **entry} for name in NAMES for entry in read_metrics(output / name / METRICS)]
    write_metrics(output / METRICS, entries)


def _figures(data: page.Report, results: Sequence[Result]) -> dict[str, Any]:
    """The figures of the comparison as plain values."""
    llama, *others = results
    return {
        "held_out_loss": {one.model: one.loss for one in results},
        "relative_gap": {one.model: _gap(one, llama) for one in others},
        "retention": {one.model: list(one.retention) for one in results if one.retention},
        "training_selection_loss": {one.model: one.training_loss for one in results if one.retention},
        "speed": [_speed_figures(row) for row in data.speed.rows],
        "growth": data.growth
        and {one.model: [point._asdict() for point in one.measured] for one in data.growth.curves},
        "machine_was_busy": data.speed.disturbed,
    }


def _gap(own: Result, other: Result) -> float | None:
    """How much higher a loss is, relative; None where one is not known."""
    return None if own.loss is None or other.loss is None else own.loss / other.loss - 1


def _speed_figures(row: page.SpeedRow) -> dict[str, Any]:
    """A row of the speed table as plain values, with the figure of each model under its key."""
    figures = {name: dataclasses.asdict(figure) for name, figure in row.figures.items()}
    return {"kind": row.kind, "label": row.label, "tokens": row.tokens, **figures}
