"""Growth with the context: bounded time, exact state, times that follow the formulas, and words that claim no more."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from reports import bare_report, drawn, is_ready
from test_bench_context import decoder

from longwave.benchmarks import growth
from longwave.benchmarks.context.sequence import Reading, Stopped
from longwave.benchmarks.growth import Growth, GrowthCurve, GrowthPoint, measure_growth
from longwave.costs import Work, total
from longwave.model import Decoder
from longwave.reports.content import Report
from longwave.reports.growth import growth_words

CONTEXTS, BEYOND = (32, 64, 128, 256), (128, 512, 4096)
LAYOUTS = {"dense": "2F", "window": "F W", "linear": "2L", "subllm": "F subllm(0.64: F subllm(0.5: F)) F"}
IDS = torch.randint(0, 300, (100,), generator=torch.Generator().manual_seed(0))


def grown(models: dict[str, Decoder], seconds: float = 60.0, contexts=CONTEXTS) -> dict[str, GrowthCurve]:
    found = measure_growth(models, dict.fromkeys(models, IDS), seconds, contexts, BEYOND)
    assert found.note
    return {curve.model: curve for curve in found.curves}


@pytest.fixture(scope="module")
def really() -> dict[str, GrowthCurve]:
    """Models of every kind, really measured."""
    return grown({name: decoder(layout) for name, layout in LAYOUTS.items()}, contexts=(32, 64))


@pytest.mark.parametrize("name", LAYOUTS)
def test_models_are_measured_and_computed_beyond(name: str, really):
    curve = really[name]
    assert [point.tokens for point in curve.measured] == [32, 64]
    assert [point.tokens for point in curve.computed] == [128, 512, 4096]
    assert all(point.first_token and point.per_token and point.state for point in curve.measured)
    assert (curve.window, curve.stopped) == (64, "")


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_that_is_computed_continues_what_was_measured(name: str, really):
    """The formula at the retention that was really kept gives the bytes that were counted."""
    model, curve = decoder(LAYOUTS[name]), really[name]
    options = growth.ContextOptions(contexts=(64,), decode_steps=1)
    counted = growth.Growing(model, IDS.int(), options).grow(64)
    kept = {level.index: share for level, share in zip(model.resamplers, counted.retention, strict=True)}
    assert curve.measured[-1].state == total(model.costs(64, kept=kept)).state_bytes
    for point in curve.computed:
        assert point.state == total(model.costs(point.tokens, kept=kept)).state_bytes


class Clock:
    """A clock that stands still but for what models take: `rate` seconds a FLOP for each model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rates: dict[Decoder, float], fails_at: int = 0) -> None:
        self.now, clock = 0.0, self
        self.read: list[tuple[Decoder, int]] = []

        class Timed:
            def __init__(self, model: Decoder, *_: object) -> None:
                self.model, self.seconds = model, 0.0

            def check(self) -> None:
                return

            def grow(self, context: int) -> Reading:
                if context == fails_at:
                    raise Stopped("does not fit")
                flops = self.model.prefill_flops(context) - self.model.head_flops()
                clock.now += flops * rates[self.model] - self.seconds
                clock.read.append((self.model, context))
                self.seconds = flops * rates[self.model]
                steps = (0.5, 0.25, 0.75)
                work = Work(0, 0)
                return Reading(context, self.seconds, work, (), steps, (), (), 8 * context, 8 * context, 0, 0)

        monkeypatch.setattr(growth, "Growing", Timed)
        monkeypatch.setattr("longwave.benchmarks.growth.time.monotonic", lambda: self.now)


def test_a_model_is_stopped_before_it_would_be_beyond_its_share(monkeypatch):
    """A dense model that takes 10 s up to 128 tokens, and far more than 12 s up to 256; a linear one goes on."""
    dense, linear = decoder("2F"), decoder("2L")
    rate = 10 / (dense.prefill_flops(128) - dense.head_flops())
    clock = Clock(monkeypatch, {dense: rate, linear: rate / 100})
    found = grown({"dense": dense, "linear": linear}, seconds=24)
    assert [context for model, context in clock.read if model is dense] == [32, 64, 128]
    assert [context for model, context in clock.read if model is linear] == list(CONTEXTS)
    assert clock.read[:2] == [(dense, 32), (linear, 32)], "in turn"
    assert clock.now < 24
    assert found["dense"].stopped.startswith(
        "256 tokens would have taken about 17 s more, and of its share of 12 s 2 s were left"
    )
    assert [point.tokens for point in found["dense"].computed] == [512, 4096]
    assert found["linear"].stopped == ""


def test_the_shortest_context_is_measured_however_little_time_there_is(monkeypatch):
    dense = decoder("2F")
    Clock(monkeypatch, {dense: 1.0})
    curve = grown({"dense": dense}, seconds=1e-3)["dense"]
    assert [point.tokens for point in curve.measured] == [32]
    assert "0 s were left" in curve.stopped


def test_times_beyond_follow_the_formulas_and_a_token_is_the_mean_of_the_steps(monkeypatch):
    dense = decoder("2F")
    Clock(monkeypatch, {dense: 1e-9})
    curve = grown({"dense": dense})["dense"]
    for point in (*curve.measured, *curve.computed):
        assert point.first_token == pytest.approx(1e-9 * (dense.prefill_flops(point.tokens) - dense.head_flops()))
        assert point.per_token == pytest.approx(0.5)
    assert curve.misfit < 1e-9


def test_a_model_that_does_not_fit_keeps_what_was_measured(monkeypatch):
    dense = decoder("2F")
    Clock(monkeypatch, {dense: 1e-9}, fails_at=128)
    curve = grown({"dense": dense})["dense"]
    assert ([point.tokens for point in curve.measured], curve.stopped) == ([32, 64], "does not fit")
    Clock(monkeypatch, {dense: 1e-9}, fails_at=32)
    curve = grown({"dense": dense})["dense"]
    assert (curve.measured, curve.computed, curve.stopped) == ((), (), "does not fit")


# The fit: attention and the rest have rates of their own

N = np.array([1024, 2048, 4096, 8192.0])
PAIRS = N * N / 2


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (7e6 * N + 768 * PAIRS, 3e-4 * N + 2e-8 * PAIRS),  # attention slower than products
        (7e6 * N + 768 * PAIRS, 3e-3 * N + 2e-10 * PAIRS),  # overhead alone, nearly
        (7e6 * N, 3e-4 * N),  # nothing that grows
    ],
)
def test_a_law_of_this_form_is_found_whatever_its_rates(work, seconds):
    fit = growth._fit(list(zip(work, N, seconds, strict=True)))
    assert fit.misfit < 1e-9
    share = (1 << 20) / N[-1]
    pairs = PAIRS[-1] * share**2
    extra = 768 if work[-1] > 7e6 * N[-1] else 0
    slope = (seconds[-1] / N[-1] - seconds[0] / N[0]) / (PAIRS[-1] / N[-1] - PAIRS[0] / N[0])
    expected = (seconds[0] / N[0] - slope * PAIRS[0] / N[0]) * N[-1] * share + slope * pairs
    assert fit.at(7e6 * N[-1] * share + extra * pairs, N[-1] * share) == pytest.approx(expected, rel=1e-6)


def test_neither_rate_is_ever_below_zero():
    """Times that fall with the work, as noise can make them, give times that do not grow and are above nothing."""
    fit = growth._fit(list(zip(7e6 * N + 768 * PAIRS, N, N * np.array([4e-4, 3.9e-4, 3.8e-4, 3.7e-4]), strict=True)))
    assert fit.by_extra == 0
    assert (fit.at(1e15, 1 << 20) or 0) > 0


def test_times_that_scatter_are_not_computed_on():
    fit = growth._fit(list(zip(7e6 * N, N, N * np.array([1, 2, 1, 2.0]), strict=True)))
    assert fit.misfit > 0.2
    assert fit.at(1e15, 1 << 20) is None


def test_one_point_gives_times_in_proportion_to_the_work():
    assert growth._fit([(100.0, 10.0, 2.0)]).at(1000.0, 20.0) == pytest.approx(20.0)


# Words and charts


def report(*curves: GrowthCurve, disturbed: bool = False) -> Report:
    return dataclasses.replace(bare_report(), growth=Growth(curves, 42.0, "other processes kept 0.1 of 2", disturbed))


def curve_of(model: str, factor: int, until: int = 4096, misfit: float = 0.04) -> GrowthCurve:
    """A curve of `factor` times the figures of another, measured up to a context."""
    times = {tokens: (factor * tokens / 1e3, factor * 1e-2) for tokens in (1024, 4096, 16384, 1 << 20)}
    untrusted = {tokens: (None, None) if misfit > 0.2 and tokens > until else pair for tokens, pair in times.items()}
    points = [GrowthPoint(tokens, *pair, factor * tokens) for tokens, pair in untrusted.items()]
    measured = tuple(point for point in points if point.tokens <= until)
    stopped = "" if until > 4096 else "16,384 tokens would have taken about 99 s more"
    return GrowthCurve(model, measured, tuple(points[len(measured) :]), misfit, 1024, stopped)


def test_ratios_are_told_at_the_most_that_both_were_measured_at_and_at_the_end():
    (sentence,), notes = growth_words(report(curve_of("llama", 4), curve_of("subllm", 2, until=16384)))
    ratios = "2 times less time to the first token, 2 times less time per token, 2 times less state"
    assert sentence == (
        f"At 4,096 tokens, the most that both were measured at, SUBLLM needs {ratios} than Llama; "
        f"at 1,048,576 tokens, computed, {ratios}."
    )
    assert notes[0] == "Llama was stopped: 16,384 tokens would have taken about 99 s more."
    assert "to 4% at worst" in notes[1]
    assert "trained on windows of 1,024 tokens: beyond, what it costs is as shown, what it would say is not" in notes[2]
    assert notes[3] == "Measured in 42 s in all; other processes kept 0.1 of 2."


def test_times_that_were_not_computed_are_not_compared():
    (sentence,), notes = growth_words(report(curve_of("llama", 2), curve_of("subllm", 3, misfit=0.3)))
    assert sentence.endswith("at 1,048,576 tokens, computed, 1.5 times more state.")
    assert "The times of SUBLLM scatter by more than a fifth, so they are not computed on." in notes


@pytest.mark.parametrize("curves", [(), (GrowthCurve("llama", (), (), 0.0, 1024, "does not fit"),)])
def test_nothing_measured_is_no_section(curves, tmp_path):
    assert growth_words(report(*curves))[0] == []
    page = drawn(report(*curves), tmp_path)
    assert is_ready(page)
    assert '<section id="growth" data-name="Growth" hidden' in page


def test_a_browser_draws_measured_points_and_dashes_beyond(tmp_path):
    curves = curve_of("llama", 4), curve_of("subllm", 2, until=16384, misfit=0.3)
    page = drawn(report(*curves, disturbed=True), tmp_path)
    assert is_ready(page)
    section = page[page.index('<section id="growth"') : page.index('<section id="speed"')]
    assert section.count("<svg") == 3
    assert section.count("stroke-dasharray") == 2 + 2, "both times of Llama, and the state of both models"
    assert section.count("<circle") == 3 * (2 + 3), "of what was measured"
    assert "This machine was busy: other processes" in section
