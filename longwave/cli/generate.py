"""`longwave generate`: prompts from the command line, files or stdin; text streams to stdout."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from longwave.cli.options import DRAFT, OfModel, OnDevice, argument, option
from longwave.cli.parser import Verb
from longwave.errors import UserError, require
from longwave.files.textfile import read_text

if TYPE_CHECKING:
    from longwave.inference.text import Continuation


@dataclass(frozen=True, kw_only=True)
class Generate(OnDevice, OfModel):
    """Options of `longwave generate`."""

    model: str = argument("a model folder")
    prompt: tuple[str, ...] = option("can be given several times; stdin without any", default=())
    prompt_file: tuple[str, ...] = option("a file that holds one prompt", default=())
    chat: bool = option("prompts are what a user says, answered by the assistant", default=False)
    max_new_tokens: int = option("tokens at most", default=128)
    temperature: float = option("0 is greedy", default=0.0)
    top_k: int | None = option("draw among so many of the likeliest tokens (all)")
    top_p: float = option("draw among the likeliest of this total share", default=1.0)
    seed: int = option("of the draws, where there is a temperature", default=0)
    draft: str | None = option(DRAFT, metavar="DRAFT")
    stop: tuple[str, ...] = option(r"a string that ends a text; \n is a line end, \t a tab, \\ a backslash", default=())
    dtype: Literal["fp32", "bf16", "fp16", "fp64", "int8"] | None = option("of the weights; as saved by default")


def run(options: Generate) -> dict[str, Any]:
    """Generates a text for every prompt, and prints them."""
    from longwave.api import load, stream
    from longwave.engine.sampling import Sampling
    from longwave.progress import say

    draws = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p, "seed": options.seed}
    Sampling(**draws)  # refused before the model is loaded
    prompts, stop = _prompts(options), tuple(map(_unescaped, options.stop))
    model = load(options.model, dtype=options.dtype, device=options.device)
    if model.tokenizer is None:
        raise UserError(f"{options.model}: no tokenizer.json; generation from text needs one")
    for line in model.describe():
        say(line)
    limits = {"max_new_tokens": options.max_new_tokens, "stop": stop, "chat": options.chat}
    limits |= {"draft": options.draft}
    texts = _printed(stream(model, prompts, **limits, **draws), len(prompts))
    for number, text in enumerate(texts, start=1):
        if text.ended == "context_window":
            window, most = model.config.context_window, options.max_new_tokens
            say(f"prompt {number}: ended at the context window of {window:,} tokens, before --max-new-tokens {most:,}")
    return {"prompts": prompts, "texts": texts, "ended": [text.ended for text in texts]}


def _printed(pieces: Iterable[Continuation], count: int) -> list[Continuation]:
    """Prints a lone text as it comes, and several one after the other when all are done; returns them."""
    from longwave.inference.text import joined

    texts = joined(_shown(pieces) if count == 1 else pieces)
    print(*([] if count == 1 else [f"--- {i + 1}\n{text}" for i, text in enumerate(texts)]), sep="\n")
    return texts


def _shown(pieces: Iterable[Continuation]) -> Iterator[Continuation]:
    for piece in pieces:
        print(piece, end="", flush=True)
        yield piece


def _prompts(options: Generate) -> list[str]:
    files = [read_text(path, f"--prompt-file {path}") for path in options.prompt_file]
    prompts = [*options.prompt, *files]
    if prompts:
        return prompts
    no_prompt = "no prompt: give --prompt, --prompt-file, or text on stdin"
    require(not sys.stdin.isatty(), no_prompt)
    text = read_text("-", "stdin")
    require(bool(text), no_prompt)
    return [text]


def _unescaped(stop: str) -> str:
    """A stop string of a shell, in which a backslash and an `n` are meant as a line end."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), stop)


VERB = Verb("generate", "continue prompts", Generate, run)
