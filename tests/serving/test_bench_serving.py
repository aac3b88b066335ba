"""`longwave bench serving`: its load, its figures, and what it says of servers that do not answer."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import pairwise

import pytest
from servers import folders, running

from longwave.benchmarks.serving.load import Load, schedule, words
from longwave.benchmarks.serving.run import Target, percentiles, summary
from longwave.errors import UserError
from longwave.serving.server import Running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = folders(tmp_path_factory.mktemp("models"))
    with running([made["plain"], made["levels"]]) as begun:
        yield begun


def test_servers_are_asked_the_same_side_by_side(longwave, server: Running):
    words = ["--rate", "30", "--requests", "6", "--prompts", "8,40", "--answers", "3,9", "--seed", "4", "--json"]
    result = longwave("bench", "serving", server.url, f"{server.url}/v1#levels", *words)
    load = Load(30.0, 6, (8, 40), (3, 9), 4)
    first, second = result.json["servers"]
    assert [one["model"] for one in (first, second)] == ["plain", "levels"]
    for one in (first, second):
        assert (one["requests"], one["answered"], one["failures"]) == (6, 6, {})
        assert one["new_tokens"] == sum(arrival.answer_tokens for arrival in schedule(load))
        assert one["prompt_tokens"] == pytest.approx(sum(arrival.prompt_tokens for arrival in schedule(load)), rel=0.3)
        assert one["tokens_per_second"] == pytest.approx(one["new_tokens"] / one["seconds"])
        for times in (one["first_token"], one["per_token"], one["whole"]):
            assert 0 < times["p50"] <= times["p95"] <= times["p99"] < 60
        assert one["first_token"]["p50"] < one["whole"]["p50"]
    assert first["prompt_tokens"] == second["prompt_tokens"]
    assert "new tokens a second" in result.out


def test_arrivals_are_those_of_a_poisson_process():
    load = Load(5.0, 4000, (10, 20), (3,), 0)
    found = schedule(load)
    assert found == schedule(load)
    assert found != schedule(Load(5.0, 4000, (10, 20), (3,), 1))
    gaps = [after.at - before.at for before, after in pairwise(found)]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.08)  # as of an exponential distribution
    assert {one.prompt_tokens for one in found} == {10, 20}
    assert len({words(30, one.key) for one in found[:50]}) == 50


def test_figures_of_answers_and_failures():
    target = Target("http://x/v1", "m", 1.0, True)
    found = [
        {"at": 0.0, "status": 200, "pieces": [1.0, 1.5, 2.0], "ended": 2.0, "usage": {"completion_tokens": 5}},
        {"at": 1.0, "status": 200, "pieces": [4.0], "ended": 4.0, "usage": None},
        {"at": 2.0, "status": 429, "pieces": [], "error": "full"},
        {"at": 3.0, "status": 200, "pieces": [], "ended": 3.0, "usage": None},
    ]
    made = summary(target, found)
    assert (made.answered, made.failures, made.error) == (2, {"429": 1, "200": 1}, "full")
    assert (made.seconds, made.new_tokens, made.tokens_per_second) == (4.0, 6, 1.5)
    assert made.first_token["p50"] == pytest.approx(2.0)  # of 1 and 3
    assert made.per_token == percentiles([0.25])
    assert percentiles([]) == {}
    assert percentiles([float(one) for one in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


@pytest.mark.parametrize(
    "keys", [{"rate": 0.0}, {"requests": 0}, {"prompts": ()}, {"answers": (0,)}, {"rate": float("nan")}]
)
def test_a_load_that_is_none(keys: dict[str, object]):
    with pytest.raises(UserError, match=next(iter(keys))):
        Load(**keys)  # pyright: ignore[reportArgumentType]


def test_what_is_no_server_is_one_line(refuses, server: Running):
    refuses("bench", "serving", says=["give the address"])
    refuses("bench", "serving", "ftp://x", says=["ftp://x", "http://HOST:PORT/v1"])
    refuses("bench", "serving", "http://127.0.0.1:9", says=["no answer"])
    refuses("bench", "serving", f"{server.url}/v1#none", says=["status 404", "no model"])
    refuses("bench", "serving", f"{server.url}/nowhere", says=["status 404"])
    refuses("bench", "serving", server.url, "--rate", "0", says=["rate = 0"])
    refuses("bench", "serving", server.url, "--prompts", "few", says=["few"])
