"""`longwave generate`: prompts from the command line, files or stdin; text streams to stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longwave.cli.options import OnDevice, argument, option
from longwave.cli.parser import Verb
from longwave.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Generate(OnDevice):
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
    stop: tuple[str, ...] = option("a string that ends a text", default=())
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] | None = option("of the weights; as saved by default")


def run(options: Generate) -> dict[str, Any]:
    """Generates a text for every prompt, and prints them."""
    from longwave.api import load
    from longwave.inference.sampling import Sampling
    from longwave.inference.text import generate_text
    from longwave.machine import device_of, dtype_of
    from longwave.progress import say

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    prompts = _prompts(options)
    dtype = dtype_of(options.dtype) if options.dtype else None
    model = load(options.model, dtype=dtype, device=device_of(options.device))
    if model.tokenizer is None:
        raise UserError(f"{options.model}: no tokenizer.json; generation from text needs one")
    for line in model.describe():
        say(line)
    limits = {"max_new_tokens": options.max_new_tokens, "sampling": sampling, "stop": options.stop}
    pieces = generate_text(model, model.tokenizer, prompts, chat=options.chat, **limits)
    return {"prompts": prompts, "texts": _printed(pieces, len(prompts))}


def _printed(pieces: Iterable[tuple[int, str]], count: int) -> list[str]:
    """Prints a lone text as it comes, and several one after the other when all are done; returns them."""
    texts = [""] * count
    for prompt, text in pieces:
        texts[prompt] += text
        if count == 1:
            print(text, end="", flush=True)
    print(*([] if count == 1 else [f"--- {i + 1}\n{text}" for i, text in enumerate(texts)]), sep="\n")
    return texts


def _prompts(options: Generate) -> list[str]:
    prompts = [*options.prompt, *map(_read, options.prompt_file)]
    if not prompts and sys.stdin.isatty():
        raise UserError("no prompt: give --prompt, --prompt-file, or text on stdin")
    return prompts or [_stdin()]


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise UserError("stdin: not UTF-8 text") from None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf8")
    except OSError as error:
        raise UserError(f"--prompt-file {path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {path}: not UTF-8 text") from None


VERB = Verb("generate", "continue prompts", Generate, run)
