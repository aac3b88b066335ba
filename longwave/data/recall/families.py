"""The families of recall tasks: for each, what stands in the text, what is asked, and what answers.

A family makes a `Plan`: lines of filler without end, the needles among them, and after the text a question, or several
in turn. `fitting.py` takes as many lines as give the length that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from longwave import draws
from longwave.data.recall.words import ADJECTIVES, NOUNS, Draws, Names, sentence
from longwave.errors import UserError, shown

SHORT_TEXT = 800  # tokens; up to here keys have one word and chains of variables two steps, as short texts need
DIGITS = 5
_KEYS, _VALUES, _QUERIES = 4, 4, 4  # RULER's numbers of needles
_COPIED = 8  # words
_COMMON, _TIMES = 5, 8  # words, and how often each stands in the list
_BLOCK = (0, 0, 0, 0, 1, 1, 1, 2, 2, 3)  # of ten words: the most frequent, the next two, and one of the others
_STEPS = (1, 3, 7, 9)  # through a block, each of which meets every word of it
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Turn(NamedTuple):
    """A question after the text, and what has to be said to it: all of the answers, or any one of them."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A task before it is brought to a length.

    head: the text before the lines. line: the lines of filler by their number. lines: how many there are of them, and
    `least` of which the task needs. needles: what is hidden, and `places`, where: shares of the filler before them.
    turns: the questions in order; the last one's answer ends the text. joint: between lines. opening: between the lines
    and the first question. needed: whether a question needs all of its answers or any one.
    padding: a text whose beginning fills a rest that is large because the lines are long. chance: that a guess is right
    which knows what an answer looks like and not which is asked for; of the lines of a text, where they decide it.
    """

    head: str
    line: Callable[[int], str]
    needles: Sequence[str]
    places: Sequence[float]
    turns: Sequence[Turn]
    lines: int = 1 << 31
    least: int = 0
    joint: str = "\n"
    opening: str = "\n"
    needed: Literal["all", "any"] = "all"
    padding: str = ""
    chance: Callable[[Sequence[str]], float] = field(default=lambda lines: 0.0)

    @property
    def targets(self) -> list[str]:
        """The answer to each question as a text goes on with it, and its line end."""
        said = [turn.answers if self.needed == "all" else turn.answers[:1] for turn in self.turns]
        return [f" {_listed(answers)}\n" for answers in said]

    @property
    def asked(self) -> str:
        """The text from the last line to the end, every answer in it."""
        pairs = zip(self.turns, self.targets, strict=True)
        return self.opening + "".join(turn.question + target for turn, target in pairs)


@dataclass(frozen=True)
class Family:
    """A kind of recall task. has_depth: whether one needle is asked for, whose depth can be chosen.

    plan: makes a task from draws, a length in tokens, where there is a depth the share of the text before the (first)
    needle that is asked for, and the number of questions; a depth of None is drawn. asks_many: whether a text can be
    asked several questions, each of which has needles of its own; others ask one, however many are wanted.
    """

    name: str
    has_depth: bool
    plan: Callable[[Draws, int, float | None, int], Plan]
    asks_many: bool = False


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


# Needles in sentences -------------------------------------------------------------------------------------------------

_HEAD = "Some sentences of this text name a code. Remember the codes.\n"


def _needle(name: str, code: str) -> str:
    return f"The code of the {name} is {code}."


def _single(drawn: Draws, length: int, depth: float | None, questions: int) -> Plan:
    return _codes(drawn, depth, questions, questions)


def _multi_key(drawn: Draws, length: int, depth: float | None, questions: int) -> Plan:
    return _codes(drawn, depth, questions, questions + _KEYS - 1)


def _codes(drawn: Draws, depth: float | None, questions: int, keys: int) -> Plan:
    """As many codes are asked for as there are questions; the others stand anywhere."""
    names, codes, place = _names(drawn, keys), drawn.numbers(keys, DIGITS), _drawn(drawn, depth)
    needles = [_needle(*pair) for pair in zip(names, codes, strict=True)]
    places = [place, *(drawn.share() for _ in names[1:])]
    pairs = list(zip(names, codes, strict=True))[:questions]
    turns = [Turn(f"What is the code of the {name}? The code of the {name} is", (code,)) for name, code in pairs]
    chance = 1 / keys if keys > 1 else 1 / (9 * 10 ** (DIGITS - 1))
    return Plan(_HEAD, _filler(drawn), needles, places, turns, chance=lambda lines: chance)


def _multi_value(drawn: Draws, length: int, depth: float | None, questions: int) -> Plan:
    names, codes = _names(drawn, questions), _grouped(drawn.numbers(_VALUES * questions, DIGITS), _VALUES)
    needles = [_needle(name, code) for name, own in zip(names, codes, strict=True) for code in own]
    asked = [f"What are all the codes of the {name}? The codes of the {name} are" for name in names]
    turns = list(map(Turn, asked, codes))
    return Plan(_HEAD, _filler(drawn), needles, _anywhere(drawn, len(needles)), turns)


def _multi_query(drawn: Draws, length: int, depth: float | None, questions: int) -> Plan:
    names, codes = _names(drawn, _QUERIES * questions), drawn.numbers(_QUERIES * questions, DIGITS)
    needles = [_needle(*pair) for pair in zip(names, codes, strict=True)]
    groups = [_listed([f"the {name}" for name in group]) for group in _grouped(names, _QUERIES)]
    asked = [f"What are the codes of {group}? In this order, the codes are" for group in groups]
    turns = list(map(Turn, asked, _grouped(codes, _QUERIES)))
    return Plan(_HEAD, _filler(drawn), needles, _anywhere(drawn, len(needles)), turns)


def _grouped(items: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def _names(drawn: Draws, count: int) -> list[str]:
    names = Names(drawn.below(1 << 62), 2)
    return [names[number] for number in range(count)]


def _filler(drawn: Draws) -> Callable[[int], str]:
    key = drawn.below(1 << 62)
    return lambda number: sentence(key, number)


def _drawn(drawn: Draws, depth: float | None) -> float:
    return drawn.share() if depth is None else depth


def _anywhere(drawn: Draws, count: int) -> list[float]:
    return sorted(drawn.share() for _ in range(count))


# Lines of their own form ----------------------------------------------------------------------------------------------


def _key_value(drawn: Draws, length: int, depth: float | None, questions: int) -> Plan:
    """Nothing but pairs, each on a line; the keys that are asked for stand once more at the end."""
    names, key = Names(drawn.below(1 << 62), 1 if length <= SHORT_TEXT else 2), drawn.below(1 << 62)

    def value(number: int) -> str:
        return Draws(key, number).one(ADJECTIVES)

    turns = [Turn(f"{names[number]}:", (value(number),)) for number in range(questions)]
    answer = value(0)
    return Plan(
        "",
        lambda number: f"{names[number + questions]}: {value(number + questions)}",
        [f"{turn.question} {turn.answers[0]}" for turn in turns],
        [_drawn(drawn, depth), *(drawn.share() for _ in turns[1:])],
        turns,
        lines=len(names) - questions,
        opening="\n\n",
        chance=lambda lines: sum(line.endswith(f": {answer}") for line in lines) / len(lines),
    )


def _copy(drawn: Draws, length: int, depth: float | None, questions: int) -> Plan:
    """A line of words to be written once more."""
    words = " ".join(drawn.several((*NOUNS, *ADJECTIVES), _COPIED))
    turns = [Turn("The line to copy:", (words,))]
    return Plan("", _filler(drawn), [f"Copy this line: {words}"], [_drawn(drawn, depth)], turns)


def _variables(drawn: Draws, length: int, depth: float | None, questions: int) -> Plan:
    """Chains of variables, each of which takes the value of the one before it; of all chains but one, all are asked."""
    size, count = (2 if length <= SHORT_TEXT else 4) + 1, questions + 1
    codes = drawn.several(range(26**3), count * size)
    chains = _grouped(["".join(_LETTERS[code // 26**place % 26] for place in range(3)) for code in codes], size)
    values, needles, places = drawn.numbers(count, DIGITS), list[str](), list[float]()
    for chain, value in zip(chains, values, strict=True):
        needles += [f"{name} = {source}" for name, source in zip(chain, [value, *chain], strict=False)]
        places += _anywhere(drawn, size)
    asked = [f"Which variables have the value {value}? The variables with the value {value} are" for value in values]
    return Plan("", _filler(drawn), needles, places, list(map(Turn, asked[:questions], chains)))


# Counting words -------------------------------------------------------------------------------------------------------


def _common(drawn: Draws, length: int, depth: float | None, questions: int) -> Plan:
    """A list of words of which five stand there eight times, and all others once."""
    words, order = drawn.several(NOUNS, _COMMON), _others(drawn)
    turn = Turn(f"Which {_COMMON} words come most often in this list? The words are", tuple(words))
    needles = [word for word in words for _ in range(_TIMES)]
    places = [drawn.share() for _ in needles]
    return Plan(_LIST, order.__getitem__, needles, places, [turn], len(order), joint=" ")


def _frequent(drawn: Draws, length: int, depth: float | None, questions: int) -> Plan:
    """A list of words of which three make 40, 30 and 20 % of it."""
    words, order, key = drawn.several(NOUNS, 3), _others(drawn), drawn.below(1 << 62)

    def line(number: int) -> str:
        block, place = divmod(number, len(_BLOCK))
        first, step = divmod(draws.key(key, block), len(_STEPS))
        kind = _BLOCK[(first + place * _STEPS[step]) % len(_BLOCK)]
        return order[block] if kind == len(words) else words[kind]

    turn = Turn("Which 3 words come most often in this list? The words are", tuple(words))
    return Plan(_LIST, line, [], [], [turn], len(order) * len(_BLOCK), len(_BLOCK), joint=" ")


_LIST = "A list of words, some of which come more often than others:\n"


class _Compounds(Names):
    """Words of a noun and an adjective in one, which no other list has."""

    def __getitem__(self, place: int) -> str:
        return super().__getitem__(place).replace(" ", "-")


def _others(drawn: Draws) -> _Compounds:
    return _Compounds(drawn.below(1 << 62), 2)


FAMILIES = {
    family.name: family
    for family in (
        Family("single", True, _single, asks_many=True),
        Family("multi-key", True, _multi_key, asks_many=True),
        Family("multi-value", False, _multi_value, asks_many=True),
        Family("multi-query", False, _multi_query, asks_many=True),
        Family("variables", False, _variables, asks_many=True),
        Family("common-words", False, _common),
        Family("frequent-words", False, _frequent),
        Family("key-value", True, _key_value, asks_many=True),
        Family("copy", True, _copy),
    )
}
RULER = tuple(FAMILIES)[:7]
"""The families of RULER that need no data; its questions are `questions.py`."""


def family_of(name: str) -> Family:
    """The family of a name. Raises UserError for another."""
    if name not in FAMILIES:
        raise UserError(f"family = {shown(name)}: use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
