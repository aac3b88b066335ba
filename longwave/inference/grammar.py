"""Output held to a JSON schema, a regular expression or a grammar, by `llguidance`: which tokens may come next.

A `Grammars` belongs to a tokenizer and is made once, since it takes in the whole vocabulary; a `Grammar` belongs to one
text that is being written. Masks are NumPy arrays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from longwave.data.tokenizer import Tokenizer
from longwave.errors import MachineError, UserError
from longwave.files.jsonfile import brief

Kind = Literal["json", "regex", "choice", "lark"]
# Models that begin to write blanks may never end, so that only a few may stand between two parts of a JSON text.
_JSON = {"whitespace_pattern": r"[ \n\t]{0,20}"}
_LONGEST = 65_536  # characters of a grammar, a schema or a regular expression


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
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._tokenizer, source(LLMatcher), log_level=0)
        except ValueError as error:
            raise UserError(f"{name} cannot be used: {brief(error)}") from None
        if matcher.is_error():
            raise UserError(f"{name} cannot be used: {' '.join(matcher.get_error().split())[:300]}")
        return Grammar(matcher, self._vocabulary)

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

    finished: whether the text is complete, so that nothing may follow.
    """

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def copy(self) -> Grammar:
        """The same grammar in the same state, for another text."""
        return Grammar(self._matcher.deep_copy(), self._vocabulary)

    def allowed(self) -> Bool[np.ndarray, " V"]:
        """Which tokens may come next. Raises MachineError for a grammar that takes too much."""
        try:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        except Exception as error:  # the library raises bare Exceptions, as for a grammar with too many states
            raise MachineError(f"the grammar cannot go on: {brief(error)}") from None
        return np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)

    def accept(self, token: int) -> None:
        """Goes on by a token that was chosen among those allowed."""
        self._matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()


def _text(schema: dict[str, Any] | bool) -> str:
    return _bounded(json.dumps(schema))


def _bounded(text: str) -> str:
    """A text of a size that is compiled in a moment."""
    if len(text) > _LONGEST:
        raise UserError(f"{len(text):,} characters; {_LONGEST:,} at most")
    return text
