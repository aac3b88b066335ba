"""Questions about texts of one's own, hidden among the texts of the other questions: RULER's family of questions.

A file of rows, JSON on each line or another of the kinds of `longwave prepare`: `{"text": ..., "question": ...,
"answers": [...]}`; `context` is read as the text, and `answer` as the only answer. Any one of the answers will do, and
one of them stands in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longwave.data import formats
from longwave.data.recall.families import Family, Plan, Turn
from longwave.data.recall.scoring import stands_in
from longwave.data.recall.words import Draws, Order
from longwave.data.rows import Rules
from longwave.errors import UserError, require, shown
from longwave.files.jsonfile import plain

NAME = "questions"
_FORM = 'such as {"text": "...", "question": "...", "answers": ["..."]}'
_TEXTS, _ANSWERS = ("text", "context"), ("answers", "answer")


@dataclass(frozen=True)
class Question:
    """A row: a text, a question about it, and the answers of which any one will do; the first stands in the text."""

    text: str
    question: str
    answers: tuple[str, ...]


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file. Raises UserError naming the file and line."""
    name = plain(str(path))
    require(Path(path).is_file(), f"{name}: no such file; give a file of rows {_FORM}")
    try:
        pieces = list(formats.read(Path(path), Rules()))
    except formats.NotRead as error:
        raise UserError(f"{name}: not read ({error}); give .jsonl, {_FORM}") from error
    require(all(isinstance(piece, formats.Row) for piece in pieces), f"{name}: text, not rows; give .jsonl, {_FORM}")
    found = [_question(piece.content, f"{name}{piece.place}") for piece in pieces if isinstance(piece, formats.Row)]
    require(len({one.text for one in found}) > 1, f"{name}: fewer than two texts; each is hidden among the others")
    return found


def family_of_questions(questions: Sequence[Question]) -> Family:
    """The family of recall tasks that asks these questions."""
    return Family(NAME, True, _planner(questions))


def _planner(rows: Sequence[Question]) -> Callable[[Draws, int, float | None, int], Plan]:
    texts = list(dict.fromkeys(one.text for one in rows))

    def plan(drawn: Draws, length: int, depth: float | None, questions: int) -> Plan:
        asked = drawn.one(rows)
        # A text that happens to hold an answer would make the question easier than its depth says.
        others = [text for text in texts if not any(stands_in(answer, text) for answer in asked.answers)]
        order = Order(max(len(others), 1), drawn.below(1 << 62))
        turn = Turn(f"Question: {asked.question}\nAnswer:", asked.answers)
        place = drawn.share() if depth is None else depth
        return Plan(
            "",
            lambda number: others[order[number]],
            [asked.text],
            [place],
            [turn],
            lines=max(len(others) - 1, 0),
            joint="\n\n",
            opening="\n\n",
            needed="any",
            padding=others[order[len(others) - 1]] if others else "",
        )

    return plan


def _question(content: Any, where: str) -> Question:
    require(isinstance(content, dict), f"{where}: a {type(content).__name__}; each row must be a JSON object")
    text, question = _given(content, _TEXTS, where), _given(content, ("question",), where)
    answers = _given(content, _ANSWERS, where)
    answers = [answers] if isinstance(answers, str) else answers
    good = isinstance(answers, list) and bool(answers) and all(isinstance(one, str) and one.strip() for one in answers)
    require(good, f"{where}: answers = {shown(answers)}: a text, or a list of them")
    for name, value in (("text", text), ("question", question)):
        require(isinstance(value, str) and bool(value.strip()), f"{where}: {name} = {shown(value)}: a text, not empty")
    found = [" ".join(one.split()) for one in answers]
    there = [one for one in found if stands_in(one, text)]
    require(bool(there), f"{where}: answers = {shown(answers)}: none of them stands in the text, so none can be found")
    return Question(text.strip(), " ".join(question.split()), (there[0], *(one for one in found if one != there[0])))


def _given(content: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    found = [name for name in names if name in content]
    require(len(found) == 1, f"{where}: {' and '.join(found) or f'no {names[0]}'}; each row has one, {_FORM}")
    return content[found[0]]
