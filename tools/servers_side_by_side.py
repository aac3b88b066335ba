"""Times servers that OpenAI's clients can ask, by turns: a long prompt, one text behind it, and many short texts.

    python tools/servers_side_by_side.py longwave=m@http://127.0.0.1:8100/v1 other=/models/m@http://127.0.0.1:8101/v1

A server is given as NAME=MODEL@URL: what the table calls it, what it calls the model, and where it is.
Every case is the time until the whole answer is there, so that servers that do not stream can be asked, too. Decoding
is the time of a long answer less that of an answer of one token to a prompt of the same length. Prompts differ from
each other from their first word on, so that no kept prefix helps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import NamedTuple

from longwave.benchmarks.serving.client import asked
from longwave.benchmarks.serving.load import words

_KEYS = count(1)


@dataclass(frozen=True)
class Sizes:
    """In tokens. prompt, answer: of one long request. together: short requests at once, of `short` in, `answer` out."""

    prompt: int
    answer: int
    together: int
    short: int


class Server(NamedTuple):
    """A server, and its name for the model."""

    model: str
    url: str


def main() -> None:
    """Measures the servers that are named, and prints a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=MODEL@URL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=2400)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--together", type=int, default=16)
    parser.add_argument("--short", type=int, default=128)
    options = parser.parse_args()
    sizes = Sizes(options.prompt, options.answer, options.together, options.short)
    servers = {name: Server(*rest.split("@", 1)) for name, rest in (one.split("=", 1) for one in options.servers)}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for server in servers.values():
        answer(server, 16, 2)  # whatever is made at the first request
    for _ in range(options.rounds):
        for name, server in servers.items():
            rounds[name].append(measured(server, sizes))
            print(name, rounds[name][-1], file=sys.stderr, flush=True)
    for name, found in rounds.items():
        figures = {key: round(median(one[key] for one in found), 2) for key in found[0]}
        print(json.dumps({"server": name, **figures, "rounds": found}), flush=True)


def measured(server: Server, sizes: Sizes) -> dict[str, float]:
    """Tokens a second of one round: of reading a prompt, of one text behind it, of texts together."""
    read, prompt, _ = answer(server, sizes.prompt, 1)
    both, _, written = answer(server, sizes.prompt, sizes.answer)
    first, many = (together(server, sizes, length) for length in (1, sizes.answer))
    return {
        "prompt_tokens": prompt,
        "prefill": prompt / read,
        "decode": (written - 1) / (both - read),
        "together": (many[1] - first[1]) / (many[0] - first[0]),
        "together_with_prompts": many[1] / many[0],
    }


def together(server: Server, sizes: Sizes, length: int) -> tuple[float, int]:
    """Seconds until all of the short requests are answered, and the tokens of all answers."""
    began = time.perf_counter()
    with ThreadPoolExecutor(sizes.together) as pool:
        asked_for = [pool.submit(answer, server, sizes.short, length) for _ in range(sizes.together)]
        written = sum(one.result()[2] for one in asked_for)
    return time.perf_counter() - began, written


def answer(server: Server, prompt: int, length: int) -> tuple[float, int, int]:
    """Seconds until an answer is there, and the tokens of prompt and answer as the server counts them."""
    body = {"model": server.model, "prompt": words(prompt, next(_KEYS)), "max_tokens": length, "temperature": 0}
    began = time.perf_counter()
    with asked(server.url, None, "/completions", body, 600.0) as reply:
        content = reply.read()
    if reply.status != 200:
        raise SystemExit(f"{server.url}: {reply.status} {content[:300]!r}")
    usage = json.loads(content)["usage"]
    return time.perf_counter() - began, usage["prompt_tokens"], usage["completion_tokens"]


if __name__ == "__main__":
    main()
