"""Times servers that OpenAI's clients can ask, by turns: a long prompt, one text behind it, and many short texts.

    python tools/servers_side_by_side.py longwave=m@http://127.0.0.1:8100/v1 other=/models/m@http://127.0.0.1:8101/v1

A server is given as NAME=MODEL@URL: what the table calls it, what it calls the model, and where it is.
Reading a prompt is timed to the first piece of its answer, decoding from there to the last one, and many short requests
from the first to the last. A server that does not stream is timed by the difference of a long answer and a short one.
Prompts differ from their first word on, and from run to run, so that no kept prefix helps.
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

from longwave.benchmarks.serving.client import asked, events
from longwave.benchmarks.serving.load import words

_KEYS = count(time.time_ns() % (1 << 40))


@dataclass(frozen=True)
class Sizes:
    """In tokens. prompt, answer: of one long request. together: short requests at once, of `short` in, `answer` out."""

    prompt: int
    answer: int
    together: int
    short: int


class Answer(NamedTuple):
    """Seconds to the first piece, if the server streams, and to the end; tokens as the server counts them."""

    first: float | None
    whole: float
    prompt: int
    written: int


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
    one = answer(server, sizes.prompt, sizes.answer)
    read = one.first if one.first is not None else answer(server, sizes.prompt, 1).whole
    began = time.perf_counter()
    with ThreadPoolExecutor(sizes.together) as pool:
        all_of_them = list(pool.map(lambda _: answer(server, sizes.short, sizes.answer), range(sizes.together)))
    return {
        "prompt_tokens": one.prompt,
        "prefill": one.prompt / read,
        "decode": (one.written - 1) / (one.whole - read),
        "together": sum(each.written for each in all_of_them) / (time.perf_counter() - began),
    }


def answer(server: Server, prompt: int, length: int) -> Answer:
    """An answer of so many tokens to a prompt of about so many."""
    body = {"model": server.model, "prompt": words(prompt, next(_KEYS)), "max_tokens": length, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began, first, usage = time.perf_counter(), None, None
    with asked(server.url, None, "/completions", body, 600.0) as reply:
        if reply.status != 200:
            raise SystemExit(f"{server.url}: {reply.status} {reply.read(300)!r}")
        if "event-stream" in reply.headers.get("content-type", ""):
            for event in events(reply):
                first = first or time.perf_counter() - began
                usage = event.get("usage") or usage
        else:
            usage = json.loads(reply.read())["usage"]
    assert usage is not None
    return Answer(first, time.perf_counter() - began, usage["prompt_tokens"], usage["completion_tokens"])


if __name__ == "__main__":
    main()
