"""The report's curves: means and intervals over seeds, and gaps to the baseline where both have spent as much."""

import math
from dataclasses import replace

import pytest
from reports import twelve_runs

from longwave.intervals import mean_interval
from longwave.reports.content import LossPoint, ModelRun, SeedRun
from longwave.reports.curves import AXES, end_together, gap_curve, held_out_curve, training_curve

STEPS = (10, 20, 40, 80)


def power_law(step: int) -> float:
    """A loss that is a straight line in logarithms, as curves of training nearly are."""
    return 9 * step**-0.2


def run_of(seed: int, *, flops: float = 1, seconds: float = 1, gain: float = 1, steps=STEPS) -> SeedRun:
    """A run whose loss follows the power law of its FLOPs; gain: how many times less the loss is."""
    points = [LossPoint(n, 100 * n, n * flops, n * seconds, power_law(round(n * flops)) / gain) for n in steps]
    return SeedRun(seed, points, points, points[-1].loss or 0, 2.0)


def model_of(*runs: SeedRun, key: str = "one") -> ModelRun:
    return ModelRun(key, key, 10, "F", list(runs))


def test_one_run_has_a_mean_and_no_interval():
    found = held_out_curve(model_of(run_of(0)), comparable=True)
    assert [(point.tokens, point.mean, point.low) for point in found] == [(100 * n, power_law(n), None) for n in STEPS]


def test_the_band_is_the_interval_over_seeds_at_every_step():
    runs = [run_of(seed, gain=1 + seed / 100, seconds=1 + seed / 10) for seed in range(3)]
    found = held_out_curve(model_of(*runs), comparable=True)
    for index, point in enumerate(found):
        wanted = mean_interval([run.held_out[index].loss or 0 for run in runs])
        assert (point.mean, point.low, point.high) == (wanted.mean, wanted.low, wanted.high)
        assert point.seconds == pytest.approx(1.1 * STEPS[index]), "the mean of the seeds' own"


def test_only_steps_that_all_seeds_have_are_averaged_and_a_diverged_seed_is_a_gap():
    short, whole = run_of(0, steps=STEPS[:3]), run_of(1)
    points = [whole.held_out[0], whole.held_out[1]._replace(loss=None), *whole.held_out[2:]]
    found = held_out_curve(model_of(short, replace(whole, held_out=points)), comparable=True)
    assert [point.mean is None for point in found] == [False, True, False]


def test_training_curves_are_thinned_by_means_that_lose_nothing():
    points = [LossPoint(n, n, n, n, 5 + n % 7) for n in range(1, 2401)]
    run = SeedRun(0, points, [], 5.0, 2.0)
    found = training_curve(model_of(run), comparable=True)
    assert len(found) == 300
    assert sum(point.mean or 0 for point in found) / 300 == pytest.approx(sum(one.loss for one in points) / 2400)
    assert [point.tokens for point in found][:2] == [4.5, 12.5]


@pytest.mark.parametrize("axis", AXES)
def test_gaps_are_paired_by_seed_at_equal_spending(axis):
    """Seeds far apart and a model that is 3 percent better in each: the gap is certain, whatever the order of seeds."""
    baseline = model_of(*(run_of(seed, gain=1 + seed / 5) for seed in range(3)))
    model = model_of(*(run_of(seed, gain=(1 + seed / 5) / 0.97) for seed in reversed(range(3))))
    found = gap_curve(model, baseline, axis, comparable=True)
    assert [point.x for point in found] == [n * (100 if axis == "tokens" else 1) for n in STEPS]
    for point in found:
        assert (point.mean, point.low, point.high) == (pytest.approx(-0.03),) * 3


def test_a_cheaper_model_on_the_same_curve_has_no_gap_at_equal_flops():
    """Interpolated in logarithms: a power law has no gap to itself, where a line between points would show 0.4 %."""
    baseline, cheap = model_of(run_of(0)), model_of(run_of(0, flops=0.7))
    by_flops = gap_curve(cheap, baseline, "flops", comparable=True)
    assert [point.x for point in by_flops] == [14, 28, 56], "where the baseline has no point there is no gap"
    assert [point.mean for point in by_flops] == pytest.approx([0, 0, 0], abs=1e-12)
    by_tokens = gap_curve(cheap, baseline, "tokens", comparable=True)
    assert [point.mean for point in by_tokens] == pytest.approx([0.7**-0.2 - 1] * 4)


@pytest.mark.parametrize(("beyond", "points"), [(1.01, 4), (1.05, 3)])
def test_ends_within_two_percent_count_as_one(beyond, points):
    """Runs of a budget of FLOPs end a step before or after it."""
    baseline, model = model_of(run_of(0)), model_of(run_of(0, seconds=beyond))
    assert len(gap_curve(model, baseline, "seconds", comparable=True)) == points
    assert end_together([model, baseline], "seconds") == (points == 4)
    assert end_together([model, baseline], "tokens")


def test_runs_without_a_seed_in_common_are_compared_in_their_order():
    found = gap_curve(model_of(run_of(4, gain=2)), model_of(run_of(7)), "tokens", comparable=True)
    assert [point.mean for point in found] == pytest.approx([-0.5] * 4)


def test_curves_in_bits_per_byte_end_at_the_final_figure():
    run = run_of(0)
    found = held_out_curve(model_of(run), comparable=False)
    assert found[-1].mean == pytest.approx(run.bits_per_byte)
    lost = replace(run, final_loss=math.nan)
    assert [point.mean for point in held_out_curve(model_of(lost), comparable=False)] == [None] * 4


def test_the_gap_of_the_sample_ends_where_the_table_says():
    data = twelve_runs(steps=480)
    baseline, *others = data.models
    for model in others:
        last = gap_curve(model, baseline, "tokens", comparable=True)[-1]
        assert last.low is not None
        assert last.high is not None
        assert last.low < last.mean < last.high
