"""A thousand prompts with batching, prefixes, preemption and drafts, and each alone: which answers differ, and where.

    python tools/engine_on_and_off.py MODEL [--prompts 1000] [--mode fp64 | fp32 | invariant | invariant-bf16]

MODEL: a folder, or a recipe with random weights. Prompts are pieces of the standard library's help texts (of random
tokens, for a recipe), many of which begin alike. Prints a line of JSON with memory for all that runs and what is kept,
and one with memory for few, so that requests are put back: how many answers differ, and of these the largest distance
between the two likeliest logits at the first token that differs. In fp64 and in the invariant mode
there must be none; in plain fp32 the two must be as good as equally likely there. Exits with 1 where that is not so.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch

from longwave.benchmarks.models import decoder_of, sample_tokens
from longwave.engine import Engine, EngineOptions, Request
from longwave.engine.memory import page_options
from longwave.engine.speculation import PromptLookup
from longwave.model import Decoder
from longwave.ops.forms import INVARIANT

NEAR = 1e-4  # between the two likeliest logits, where plain fp32 may turn either way
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "invariant": torch.float32, "invariant-bf16": torch.bfloat16}


def main() -> int:
    """Runs every prompt alone and all together, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--answer", type=int, default=16)
    parser.add_argument("--longest", type=int, default=96)
    parser.add_argument("--mode", choices=DTYPES, default="fp32")
    options = parser.parse_args()
    model = decoder_of(options.model, DTYPES[options.mode], torch.device("cpu"), seed=0).eval()
    if options.mode.startswith("invariant"):
        model.use_form(INVARIANT)
    prompts = prompts_for(model, options.prompts, options.longest)
    requests = [Request(prompt=prompt, max_new_tokens=options.answer) for prompt in prompts]
    alone, _ = answers(model, requests, EngineOptions(running=1, prefixes=False))
    longest, wrong = options.longest + options.answer, False
    for memory, sequences in (("for all", 64), ("for few", 3)):
        together, counts = answers(model, requests, crowded(model, longest * sequences), PromptLookup(2, 1))
        pairs = zip(prompts, alone, together, strict=True)
        gaps = [gap(model, prompt, one, other) for prompt, one, other in pairs if one != other]
        found = {"differ": len(gaps), "largest_gap": max(gaps, default=0.0), **counts}
        about = {"model": Path(options.model).name, "mode": options.mode, "prompts": len(prompts), "memory": memory}
        print(json.dumps({**about, **found}), flush=True)
        wrong |= max(gaps, default=0.0) > NEAR if options.mode == "fp32" else bool(gaps)
    return int(wrong)


def prompts_for(model: Decoder, count: int, longest: int) -> list[tuple[int, ...]]:
    """Prompts of 4 to `longest` tokens, two of three of which continue the beginning of an earlier one."""
    draw, found = random.Random(0), list[tuple[int, ...]]()
    text = sample_tokens(model, 65536, seed=0).tolist()
    for _ in range(count):
        at, length = draw.randrange(len(text) - longest), draw.randrange(4, longest)
        earlier = draw.choice(found) if found and draw.random() < 0.67 else ()
        begin = earlier[: draw.randrange(len(earlier) + 1)]
        found.append((*begin, *text[at : at + length])[:longest])
    return found


def crowded(model: Decoder, held: int) -> EngineOptions:
    """Eight requests at once in memory for so many tokens; small steps and pages."""
    per_page = 1 << 30
    sizes = page_options(model, 1 << 30, model.config.context_window, per_page, 8).tokens
    tokens = sizes if isinstance(sizes, int) else sizes[-1]
    return EngineOptions(running=8, step_tokens=96, page_size=8, memory=-(-per_page * held // tokens))


def answers(
    model: Decoder, requests: list[Request], options: EngineOptions, proposer: PromptLookup | None = None
) -> tuple[list[list[int]], dict[str, int]]:
    """The tokens of every answer, and what the engine did."""
    engine = Engine(model, options, proposer=proposer)
    numbers = dict[int, int]()
    found: list[list[int]] = [[] for _ in requests]
    waiting = list(range(len(requests)))[::-1]
    while waiting or not engine.idle:
        while waiting and engine.metrics.waiting < 16:
            place = waiting.pop()
            numbers[engine.submit(requests[place])] = place
        for event in engine.step():
            if event.token is not None:
                found[numbers[event.request]].append(event.token)
    names = ("cached_tokens", "preemptions", "drafted_tokens", "accepted_tokens")
    return found, {name: getattr(engine.metrics, name) for name in names}


@torch.no_grad()
def gap(model: Decoder, prompt: tuple[int, ...], one: list[int], other: list[int]) -> float:
    """The distance between the two likeliest logits where two answers part."""
    same = next(n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    state = model.state(1)
    tokens = torch.tensor([*prompt, *one[:same]])
    logits = model(tokens, state.stream([len(tokens)], [0]), state)[-1]
    first, second = logits.topk(2).values.tolist()
    return first - second


if __name__ == "__main__":
    sys.exit(main())
