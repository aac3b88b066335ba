"""`longwave generate`: prompts from the command line, files or stdin; text streams to stdout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from longwave.api import load
from longwave.device import device_of, dtype_of
from longwave.errors import UserError
from longwave.inference.sampling import Sampling
from longwave.inference.text import generate_text
from longwave.progress import say


def generate_command(options: argparse.Namespace) -> dict[str, Any]:
    """Streams one continuation as it comes; several are shown one after the other when all are done."""
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    prompts = _prompts(options.prompt, options.prompt_file)
    dtype = dtype_of(options.dtype) if options.dtype else None
    model = load(options.model, dtype=dtype, device=device_of(options.device))
    if model.tokenizer is None:
        raise UserError(f"{options.model}: no tokenizer.json; generation from text needs one")
    for line in model.describe():
        say(line)
    texts, streaming = [""] * len(prompts), len(prompts) == 1
    limits = {
        "max_new_tokens": options.max_new_tokens,
        "sampling": sampling,
        "stop": options.stop,
        "chat": options.chat,
    }
    for prompt, text in generate_text(model, model.tokenizer, prompts, **limits):
        texts[prompt] += text
        if streaming:
            print(text, end="", flush=True)
    print(*([] if streaming else [f"--- {i + 1}\n{text}" for i, text in enumerate(texts)]), sep="\n")
    return {"prompts": prompts, "texts": texts}


def _prompts(given: list[str], files: list[str]) -> list[str]:
    prompts = [*given, *map(_read, files)]
    if not prompts:
        if sys.stdin.isatty():
            raise UserError("no prompt: give --prompt, --prompt-file, or text on stdin")
        prompts = [_stdin()]
    return prompts


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
