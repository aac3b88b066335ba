"""Schedules: the published points of Eden, the shapes of the others, and the errors."""

import math
from itertools import pairwise
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from longwave.config import build
from longwave.errors import UserError
from longwave.training.schedules import WSD, Constant, Cosine, Eden, Schedule, ScheduleConfig

SHAPES = (WSD(), WSD(shape="linear"), WSD(shape="exponential", final=0.1))
ALL: list[Schedule] = [Eden(), Cosine(), *SHAPES, Constant(), Constant(warmup_steps=30)]


def curve(schedule: Schedule, total_steps: int, tokens_per_step: int = 1000) -> list[float]:
    return [schedule.scale(step, step * tokens_per_step, total_steps) for step in range(total_steps)]


def test_eden_passes_the_published_points():
    eden = Eden()
    assert eden.scale(0, 0, 1) == 0.5
    assert eden.scale(250, 0, 1) == pytest.approx(0.75 * ((250**2 + 7500**2) / 7500**2) ** -0.25, rel=1e-14)
    assert eden.scale(500, 0, 1) == pytest.approx(((500**2 + 7500**2) / 7500**2) ** -0.25, rel=1e-14)
    assert eden.scale(7500, 0, 1) == pytest.approx(2**-0.25, rel=1e-14)
    assert eden.scale(7500, 10**9, 1) == pytest.approx(2**-0.5, rel=1e-14)
    expected = (1 + 4) ** -0.25 * (1 + 9) ** -0.25
    assert eden.scale(15000, 3 * 10**9, 1) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("off", [None, math.inf])
def test_eden_without_lr_tokens_ignores_tokens(off: float | None):
    eden = Eden(lr_tokens=off)
    assert eden.scale(7500, 10**12, 1) == eden.scale(7500, 0, 1) == pytest.approx(2**-0.25, rel=1e-14)


def test_eden_without_warmup_starts_at_the_base_rate():
    assert Eden(warmup_steps=0).scale(0, 0, 1) == 1.0


def test_cosine_rises_to_one_and_falls_to_its_final_fraction():
    cosine = Cosine(warmup_steps=99, final=0.2)
    rates = curve(cosine, 1099)
    assert rates[:99] == [(step + 1) / 100 for step in range(99)]
    assert rates[99] == 1.0
    assert rates[599] == pytest.approx(0.6, rel=1e-12)  # half way, halfway between 1 and 0.2
    assert rates[349] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)), rel=1e-12)
    assert all(a > b > 0.2 for a, b in pairwise(rates[99:]))
    assert cosine.scale(1099, 0, 1099) == cosine.scale(5000, 0, 1099) == pytest.approx(0.2, rel=1e-12)


@pytest.mark.parametrize(("shape", "quarter"), [("linear", 0.75), ("sqrt", 0.5)])
def test_wsd_rises_stays_and_decays(shape: Any, quarter: float):
    wsd = WSD(warmup_steps=9, decay_fraction=0.4, shape=shape, final=0.0)
    rates = curve(wsd, 100)
    assert rates[:9] == [(step + 1) / 10 for step in range(9)]
    assert rates[9:61] == [1.0] * 52
    assert rates[70] == pytest.approx(quarter, rel=1e-12)
    assert all(a > b > 0 for a, b in pairwise(rates[60:]))
    assert wsd.scale(100, 0, 100) == wsd.scale(101, 0, 100) == 0.0
    half = WSD(warmup_steps=9, decay_fraction=0.4, shape=shape, final=0.5)
    assert half.scale(70, 0, 100) == pytest.approx(0.5 + 0.5 * quarter, rel=1e-12)


def test_wsd_can_decay_as_minicpm_does():
    """Acceptance check 43: from 7.5e-3 to 3.75e-4, by equal factors."""
    decay = WSD(warmup_steps=0, decay_fraction=1.0, shape="exponential", final=0.05)
    rates = [7.5e-3 * rate for rate in curve(decay, 1000)]
    assert rates[0] == 7.5e-3
    assert rates[500] == pytest.approx(7.5e-3 * 0.05**0.5)
    assert rates[-1] == pytest.approx(3.75e-4, rel=0.01)


def test_wsd_may_decay_from_the_end_of_the_warmup():
    rates = curve(WSD(warmup_steps=20, decay_fraction=0.8, shape="linear"), 100)
    assert max(rates) == rates[20] == 1.0


def test_constant_warms_up_and_stays():
    assert curve(Constant(), 3) == [1.0, 1.0, 1.0]
    assert curve(Constant(warmup_steps=3), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_every_rate_is_usable(schedule: Schedule):
    """No update is wasted on a rate of zero, and none exceeds the base rate."""
    assert all(0 < rate <= 1 for rate in curve(schedule, 1000))


@pytest.mark.parametrize(
    ("schedule", "field", "value"),
    [
        (lambda: Eden(lr_steps=0), "lr_steps", "0"),
        (lambda: Eden(lr_tokens=-1.0), "lr_tokens", "-1.0"),
        (lambda: Eden(warmup_start=1.5), "warmup_start", "1.5"),
        (lambda: Eden(warmup_steps=-1), "warmup_steps", "-1"),
        (lambda: Cosine(warmup_steps=-2), "warmup_steps", "-2"),
        (lambda: Cosine(final=-0.1), "final", "-0.1"),
        (lambda: WSD(shape="exponential"), "final", "0.0"),
        (lambda: WSD(decay_fraction=0.0), "decay_fraction", "0.0"),
        (lambda: WSD(decay_fraction=1.1), "decay_fraction", "1.1"),
        (lambda: WSD(final=math.nan), "final", "nan"),
        (lambda: WSD(warmup_steps=-3), "warmup_steps", "-3"),
        (lambda: Constant(warmup_steps=-4), "warmup_steps", "-4"),
        (lambda: Cosine(warmup_steps=100).scale(0, 0, 100), "warmup_steps", "100"),
        (lambda: WSD(warmup_steps=81).scale(0, 0, 100), "warmup_steps", "81"),
    ],
)
def test_errors_name_the_field_and_its_value(schedule: Any, field: str, value: str):
    with pytest.raises(UserError, match=rf"^(schedule\.)?{field} = {value}: "):
        schedule()


def test_a_recipe_picks_the_schedule_by_kind_and_refuses_unknown_keys():
    adapter: TypeAdapter[Any] = TypeAdapter(ScheduleConfig)
    for config in (Eden(lr_steps=10), Cosine(), WSD(), Constant()):
        assert adapter.validate_python(adapter.dump_python(config)) == config
    with pytest.raises(ValidationError, match="lr_stepz"):
        adapter.validate_python({"kind": "eden", "lr_stepz": 3})
    with pytest.raises(ValidationError, match="a number of steps above 0"):
        adapter.validate_python({"kind": "eden", "lr_steps": -3})


def test_a_shape_that_does_not_exist_is_refused_in_a_recipe():
    says = r"^recipe\.toml: shape = 'cubic': input should be 'linear', 'sqrt' or 'exponential'$"
    with pytest.raises(UserError, match=says):
        build(WSD, {"shape": "cubic"}, "recipe.toml")
