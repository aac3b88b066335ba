"""`longwave chat`: a conversation with a model in the terminal, or on a pipe with a line for each turn."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from longwave.cli.options import OfModel, OnDevice, argument, option
from longwave.cli.parser import Verb
from longwave.errors import UserError, one_line, require

if TYPE_CHECKING:
    from longwave.inference.talk import History, Talk
    from longwave.model import Decoder

_HELP = """\
/exit            ends (so does Ctrl-D); Ctrl-C ends an answer
/reset           begins anew
/system TEXT     begins anew, with these instructions
/undo            takes back the last turn
/retry           answers the last turn again; with a temperature, differently
/set NAME VALUE  temperature, top_k, top_p, min_p, seed or max_new_tokens"""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(OnDevice, OfModel):
    """Options of `longwave chat`."""

    model: str = argument("a model folder")
    system: str | None = option("instructions before the conversation", metavar="TEXT")
    plain: bool = option("continue lines of text, as with a model without a chat template", default=False)
    max_new_tokens: int = option("tokens of an answer at most", default=512)
    temperature: float = option("0 is greedy", default=0.0)
    top_k: int | None = option("draw among so many of the likeliest tokens (all)")
    top_p: float = option("draw among the likeliest of this total share", default=1.0)
    min_p: float = option("draw among tokens at least this times as likely as the likeliest", default=0.0)
    seed: int = option("of the draws, where there is a temperature", default=0)
    dtype: Literal["fp32", "bf16", "fp16", "fp64", "int8"] | None = option("of the weights; as saved by default")


_DRAWN = ("temperature", "top_k", "top_p", "min_p", "seed")
_KINDS = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "seed": int, "max_new_tokens": int}


def run(options: ChatOptions) -> dict[str, Any]:
    """Talks until the input ends; returns every turn."""
    from longwave.api import load
    from longwave.engine import Sampling
    from longwave.inference.talk import Talk
    from longwave.progress import say

    sampling = Sampling(**{name: getattr(options, name) for name in _DRAWN})  # refused before the model is loaded
    require(options.max_new_tokens > 0, f"max_new_tokens = {options.max_new_tokens}: 1 or more")
    model = load(options.model, dtype=options.dtype, device=options.device)
    for line in model.describe():
        say(line)
    session = _Session(options, model, Talk(model, _history(options, model), sampling, options.max_new_tokens))
    for line in _lines(sys.stdin.isatty()):
        if not session.take(line):
            break
    return {"model": options.model, "turns": session.turns}


def _history(options: ChatOptions, model: Decoder, system: str | None = None) -> History:
    from longwave.inference.talk import Conversation, Passage

    if model.tokenizer is None:
        raise UserError(f"{options.model}: no tokenizer.json; a conversation needs one")
    system = options.system if system is None else system
    if options.plain:
        return Passage(model, model.tokenizer, system)
    if model.tokenizer.chat_template is None:
        raise UserError(f"{options.model}: its tokenizer has no chat template; --plain continues lines of text instead")
    return Conversation(model, model.tokenizer, system)


def _lines(terminal: bool) -> Iterator[str]:
    """What the user says. In a terminal, Ctrl-C takes back the line that is being typed."""
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]
        print("/help tells what there is", file=sys.stderr)
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\n(/exit or Ctrl-D ends)", file=sys.stderr)
            continue
        except EOFError:
            print(file=sys.stderr)
            return
        except UnicodeDecodeError as error:
            raise UserError(f"stdin: not UTF-8 text ({error})") from None
        if not line and not terminal:
            return
        yield line.rstrip("\r\n")


@dataclass
class _Session:
    """A conversation and its commands."""

    options: ChatOptions
    model: Decoder
    talk: Talk

    def __post_init__(self) -> None:
        self.turns: list[dict[str, Any]] = []

    def take(self, line: str) -> bool:
        """Answers a line, or does what it says; False if the conversation ends with it."""
        word, _, rest = line.strip().partition(" ")
        if word in ("/exit", "/quit"):
            return False
        try:
            if word.startswith("/"):
                self._do(word[1:], rest.strip())
            elif line.strip():
                self._answer(line)
        except UserError as error:
            print(f"longwave: {one_line(error)}", file=sys.stderr)
        return True

    def _do(self, command: str, rest: str) -> None:
        if command == "help":
            print(_HELP, file=sys.stderr)
        elif command in ("reset", "system"):
            self.talk.history = _history(self.options, self.model, rest if command == "system" else None)
        elif command in ("undo", "retry"):
            said = self.talk.history.undo()
            require(bool(said), "nothing was said yet")
            if command == "retry":
                self._answer(said)
        elif command == "set":
            self._set(*rest.partition(" ")[::2])
        else:
            raise UserError(f"no command /{command}; /help tells what there is")

    def _set(self, name: str, value: str) -> None:
        require(name in _KINDS, f"/set {name}: one of {', '.join(_KINDS)}")
        try:
            number = _KINDS[name](value)
        except ValueError:
            raise UserError(f"/set {name} {value}: a number is expected") from None
        if name == "max_new_tokens":
            require(number > 0, f"max_new_tokens = {value}: 1 or more")
            self.talk.max_new_tokens = int(number)
        else:
            self.talk.sampling = replace(self.talk.sampling, **{name: number})

    def _answer(self, text: str) -> None:
        """Prints the answer as it comes; Ctrl-C ends it, and what was written stays in the conversation."""
        written = ""
        with closing(self.talk.answer(text)) as pieces, _interrupts(sys.stdin.isatty()) as asked:
            for piece in pieces:
                print(piece, end="", flush=True)
                written += piece
                if asked:
                    break
        print()
        self.turns.append({"said": text, "answered": written, "ended": self.talk.ended})
        if self.talk.ended == "context_window":
            print("(the context window is full: /reset or /undo makes room)", file=sys.stderr)


@contextmanager
def _interrupts(terminal: bool) -> Iterator[list[int]]:
    """A list that the first Ctrl-C fills, so that no step of the model is torn; the second ends the program."""
    asked = list[int]()

    def note(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        asked.append(number)

    before = signal.signal(signal.SIGINT, note) if terminal else None
    try:
        yield asked
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


VERB = Verb("chat", "talk with a model in the terminal", ChatOptions, run)
