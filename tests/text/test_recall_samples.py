"""Recall tasks: exact lengths with any tokenizer, solvable by string search, needles where they are said to be."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from recall_solver import TOKENIZERS, is_solved
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from longwave.data.documents import Document
from longwave.data.encoding import TextEncoder
from longwave.data.recall import FAMILIES, RULER, Sample, family_of, read_questions, sample
from longwave.data.recall.questions import family_of_questions
from longwave.data.recall.scoring import found_in, stands_in
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError

LENGTHS = (512, 513, 777, 1031)
DEPTHS = (0.0, 0.25, 0.5, 0.9, 1.0)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return TOKENIZERS["byte-level, 300 entries"]()


def samples(tokenizer: Tokenizer, name: str) -> list[Sample]:
    """Samples of several keys, lengths, and depths where there are any."""
    family, depths = FAMILIES[name], DEPTHS if FAMILIES[name].has_depth else (None,)
    keys = [(length, depths[number % len(depths)], number) for number in range(len(DEPTHS)) for length in LENGTHS]
    return [sample(family, tokenizer, length, depth, number) for length, depth, number in keys]


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_have_their_length_and_one_answer_that_string_search_finds(tokenizer: Tokenizer, name: str):
    """The length is that of the joined text as it is stored for training, and its prompt is what a model is given."""
    for found in samples(tokenizer, name):
        [[stored]] = TextEncoder(tokenizer).encode([Document("", found.text)])
        assert len(stored.ids) == found.length
        prompt = tokenizer.encode(found.prompt, add_bos=True)
        assert len(prompt) == found.prompt_tokens
        assert stored.ids[: len(prompt)] == prompt
        assert is_solved(found.prompt, found.answers), found.prompt
        assert found_in(found.answers, found.targets[-1]) == 1


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_depth])
def test_needles_stand_where_they_are_said_to_be(tokenizer: Tokenizer, name: str):
    """Within a line of filler; at 0 nothing but the head comes before the needle, and at 1 no line after it."""
    for found in samples(tokenizer, name):
        key = {"key-value": found.prompt.rsplit("\n", 1)[1], "copy": "Copy this line"}.get(name)
        needle = key or f"{found.prompt.rsplit('? ', 1)[1].removesuffix(' is')} is {found.answers[0]}."
        body = found.prompt[: found.prompt.rindex("\n", 0, -1)].rstrip("\n")
        lines = [line for line in body.split("\n") if line and not line.startswith("Some sentences")]
        place = next(number for number, line in enumerate(lines) if line.startswith(needle.strip("\n")))
        sizes = [len(tokenizer.encode("\n" + line)) for line in lines]
        before, rest = sum(sizes[:place]), sum(sizes) - sizes[place]
        others = [line for number, line in enumerate(lines) if number != place]
        assert found.depth is not None
        assert abs(before - found.depth * rest) <= max(sizes), (name, found.depth, before, rest)
        if name in ("single", "key-value", "copy") and found.depth in (0, 1):
            assert place == len(others) * found.depth


VALUES = {"key-value": r": (\w+)\n", "multi-key": r"(\d+)"}


@pytest.mark.parametrize("name", VALUES)
def test_chance_is_what_taking_any_value_of_the_text_gives(small: Tokenizer, name: str):
    made = [sample(FAMILIES[name], small, 480, None, 3, number) for number in range(60)]
    right = 0.0
    for one in made:
        values = re.findall(VALUES[name], one.prompt)
        right += sum(stands_in(one.answers[0], value) for value in values) / len(values)
    assert right / len(made) == pytest.approx(sum(one.chance for one in made) / len(made), abs=1e-9)
    assert 0.01 < right / len(made) < 0.3


def test_the_same_key_gives_the_same_sample_on_every_machine(small: Tokenizer):
    """To the letter: the digests were made once, on another machine than most that run this."""
    made = [sample(family, small, 601, None, 7, 1) for family in FAMILIES.values()]
    digest = hashlib.sha256("\0".join(one.text for one in made).encode()).hexdigest()
    assert digest[:16] == "890d8955520a9715"
    assert (
        sample(FAMILIES["single"], small, 601, None, 7, 2)
        != made[0]
        != sample(FAMILIES["single"], small, 602, None, 7, 1)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_are_exact_from_the_shortest_on_and_below_it_refused_in_one_line(small: Tokenizer, name: str):
    family = FAMILIES[name]
    for length in (1, 2, 20):
        with pytest.raises(UserError, match=rf"^length = {length}: {name} takes \d+ tokens or more"):
            sample(family, small, length, None, 0)
    with pytest.raises(UserError) as refused:
        sample(family, small, 20, None, 0)
    shortest = int(str(refused.value).split(" takes ")[1].split()[0])
    for length in range(shortest + 4, shortest + 50):
        assert sample(family, small, length, None, 0).length == length


def test_a_length_without_end_is_refused_before_it_is_made(small: Tokenizer):
    with pytest.raises(UserError, match="length = 2147483648: 1 to 2,147,483,647 tokens"):
        sample(FAMILIES["single"], small, 1 << 31, None, 0)
    family = FAMILIES["single"]
    few = replace(family, plan=lambda *given: replace(family.plan(*given), lines=9))
    with pytest.raises(UserError, match="length = 2,000: single has too little text for so many tokens; give fewer"):
        sample(few, small, 2000, None, 0)
    with pytest.raises(UserError, match="family = 'needle': use one of single, multi-key"):
        family_of("needle")


def test_a_tokenizer_that_cannot_write_the_answer_is_refused():
    backend = Backend(models.WordLevel({"<unk>": 0, "a": 1, "The": 2}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    words = Tokenizer(backend, {"unk_token": "<unk>"})
    with pytest.raises(UserError, match=r"^tokenizer: it writes '\d{5}' as"):
        sample(FAMILIES["single"], words, 500, None, 0)


def test_the_families_of_ruler_are_the_first_seven():
    assert RULER == ("single", "multi-key", "multi-value", "multi-query", "variables", "common-words", "frequent-words")


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text", "stands"),
    [
        ("12", "12", True),
        ("12", "it is 12.", True),
        ("12", "(12)", True),
        ("12", "12,13", True),
        ("12", "4123", False),
        ("12", "123", False),
        ("12", "412", False),
        ("12", "12.5", False),
        ("12", "0.12", False),
        ("12", "x12", False),
        ("12", "12_000", False),
        ("12", "", False),
        ("Oslo", "in OSLO!", True),
        ("Oslo", "Osloer", False),
        ("the  old cat", "The old\ncat", True),
        ("old cat", "bold cat", False),
        ("café", "un café noir", True),
        ("caf", "un café noir", False),
        ("straße", "STRASSE", True),
        ("東京", "私は東京に", True),
        ("C++", "in C++.", True),
        ("a.b", "axb", False),
    ],
)
def test_answers_are_words_of_their_own(answer: str, text: str, stands: bool):
    assert stands_in(answer, text) is stands


def test_the_share_of_answers_and_any_of_them():
    assert found_in(["a", "b"], "b c") == 0.5
    assert found_in(["a", "b"], "b c", "any") == 1
    assert found_in(["a", "b"], "c", "any") == 0


# --- questions of one's own -------------------------------------------------------------------------------------------


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def facts(count: int) -> list[object]:
    said = "It is said that a sailor of the north built it, long before anybody kept books of such things. "
    return [
        {
            "text": f"House {n} stands in a park. {said * (n % 4)}Its colour is red{n}.",
            "question": f"Which colour has house {n}?",
            "answers": [f"red{n}", "none"],
        }
        for n in range(count)
    ]


def test_questions_are_hidden_among_the_texts_of_others(tokenizer: Tokenizer, tmp_path: Path):
    family = family_of_questions(read_questions(write(tmp_path / "q.jsonl", facts(40))))
    for length in (700, 701, 907, 1500):
        for number in range(4):
            found = sample(family, tokenizer, length, number / 3, number)
            [[stored]] = TextEncoder(tokenizer).encode([Document("", found.text)])
            assert len(stored.ids) == length
            text, question = found.prompt.split("\n\nQuestion: ")
            house = question.split("house ")[1].split("?")[0]
            assert found.answers[0] == f"red{house}"
            assert text.count(f"red{house}.") == 1
            assert found.needed == "any"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([], "a list; each row must be a JSON object"),
        ({"text": "a", "question": "b"}, "no answers; each row has one"),
        ({"text": "a", "question": "b", "answers": []}, r"answers = \[\]: a text, or a list"),
        ({"text": "a", "question": "b", "answers": "c"}, "answers = .*none of them stands in the text"),
        ({"text": "4123", "question": "b", "answer": "12"}, "none of them stands in the text"),
        ({"text": "a", "context": "a", "question": "b", "answers": "a"}, "text and context; each row has one"),
        ({"text": "a", "question": " ", "answers": "a"}, "question = ' ': a text, not empty"),
    ],
)
def test_rows_that_are_no_questions_are_refused(row: object, says: str, tmp_path: Path):
    with pytest.raises(UserError, match=rf"q\.jsonl:3: .*{says}"):
        read_questions(write(tmp_path / "q.jsonl", [*facts(2), row]))


def test_files_without_questions_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="fewer than two texts"):
        read_questions(write(tmp_path / "q.jsonl", facts(1)))
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(UserError, match=r"t\.txt: text, not rows"):
        read_questions(tmp_path / "t.txt")
