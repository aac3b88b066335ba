"""`longwave bench serving`: servers under one load, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longwave import trial
from longwave.cli.options import Options, argument, option
from longwave.cli.parser import Verb
from longwave.cli.tables import print_table
from longwave.errors import require
from longwave.units import parse_sizes

if TYPE_CHECKING:
    from longwave.benchmarks.serving.run import Measured


@dataclass(frozen=True, kw_only=True)
class Serving(Options):
    """Options of `longwave bench serving`."""

    urls: tuple[str, ...] = argument("http://HOST:PORT/v1, with #MODEL for one of several", default=(), metavar="URL")
    rate: float = option("requests a second, on average; times between them are exponential", default=2.0)
    requests: int = option("in all", default=64)
    prompts: str = option("lengths in tokens, of which one is drawn for each", default="64,256")
    answers: str = option("lengths in tokens, of which one is drawn for each", default="32,128")
    seed: int = option("of lengths, words and times", default=0)
    timeout: float = option("of one request", default=300.0, metavar="SECONDS")
    api_key: str | None = option("of the servers; or in the environment, as OPENAI_API_KEY", metavar="KEY")


def run(options: Serving) -> dict[str, Any]:
    """Asks one server after the other, with the same requests at the same times."""
    from longwave.benchmarks.serving.load import Load
    from longwave.benchmarks.serving.run import run_load, target_of
    from longwave.config import build
    from longwave.progress import say

    require(bool(options.urls), "give the address of a server, such as http://127.0.0.1:8000/v1")
    values: dict[str, Any] = {name: getattr(options, name) for name in ("rate", "seed")}
    values["requests"] = trial.at_most(options.requests, 4)
    values |= {name: tuple(parse_sizes(getattr(options, name))) for name in ("prompts", "answers")}
    load = build(Load, values, "bench serving")
    key = options.api_key or os.environ.get("OPENAI_API_KEY")
    targets = [target_of(url, key) for url in options.urls]  # all are looked at before any is measured
    found = list[Any]()
    for target in targets:
        say(f"{target.url} {target.model}: {load.requests} requests, {load.rate:g} a second")
        found.append(run_load(target, load, key, options.timeout, lambda count: None))
    _show(found)
    return {"load": load, "servers": found}


_FIGURES = {"first token": "first_token", "per token": "per_token", "whole answer": "whole"}


def _show(found: Sequence[Measured]) -> None:
    columns = ["", *(f"{one.model} at {one.url.split('://')[-1].removesuffix('/v1')}" for one in found)]
    rows = [
        ["answered", *(f"{one.answered} of {one.requests}" for one in found)],
        ["new tokens a second", *(f"{one.tokens_per_second:,.1f}" for one in found)],
        ["requests a second", *(f"{one.requests_per_second:.2f}" for one in found)],
        ["tokens read, written", *(f"{one.prompt_tokens:,}, {one.new_tokens:,}" for one in found)],
    ]
    for label, field in _FIGURES.items():
        for rank in ("p50", "p95", "p99"):
            rows.append([f"{label}, {rank}", *(_milliseconds(getattr(one, field).get(rank)) for one in found)])
    print_table(columns, rows, {""})
    for one in found:
        if one.failures:
            told = ", ".join(f"{count} of status {status}" for status, count in one.failures.items())
            print(f"{one.model} at {one.url}: {told}; the first: {one.error}")


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:,.1f} ms"


VERB = Verb("serving", "ask servers under one load, side by side", Serving, run)
