"""Words, numbers and sentences of recall tasks, drawn by keys; and the order in which none of them comes twice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

from longwave import draws
from longwave.data.packed import WindowSampler

T = TypeVar("T")

_ADJECTIVES = """
amber ancient bitter blue bold brave bright brown calm clean clear clever cold cool crisp dark deep dry dusty early
empty fair fast fine firm fresh gentle giant golden grand green grey happy heavy hidden hollow humble icy keen kind
large late light lively lone long loud lucky mild narrow neat noble odd old pale plain proud quick quiet rare red
rich rough round royal sharp shiny short shy silent silver simple slow small smooth soft solid steep still strange
strong sweet swift tall tame thick thin tidy tiny true vast warm weak wet white wide wild wise wooden young
"""
_NOUNS = """
anchor apple apron arch arrow badge bakery banjo barn basin basket beach beacon bell bench berry bicycle boat book
boot bottle bowl branch bread brick bridge broom brush bucket button cabin cable camel camera candle canoe canyon
carpet castle cave cellar chain chair chalk cherry chimney church circle cliff clock cloud coat coin comb compass
copper corner cottage cotton cradle crane crown cup curtain desk diamond door dove dragon drawer drum eagle engine
falcon farm feather fence ferry field flag flute forest fork fountain fox garden gate glove goat guitar hammer
harbor hat hawk hill honey horn horse island jacket jar jewel kettle key kite kitten ladder lake lamp lantern leaf
lemon letter lion lock magnet map marble market meadow melon mill mirror monkey moon mountain needle nest oak ocean
olive onion orange orchard otter oven owl paddle palace panda paper parrot peach pear pencil pepper piano pigeon
pillow pine pipe planet plate pocket pond potato puzzle rabbit radio raft railway ribbon river robot rocket roof
rope rose saddle sail salmon sandal scarf school shell ship shoe shovel snow spider spoon square stable star station
statue stone stool stove street sugar swan table tailor temple tent thread ticket tiger tomato tower train tree
trumpet tunnel turtle valley violin wagon wall water wheel whistle window wolf wool zebra
"""
_VERBS = """
answers carries chases covers crosses draws finds follows greets guards helps hides holds joins keeps leaves lifts
likes loses marks meets moves needs opens paints passes pulls pushes reaches reads sees sells shows takes touches
trusts turns visits wants watches
"""
_SHORT = "at be by do go he if in is it me my no of on or so to up us we a b c d e f g h"
ADJECTIVES, NOUNS, VERBS = (tuple(words.split()) for words in (_ADJECTIVES, _NOUNS, _VERBS))
PADDING = (*VERBS, *_SHORT.split())
"""Words of which some take together any number of tokens, by which a text gets its exact length."""


def spelled() -> str:
    """A text with every word as recall tasks write it: after a blank, and what names a line at its beginning too."""
    return "\n".join(["", *NOUNS, ""]) + "".join(f" {word}" for word in dict.fromkeys((*NOUNS, *ADJECTIVES, *VERBS)))


class Draws:
    """Draws one after the other, from a key that its parts alone decide."""

    def __init__(self, *parts: int) -> None:
        self.key, self._drawn = draws.key(*parts), 0

    def below(self, count: int) -> int:
        """A whole number from 0 up to `count`, without it."""
        self._drawn += 1
        return draws.key(self.key, self._drawn) % count

    def share(self) -> float:
        """A number from 0 up to 1, without it."""
        self._drawn += 1
        return draws.uniform(self.key, self._drawn)

    def one(self, items: Sequence[T]) -> T:
        """One of several things."""
        return items[self.below(len(items))]

    def several(self, items: Sequence[T], count: int) -> list[T]:
        """So many of them, none twice, in an order that is drawn too."""
        order = Order(len(items), self.below(1 << 62))
        return [items[order[number]] for number in range(count)]

    def number(self, digits: int) -> str:
        """A number of so many digits, the first of which is not 0."""
        return str(10 ** (digits - 1) + self.below(9 * 10 ** (digits - 1)))

    def numbers(self, count: int, digits: int) -> list[str]:
        """Several, none twice."""
        return [str(10 ** (digits - 1) + n) for n in self.several(range(9 * 10 ** (digits - 1)), count)]


class Order:
    """The numbers from 0 up to `count` in an order that a key decides: computed, not stored."""

    def __init__(self, count: int, key: int) -> None:
        self.count, self._sampler = count, WindowSampler(count, key)

    def __getitem__(self, place: int) -> int:
        return self._sampler.window(place % self.count)


class Names:
    """Names of one or two words, none twice, in an order that a key decides; len() is how many there are."""

    def __init__(self, key: int, words: int) -> None:
        self._words, self._key = words, key

    def __len__(self) -> int:
        return len(NOUNS) * (len(ADJECTIVES) if self._words == 2 else 1)

    def __getitem__(self, place: int) -> str:
        adjective, noun = divmod(self._order[place], len(NOUNS))
        return f"{ADJECTIVES[adjective]} {NOUNS[noun]}" if self._words == 2 else NOUNS[noun]

    @cached_property
    def _order(self) -> Order:
        return Order(len(self), self._key)


def sentence(key: int, number: int) -> str:
    """A sentence of filler, without a number in it: all of its words from one draw."""
    left, words = draws.key(key, number), list[str]()
    for kind in (ADJECTIVES, NOUNS, VERBS, ADJECTIVES, NOUNS):
        left, place = divmod(left, len(kind))
        words.append(kind[place])
    adjective, noun, verb, other, thing = words
    return f"The {adjective} {noun} {verb} the {other} {thing}."
