"""Chat templates that would take the machine are ended in time; published ones give the ids that they always gave."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import chats
import pytest
from chats import talk

from longwave.data import confined, rendering
from longwave.data.chat import Chat
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError

# An expression that takes time or memory without end, as it stands and where N is a number of nine digits.
EXPRESSIONS = [
    "'a' * N",
    "9 ** N",
    "(9 ** 99999) ** 999",
    "[0] * N",
    "'%0999999999d' % 7",
    "'{:>999999999}'.format(7)",
    "'a'.center(N)",
    "'a'.ljust(N)",
    "'a' | center(N)",
    "'a\nb' | indent(N)",
    "{'a': [1]} | tojson(indent=N)",
    "range(99999) | map('string') | list * 9999",
    "('a' * 99999).replace('a', 'a' * 99999)",
    "lipsum(n=N)",
    "('a ' * 9999999) | wordwrap(1) | length",
    "strftime_now('%Y' * N)",
    "raise_exception('a' * N)",
    "'a'.zfill(N) | reverse",
    "([[0] * 9999] * 9999) | tojson",
    "'a' ~ ('b' * N)",
]
# Where it stands: folded while compiling, computed at run time, kept, repeated, hidden in a macro.
PLACES: list[Callable[[str], str]] = [
    lambda it: "{{ " + it.replace("N", "999999999") + " }}",
    lambda it: "{% set n = messages | length * 999999999 %}{{ " + it.replace("N", "n") + " }}",
    lambda it: "{% set x = " + it.replace("N", "999999999") + " %}{{ x | string | length }}",
    lambda it: "{% for i in range(9999) %}{% set x = " + it.replace("N", "(i + 1) * 99999999") + " %}{% endfor %}",
    lambda it: "{% macro f(n) %}{{ " + it.replace("N", "n") + " }}{% endmacro %}{{ f(999999999) }}",
    lambda it: "{% if (" + it.replace("N", "999999999") + ") | string %}a{% endif %}",
    lambda it: (
        "{% set t = namespace(x='') %}{% for i in range(999) %}{% set t.x = t.x ~ ("
        + it.replace("N", "99999999")
        + ") %}{% endfor %}"
    ),
]
LOOP = "{% for i in range(99999) %}"
ALONE = {
    "loops within loops": LOOP * 5 + "a" + "{% endfor %}" * 5,
    "quiet loops": LOOP * 3 + "{% endfor %}" * 3,
    "text without end": LOOP * 2 + "a" * 999 + "{% endfor %}" * 2,
    "doubling": "{% set t = namespace(x='a') %}{% for i in range(99) %}{% set t.x = t.x ~ t.x %}{% endfor %}",
    "doubling a list": "{% set t = namespace(x=[1]) %}{% for i in range(99) %}{% set t.x = t.x + t.x %}{% endfor %}",
    "squaring": "{% set t = namespace(x=9) %}{% for i in range(99) %}{% set t.x = t.x * t.x %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that doubles": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "a recursive loop": "{% for m in [messages] recursive %}{{ loop([m]) }}{% endfor %}",
    "parentheses": "{{ " + "(" * 99999 + "1" + ")" * 99999 + " }}",
    "lists": "{{ " + "[" * 500 + "]" * 500 + " }}",
    "conditions": "{% if a %}" * 2000 + "{% endif %}" * 2000,
    "minus signs": "{{ " + "-" * 9999 + "1 }}",
    "a sum": "{{ " + "1+" * 20_000 + "1 }}",
    "filters": "{{ 'a'" + " | upper" * 9999 + " }}",
    "many outputs": "{{ messages }}" * 99_999,
    "half a megabyte of names": "{{ " + "a" * 500_000 + " }}",
    "sorting": "{{ (range(99999) | list * 99) | sort(reverse=true) | sort | unique | list | length }}",
    "tags": "{{ ('<' * 99999 ~ 'a') | striptags | length }}",
    "addresses": "{{ ('http://a' * 99999) | urlize | length }}",
    "comparing": "{% set a = [[]] %}" + "{% set a = [a, a] %}" * 99 + "{{ a == a }}{{ a | string }}",
}
HOSTILE = {
    **{f"{it}, {number}": PLACES[number](it) for it, number in product(EXPRESSIONS, range(len(PLACES)))},
    **ALONE,
    **{f"{name}, later": "a\n" + it for name, it in ALONE.items()},
    **{f"tail {number}": "{{ messages[0].content }}" + ALONE["doubling"] + str(number) for number in range(18)},
}
FEW = ["'a' * N, 0", "'a' * N, 1", "9 ** N, 1", "quiet loops", "doubling", "squaring", "recursion", "parentheses"]
CONVERSATION = talk("hello", "hi", "and?")


def hold(name: str) -> float:
    """Opens and runs a hostile template; it renders within the limits or is refused in a line. Returns the seconds."""
    tokenizer, begun, said = chats.tokenizer(HOSTILE[name]), time.perf_counter(), ""
    try:
        Chat(tokenizer).prompt(CONVERSATION)
    except UserError as error:
        said = str(error)
    seconds = time.perf_counter() - begun
    assert "\n" not in said
    assert len(said) < 500
    return seconds


@pytest.mark.parametrize("name", FEW)
def test_a_hostile_template_is_ended(name: str):
    hold(name)
    fine = Chat(chats.tokenizer(chats.TEMPLATES["chatml"]))
    assert fine.prompt(CONVERSATION)


@pytest.mark.slow
def test_two_hundred_hostile_templates_take_two_seconds_each_at_most():
    """The bound is a second of a processor; the clock of a machine that others use is given more."""
    assert len(HOSTILE) >= 200
    seconds = {name: hold(name) for name in HOSTILE}
    assert sorted(seconds.values())[len(seconds) * 9 // 10] < 2.5
    assert max(seconds.values()) < 10, max(seconds, key=lambda name: seconds[name])


def test_the_process_is_bounded_by_the_system():
    Chat(chats.tokenizer(chats.TEMPLATES["chatml"])).prompt(CONVERSATION)
    running = confined._PROCESS._running
    assert running is not None
    limits = Path(f"/proc/{running.pid}/limits").read_text()
    assert f"Max address space         {rendering.MEMORY}" in limits
    assert "Max core file size        0" in limits


def test_a_process_that_was_ended_is_begun_anew():
    chat = Chat(chats.tokenizer(chats.TEMPLATES["chatml"]))
    ids = chat.prompt(CONVERSATION)
    for _ in range(2):
        running = confined._PROCESS._running
        assert running is not None
        running.kill()
        running.wait()
        assert chat.prompt(CONVERSATION) == ids
    with pytest.raises(UserError, match="takes more than 256 MiB of memory"):
        Chat(chats.tokenizer("{{ 'a' * 10 ** 9 }}")).prompt(CONVERSATION)
    assert chat.prompt(CONVERSATION) == ids


def test_two_templates_take_turns():
    one, other = (Chat(chats.tokenizer(chats.TEMPLATES[name])) for name in ("chatml", "llama"))
    first = one.prompt(CONVERSATION), other.prompt(CONVERSATION)
    assert first[0] != first[1]
    assert (one.prompt(CONVERSATION), other.prompt(CONVERSATION)) == first


def test_long_conversations_are_rendered_and_endless_ones_refused():
    chat = Chat(chats.tokenizer(chats.TEMPLATES["chatml"]))
    letter = "é" * 68_345
    assert len(chat.prompt(talk(letter))) > 68_345
    assert len(chat.prompt(talk(*["a", "b"] * 500, "c"))) > 5000
    with pytest.raises(UserError, match="writes more than 4,194,304 characters"):
        chat.prompt(talk("a" * (4 << 20)))


def test_what_a_template_says_is_one_short_line():
    for source in (
        "{{ raise_exception('a\n' * 99999) }}",
        "{% for m in\n\n messages %}" + "x" * 99999 + "{{ }",
        "{% " + "y" * 10**6,
    ):
        with pytest.raises(UserError) as caught:
            Chat(chats.tokenizer(source)).prompt(CONVERSATION)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_a_conversation_that_is_nested_too_deeply_is_refused():
    chat = Chat(chats.tokenizer("{{ messages | tojson }}{{ eos_token }}"))
    with pytest.raises(UserError, match="nested too deeply"):
        chat.prompt([{"role": "user", "content": "a", "tool_calls": deep(5000)}])


# --- published templates ----------------------------------------------------------------------------------------------

PUBLISHED = {path.name: path.read_text() for path in files("trl").joinpath("chat_templates").iterdir()}
PUBLISHED = {name: source for name, source in sorted(PUBLISHED.items()) if name.endswith(".jinja")}
TALKS: list[list[dict[str, Any]]] = [
    talk("Hello?", "Hi."),
    talk("1+1", "2", "and 3?", "5", system="Be brief."),
    talk("why", "<think>\nbecause\n</think>\n\nSo.", "how", "Thus."),
]


def in_this_process(
    source: str, tokenizer: Tokenizer, messages: list[dict[str, Any]], prompt: bool
) -> list[int] | None:
    """The ids as `transformers` renders and encodes them; None where the template refuses."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.twin(), **tokenizer.named_tokens, chat_template=source)
    try:
        return theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
    except Exception:
        return None


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_give_the_ids_of_transformers(name: str):
    source = PUBLISHED[name]
    tokenizer = chats.tokenizer(source)
    rendered = 0
    for messages in TALKS:
        expected = in_this_process(source, tokenizer, messages[:-1], prompt=True)
        try:
            ids = Chat(tokenizer).prompt(messages[:-1])
        except UserError:
            assert expected is None
            continue
        assert ids == expected
        rendered += 1
    assert rendered, json.dumps(TALKS)
