"""Reuse of prefixes: the tree against a plain list of what was kept, and the same tokens with it as without."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
import runs
from engines import WARM, alone, finish, prompt_of, request_of, tiny, tokens

from longwave.engine import Engine, EngineOptions, Request
from longwave.engine.memory import page_options
from longwave.engine.prefix import PrefixCache, _Node
from longwave.model import Decoder
from longwave.states import Branch

every_model = pytest.mark.parametrize("kind", runs.MODELS)


class Kept(Branch):
    """A branch that remembers nothing but its length and whether it was dropped."""

    def __init__(self, seen: int) -> None:
        self.seen, self.dropped = seen, False

    @property
    def nbytes(self) -> int:
        return 10

    def drop(self) -> None:
        assert not self.dropped
        self.dropped = True


def common(one: list[int], other: list[int]) -> int:
    return next(
        (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_tree_finds_what_a_search_through_everything_finds(forgets: bool, seed: int):
    draw, cache, kept = Random(seed), PrefixCache(forgets, 1 << 30, 1000), list[tuple[list[int], Kept]]()
    for _ in range(60):
        words = [draw.randrange(2) for _ in range(draw.randint(1, 9))]
        found = cache.find(words)
        there = [(one, branch) for one, branch in kept if not branch.dropped]
        assert found.known == max((common(words, one) for one, _ in there), default=0)
        if forgets:
            usable = [len(one) for one, _ in there if one == words[: len(one)] and len(one) < len(words)]
        else:
            usable = [min(common(words, one), len(words) - 1) for one, _ in there]
        assert found.length == max(usable, default=0)
        assert (found.branch is None) == (found.length == 0)
        if found.branch is not None:
            [whole] = [one for one, branch in kept if branch is found.branch]
            assert common(whole, words) >= found.length
            assert not forgets or found.branch.seen == found.length
        if draw.random() < 0.7:
            branch = Kept(len(words))
            kept.append((words, branch))
            cache.add(words, branch)
        elif draw.random() < 0.3:
            before = len(cache)
            assert cache.drop_oldest() == (before > 0)
    alive = [branch for _, branch in kept if not branch.dropped]
    nodes = list(below(cache._root))
    assert len(cache) == len(alive)
    assert cache.nbytes == 10 * len(alive) + sum(node.nbytes for node in nodes)
    assert all(node.tokens.base is None for node in nodes)  # none holds on to a longer prompt
    cache.clear()
    assert all(branch.dropped for _, branch in kept)
    assert (cache.nbytes, cache._root.children) == (0, {})


def below(node: _Node) -> Iterator[_Node]:
    for child in node.children.values():
        yield child
        yield from below(child)


def test_the_least_recently_used_goes_first():
    each = 10 + _Node(np.zeros(2, np.int64)).nbytes
    cache, kept = PrefixCache(True, 2 * each + 5, 1000), [Kept(2), Kept(2), Kept(2)]
    cache.add([1, 1], kept[0])
    cache.add([2, 2], kept[1])
    assert cache.find([1, 1, 1]).branch is kept[0]
    cache.add([3, 3], kept[2])
    assert [branch.dropped for branch in kept] == [False, True, False]


def test_boundaries_are_as_far_apart_as_their_copies_allow():
    cache = PrefixCache(True, 4_000_000, 100_000)
    words = [1] * 10_000
    stops = cache.stops(words, cache.find(words), 100_000)
    assert stops == [9_999]  # one copy in ten thousand tokens
    assert cache.stops(words, cache.find(words), 10_000) == [*range(1000, 10_000, 1000), 9_999]
    assert PrefixCache(False, 0, 100).stops(words, cache.find(words), 0) == [10_000]


# --- in the engine ----------------------------------------------------------------------------------------------------


def conversation(seed: int) -> list[Request]:
    """Prompts that have beginnings in common: equal ones, and ones that leave a common text at some place."""
    draw, base = Random(seed), prompt_of(40, seed)
    found = [request_of(prompt=base), request_of(prompt=base, sampling=WARM)]
    for number in range(8):
        cut = draw.randint(1, 40)
        rest = prompt_of(draw.randint(1, 20), 100 * seed + number)
        found.append(request_of(prompt=base[:cut] + rest, max_new_tokens=draw.randint(1, 4)))
    return found


@every_model
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("running", [1, 4])
def test_a_prefix_that_is_there_changes_nothing(kind: str, seed: int, running: int):
    engine = Engine(tiny(kind), EngineOptions(running=running, step_tokens=40, page_size=8))
    requests = conversation(seed)
    numbers = [engine.submit(one) for one in requests]
    found = finish(engine)
    for number, request in zip(numbers, requests, strict=True):
        assert tokens(found[number]) == tokens(alone(kind, request))
    done = engine.metrics
    assert done.cached_tokens > 0
    assert done.prompt_tokens == sum(len(one.prompt) for one in requests)
    assert done.run_tokens + done.cached_tokens == done.prompt_tokens + sum(len(found[n]) - 1 for n in numbers)
    engine.forget()
    assert (engine.metrics.free_pages, engine.metrics.prefixes, engine.metrics.prefix_bytes) == (
        engine.metrics.pages,
        0,
        0,
    )


@every_model
def test_a_prompt_that_comes_twice_runs_one_token_the_second_time(kind: str):
    """At the second sight already, and for each kind of layer; a longer prompt runs what is new to it."""
    engine = Engine(tiny(kind), EngineOptions(running=1))
    prompt = prompt_of(30)
    for more, cached in [((), 0), ((), 29), ((7, 8, 9), 29), ((7, 8, 9), 32)]:
        engine.submit(request_of(prompt=prompt + more, max_new_tokens=1))
        before = engine.metrics.cached_tokens
        finish(engine)
        assert engine.metrics.cached_tokens - before >= cached
        assert engine.metrics.cached_tokens - before < len(prompt + more)


def test_the_answer_is_there_for_the_next_turn():
    """A conversation goes on: prompt, answer and the next question share all but the question."""
    engine = Engine(tiny("around a hybrid"), EngineOptions(running=1))
    first = request_of(20)
    number = engine.submit(first)
    answer = tuple(tokens(finish(engine)[number]))
    engine.submit(request_of(prompt=first.prompt + answer + prompt_of(5, 9)))
    engine.step()
    assert engine.metrics.cached_tokens == 20 + len(answer) - 1


def test_prefixes_can_be_switched_off():
    engine = Engine(tiny("llama"), EngineOptions(prefixes=False))
    for _ in range(2):
        engine.submit(request_of())
        finish(engine)
    assert (engine.metrics.cached_tokens, engine.metrics.prefixes) == (0, 0)
    assert engine.metrics.free_pages == engine.metrics.pages


# --- too little memory ------------------------------------------------------------------------------------------------


def bytes_for(model: Decoder, count: int) -> int:
    """Memory for so many tokens, by the engine's own rate."""
    options = page_options(model, 1 << 30, runs.WINDOW, 1 << 30, 8)
    return (1 << 30) * count // dict(options.tokens)[-1]


@every_model
def test_who_is_put_back_goes_on_as_if_nothing_had_been(kind: str):
    """Memory for two and a half sequences of five; all are answered, and get what they would get alone."""
    limits = {"running": 5, "step_tokens": 40, "page_size": 8, "prefixes": False}
    engine = Engine(tiny(kind), EngineOptions(**limits, memory=bytes_for(tiny(kind), 110)))
    requests = [request_of(20 + seed, seed, max_new_tokens=24, sampling=WARM) for seed in range(5)]
    numbers = [engine.submit(one) for one in requests]
    found = finish(engine)
    for number, request in zip(numbers, requests, strict=True):
        assert tokens(found[number]) == tokens(alone(kind, request))
        assert found[number][-1].ended == "max_new_tokens"
    assert engine.metrics.preemptions > 0
    assert engine.metrics.free_pages == engine.metrics.pages


def test_kept_prefixes_give_way_to_requests():
    engine = Engine(tiny("llama"), EngineOptions(running=1, page_size=8, memory=bytes_for(tiny("llama"), 110)))
    for seed in range(6):
        number = engine.submit(request_of(40, seed))
        assert tokens(finish(engine)[number]) == tokens(alone("llama", request_of(40, seed)))
    assert engine.metrics.preemptions == 0


def test_room_for_a_prompt_is_not_made_of_its_own_prefix():
    """Memory for two prompts: the first one's prefix stays while others go, and what comes after it is run alone."""
    engine = Engine(tiny("llama"), EngineOptions(running=1, page_size=8, memory=bytes_for(tiny("llama"), 110)))
    base = prompt_of(40)
    for prompt, cached in [(base, 0), (prompt_of(30, 1), 0), ((*base, 7), 40), (prompt_of(30, 2), 0), ((*base, 8), 40)]:
        before = engine.metrics.cached_tokens
        engine.submit(request_of(prompt=prompt, max_new_tokens=2))
        finish(engine)
        assert engine.metrics.cached_tokens - before == cached
