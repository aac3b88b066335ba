"""Reports for tests: as full, as bare and as hostile as they come; and pages as a parser and as Chromium see them."""

# ruff: noqa: RUF001 (the page writes ×, so the samples do)

import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from longwave.reports.content import (
    Bound,
    Figure,
    Generation,
    Grid,
    LossPoint,
    Missing,
    ModelRun,
    Passage,
    Report,
    RetentionLevel,
    SeedRun,
    Speed,
    SpeedRow,
    Statement,
)
from longwave.reports.page import Fact, PassageToken
from longwave.reports.report import write_report

HALF_AN_EMOJI = "\ud83e"  # what a token that ends inside a character can decode to
HOSTILE = (
    "</script><img src=x onerror=alert(1)><!-- {{data}} {{script}} & \u2028\u2029 \t\x00 日本語 🦙 'quoted\" \\u003c"
)

PROSE = (
    "The sea was not rough that evening, but never still. Captain Harrow stood at the rail, his pipe unlit,\n"
    "counting the gulls that wheeled above the wake, and thought of the letter folded in his breast pocket.\n\n"
    '"You will not find it," the harbour-master had said. "Nobody has, not in forty years."\n\n'
)


def fake_report(steps: int = 400, tokens: int = 600, seed: int = 0) -> Report:
    """A report of the shape and noise that a real quickstart gives."""
    draw = random.Random(seed)
    return Report(
        title="Llama and SUBLLM on The Riddle of the Sands",
        created="2026-03-14 09:26:53 +01:00",
        machine=[
            Fact("CPU", "AMD EPYC 9454, 2 cores"),
            Fact("Threads", "2"),
            Fact("Python", "3.11.9"),
            Fact("PyTorch", "2.11.0+cpu"),
            Fact("longwave", "0.1.0"),
        ],
        run=[
            Fact("Text", "riddle-of-the-sands.txt, 612 kB"),
            Fact("Documents", "28"),
            Fact("Tokens", "158,204 to train on, 8,326 held out"),
            Fact("Vocabulary", "4,096 byte-level BPE"),
            Fact("Window", "512 tokens, 8 per step"),
            Fact("Steps", f"{steps:,}"),
            Fact("Optimizer", "ScaledAdam, Eden schedule, base rate 0.03"),
            Fact("Duration", "Llama 4 min 12 s, SUBLLM 3 min 31 s"),
        ],
        models=[
            fake_model("llama", "Llama", 4_721_920, "6F", 4.02, steps, draw),
            fake_model("subllm", "SUBLLM", 4_722_944, "F subllm(0.64: F subllm(0.64: 2F) F) F", 4.11, steps, draw),
        ],
        baseline="llama",
        speed=fake_speed(),
        passage=Passage("riddle-of-the-sands.txt, held-out tokens 1,024 to 1,624", fake_tokens(tokens, draw)),
        notes=[
            "The SUBLLM ends 2.2% behind the Llama; at this budget several percent are to be expected.",
            "Prefill is faster, decoding is not: at 4.7 million parameters a step is ruled by overhead, not by bytes.",
            "Inference keeps 61% and 59% of the tokens entering each level, close to the 64% it was trained for.",
        ],
        command="longwave quickstart riddle-of-the-sands.txt --steps 400 --seed 0 --out runs/quickstart",
        subtitle="A Llama and a SUBLLM of one shape, trained on the same tokens.",
    )


def fake_model(
    key: str,
    name: str,
    parameters: int,
    layout: str,
    final: float,
    steps: int,
    draw: random.Random,
    seeds: Sequence[int] = (0,),
) -> ModelRun:
    """A model with as many runs as seeds; with two levels if its layout has any."""
    levels = ("level 1", "level 2")[: layout.count("subllm")]
    return ModelRun(
        key,
        name,
        parameters,
        layout,
        runs=[_fake_run(final, "subllm" in layout, steps, seed, draw) for seed in seeds],
        levels=[_fake_level(level, 0.64, steps, draw) for level in levels],
        selected_loss=final - 0.0044 if levels else None,
        generations=[
            Generation(
                "The yacht lay",
                " in the channel, and the wind had gone round to the west.\n“We are too late,” said Davies.",
            ),
            Generation("I had read of", " the sands, and of the men who had been upon them in the night of the"),
        ],
    )


def _fake_run(final: float, cheap: bool, steps: int, seed: int, draw: random.Random) -> SeedRun:
    final += draw.gauss(0, 0.02) if seed else 0
    flops, seconds = (27e6, 0.62) if cheap else (35.4e6, 0.81)

    def loss(step: int) -> float:
        lag = cheap * 0.3 * math.exp(-(((step / steps - 0.15) / 0.12) ** 2))
        early = (8.4 - final) * math.exp(-step / (0.09 * steps)) + 0.5 * math.exp(-step / (0.4 * steps))
        return final + lag + early - 0.5 * math.exp(-1 / 0.4) * step / steps

    def point(step: int, noise: float) -> LossPoint:
        passed = step * seconds * (1 + 0.01 * seed)
        return LossPoint(step, 4096 * step, 4096 * step * flops, passed, loss(step) + noise)

    every = max(1, steps // 16)
    return SeedRun(
        seed,
        train=[point(step, draw.gauss(-0.05, 0.07)) for step in range(1, steps + 1)],
        held_out=[point(step, 0) for step in range(0, steps + 1, every)],
        final_loss=final,
        bits_per_byte=final / math.log(2) / 3.71,
    )


def _fake_level(name: str, target: float, steps: int, draw: random.Random) -> RetentionLevel:
    marks = range(1, steps + 1)

    def settle(start: float, end: float, noise: float) -> list[float]:
        return [
            min(1.0, max(0.0, end + (start - end) * math.exp(-s / (0.12 * steps)) + draw.gauss(0, noise)))
            for s in marks
        ]

    return RetentionLevel(
        name,
        target,
        list(marks),
        settle(1.0, target - 0.02, 0.012),
        settle(0.99, 0.47, 0.015),
        settle(0, 0.05, 0.006),
        settle(0.35, 0.03, 0.006),
        target - 0.03,
    )


COLUMNS = {"transformers": "transformers Llama", "llama": "longwave Llama", "subllm": "SUBLLM"}


def speed_row(kind: Any, label: str, tokens: int, *figures: Figure | Missing) -> SpeedRow:
    """A row of the columns above."""
    return SpeedRow(kind, label, tokens, dict(zip(COLUMNS, figures, strict=True)))


def fake_speed() -> Speed:
    flops, carried = (
        "FLOPs of both models at 61% and 59% of the tokens kept",
        "bytes of weights and state read per token",
    )
    none = Missing("transformers allocates its state as it goes, so there is no figure to read")
    rows = [
        speed_row(
            "prefill",
            "Prefill, 512 tokens",
            512,
            Figure(19.8, 19.1, 22.4),
            Figure(17.2, 16.8, 18.9),
            Figure(14.9, 14.5, 16.0, Bound(1.27, flops)),
        ),
        speed_row(
            "prefill",
            "Prefill, 2,048 tokens",
            2048,
            Figure(118, 115, 127),
            Figure(104, 102, 109),
            Figure(81.3, 80.2, 84.8, Bound(1.36, flops)),
        ),
        speed_row(
            "decode",
            "Decoding, per token, at 2,048 tokens",
            2048,
            Figure(5.31, 5.12, 6.20),
            Figure(2.87, 2.80, 3.02, Bound(1.9, "bytes over the bandwidth measured here", "floor")),
            Figure(3.11, 3.05, 3.30, Bound(1.31, carried)),
        ),
        speed_row(
            "training",
            "Training step, 8 × 512 tokens",
            4096,
            Missing("not timed: quickstart trains with longwave only"),
            Figure(604, 588, 671),
            Figure(502, 490, 566, Bound(1.25, flops)),
        ),
        speed_row(
            "memory",
            "State at 2,048 tokens",
            2048,
            none,
            Figure(12_582_912, 12_582_912, 12_582_912),
            Figure(8_912_896, 8_912_896, 8_912_896, Bound(1.41, "keys and values of the kept tokens only")),
        ),
    ]
    return Speed(COLUMNS, rows)


def fake_tokens(count: int, draw: random.Random) -> list[PassageToken]:
    pieces = re.findall(r"\n+| ?\w{1,5}| ?[^\w\n]", PROSE)
    tokens = []
    for index in range(count):
        first, second = draw.gauss(0.3, 0.8), draw.gauss(0.25, 0.7)
        kept = [] if first <= 0 else [0] if second <= 0 else [0, 1]
        tokens.append(PassageToken(pieces[index % len(pieces)], kept, (first, second if kept else None)))
    return tokens


def hostile_report() -> Report:
    """The fake report with hostile text in every place that takes text."""
    data = fake_report(steps=5, tokens=3)
    return dataclasses.replace(
        data,
        title=HOSTILE,
        created=HOSTILE,
        subtitle=HOSTILE,
        machine=[Fact(HOSTILE, HOSTILE)],
        run=[Fact(HOSTILE, HOSTILE)],
        models=[
            dataclasses.replace(model, name=HOSTILE, layout=HOSTILE, generations=[Generation(HOSTILE, HOSTILE)])
            for model in data.models
        ],
        speed=Speed(
            dict.fromkeys(COLUMNS, HOSTILE),
            [speed_row("prefill", HOSTILE, 512, Missing(HOSTILE), *list(data.speed.rows[0].figures.values())[1:])],
        ),
        passage=Passage(HOSTILE, [PassageToken(HOSTILE, [0], None), PassageToken("\n\n", [], (-0.5,))], code=True),
        notes=[HOSTILE],
        command=HOSTILE,
    )


def bare_report() -> Report:
    """The least a report can hold: one point per curve, no levels, no passage, nothing measured."""
    run = SeedRun(0, [LossPoint(0, 0, 0, 0, 5.0)], [LossPoint(0, 0, 0, 0, 5.1)], 5.1, 2.0)
    model = ModelRun("llama", "Llama", 10, "F", [run])
    empty = dataclasses.replace(run, train=[], held_out=[])
    missing = Missing("no time was left")
    return Report(
        title="Bare",
        created="2026-01-01T00:00:00Z",
        models=[model, dataclasses.replace(model, key="subllm", name="SUBLLM", runs=[empty])],
        baseline="llama",
        speed=Speed(COLUMNS, [speed_row("prefill", "Prefill, 8 tokens", 8, missing, missing, missing)]),
    )


def three_models() -> Report:
    """The bare report with a third model between the two, and the last one as the baseline."""
    data = bare_report()
    llama, subllm = data.models
    third = dataclasses.replace(llama, key="sala", name="SALA", runs=ended(4.59))
    figures = {"subllm": Figure(10, 10, 10), "sala": Figure(5, 5, 5), "llama": Missing("it crashed")}
    return dataclasses.replace(
        data,
        models=[llama, third, subllm],
        baseline="subllm",
        speed=Speed({key: key.upper() for key in figures}, [SpeedRow("decode", "Per token", 8, figures)]),
    )


def ended(*losses: float) -> list[SeedRun]:
    """Runs without curves that ended at these losses, of the seeds 0, 1, ..."""
    return [SeedRun(seed, [], [], loss, loss / 2.5) for seed, loss in enumerate(losses)]


def twelve_runs(steps: int = 2400) -> Report:
    """A comparison of four models in three seeds each, with grids and statements; no speed, passage or samples."""
    draw, seeds = random.Random(1), (0, 1, 2)
    deep, layout = "2F subllm(0.64: F subllm(0.64: 6F) F) 2F", "2F subllm(0.64: F subllm(0.64: 2F) F) 2F"
    models = [
        fake_model("8F", "Llama", 4_721_920, "8F", 4.31, steps, draw, seeds),
        fake_model("6F", "smaller Llama", 3_832_112, "6F", 4.25, steps, draw, seeds),
        fake_model("subllm", "SUBLLM", 4_722_944, layout, 4.35, steps, draw, seeds),
        fake_model("deep", "deep SUBLLM", 6_722_944, deep, 4.20, steps, draw, seeds),
    ]
    models = [dataclasses.replace(model, setting="optimizer.lr = 3e-3", generations=()) for model in models]
    rates = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
    return Report(
        title="Llama, SUBLLM and what it saves",
        created="2026-03-14 09:26:53 +01:00",
        models=models,
        baseline="8F",
        subtitle="Four models at 2.46M tokens, three seeds each.",
        statements=[
            Statement("deep SUBLLM is 1.9 to 3.2% lower than Llama at equal tokens (3 seeds).", "better"),
            Statement("SUBLLM is 0.2 to 1.4% higher than Llama at equal tokens (3 seeds).", "worse"),
            Statement("smaller Llama and Llama are not told apart at equal tokens (3 seeds).", "same"),
        ],
        grids=[
            Grid(model.key, "optimizer.lr", rates, [round(4.9 - i * 0.1, 1), 4.45, 4.3, 4.4 if i else None], 3e-3)
            for i, model in enumerate(models[:3])
        ]
        + [Grid("deep", "optimizer.lr", rates, [4.8, 4.5, 4.3, 4.2], 6e-3, at_edge=True)],
        notes=["Every model ran at the best rate of its own grid."],
        run=[Fact("Tokens", "2.46M a run"), Fact("Seeds", "0, 1, 2")],
        machine=[Fact("CPU", "AMD EPYC 9454, 2 cores")],
        command="longwave compare llama-8f llama-6f subllm deep --tokens 2.46M --seeds 0,1,2 --output runs/worth",
    )


class Page(HTMLParser):
    """The page as a parser sees it: its tags, its attributes, and the text of its data block."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.data, self.title, self._inside = "", "", ""
        self.text = path.read_text("utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._inside = "data" if ("id", "data") in attrs else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("data", "title"):
            setattr(self, self._inside, getattr(self, self._inside) + data)

    @property
    def content(self) -> dict[str, Any]:
        """What the data block holds."""
        return json.loads(self.data)

    @property
    def report(self) -> dict[str, Any]:
        """The part of it that the page shows as it is."""
        return self.content["report"]


def written(data: Report, folder: Path) -> Page:
    """The page of a report."""
    write_report(data, folder / "report.html")
    return Page(folder / "report.html")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def drawn(data: Report, folder: Path, then: str = "") -> str:
    """A report's elements after its script has run, and after it a script of the test's own if there is one."""
    write_report(data, folder / "report.html")
    return drawn_file(folder / "report.html", then)


def drawn_file(path: Path, then: str = "") -> str:
    """The same for a page that has been written."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page was not drawn in a browser")
    if then:  # the page's policy forbids any script but its own
        page = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text("utf-8"))
        path.write_text(page.replace("</body>", f"<script>{then}</script></body>"), "utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --window-size=1280,2000 --virtual-time-budget=2000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={path.parent / 'profile'}", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=True).stdout


def is_ready(page: str) -> bool:
    """Whether the page was drawn to its end, without an error."""
    root = page[page.index("<html") : page.index("<head")]
    return 'data-ready="true"' in root and "data-error" not in root
