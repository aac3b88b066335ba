"""The report page: it holds exactly its data, no text can break out of it, and a browser draws all of it offline."""

# ruff: noqa: RUF001 (the page writes ×, so the tests read it)

import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from longwave.reports.report import (
    Bound,
    Fact,
    Figure,
    Generation,
    LossPoint,
    Missing,
    ModelRun,
    Passage,
    PassageToken,
    Report,
    Retention,
    RetentionLevel,
    Speed,
    SpeedRow,
    headline,
    relative_gap,
    write_report,
)

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
            _fake_model("llama", "Llama", 4_721_920, "6F", 4.02, steps, draw),
            _fake_model("subllm", "SUBLLM", 4_722_944, "F subllm(0.64: F subllm(0.64: 2F) F) F", 4.11, steps, draw),
        ],
        baseline="llama",
        retention=Retention(
            [_fake_level("level 1", 0.64, steps, draw), _fake_level("level 2", 0.64, steps, draw)], 4.1079, 4.1123
        ),
        speed=_fake_speed(),
        passage=Passage("riddle-of-the-sands.txt, held-out tokens 1,024 to 1,624", _fake_tokens(tokens, draw)),
        notes=[
            "The SUBLLM ends 2.2% behind the Llama; at this budget several percent are to be expected.",
            "Prefill is faster, decoding is not: at 4.7 million parameters a step is ruled by overhead, not by bytes.",
            "Inference keeps 61% and 59% of the tokens entering each level, close to the 64% it was trained for.",
        ],
        command="longwave quickstart riddle-of-the-sands.txt --steps 400 --seed 0 --out runs/quickstart",
        subtitle="A Llama and a SUBLLM of one shape, trained on the same tokens.",
    )


def _fake_model(
    key: str, name: str, parameters: int, layout: str, final: float, steps: int, draw: random.Random
) -> ModelRun:
    def loss(step: int) -> float:
        return final + (8.4 - final) * math.exp(-step / (0.09 * steps)) + 0.5 * math.exp(-step / (0.4 * steps))

    def lag(step: int) -> float:
        return (name == "SUBLLM") * 0.3 * math.exp(-(((step / steps - 0.15) / 0.12) ** 2))

    modes = ("threshold", "top-k") if name == "SUBLLM" else ("",)
    every = max(1, steps // 16)
    return ModelRun(
        key,
        name,
        parameters,
        layout,
        train=[LossPoint(step, loss(step) + draw.gauss(-0.05, 0.07)) for step in range(1, steps + 1)],
        held_out=[
            LossPoint(step, loss(step) + lag(step) + 0.01 * (mode == "top-k"), mode)
            for mode in modes
            for step in range(0, steps + 1, every)
        ],
        final_loss=final,
        bits_per_byte=final / math.log(2) / 3.71,
        perplexity=math.exp(final),
        generations=[
            Generation(
                "The yacht lay",
                " in the channel, and the wind had gone round to the west.\n“We are too late,” said Davies.",
            ),
            Generation("I had read of", " the sands, and of the men who had been upon them in the night of the"),
        ],
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


def _fake_speed() -> Speed:
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


def _fake_tokens(count: int, draw: random.Random) -> list[PassageToken]:
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
    model = ModelRun("llama", "Llama", 10, "F", [LossPoint(0, 5.0)], [LossPoint(0, 5.1)], 5.1, 2.0, 164.0)
    missing = Missing("no time was left")
    return Report(
        title="Bare",
        created="2026-01-01T00:00:00Z",
        machine=[],
        run=[],
        models=[model, dataclasses.replace(model, key="subllm", name="SUBLLM", train=[], held_out=[])],
        baseline="llama",
        retention=Retention(),
        speed=Speed(COLUMNS, [speed_row("prefill", "Prefill, 8 tokens", 8, missing, missing, missing)]),
        passage=Passage(),
        notes=[],
        command="",
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
    def report(self) -> dict:
        return json.loads(self.data)["report"]


def written(data: Report, folder: Path) -> Page:
    write_report(data, folder / "report.html")
    return Page(folder / "report.html")


@pytest.mark.parametrize("make", [fake_report, hostile_report, bare_report])
def test_the_page_holds_exactly_its_data(make, tmp_path):
    data = make()
    assert written(data, tmp_path).report == json.loads(json.dumps(dataclasses.asdict(data)))


def test_half_a_character_survives(tmp_path):
    data = dataclasses.replace(bare_report(), title=HALF_AN_EMOJI, notes=[HALF_AN_EMOJI])
    assert written(data, tmp_path).report["notes"] == [HALF_AN_EMOJI]


def test_hostile_text_adds_no_element_and_ends_no_script(tmp_path):
    calm, hostile = written(fake_report(), tmp_path), written(hostile_report(), tmp_path)
    assert hostile.tags == calm.tags
    assert hostile.title.startswith("</script><img src=x onerror=alert(1)>")
    assert "<img" not in hostile.text
    assert hostile.text.count("</script>") == 2


@pytest.mark.parametrize("make", [fake_report, hostile_report, bare_report])
def test_nothing_is_fetched_from_anywhere(make, tmp_path):
    page = written(make(), tmp_path)
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", page.text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", page.text)
    loads = {(tag, name): value for tag, name, value in page.attributes if name in ("src", "href", "srcset", "data")}
    assert loads == {("link", "href"): "data:,"}


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    data = bare_report()
    diverged = dataclasses.replace(data.models[1], train=[LossPoint(1, math.nan)], final_loss=math.inf)
    page = written(dataclasses.replace(data, models=[data.models[0], diverged]), tmp_path)
    assert page.report["models"][1]["train"] == [[1, None, ""]]
    assert page.report["models"][1]["final_loss"] is None
    assert "NaN" not in page.data
    assert "Infinity" not in page.data


def test_a_large_report_stays_far_below_two_megabytes(tmp_path):
    write_report(fake_report(steps=2000, tokens=2000), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 1_200_000


def test_a_failed_write_leaves_the_old_page_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def refuse(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.rename", refuse)
    with pytest.raises(OSError, match="no space"):
        write_report(bare_report(), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_series_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="level 1: live has 1 values; steps has 2"):
        RetentionLevel("level 1", 0.64, [1, 2], [1.0, 1.0], [0.5], [0.0, 0.0], [0.0, 0.0])


# The wording of the headline


def test_the_headline_says_what_was_measured():
    loss, prefill, decode, memory = headline(fake_report())
    assert (loss.value, loss.verdict) == ("2.2% higher", "worse")
    assert "SUBLLM ends at 4.110 on held-out text, Llama at 4.020" in loss.sentence
    assert (prefill.value, prefill.verdict) == ("×1.28 faster", "better")
    assert "Prefill, 2,048 tokens: SUBLLM 81.3 ms, longwave Llama 104 ms." in prefill.sentence
    assert "bound is ×1.36, of which 94% was reached (FLOPs" in prefill.sentence
    assert (decode.value, decode.verdict) == ("×1.08 slower", "worse")
    assert (memory.value, memory.verdict) == ("×1.41 smaller", "better")
    assert "8.50 MiB, longwave Llama 12.0 MiB" in memory.sentence


@pytest.mark.parametrize(
    ("llama", "subllm", "value", "verdict"),
    [
        (Figure(10, 9, 12), Figure(9.5, 9, 11), "×1.05 faster", "same"),
        (Figure(10, 10, 10), Figure(10, 10, 10), "level", "same"),
        (Figure(10, 10, 10), Figure(30, 29, 31), "×3.00 slower", "worse"),
        (Figure(10, 10, 10), Figure(0, 0, 0), "—", "unknown"),
        (Figure(10, 10, 10), Missing("it crashed"), "—", "unknown"),
    ],
)
def test_the_headline_claims_no_more_than_the_figures(llama, subllm, value, verdict):
    row = speed_row("prefill", "Prefill", 64, Missing("no"), llama, subllm)
    found = headline(dataclasses.replace(bare_report(), speed=Speed(COLUMNS, [row])))[1]
    assert (found.value, found.verdict) == (value, verdict)
    if value == "×1.05 faster":
        assert "may be noise" in found.sentence
    if isinstance(subllm, Missing):
        assert "it crashed" in found.sentence


def timed(*rounds: float, bound: float | None = None) -> Figure:
    """A figure of so many rounds."""
    return Figure(
        sorted(rounds)[len(rounds) // 2], min(rounds), max(rounds), bound and Bound(bound, "FLOPs"), rounds=rounds
    )


@pytest.mark.parametrize(
    ("llama", "subllm", "value", "verdict", "says"),
    [
        # a machine that became three times slower on the way: the spreads overlap, and every round says the same
        (timed(10, 10, 30), timed(5, 5, 15), "×2.00 faster", "better", "SUBLLM 5.00 ms"),
        # medians of the same two figures, and rounds that contradict each other
        (timed(10, 12, 20), timed(11, 10, 16), "×1.20 faster", "same", "From round to round it was ×0.91 to ×1.25"),
        (timed(10, 10, 10), timed(5, 5, 5, bound=1.6), "×2.00 faster", "better", "beyond the computed bound of ×1.60"),
        (timed(10, 10, 10), timed(5, 5, 5, bound=2.5), "×2.00 faster", "better", "×2.50, of which 80% was reached"),
        (timed(10, 10), timed(5, 0), "—", "unknown", "SUBLLM"),
    ],
)
def test_figures_that_were_timed_in_turn_are_compared_round_by_round(llama, subllm, value, verdict, says):
    row = speed_row("prefill", "Prefill", 64, Missing("no"), llama, subllm)
    found = headline(dataclasses.replace(bare_report(), speed=Speed(COLUMNS, [row])))[1]
    assert (found.value, found.verdict) == (value, verdict)
    assert says in found.sentence
    assert "117%" not in found.sentence


def test_the_page_says_how_busy_the_machine_was_and_why_figures_differ(tmp_path):
    data = bare_report()
    speed = dataclasses.replace(data.speed, note="This machine was busy.", disturbed=True)
    page = drawn(dataclasses.replace(data, speed=speed, curve_note="Of the first 4 of 9 windows."), tmp_path)
    assert '<p id="speed-words" class="alarm">This machine was busy.</p>' in page
    assert "Of the first 4 of 9 windows." in page


@pytest.mark.parametrize(
    ("loss", "value", "verdict"),
    [(5.1, "level", "same"), (4.59, "10.0% lower", "better"), (math.inf, "—", "unknown")],
)
def test_the_loss_gap_in_words(loss, value, verdict):
    data = bare_report()
    models = [data.models[0], dataclasses.replace(data.models[1], final_loss=loss)]
    found = headline(dataclasses.replace(data, models=models))[0]
    assert (found.value, found.verdict) == (value, verdict)


def test_the_gap_is_relative_to_the_baseline():
    llama, subllm = fake_report().models
    assert relative_gap(subllm, llama) == pytest.approx(4.11 / 4.02 - 1)
    assert relative_gap(llama, llama) == 0


# Any number of models


def three_models() -> Report:
    """The bare report with a third model between the two, and the last one as the baseline."""
    data = bare_report()
    llama, subllm = data.models
    third = dataclasses.replace(llama, key="sala", name="SALA", final_loss=4.59)
    figures = {"subllm": Figure(10, 10, 10), "sala": Figure(5, 5, 5), "llama": Missing("it crashed")}
    return dataclasses.replace(
        data,
        models=[llama, third, subllm],
        baseline="subllm",
        speed=Speed({key: key.upper() for key in figures}, [SpeedRow("decode", "Per token", 8, figures)]),
    )


def test_every_model_is_compared_with_the_baseline():
    found = {one.label: one.value for one in headline(three_models())}
    assert found == {
        "Held-out loss, Llama": "level",
        "Held-out loss, SALA": "10.0% lower",
        "Reading a prompt, Llama": "—",
        "Reading a prompt, SALA": "—",
        "Writing a token, Llama": "—",
        "Writing a token, SALA": "×2.00 faster",
        "Memory of the context, Llama": "—",
        "Memory of the context, SALA": "—",
    }
    writing = {one.label: one.sentence for one in headline(three_models()) if "Writing" in one.label}
    assert "it crashed" in writing["Writing a token, Llama"]
    assert "SALA 5.00 ms, SUBLLM 10.0 ms" in writing["Writing a token, SALA"]


def test_a_lone_model_is_compared_with_nothing():
    data = bare_report()
    (only,) = headline(dataclasses.replace(data, models=data.models[:1]))
    assert (only.value, only.sentence) == ("—", "No second model to compare with.")


def test_the_page_holds_the_cells_of_every_column(tmp_path):
    page = json.loads(written(three_models(), tmp_path).data)
    assert page["columns"] == ["SUBLLM", "SALA", "LLAMA"]
    ((baseline, sala, llama),) = page["cells"]
    assert (baseline["ratio"], sala["ratio"], llama) == (None, 2, {"missing": "it crashed"})
    assert page["gaps"] == [0, pytest.approx(-0.1), None]


def test_models_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="baseline = 'sala': no such model; the models are llama, subllm"):
        dataclasses.replace(bare_report(), baseline="sala")
    with pytest.raises(ValueError, match="Per token: figures of llama; columns: transformers, llama, subllm"):
        Speed(COLUMNS, [SpeedRow("decode", "Per token", 8, {"llama": Missing("no")})])


# The page in a browser

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
    root = page[page.index("<html") : page.index("<head")]
    return 'data-ready="true"' in root and "data-error" not in root


def test_a_browser_draws_the_charts_and_the_passage(tmp_path):
    page = drawn(fake_report(steps=200, tokens=300), tmp_path)
    assert is_ready(page)
    assert page.count("<svg") == 4
    assert page.count('<g class="series') == 5 + 1 + 4 + 4
    assert page.count("data-index=") == 300
    assert "×1.08 slower" in page
    assert 'data-tip="transformers allocates its state' in page


def test_a_browser_shows_hostile_text_as_text(tmp_path):
    page = drawn(hostile_report(), tmp_path)
    assert is_ready(page)
    assert "<img" not in page
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in page


def test_a_browser_draws_three_models_and_their_gaps_to_the_baseline(tmp_path):
    page = drawn(three_models(), tmp_path)
    assert is_ready(page)
    assert "Gap to SUBLLM" in page
    assert 'data-column="LLAMA"' in page


def test_a_browser_draws_a_report_with_hardly_anything_in_it(tmp_path):
    page = drawn(bare_report(), tmp_path)
    assert is_ready(page)
    for section in ("notes", "retention", "passage", "samples", "facts", "reproduce"):
        assert re.search(rf'<section id="{section}"[^>]*hidden', page), section
    assert page.count('class="missing"') == 3


def test_hovering_reads_out_every_series_at_that_step(tmp_path):
    data = fake_report(steps=200, tokens=30)
    hover = """
      const canvas = document.querySelector("#loss-chart .canvas"), box = canvas.getBoundingClientRect();
      canvas.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right, clientY: box.top + 50 }));
    """
    page = drawn(data, tmp_path, hover)
    tip = re.sub(r"<[^>]*>", " ", page[page.index('<div id="tip"') : page.index('<script type="application/json"')])
    llama, subllm = data.models
    assert "step 200" in tip
    for name, point in (("Llama training", llama.train[-1]), ("SUBLLM training", subllm.train[-1])):
        assert re.search(rf"{name} +{point.loss:.4f}", tip), tip
    last = llama.held_out[-1]
    assert re.search(rf"Llama held-out +{last.loss:.4f} +at {last.step} ", tip), tip


def test_every_button_and_every_token_answers_without_an_error(tmp_path):
    poke = """
      for (const button of document.querySelectorAll("button")) button.click();
      for (const host of document.querySelectorAll("[data-index], [data-tip]"))
        host.dispatchEvent(new PointerEvent("pointerover", { clientX: 9, clientY: 9, bubbles: true }));
      document.documentElement.dataset.poked = document.querySelectorAll(".muted").length;
    """
    data = fake_report(steps=20, tokens=50)
    page = drawn(data, tmp_path, poke)
    assert is_ready(page)
    shown = sum(len(token.kept) == 2 for token in data.passage.tokens)
    assert f'data-poked="{50 - shown}"' in page


def test_an_error_in_the_page_is_told(tmp_path):
    page = drawn(bare_report(), tmp_path, "throw new Error('a planted fault')")
    assert not is_ready(page)
    assert "could not be drawn: Uncaught Error: a planted fault" in page
