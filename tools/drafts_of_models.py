"""Drafts by lookup, layers and other models, measured: tokens of a pass beside the formula, and tokens a second.

    python tools/drafts_of_models.py MODEL DATA DRAFT [DRAFT ...] [--drafts 4] [--temperature 0.7] [--rounds 3]

DRAFT: as `longwave generate --draft` takes it. Prompts are the beginnings of held-out windows of a prepared folder.
Every way of drafting answers all of them, one request at a time, in turn with the others; ratios are medians of rounds,
of the processor's time. Prints a line of JSON for each way and temperature. acceptance: of the drafts that the model
came to judge. formula: tokens of a pass at that acceptance, (1 - a^(k+1)) / (1 - a) for the k drafts of each pass.
Exits with 1 if a text is another one than without drafts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, median

import longwave as lw
from longwave.data.packed import PackedTokens
from longwave.engine import Engine, EngineOptions, Request, Sampling
from longwave.engine.drafts import Drafts
from longwave.engine.speculation import Begun, Proposer, expected_tokens
from longwave.inference.drafter import drafter
from longwave.model import Decoder

PROMPT, ANSWER = 24, 96


@dataclass
class Recorded:
    """A proposer whose drafts are kept. calls: tokens of the text so far, and the drafts behind them."""

    inner: Proposer
    calls: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def propose(self, texts: Sequence[Begun]) -> list[Drafts]:
        found = self.inner.propose(texts)
        self.calls += [(len(text.tokens), one.tokens) for text, one in zip(texts, found, strict=True)]
        return found

    def forget(self, number: int) -> None:
        self.inner.forget(number)


@dataclass
class Way:
    """A way of drafting. judged: for every draft that the model came to, whether it counted. passes: drafts of each."""

    name: str
    seconds: list[float] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    judged: list[bool] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)

    def run(self, model: Decoder, requests: Sequence[Request], drafts: int) -> None:
        """Answers the requests, one after the other."""
        inner = None if self.name == "none" else drafter(self.name, model, 1)
        recorded = None if inner is None else Recorded(inner)
        engine = Engine(model, EngineOptions(running=1, drafts=drafts, prefixes=False), proposer=recorded)
        self.texts, self.judged, self.passes = [], [], []
        began = time.process_time()
        for request in requests:
            self.texts.append(answer(engine, request))
            if recorded is not None:
                self._judge([*request.prompt, *self.texts[-1]], recorded)
        self.seconds.append(time.process_time() - began)

    def _judge(self, text: list[int], recorded: Recorded) -> None:
        for at, drafts in recorded.calls:
            self.passes.append(len(drafts))
            for place, token in enumerate(drafts, start=at):
                self.judged.append(place < len(text) and text[place] == token)
                if not self.judged[-1]:
                    break
        recorded.calls.clear()

    def told(self, plain: Way) -> dict[str, float]:
        """The figures beside those of a way without drafts."""
        acceptance = mean(self.judged) if self.judged else 0.0
        times = [a / b for a, b in zip(plain.seconds, self.seconds, strict=True)]
        passes = len(self.passes) or sum(map(len, self.texts))
        return {
            "acceptance": acceptance,
            "drafts_of_a_pass": mean(self.passes) if self.passes else 0.0,
            "tokens_of_a_pass": 1 + sum(self.judged) / passes,
            "formula": mean(expected_tokens(acceptance, count) for count in self.passes) if self.passes else 1.0,
            "tokens_a_second": sum(map(len, self.texts)) / median(self.seconds),
            "times": median(times),
            "texts_alike": sum(a == b for a, b in zip(self.texts, plain.texts, strict=True)),
        }


def main() -> int:
    """Measures every way at both temperatures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("drafters", nargs="+", metavar="DRAFT")
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default=None)
    options = parser.parse_args()
    model, same = lw.load(options.model, dtype=options.dtype), True
    held_out = PackedTokens(options.data, "held_out", PROMPT + ANSWER)
    prompts = [tuple(held_out.batch(range(at, at + 1)).tokens[:PROMPT].tolist()) for at in range(options.prompts)]
    for temperature in (0.0, options.temperature):
        sampling = Sampling(temperature=temperature, seed=1 if temperature else 0)
        requests = [
            Request(prompt=one, max_new_tokens=ANSWER, sampling=sampling, sequence=n) for n, one in enumerate(prompts)
        ]
        ways = [Way(name) for name in ("none", *options.drafters)]
        for way in [way for _ in range(options.rounds) for way in ways]:
            way.run(model, requests, options.drafts)
        for way in ways:
            told = way.told(ways[0])
            same &= told["texts_alike"] == len(prompts)
            print(
                json.dumps({"draft": way.name.rstrip("/").split("/")[-1], "temperature": temperature, **told}),
                flush=True,
            )
    return int(not same)


def answer(engine: Engine, request: Request) -> list[int]:
    """The tokens of an answer."""
    engine.submit(request)
    found = list[int]()
    while not engine.idle:
        found += [event.token for event in engine.step() if event.token is not None]
    return found


if __name__ == "__main__":
    sys.exit(main())
