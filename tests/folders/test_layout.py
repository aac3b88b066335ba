"""The one-line notation: what is printed is parsed again, and every mistake is pointed at."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longwave.blocks import BLOCKS
from longwave.errors import UserError
from longwave.layout import Blocks, Bracketed, Layout, check_names, parse
from longwave.resamplers import BRACKETS

LETTERS = st.sampled_from("ABCFLSWZ")
BLOCK = st.builds(Blocks, st.integers(1, 30), LETTERS)
ARGUMENTS = st.lists(st.from_regex(r"[^\s,:()]+", fullmatch=True), max_size=3).map(tuple)


def layouts(items: st.SearchStrategy) -> st.SearchStrategy[Layout]:
    return st.lists(items, min_size=1, max_size=4).map(tuple).map(Layout)


NAMES = st.from_regex(r"[a-z_][a-z_0-9]{0,8}", fullmatch=True)
NESTED = st.recursive(BLOCK, lambda item: BLOCK | st.builds(Bracketed, NAMES, ARGUMENTS, layouts(item)), max_leaves=12)


@given(layouts(NESTED))
def test_what_is_printed_is_parsed_again(layout: Layout):
    assert parse(str(layout)) == layout
    assert str(parse(str(layout))) == str(layout)


@given(layouts(NESTED), st.data())
def test_blanks_are_free(layout: Layout, data: st.DataObject):
    text = "".join(
        mark + data.draw(st.sampled_from(["", " ", "  ", "\t", "\n"])) if mark in "(),: " else mark
        for mark in str(layout)
    )
    spaced = text.replace(")", " )")
    assert parse(f" {spaced} ") == layout


def test_what_the_parts_of_a_layout_are():
    text = "5F subllm(0.64: 2W other(a, b-c: F)) L"
    layout = parse(text)
    inner = Bracketed("other", ("a", "b-c"), Layout((Blocks(1, "F"),)))
    assert layout == Layout(
        (Blocks(5, "F"), Bracketed("subllm", ("0.64",), Layout((Blocks(2, "W"), inner))), Blocks(1, "L"))
    )
    assert layout.depth == 9
    assert [text[item.at] for item in layout.walk()] == ["F", "s", "W", "o", "F", "L"]
    assert parse("halves(F)") == Layout((Bracketed("halves", (), Layout((Blocks(1, "F"),))),))
    assert parse("5F5F") == Layout((Blocks(5, "F"), Blocks(5, "F")))


@pytest.mark.parametrize(
    ("text", "at", "message"),
    [
        ("", 0, "expected a block or a bracket"),
        ("   ", 3, "expected a block or a bracket"),
        ("5F ?", 3, "expected a block letter, a count or a bracket"),
        ("5F )", 3, "expected a block letter, a count or a bracket"),
        ("5F, 2F", 2, "expected a block letter, a count or a bracket"),
        (": F", 0, "expected a block letter, a count or a bracket"),
        ("5 6F", 2, "expected a block letter after the count"),
        ("5", 1, "expected a block letter after the count"),
        ("5subllm(0.5: F)", 1, "expected a block letter after the count"),
        ("F 0F", 2, "a count is 1 to 1024"),
        ("F 000F", 2, "a count is 1 to 1024"),
        ("F 1025F", 2, "a count is 1 to 1024"),
        ("999999999999F", 0, "a count is 1 to 1024"),
        ("1000F 25F", 6, "more than 1024 blocks in all"),
        ("1024F F", 6, "more than 1024 blocks in all"),
        ("subllm(0.5: 600F) 600W", 18, "more than 1024 blocks in all"),
        ("subllm", 6, "expected '(' after subllm"),
        ("F subllm F", 9, "expected '(' after subllm"),
        ("subllm(", 7, "expected an argument of subllm"),
        ("subllm(: F)", 7, "expected an argument of subllm"),
        ("subllm(0.5, : F)", 12, "expected an argument of subllm"),
        ("subllm(0.5 0.6: F)", 11, "expected ',' or ':' after the arguments of subllm"),
        ("subllm(0.5)", 10, "expected ',' or ':' after the arguments of subllm"),
        ("subllm(0.5", 10, "expected ',' or ':' after the arguments of subllm"),
        ("subllm(0.5: )", 12, "expected a block or a bracket"),
        ("subllm(0.5: F", 13, "expected ')' that closes the bracket"),
        ("subllm(0.5: 2F subllm(0.5: F) F", 31, "expected ')' that closes the bracket"),
        ("subllm(0.5: F))", 14, "expected a block letter, a count or a bracket"),
        ("F (F)", 2, "expected a block letter, a count or a bracket"),
        ("F-F", 1, "expected a block letter, a count or a bracket"),
    ],
)
def test_a_mistake_is_pointed_at(text: str, at: int, message: str):
    with pytest.raises(UserError) as caught:
        parse(text)
    shown = f"{text[:at]}>>{text[at : at + 1]}<<{text[at + 1 :]}"
    assert str(caught.value) == f"layout, character {at + 1}: {message}: {shown!r}"


@pytest.mark.parametrize(
    ("text", "at", "message"),
    [
        ("2F 12Q", 5, "no block kind 'Q'; known: "),
        ("2F halve(0.5: F)", 3, "no bracket 'halve'; known: subllm"),
        ("subllm(0.5: 2F Q)", 15, "no block kind 'Q'; known: "),
    ],
)
def test_an_unknown_name_is_pointed_at(text: str, at: int, message: str):
    with pytest.raises(UserError) as caught:
        check_names(text, parse(text), BLOCKS, BRACKETS)
    assert str(caught.value).startswith(f"layout, character {at + 1}: {message}")
    assert all(letter in str(caught.value) for letter in BLOCKS) or "bracket" in message


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000 + "F",
        "0" * 5000 + "F",
        "F " * 30_000,
        "F " * 3_000_000,
        "subllm(0.5: " * 3000 + "F" + ")" * 3000,
        "subllm(0.5: F) " * 3000,
        "subllm(" + "0," * 30_000 + "?",
        "a" * 60_000,
        f"subllm(0.{'5' * 5000}: 2F",
    ],
)
def test_layouts_that_nobody_needs_are_refused_at_once_and_in_a_short_line(text: str):
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"^layout[,:]") as caught:
        parse(text)
    assert time.perf_counter() - began < 5
    assert len(str(caught.value)) < 400


def test_the_deepest_and_most_nested_layouts_are_parsed():
    assert parse("01024F").depth == 1024
    assert parse("subllm(0.5: " * 64 + "F" + ")" * 64).depth == 1


@given(st.text(alphabet="F W5subllm0.(),:?\n", max_size=25))
def test_any_text_is_parsed_or_refused_in_one_line(text: str):
    try:
        layout = parse(text)
    except UserError as refusal:
        message = str(refusal)
    else:
        message = ""
        assert parse(str(layout)) == layout
    assert "\n" not in message
