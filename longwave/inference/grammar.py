"""Output held to a JSON schema, a regular expression or a grammar, by `llguidance`: which tokens may come next.

A `Grammars` belongs to a tokenizer and is made once, since it takes in the whole vocabulary; a `Grammar` belongs to one
text that is being written. Masks are NumPy arrays.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from longwave.data.tokenizer import Tokenizer
from longwave.errors import MachineError, UserError
from longwave.files.jsonfile import brief

Kind = Literal["json", "regex", "choice", "lark"]
# Models that begin to write blanks may never end, so that only a few may stand between two parts of a JSON text.
_JSON = {"whitespace_pattern": r"[ \n\t]{0,20}"}
_LONGEST = 65_536  # characters of a grammar, a schema or a regular expression
# Parts that a grammar's automaton has before the first token at most: a fifth of what the library allows, by which a
# regular expression of 15 characters takes 0.9 s and 220 MB. A schema of 400 dates and addresses takes half of it.
_FUEL = 200_000
_SLOWEST = 0.05  # seconds of the processor for the tokens that may come next; everybody's texts wait for it


class Grammars:
    """Makes the grammars of one tokenizer.

    vocabulary: rows of the model's embedding, of which the tokenizer may name fewer. ends: the tokens that end a text.
    Raises UserError where llguidance is not installed, or cannot use the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Collection[int]) -> None:
        self._source, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)

    def json(self, schema: dict[str, Any] | bool) -> Grammar:
        """Output that is JSON of the schema. Raises UserError for a schema that cannot be used."""
        return self._made("the JSON schema", lambda lark: lark.grammar_from_json_schema(_text(schema), _JSON))

    def regex(self, pattern: str) -> Grammar:
        """Output that the regular expression matches as a whole. Raises UserError for one that cannot be used."""
        return self._made("the regular expression", lambda lark: lark.grammar_from_regex(_bounded(pattern)))

    def choice(self, texts: Sequence[str]) -> Grammar:
        """Output that is one of the texts."""
        return self._made("the choice", lambda _: _bounded("start: " + " | ".join(json.dumps(one) for one in texts)))

    def lark(self, grammar: str) -> Grammar:
        """Output of a grammar in Lark's notation. Raises UserError for one that cannot be used."""
        return self._made("the grammar", lambda lark: lark.grammar_from_lark(_bounded(grammar)))

    def _made(self, name: str, source: Callable[[Any], str]) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(initial_lexer_fuel=_FUEL)
        try:
            matcher = LLMatcher(self._tokenizer, source(LLMatcher), log_level=0, limits=limits)
        except ValueError as error:
            raise UserError(f"{name} cannot be used: {brief(error)}") from None
        made = Grammar(matcher, self._vocabulary)
        try:
            made.prepare()
        except MachineError:
            raise UserError(f"{name} cannot be used: {made.fault}") from None
        return made

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise UserError("llguidance is not installed; pip install longwave[serve]") from None
        try:
            return LLTokenizer(self._source.twin().to_str(), n_vocab=self._vocabulary, eos_token=self._ends)
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"tokenizer: llguidance cannot use it ({brief(error)})") from None


class Grammar:
    """The state of a grammar over one text: a `Constraint` of the engine's.

    finished: whether the text is complete, so that nothing may follow. fault: why the grammar cannot go on, if so.
    """

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary, self._slow = matcher, vocabulary, False

    def copy(self) -> Grammar:
        """The same grammar in the same state, for another text."""
        return Grammar(self._matcher.deep_copy(), self._vocabulary)

    def prepare(self) -> None:
        """Does what is done once, which is most of the work. Raises MachineError as `allowed` does."""
        self._mask()
        self.allowed()

    def allowed(self) -> Bool[np.ndarray, " V"]:
        """Which tokens may come next. Raises MachineError for a grammar that takes too much."""
        began = time.thread_time()
        bits = self._mask()
        self._slow = time.thread_time() - began > _SLOWEST
        self._check()
        return np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)

    def _mask(self) -> NDArray[np.uint8]:
        self._check()
        try:
            return np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        except Exception as error:  # the library raises bare Exceptions, as for a grammar with too many states
            raise MachineError(f"the grammar cannot go on: {brief(error)}") from None
        finally:
            self._check()

    def accept(self, token: int) -> None:
        """Goes on by a token that was chosen among those allowed. Raises MachineError as `allowed` does."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self.fault is not None:
            raise MachineError(f"the grammar cannot go on: {self.fault}")

    @property
    def fault(self) -> str | None:
        if self._slow:
            return f"it takes more than {1000 * _SLOWEST:.0f} ms a token"
        if not self._matcher.is_error():
            return None
        return " ".join(self._matcher.get_error().partition("<state>")[0].split())[:300]

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped() and self.fault is None


def _text(schema: dict[str, Any] | bool) -> str:
    return _bounded(json.dumps(schema))


def _bounded(text: str) -> str:
    """A text of a size that is compiled in a moment."""
    if len(text) > _LONGEST:
        raise UserError(f"{len(text):,} characters; {_LONGEST:,} at most")
    return text
