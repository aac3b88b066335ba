"""Drafts by Medusa's heads, measured: tokens of a pass beside what the formula gives, and tokens a second.

    python tools/drafts.py MODEL HEADS DATA [--nodes 4,8,16] [--temperature 0.7] [--rounds 3]

Prompts are the beginnings of held-out documents. Every way of drafting answers all of them, one request at a time, in
turn with the others; how many texts are alike is told, and ratios are medians of rounds, of the processor's time. The
formula takes the heads' guesses to be right independently of each other, as often as they are where the texts go. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import Any

import torch

import longwave as lw
from longwave.data.packed import PackedTokens
from longwave.engine import Engine, EngineOptions, Request, Sampling
from longwave.engine.medusa import MedusaDrafts, Place, likeliest_places
from longwave.engine.sampling import first_tokens
from longwave.engine.speculation import Proposer
from longwave.medusa import Medusa, Shares, load_medusa
from longwave.model import Decoder
from longwave.streams import Stream


@dataclass
class Way:
    """A way of drafting. places: of its guesses, the heads' own. texts: the answers of the last round.

    steps, tokens: of one round, without those of prompts, behind which nothing is drafted.
    """

    name: str
    proposer: Proposer | None = None
    places: Sequence[Place] = ()
    texts: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0

    def run(self, model: Decoder, requests: Sequence[Request]) -> None:
        """Answers the requests, one after the other."""
        options = EngineOptions(running=1, drafts=max(1, len(self.places)), prefixes=False)
        engine, began = Engine(model, options, proposer=self.proposer), time.process_time()
        self.texts = [_answer(engine, one) for one in requests]
        self.seconds.append(time.process_time() - began)
        self.steps = engine.metrics.steps - len(requests)
        self.tokens = engine.metrics.new_tokens - len(requests)

    def told(self, plain: Way, accuracies: Shares) -> dict[str, float]:
        """The figures beside those of a way without drafts. accuracies: of the heads, along the texts."""
        times = [a / b for a, b in zip(plain.seconds, self.seconds, strict=True)]
        alike = sum(a == b for a, b in zip(self.texts, plain.texts, strict=True))
        per_second = self.tokens / median(self.seconds)
        tokens = {"tokens of a pass": self.tokens / self.steps, "formula": _formula(self.places, accuracies)}
        return {**tokens, "tokens a second": per_second, "times": median(times), "texts alike": alike}


def main() -> None:
    options = _options()
    model = lw.load(options.model, dtype=options.dtype)
    heads, prompts = load_medusa(options.heads, model), _prompts(options.data, options.prompts)
    found: dict[str, Any] = {}
    for temperature in (0.0, options.temperature):
        ways = _ways(heads, [int(one) for one in options.nodes.split(",")])
        requests = [_request(prompt, number, temperature) for number, prompt in enumerate(prompts)]
        for way in [way for _ in range(options.rounds) for way in ways]:
            way.run(model, requests)
        accuracies = _accuracies(heads, requests, ways[0].texts)
        print("accuracies of first guesses, held out and along the texts:")
        print([round(one[0], 3) for one in heads.accuracies], [round(one[0], 3) for one in accuracies])
        found[f"temperature {temperature}"] = {way.name: way.told(ways[0], accuracies) for way in ways}
        _print(temperature, found[f"temperature {temperature}"], len(prompts))
    load = " ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load average {load}")
    print(json.dumps(found))


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "heads", "data"):
        parser.add_argument(name)
    parser.add_argument("--nodes", default="4,8,16")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default=None)
    return parser.parse_args()


def _prompts(folder: str, count: int, length: int = 24) -> list[tuple[int, ...]]:
    held_out = PackedTokens(folder, "held_out", 256, keep_last=True)
    batches = [held_out.batch(range(at, at + 1)) for at in range(min(len(held_out), 4 * count))]
    pieces = [piece for one in batches for piece in one.tokens.split(list(one.runs)) if len(piece) >= length]
    return [tuple(int(token) for token in piece[:length]) for piece in pieces[:count]]


def _request(prompt: tuple[int, ...], number: int, temperature: float) -> Request:
    sampling = Sampling(temperature=temperature, seed=1 if temperature else 0)
    return Request(prompt=prompt, max_new_tokens=96, sampling=sampling, sequence=number)


def _ways(heads: Medusa, nodes: Sequence[int]) -> list[Way]:
    row = MedusaDrafts(heads)
    row.places = []
    firsts = likeliest_places(tuple(one[:1] for one in heads.accuracies), len(heads.accuracies))
    tree = MedusaDrafts(heads)
    return [Way("none"), Way("row", row, firsts), *(Way(f"tree of {one}", tree, tree.places[:one]) for one in nodes)]


def _formula(places: Sequence[Place], accuracies: Shares) -> float:
    """Tokens of a pass: one, and for every place the product of the accuracies up to it."""
    chances = list[float]()
    for one in places:
        chances.append(accuracies[one.head][one.rank] * (chances[one.parent] if one.parent >= 0 else 1.0))
    return 1 + sum(chances)


@torch.no_grad()
def _accuracies(heads: Medusa, requests: Sequence[Request], texts: Sequence[Sequence[int]]) -> Shares:
    """How often each guess of each head is right along the texts, wherever it would be asked for one."""
    count, ranks = len(heads.heads), len(heads.accuracies[0])
    right, asked = torch.zeros(count, ranks), torch.zeros(count, 1)
    for request, text in zip(requests, texts, strict=True):
        tokens, keys = [*request.prompt, *text], (request.sampling, request.sequence)
        logits = heads(heads.base.hidden(torch.tensor(tokens), Stream.of([len(tokens)])))
        for row, head in product(range(len(request.prompt) - 1, len(tokens) - 2), range(count)):
            if (place := row + 2 + head) < len(tokens):
                guesses = first_tokens(logits[head, row], *keys, place, ranks)
                right[head] += torch.tensor(guesses) == tokens[place]
                asked[head] += 1
    return tuple(tuple(float(one) for one in row) for row in right / asked)


def _answer(engine: Engine, request: Request) -> list[int]:
    engine.submit(request)
    found = list[int]()
    while not engine.idle:
        found += [event.token for event in engine.step() if event.token is not None]
    return found


def _print(temperature: float, told: dict[str, dict[str, float]], prompts: int) -> None:
    print(f"temperature {temperature}, {prompts} prompts: {', '.join(next(iter(told.values())))}")
    for name, figures in told.items():
        print(f"  {name:12}" + "".join(f"{value:10.3f}" for value in figures.values()))


if __name__ == "__main__":
    main()
