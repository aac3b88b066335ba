"""The report's page and words: it holds its data, no text can break out of it, and it claims no more than they say."""

# ruff: noqa: RUF001 (the page writes ×, so the tests read it)

import dataclasses
import json
import math
import re

import pytest
from reports import (
    COLUMNS,
    HALF_AN_EMOJI,
    HOSTILE,
    bare_report,
    ended,
    fake_report,
    hostile_report,
    speed_row,
    three_models,
    twelve_runs,
    written,
)

from longwave.reports.content import (
    Bound,
    Figure,
    Grid,
    LossPoint,
    Missing,
    ModelRun,
    Report,
    RetentionLevel,
    Speed,
    SpeedRow,
)
from longwave.reports.curves import final_gap
from longwave.reports.report import write_report
from longwave.reports.words import headline

MAKERS = [fake_report, hostile_report, bare_report, three_models, twelve_runs]


@pytest.mark.parametrize("make", MAKERS)
def test_the_page_holds_its_data(make, tmp_path):
    data = make()
    page = written(data, tmp_path)
    expected = json.loads(json.dumps(dataclasses.asdict(data))) | {"passage": page.report["passage"]}
    del expected["models"]
    assert page.report == expected
    texts = [(text, kept) for text, kept, *_ in page.report["passage"]["tokens"]]
    assert texts == [(token.text, list(token.kept)) for token in data.passage.tokens]
    for model, held in zip(data.models, page.content["models"], strict=True):
        assert (held["key"], held["name"], held["layout"]) == (model.key, model.name, model.layout)
        assert [seed["loss"] for seed in held["seeds"]] == pytest.approx(
            [run.final_loss for run in model.runs], rel=1e-5
        )
        steps = len({point.step for point in model.runs[0].held_out})
        assert len(held["held_out"]) == steps, "every evaluated point is kept"
        assert len(held["train"]) <= 300


def test_half_a_character_survives(tmp_path):
    data = dataclasses.replace(bare_report(), title=HALF_AN_EMOJI, notes=[HALF_AN_EMOJI])
    assert written(data, tmp_path).report["notes"] == [HALF_AN_EMOJI]


def test_hostile_text_adds_no_element_and_ends_no_script(tmp_path):
    calm, hostile = written(fake_report(), tmp_path), written(hostile_report(), tmp_path)
    assert hostile.tags == calm.tags
    assert hostile.title.startswith("</script><img src=x onerror=alert(1)>")
    assert "<img" not in hostile.text
    assert hostile.text.count("</script>") == 2
    assert hostile.content["models"][0]["name"] == HOSTILE


@pytest.mark.parametrize("make", MAKERS)
def test_nothing_is_fetched_from_anywhere(make, tmp_path):
    page = written(make(), tmp_path)
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", page.text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", page.text)
    loads = {(tag, name): value for tag, name, value in page.attributes if name in ("src", "href", "srcset", "data")}
    assert loads == {("link", "href"): "data:,"}


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    data = bare_report()
    run = dataclasses.replace(data.models[1].runs[0], train=[LossPoint(1, 9, 9, 9, math.nan)], final_loss=math.inf)
    diverged = dataclasses.replace(data.models[1], runs=[run])
    page = written(dataclasses.replace(data, models=[data.models[0], diverged]), tmp_path)
    model = page.content["models"][1]
    assert model["train"] == [[9, 9, 9, None]]
    assert (model["loss"], model["gap"], model["perplexity"], model["seeds"][0]["loss"]) == (None,) * 4
    assert "NaN" not in page.data
    assert "Infinity" not in page.data


@pytest.mark.parametrize("make", [lambda: fake_report(steps=2000, tokens=2000), lambda: twelve_runs(20_000)])
def test_a_large_report_stays_far_below_two_megabytes(make, tmp_path):
    write_report(make(), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 600_000


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


# Data that contradict themselves


def test_series_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="level 1: live has 1 values; steps has 2"):
        RetentionLevel("level 1", 0.64, [1, 2], [1.0, 1.0], [0.5], [0.0, 0.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="one loss for each value"):
        Grid("llama", "optimizer.lr", [1e-3, 2e-3], [4.0], 1e-3)
    with pytest.raises(ValueError, match="best"):
        Grid("llama", "optimizer.lr", [1e-3, 2e-3], [4.0, 3.9], 3e-3)


def test_models_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="baseline = 'sala': no such model; the models are llama, subllm"):
        dataclasses.replace(bare_report(), baseline="sala")
    with pytest.raises(ValueError, match="grids = 'sala': no such model"):
        dataclasses.replace(bare_report(), grids=[Grid("sala", "optimizer.lr", [1.0], [4.0], 1.0)])
    with pytest.raises(ValueError, match="Per token: figures of llama; columns: transformers, llama, subllm"):
        Speed(COLUMNS, [SpeedRow("decode", "Per token", 8, {"llama": Missing("no")})])


@pytest.mark.parametrize("runs", [[], [*ended(4.0), *ended(4.1)]])
def test_a_model_has_one_run_of_a_seed(runs):
    with pytest.raises(ValueError, match="one run or more, each of another seed"):
        ModelRun("llama", "Llama", 10, "F", runs)


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


def report_of(llama: list[float], subllm: list[float]) -> Report:
    """The bare report with runs that ended at these losses."""
    models = [
        dataclasses.replace(model, runs=ended(*losses))
        for model, losses in zip(bare_report().models, (llama, subllm), strict=True)
    ]
    return dataclasses.replace(bare_report(), models=models)


@pytest.mark.parametrize(
    ("llama", "subllm", "value", "verdict", "says"),
    [
        ([5.1], [5.1], "level", "same", "One run each"),
        ([5.1], [4.59], "10.0% lower", "better", "One run each"),
        ([5.1], [math.inf], "—", "unknown", "diverged"),
        ([5.1, 5.0], [5.1, math.nan], "—", "unknown", "diverged"),
        # the seeds differ by far more than the models, which the pairs tell apart all the same
        ([5.0, 6.0, 4.0], [4.95, 5.952, 3.958], "0.9% lower", "better", "lies between -1.3% and -0.6% (95%)."),
        ([5.0, 5.1, 5.2], [5.1, 5.0, 5.3], "0.7% higher", "same", "(95%): not told apart."),
    ],
)
def test_the_loss_gap_in_words(llama, subllm, value, verdict, says):
    found = headline(report_of(llama, subllm))[0]
    assert (found.value, found.verdict) == (value, verdict)
    assert says in found.sentence


def test_the_gap_is_relative_to_the_baseline():
    llama, subllm = fake_report().models
    gaps = [final_gap(subllm, llama, comparable=True), final_gap(llama, llama, comparable=True)]
    assert [gap and gap.mean for gap in gaps] == [pytest.approx(4.11 / 4.02 - 1), 0]


def test_models_of_different_tokenizers_are_compared_in_bits_per_byte():
    data = report_of([4.0], [4.4])
    longer = dataclasses.replace(data.models[1].runs[0], bits_per_byte=1.4)  # more loss a token, more bytes a token
    models = [data.models[0], dataclasses.replace(data.models[1], runs=[longer])]
    found = headline(dataclasses.replace(data, models=models, loss_comparable=False))[0]
    assert (found.label, found.value) == ("Bits per byte", "12.5% lower")
    assert "SUBLLM ends at 1.400" in found.sentence


# Any number of models


def test_every_model_is_compared_with_the_baseline():
    found = {one.title: one.value for one in headline(three_models())}
    assert found == {
        "Held-out loss, Llama": "level",
        "Held-out loss, SALA": "10.0% lower",
        "Writing a token, Llama": "—",
        "Writing a token, SALA": "×2.00 faster",
    }, "and no figure of a quantity that was measured of nobody"
    writing = {one.about: one.sentence for one in headline(three_models()) if "Writing" in one.label}
    assert "it crashed" in writing["Llama"]
    assert "SALA 5.00 ms, SUBLLM 10.0 ms" in writing["SALA"]


def test_a_lone_model_is_compared_with_nothing():
    data = bare_report()
    (only,) = headline(dataclasses.replace(data, models=data.models[:1]))
    assert (only.value, only.sentence) == ("—", "No second model to compare with.")


def test_the_page_holds_the_cells_of_every_column(tmp_path):
    page = written(three_models(), tmp_path).content
    assert page["columns"] == ["SUBLLM", "SALA", "LLAMA"]
    ((baseline, sala, llama),) = page["cells"]
    assert (baseline["ratio"], sala["ratio"], llama) == (None, 2, {"missing": "it crashed"})
    assert [one["gap"] and one["gap"]["mean"] for one in page["models"]] == [0, pytest.approx(-0.1), None]
