"""Intervals: t's quantiles as printed in tables, coverage on drawn samples, and differences of pairs."""

import math
import random

import pytest

from longwave.intervals import Interval, mean_interval, paired, t_quantile

# Two-sided 95 % and 99 %, from the table in any textbook.
TABLE = {
    1: (12.706, 63.657),
    2: (4.303, 9.925),
    3: (3.182, 5.841),
    4: (2.776, 4.604),
    5: (2.571, 4.032),
    8: (2.306, 3.355),
    15: (2.131, 2.947),
    30: (2.042, 2.750),
    120: (1.980, 2.617),
}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_tables(freedom: int) -> None:
    found = (t_quantile(0.975, freedom), t_quantile(0.995, freedom))
    assert found == pytest.approx(TABLE[freedom], abs=6e-4)


def test_one_value_has_no_interval() -> None:
    assert mean_interval([2.5]) == Interval(2.5)
    assert not mean_interval([2.5]).excludes_zero


def test_equal_values_have_an_interval_of_one_point() -> None:
    assert mean_interval([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 2.0)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_intervals_hold_the_true_mean_as_often_as_they_say(count: int) -> None:
    draws, tries = random.Random(count), 4000
    inside = 0
    for _ in range(tries):
        found = mean_interval([draws.gauss(3.0, 0.7) for _ in range(count)])
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 3.0 <= found.high
    assert abs(inside / tries - 0.95) < 4 * math.sqrt(0.95 * 0.05 / tries)


def test_pairs_cancel_what_runs_of_one_seed_share() -> None:
    theirs = [4.0, 4.4, 4.9]
    ours = [loss * ratio for loss, ratio in zip(theirs, (0.985, 0.984, 0.986), strict=True)]
    found = paired(ours, theirs)
    assert found.mean == pytest.approx(-0.015)
    assert found.excludes_zero
    means = (mean_interval(ours), mean_interval(theirs))
    assert means[0].high is not None
    assert means[1].low is not None
    assert means[0].high > means[1].low  # unpaired, the two could not be told apart


def test_a_pair_without_a_partner_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])
