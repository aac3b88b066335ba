"""Documents chosen by length and by source: budgets, shares, shortfalls, and the same choice for the same seed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st

import longwave as lw
from longwave.cli import main
from longwave.data.documents import Document
from longwave.data.prepared import PreparedInfo, SplitTokens
from longwave.data.selection import Chooser, Counts, Lengths, Selection, parse_keep
from longwave.data.shards import prepare
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "the", "moon", "all", "night"]
LONG = 64  # tokens of a long document, at least


def corpus(count: int = 900) -> Iterator[Document]:
    """Three sources: a third of the text each; one has short documents alone, one both, and one mostly long ones."""
    for number in range(count):
        source = ("chats", "web", "books")[number % 3]
        words = {"chats": 8, "web": 8 if number % 2 else 150, "books": 20 if number % 5 == 0 else 200}[source]
        text = " ".join(WORDS[(number + place) % len(WORDS)] for place in range(words))
        yield Document(f"{source}/{number}", text, source=source)


def prepared(folder: Path, keep: str | None = None, tokens: int | None = None, **options: Any) -> PreparedInfo:
    tokenizer = Tokenizer.load(runs.prepared())
    chosen = {"keep": () if keep is None else parse_keep(keep), "tokens": tokens}
    return prepare(corpus, folder, tokenizer=tokenizer, **{"held_out": 0.1, **chosen, **options})


def lengths(folder: Path, split: str = "train") -> dict[str, list[int]]:
    """The lengths of the documents of a split, by source."""
    read = SplitTokens(folder, split)  # type: ignore[arg-type]
    found: dict[str, list[int]] = {name: [] for name in read.info.sources}
    for source, document in zip(read.sources, read.documents(), strict=True):
        found[read.info.sources[source]].append(len(document))
    return found


def all_lengths(folder: Path, split: str = "train") -> list[int]:
    return list(chain(*lengths(folder, split).values()))


def shares(folder: Path) -> dict[str, float]:
    found = {name: sum(its) for name, its in lengths(folder).items()}
    return {name: tokens / sum(found.values()) for name, tokens in found.items()}


def long_share(folder: Path) -> float:
    found = all_lengths(folder)
    return sum(length for length in found if length >= LONG) / sum(found)


# --- reading lengths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("0-4k:0.1,4k-", [(0, 4096, 0.1), (4096, float("inf"), 1)]),
        ("4k-12k", [(4096, 12288, 1)]),
        ("100-", [(100, float("inf"), 1)]),
        ("00-1:1", [(0, 1, 1)]),
        ("4k-: 0.5, 0 - 10 : 1e-3", [(0, 10, 0.001), (4096, float("inf"), 0.5)]),
        ("24k-32k,12k-24k,4k-12k,0-4k", [(0, 4096, 1), (4096, 12288, 1), (12288, 24576, 1), (24576, 32768, 1)]),
    ],
)
def test_lengths_read_as_ranges_with_a_probability(text: str, kept: list[tuple[int, float, float]]):
    assert parse_keep(text) == tuple(Lengths(*one) for one in kept)


@pytest.mark.parametrize(
    "text", ["", "4k", "-4k", "4k-2k", "4k-4k", "0-4k:0", "0-4k:-1", "0-4k:1.5", "0-4k:nan", "0-4k:x", "0-4k:", "a-b"]
)
def test_what_is_no_range_is_refused(text: str):
    with pytest.raises(UserError, match=r"such as 0-4k:0\.1,4k-|is no number of tokens"):
        parse_keep(text)


@pytest.mark.parametrize("text", ["0-4k,0-4k", "0-5k,4k-8k", "4k-,8k-9k"])
def test_ranges_that_overlap_are_refused(text: str):
    with pytest.raises(UserError, match="ranges overlap"):
        parse_keep(text)


# --- the rule, by itself ----------------------------------------------------------------------------------------------

FU = Selection(parse_keep("0-64:0.1,64-"))


def test_every_long_document_is_kept_and_a_short_one_with_its_probability():
    assert all(FU.place(f"{number}", 64) is not None for number in range(2000))
    short = [FU.place(f"{number}", 63) for number in range(20000)]
    assert sum(place is not None for place in short) / 20000 == pytest.approx(0.1, abs=0.007)
    places = np.array([place for place in short if place is not None])
    assert (places.min() >= 0, places.max() < 1) == (True, True)
    assert places.mean() == pytest.approx(0.5, abs=0.03)  # so a budget cuts off any part alike


def test_a_draw_depends_on_name_and_seed_alone():
    other = Selection(FU.keep, seed=1)
    names = [f"{number}" for number in range(500)]
    assert [FU.place(name, 9) for name in names] == [FU.place(name, 9) for name in names]
    assert [FU.place(name, 9) for name in names] != [other.place(name, 9) for name in names]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300)), min_size=1, max_size=200),
    st.integers(1, 60_000),
    st.integers(0, 9),
)
def test_a_source_ends_with_the_document_that_reaches_its_budget(
    documents: list[tuple[int, int]], tokens: int, seed: int
):
    selection = Selection(FU.keep, tokens, seed)
    counts = Counts(selection)
    for number, (source, length) in enumerate(documents):
        counts.add(source, f"{number}", length)
    chooser = Chooser(selection, counts)
    taken = [chooser.takes(source, f"{at}", length, False) for at, (source, length) in enumerate(documents)]
    total = sum(length for _, length in documents)
    for share, source in zip(chooser.shares("abcd"), sorted({source for source, _ in documents}), strict=True):
        own = [(length, took) for (one, length), took in zip(documents, taken, strict=True) if one == source]
        kept = [x for at, (one, x) in enumerate(documents) if one == source and selection.place(f"{at}", x) is not None]
        assert (share.documents, share.tokens) == (sum(t for _, t in own), sum(x * t for x, t in own))
        assert share.of_tokens == sum(length for length, _ in own)
        assert share.wanted is not None
        assert share.wanted == tokens * share.of_tokens // total
        assert share.tokens < share.wanted + 300
        assert share.tokens >= min(share.wanted, sum(kept))
        assert share.missing == max(0, share.wanted - share.tokens)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_each_source_keeps_its_share_of_the_tokens_and_has_more_in_long_documents(tmp_path: Path):
    plain = prepared(tmp_path / "plain")
    info = prepared(tmp_path / "long", "0-64:0.3,64-", plain.train.tokens // 2)
    before = shares(tmp_path / "plain")
    by_name = {one.name: one for one in info.shares}
    assert set(by_name) == {"chats", "web", "books"}
    for name in ("web", "books"):
        assert by_name[name].tokens / (plain.train.tokens / 2) == pytest.approx(before[name], abs=0.01)
        assert by_name[name].of_tokens / plain.train.tokens == pytest.approx(before[name], abs=1e-9)
        assert by_name[name].missing == 0
    assert long_share(tmp_path / "long") > long_share(tmp_path / "plain")
    assert plain.shares == []


def test_without_a_number_of_tokens_sources_of_long_documents_gain(tmp_path: Path):
    """The paper's global upsampling, whose shares move; those of the per-source one do not."""
    prepared(tmp_path / "plain")
    info = prepared(tmp_path / "global", "0-64:0.1,64-")
    before, after = shares(tmp_path / "plain"), shares(tmp_path / "global")
    assert after["books"] > before["books"] + 0.01
    assert after["chats"] < before["chats"] / 2
    assert all(one.wanted is None and one.missing == 0 for one in info.shares)
    kept = lengths(tmp_path / "global")
    long = {name: [x for x in its if x >= LONG] for name, its in lengths(tmp_path / "plain").items()}
    assert {name: [x for x in its if x >= LONG] for name, its in kept.items()} == long


def test_a_source_that_runs_out_is_told_of(tmp_path: Path):
    plain = prepared(tmp_path / "plain")
    info = prepared(tmp_path / "long", "0-64:0.1,64-", plain.train.tokens)
    chats = next(one for one in info.shares if one.name == "chats")
    assert chats.wanted is not None
    assert 0 < chats.tokens < chats.wanted == chats.of_tokens
    assert chats.missing == chats.wanted - chats.tokens
    assert PreparedInfo.read(tmp_path / "long") == info


def test_the_same_seed_gives_the_same_folder_and_another_another(tmp_path: Path):
    one, same, other = (
        prepared(tmp_path / name, "0-64:0.3,64-", 4000, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert one == same
    for path in (tmp_path / "a").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    assert other.shares != one.shares


@pytest.mark.parametrize("keep", [None, "0-"])
def test_what_leaves_nothing_out_changes_no_token(tmp_path: Path, keep: str | None):
    plain, info = prepared(tmp_path / "plain"), prepared(tmp_path / "all", keep, 10**9 if keep is None else None)
    assert (info.train, info.held_out) == (plain.train, plain.held_out)
    assert lengths(tmp_path / "all") == lengths(tmp_path / "plain")


def test_classes_of_length_are_apart_and_make_up_the_whole(tmp_path: Path):
    """InfLLM-V2's classes of documents, each a folder of its own, to be mixed by shares."""
    borders = ["0-45", "45-100", "100-"]
    infos = [prepared(tmp_path / keep, keep) for keep in borders]
    plain = prepared(tmp_path / "plain")
    for split in ("train", "held_out"):
        found = [all_lengths(tmp_path / keep, split) for keep in borders]
        assert all(max(one) < min(other) for one, other in pairwise(found))
        assert sorted(chain(*found)) == sorted(all_lengths(tmp_path / "plain", split))
    assert sum(one.train.tokens for one in infos) == plain.train.tokens
    mix = [{"folder": str(tmp_path / keep), "share": 1} for keep in borders[1:]]
    recipe = runs.write_recipe(tmp_path / "r.toml", "llama", "adamw", steps=3)
    result = lw.train(recipe, {"data.folder": "", "data.mix": mix}, output=tmp_path / "run")
    assert set(result.held_out_by_folder) == set(borders[1:])


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    for document in corpus(120):
        path = tmp_path / "text" / f"{document.name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text)
    return tmp_path / "text"


def run(text: Path, *words: str) -> int:
    return main(["prepare", str(text), str(text.parent / "out"), "--tokenizer", str(runs.prepared()), *words])


def test_the_command_tells_of_every_source(text: Path, capsys: Any):
    assert run(text, "--keep", "0-64:0.1,64-", "--tokens", "8k", "--held-out", "0.2", "--json") == 0
    said = capsys.readouterr().out.splitlines()
    for name in ("books", "web"):
        assert any(
            re.match(rf"{name}: [\d,]+ of [\d,]+ tokens, \d+ of \d+ documents; .*% of all, .*% before", x) for x in said
        )
    assert any(re.match(r"chats: \d+ tokens fewer than its share of \d+; it has no more to keep", x) for x in said), (
        said
    )
    assert {one["name"] for one in json.loads(said[-1])["shares"]} == {"books", "web", "chats"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "4k"], "keep = '4k': lengths in tokens with a probability"),
        (["--keep", "0-4k,2k-"], "ranges overlap"),
        (["--keep", "100k-"], "keep: no training document has such a length"),
        (["--keep", "64-:0.01", "--held-out", "0.02"], "keep: no "),
        (["--tokens", "0"], "'0' is no amount above 0"),
        (["--tokens", "x"], "'x' is no amount above 0"),
        (["--lengths", "256"], "lengths = '256': has no effect on any source but recall"),
    ],
    ids=str,
)
def test_what_cannot_be_chosen_is_one_line(text: Path, capsys: Any, words: list[str], message: str):
    assert run(text, *words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0], said
    assert not (text.parent / "out").exists()


def test_recall_tasks_are_not_kept_by_length(tmp_path: Path):
    with pytest.raises(UserError, match="keep = '0-4k': has no effect on the source recall; leave it out"):
        lw.prepare("recall", tmp_path / "out", tokenizer=runs.prepared(), lengths=256, tokens="20k", keep="0-4k")
