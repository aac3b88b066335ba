"""Fills the tables of docs/conversion.md from the figures in docs/conversion: `python tools/proof_page.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `results.json` has what evaluations found, by their
commands (tools/proof.py), `trainings.json` the last entry of every training; the others are conversions' records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from longwave.intervals import Interval, mean_interval

ROOT = Path(__file__).resolve().parents[1]
PAGE, FIGURES = ROOT / "docs/conversion.md", ROOT / "docs/conversion"
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_LENGTHS = (256, 512, 1024, 2048)
_SEEDS = {0: "cut", 1: "rules", 2: "cut-2"}  # of a conversion, and the folder of each

# What is known --------------------------------------------------------------------------------------------------------


@cache
def figures(name: str) -> Any:
    """A file of figures."""
    return json.loads((FIGURES / f"{name}.json").read_text())


def stage(folder: str, student: str) -> dict[str, Any]:
    """The last stage of a student in the record of a conversion."""
    return [one for one in figures(folder)["stages"] if one["student"] == student][-1]


def tokens(folder: str, student: str) -> int:
    """Tokens of a student's conversion, the alignment that it shares with others included."""
    return sum(one["tokens"] for one in figures(folder)["stages"] if one["student"] in ("", student))


def trained(*runs: str) -> int:
    """Tokens of trainings that followed each other."""
    return sum(figures("trainings")[run]["tokens"] for run in runs)


def recall(model: str, task: str = "single") -> dict[int, float]:
    """The shares of right answers of a model by length; empty where it was not asked."""
    found = [one for one in evaluations(model) for one in one["recall"] if one["task"] == task]
    return {one["length"]: one["accuracy"] for task in found for one in task["by_length"]}


def one_recall(model: str, length: int, task: str = "single") -> str:
    """The share of right answers of one model, with the interval that its samples leave."""
    found = [one for one in evaluations(model) for one in one["recall"] if one["task"] == task]
    asked = next(one for task in found for one in task["by_length"] if one["length"] == length)
    low, high = asked["interval"]
    return f"{share(asked['accuracy'])} ({low * 100:.1f} to {high * 100:.1f})"


def text_loss(model: str) -> float:
    """The loss of a model on all held-out text, by windows of 256."""
    return next(one["loss"] for one in evaluations(model) if "loss" in one)


def kept_of_text(model: str) -> list[float]:
    """The share of all held-out text that each level of a model keeps."""
    return next(one["retention"] for one in evaluations(model) if "loss" in one)


def evaluations(model: str) -> list[dict[str, Any]]:
    """What was found of the model in a folder."""
    found = [result for command, result in figures("results").items() if command.split()[2] == f"proof/{model}"]
    assert found, f"results.json: nothing of proof/{model}"
    return found


def finished(seed: int, student: str) -> str:
    """The folder of a finished student, with its stage where the conversion goes on in others."""
    return f"{_SEEDS[seed]}/models/{student}"


# Words ----------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(value: float) -> str:
    """A share as percent; what a t-interval says beyond 0 and 1 is cut."""
    return f"{min(max(value, 0.0), 1.0) * 100:.1f} %"


def spread(values: Sequence[float], shown: Callable[[float], str]) -> str:
    """A mean with its interval over seeds; without one for one value, and where all are alike."""
    found = mean_interval(values)
    return shown(found.mean) if found.low in (None, found.high) else f"{shown(found.mean)} {_between(found, shown)}"


def _between(found: Interval, shown: Callable[[float], str]) -> str:
    assert found.low is not None
    assert found.high is not None
    return f"({shown(found.low).removesuffix(' %')} to {shown(found.high).removesuffix(' %')})"


def nats(value: float) -> str:
    """A loss."""
    return f"{value:.3f}"


# The tables -----------------------------------------------------------------------------------------------------------


def students() -> str:
    """All students: loss, divergence and recall by length, means over seeds."""
    names = {
        "halo": "HALO's layer",
        "even": "the middle layer",
        "undistilled": "HALO's layer, not distilled",
        "kl": "the layer by KL",
        "last": "the last layer",
        "none": "no layer",
        "nope": "HALO's layer, without rotation, gated",
    }
    teacher = ["teacher", "`5F`", "-", "-", nats(stage("cut", "halo")["teacher"]["held_out_loss"]), "0"]
    found = [[*teacher, nats(text_loss("teacher/model")), *_recalled(["teacher/model"])]]
    for name, words in names.items():
        seeds = [seed for seed, folder in _SEEDS.items() if name in figures(folder)["students"]]
        ends = [stage(_SEEDS[seed], name)["figures"] for seed in seeds]
        layouts = {figures(_SEEDS[seed])["students"][name]["layout"] for seed in seeds}
        spent = [tokens(_SEEDS[seed], name) for seed in seeds]
        models = [finished(seed, name) for seed in seeds]
        kl = [one["held_out_kl"] for one in ends if "held_out_kl" in one]
        found.append(
            [
                words,
                " ".join(f"`{one}`" for one in sorted(layouts)),
                ", ".join(map(str, seeds)),
                f"{sum(spent) / len(spent):,.0f}",
                spread([one["held_out_loss"] for one in ends], nats),
                spread(kl, nats) if kl else "-",
                spread([text_loss(one) for one in models], nats),
                *_recalled(models),
            ]
        )
    header = ["", "model", "seeds", "tokens", "loss of the mix", "KL", "loss of text"]
    return table([*header, *(f"`single` at {length:,}" for length in _LENGTHS)], found)


def _recalled(models: Sequence[str]) -> list[str]:
    """Recall by length: the mean over the models of some seeds, or one with the interval of its samples."""
    if len(models) == 1:
        return [one_recall(models[0], length) for length in _LENGTHS]
    found = [recall(model) for model in models]
    return [spread([one[length] for one in found], share) for length in _LENGTHS]


def differences() -> str:
    """What HALO's layer is worth beside the controls, in points of recall, paired by seed."""
    rows = [
        [
            words,
            *(
                spread(
                    [recall(finished(seed, "halo"))[length] - recall(finished(seed, other))[length] for seed in _SEEDS],
                    lambda value: f"{value * 100:+.1f}",
                )
                for length in _LENGTHS
            ),
        ]
        for other, words in (("even", "less the middle layer"), ("undistilled", "less the one not distilled"))
    ]
    return table(["HALO's layer, points of recall", *(f"at {length:,}" for length in _LENGTHS)], rows)


def against_tokens() -> str:
    """Recall at the training window at several steps of the last stage."""
    rows = []
    for name, kind in (("halo", "distil"), ("kl", "distil"), ("undistilled", "next-token")):
        end = stage("rules", name)
        losses = {one["step"]: one["held_out_loss"] for one in end["curve"]}
        cells = []
        for step in (100, 200):
            folder = f"rules/stages/{kind}/{name}/checkpoints/step-{step:08}"
            cells.append(f"{one_recall(folder, 256)}; {nats(losses[step])}")
        last = f"{one_recall(finished(1, name), 256)}; {nats(end['figures']['held_out_loss'])}"
        rows.append([f"`{end['layout']}` {name}", nats(end["start"]["held_out_loss"]), *cells, last])
    curve = {one["step"]: one["tokens"] for one in stage("rules", "halo")["curve"]}
    shared = tokens("rules", "halo") - stage("rules", "halo")["tokens"]
    counts = [f"{shared + curve.get(step, 0):,} tokens" for step in (0, 100, 200, 400)]
    return table(["seed 1", *counts], rows)


def scratch() -> str:
    """A converted model beside the same hybrid from random weights, and the teacher."""
    rows, whole = [], trained("teacher-recall", "teacher")
    for words, spent, mix, model in _against_scratch():
        found = [nats(mix), nats(text_loss(model)), one_recall(model, 256), one_recall(model, 256, "copy")]
        rows.append([words, f"{spent:,} ({spent / whole:.0%})", *found])
    return table(["", "tokens", "loss of the mix", "loss of text", "`single` at 256", "`copy` at 256"], rows)


def _against_scratch() -> Iterable[tuple[str, int, float, str]]:
    for name in ("halo", "undistilled"):
        end = stage("cut", name)
        words = "converted" if name == "halo" else "converted, not distilled"
        yield f"`F 4L` {words}", tokens("cut", name), end["figures"]["held_out_loss"], finished(0, name)
    for name, first in (("25", "25-recall"), ("100", "recall")):
        spent, loss = trained(f"scratch/{first}", f"scratch/{name}"), figures("trainings")[f"scratch/{name}"]
        yield f"`F 4L` from scratch, {name} %", spent, loss["held_out_loss"], f"scratch/{name}/model"


def subllm() -> str:
    """A SUBLLM out of the teacher beside the Llama that learned from the same tokens."""
    rows = []
    for name in ("llama", "subllm"):
        one, model = stage("subllm", name), f"subllm/models/{name}"
        kept = [*one["figures"].get("retention", []), *kept_of_text(model)]
        rows.append(
            [
                f"`{one['layout']}`",
                f"{one['tokens']:,}",
                nats(one["start"]["held_out_loss"]),
                nats(one["figures"]["held_out_loss"]),
                nats(text_loss(model)),
                one_recall(model, 256),
                one_recall(model, 256, "copy"),
                ", ".join(f"{value:.2f}" for value in kept) or "-",
            ]
        )
    names = ["", "tokens", "begins at", "loss of the mix", "loss of text", "`single` at 256", "`copy` at 256"]
    names += ["kept of the mix, of text"]
    return table(names, rows)


def sparse() -> str:
    """A dense model, switched to block-sparse attention, and tuned."""
    rows = []
    begins = stage("sparse", "tuned")["start"]["held_out_loss"]
    for name, words in (("switched", "switched, not tuned"), ("tuned", "tuned"), ("dense", "dense, tuned as long")):
        known = [one for one in figures("sparse")["stages"] if one["student"] == name]
        spent = f"{known[-1]['tokens']:,}" if known else "0"
        mix = known[-1]["figures"]["held_out_loss"] if known else begins
        model = f"sparse/models/{name}"
        rows.append(
            [
                words,
                f"`{figures('sparse')['students'][name]['layout']}`",
                spent,
                nats(mix),
                nats(text_loss(model)),
                one_recall(model, 256),
                one_recall(model, 512),
                one_recall(model, 256, "copy"),
            ]
        )
    names = ["", "model", "tokens", "loss of the mix", "loss of text", "`single` at 256", "at 512", "`copy` at 256"]
    return table(names, rows)


def stories() -> str:
    """Students of a model that others trained: loss and divergence on what it wrote and they never read."""
    rows = [["the source", "`5F`", "-", "-", nats(figures("stories-positions")["teacher"]["loss"]), "-", "0"]]
    for name in ("hybrid", "subllm"):
        one, found = stage("stories", name), figures("stories-positions")[f"proof/stories/models/{name}"]
        rows.append(
            [
                name,
                f"`{one['layout']}`",
                f"{tokens('stories', name) if 'L' in one['layout'] else one['tokens']:,}",  # only L was aligned
                nats(one["start"]["held_out_loss"]),
                nats(found["loss"]),
                nats(one["start"]["held_out_kl"]),
                nats(one["figures"]["held_out_kl"]),
            ]
        )
    return table(["", "model", "tokens", "begins at", "loss of fresh text", "KL at first", "KL"], rows)


def positions() -> str:
    """The divergence of the same students by the place in a text."""
    known = {name: figures("stories-positions")[f"proof/stories/models/{name}"]["kl"] for name in ("hybrid", "subllm")}
    places = list(known["hybrid"])
    return table(
        ["KL, tokens up to place", *places],
        [[name, *(nats(found[place]) for place in places)] for name, found in known.items()],
    )


TABLES: dict[str, Callable[[], str]] = {
    "students": students,
    "differences": differences,
    "against-tokens": against_tokens,
    "scratch": scratch,
    "subllm": subllm,
    "sparse": sparse,
    "stories": stories,
    "positions": positions,
}


def filled(page: str) -> str:
    """The page with its tables as the figures have them."""
    return _TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf8")), encoding="utf8")
