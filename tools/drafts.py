"""Drafts by Medusa's heads, measured: tokens of a pass beside what the heads' accuracies promise, and tokens a second.

    python tools/drafts.py MODEL HEADS DATA [--nodes 4,8,16] [--prompts 16] [--rounds 3]

Prompts are the beginnings of held-out documents. Every way of drafting answers all of them, one request at a time, in
turn with the others; how many texts are alike is told, and ratios are medians of rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

import longwave as lw
from longwave.data.packed import PackedTokens
from longwave.engine import Engine, EngineOptions, Request, Sampling
from longwave.engine.medusa import MedusaDrafts, expected_tokens_of
from longwave.medusa import load_medusa
from longwave.model import Decoder


def main() -> None:
    options = _options()
    model = lw.load(options.model, dtype=options.dtype)
    drafter = MedusaDrafts(load_medusa(options.heads, model))
    prompts = _prompts(options.data, options.prompts, options.prompt_tokens)
    found = {f"T = {one}": _measured(model, drafter, prompts, one, options) for one in (0.0, options.temperature)}
    loads = " ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load average {loads}")
    print(json.dumps(found))


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "heads", "data"):
        parser.add_argument(name)
    parser.add_argument("--nodes", default="4,8,16")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default=None)
    return parser.parse_args()


def _prompts(folder: str, count: int, length: int) -> list[tuple[int, ...]]:
    held_out = PackedTokens(folder, "held_out", 256, keep_last=True)
    pieces = (piece for at in range(len(held_out)) for piece in _documents(held_out, at))
    return [tuple(piece[:length]) for piece in pieces if len(piece) >= length][:count]


def _documents(held_out: PackedTokens, at: int) -> Iterator[list[int]]:
    batch = held_out.batch(range(at, at + 1))
    return (piece.tolist() for piece in batch.tokens.split(list(batch.runs)))


def _ways(model: Decoder, drafter: MedusaDrafts, nodes: list[int]) -> dict[str, tuple[MedusaDrafts | None, int, float]]:
    """For each way of drafting the proposer, its drafts, and the tokens of a pass that accuracies promise."""
    chain = MedusaDrafts(drafter.medusa)
    chain.places = []
    first, row = 1.0, 1.0
    for accuracies in drafter.medusa.accuracies:
        first *= accuracies[0]
        row += first
    ways: dict[str, tuple[MedusaDrafts | None, int, float]] = {"none": (None, 1, 1.0)}
    ways["row"] = (chain, drafter.medusa.config.heads, row)
    for count in nodes:
        ways[f"tree of {count}"] = (drafter, count, expected_tokens_of(drafter.places[:count]))
    return ways


def _measured(model: Decoder, drafter: MedusaDrafts, prompts: list, temperature: float, options: Any) -> dict[str, Any]:
    ways = _ways(model, drafter, [int(one) for one in options.nodes.split(",")])
    requests = [
        Request(
            prompt=prompt,
            max_new_tokens=options.new_tokens,
            sampling=Sampling(temperature=temperature, seed=1 if temperature else 0),
            sequence=number,
        )
        for number, prompt in enumerate(prompts)
    ]
    told: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[list[int]]] = {}
    for _ in range(options.rounds):
        for name, (proposer, drafts, _) in ways.items():
            engine = Engine(model, EngineOptions(running=1, drafts=drafts, prefixes=False), proposer=proposer)
            began = time.perf_counter()
            texts[name] = [_answer(engine, one) for one in requests]
            seconds[name].append(time.perf_counter() - began)
            told[name] = engine.metrics
    print(f"temperature {temperature}: tokens of a pass, promised, tokens a second, times those without drafts")
    result: dict[str, Any] = {}
    for name, (_, _, promised) in ways.items():
        same = sum(a == b for a, b in zip(texts[name], texts["none"], strict=True))
        passes = told[name].steps - len(prompts)  # those of prompts draft nothing
        tokens = (told[name].new_tokens - len(prompts)) / passes
        speed = told[name].new_tokens / median(seconds[name])
        times = median(a / b for a, b in zip(seconds["none"], seconds[name], strict=True))
        print(f"  {name:12} {tokens:6.3f} {promised:6.3f} {speed:9.1f} {times:6.2f}  texts alike {same}/{len(prompts)}")
        result[name] = {"tokens": tokens, "promised": promised, "per_second": speed, "times": times, "alike": same}
    return result


def _answer(engine: Engine, request: Request) -> list[int]:
    engine.submit(request)
    found = list[int]()
    while not engine.idle:
        found += [event.token for event in engine.step() if event.token is not None]
    return found


if __name__ == "__main__":
    main()
