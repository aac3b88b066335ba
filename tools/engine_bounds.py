"""The engine beside what bounds it: one text at a long context, and a SUBLLM beside a Llama under the same load.

    python tools/engine_bounds.py step [--context 32768]
    python tools/engine_bounds.py served [--context 8192]

`step`: a decoding step of the engine for one text of a Llama of 100 M parameters, against the sum of its products and
of its reads of keys and values, each timed alone, by turns. The text is put there by a prefill without attention.
`served`: the time in which the engine answers requests of so many tokens, by a Llama and by a SUBLLM whose levels keep
their nominal share, and the ratio of their bounds from FLOPs and bytes. Both in bf16; each prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from longwave.benchmarks.measure.roofline import Level, Load, decode_work, measure_peaks, prefill_work
from longwave.benchmarks.models import force_retention, sample_tokens
from longwave.costs import Peaks, Work
from longwave.engine import Engine, EngineOptions, Request
from longwave.layers.linear import Linear
from longwave.mixers.full import FullAttention
from longwave.model import Decoder
from longwave.ops.attention.benchmark import cases
from longwave.ops.benchmark import Shape
from longwave.ops.linear import linear
from longwave.planning import model_config

LLAMA, PAIR = "longwave/recipes/bench-llama.toml", ("bench-llama-24", "bench-subllm-24")
STEPS, NEW = 40, 32


def main() -> None:
    """Runs one of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "served"))
    parser.add_argument("--context", type=int)
    parser.add_argument("--requests", type=int, default=1)
    options = parser.parse_args()
    found = (
        step(options.context or 32768) if options.what == "step" else served(options.context or 8192, options.requests)
    )
    print(json.dumps({"measured": options.what, "threads": torch.get_num_threads(), **found}))


def decoder_of(recipe: str, window: int | None = None) -> Decoder:
    config = model_config(recipe)
    config = config if window is None else replace(config, context_window=window)
    return Decoder(config, seed=0).to(torch.bfloat16).eval()


# --- one text at a long context -------------------------------------------------------------------------------------


def step(context: int) -> dict[str, Any]:
    """Seconds of a step, and of its parts alone."""
    model = decoder_of(LLAMA, 2 * context)
    engine = Engine(model, EngineOptions(running=1, prefixes=False, window=context + STEPS + 2))
    engine.submit(Request(prompt=tuple(sample_tokens(model, context, 0).tolist()), max_new_tokens=STEPS + 1))
    with without_attention():
        while not engine.step():
            pass
    products, reads = products_of(model), reads_of(model, context)
    times: dict[str, list[float]] = {"step": [], "products": [], "reads": []}
    for _ in range(STEPS - 1):
        for name, task in (("step", engine.step), ("products", products), ("reads", reads)):
            began = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - began)
    found = {name: median(all_of_them) for name, all_of_them in times.items()}
    return {"context": context, **found, "ratio": found["step"] / (found["products"] + found["reads"])}


@contextmanager
def without_attention() -> Iterator[None]:
    """Attention gives nothing back, so that a long prompt is read in linear time; its keys and values are kept."""
    mix = FullAttention._mix
    FullAttention._mix = lambda self, query, *rest: torch.zeros_like(query)  # pyright: ignore
    try:
        yield
    finally:
        FullAttention._mix = mix


def products_of(model: Decoder) -> Any:
    """A task of all products of one token."""
    weights = [module.weight for module in model.modules() if isinstance(module, Linear)] + [model.head_weight]
    rows = {size: torch.randn(1, size).bfloat16() for size in {weight.shape[1] for weight in weights}}

    @torch.no_grad()
    def run() -> None:
        for weight in weights:
            linear(rows[weight.shape[1]], weight)

    return run


def reads_of(model: Decoder, context: int) -> Any:
    """A task of the attention of one token to its past in every block, each with keys and values of its own."""
    config, attention = model.config, model.blocks[0].mixer
    assert isinstance(attention, FullAttention)
    heads = (attention.heads, attention.kv_heads, attention.head_size)
    sizes = (config.hidden_size, config.vocab_size, None, torch.bfloat16, torch.device("cpu"))
    found = list[partial[Tensor]]()
    for seed in range(len(model.blocks)):
        case = next(one for one in cases(Shape(context, 1, *heads, *sizes, seed=seed)) if "decode" in one.quantity)
        found.append(partial(case.forms["compiled"], *case.inputs))

    @torch.no_grad()
    def run() -> None:
        for read in found:
            read()

    return run


# --- a SUBLLM beside a Llama ------------------------------------------------------------------------------------------


def served(context: int, requests: int) -> dict[str, Any]:
    """Seconds of the same load for a Llama and a SUBLLM, and those that FLOPs and bytes allow."""
    peaks = measure_peaks(torch.bfloat16)
    models = {name: decoder_of(f"longwave/recipes/{name}.toml") for name in PAIR}
    prompt = sample_tokens(models[PAIR[0]], context * requests, 0).view(requests, context)
    retention = force_retention(models[PAIR[1]], prompt[0])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(2):
        for name, model in models.items():
            began = time.perf_counter()
            answer(model, prompt)
            seconds[name].append(time.perf_counter() - began)
    llama, subllm = (min(seconds[name]) for name in PAIR)
    bounds = [
        bound(models[name], context, requests, peaks, kept) for name, kept in zip(PAIR, ((), retention), strict=True)
    ]
    speedup, possible = llama / subllm, bounds[0] / bounds[1]
    figures = {"llama": llama, "subllm": subllm, "retention": retention, "speedup": speedup, "possible": possible}
    return {"context": context, "requests": requests, "answer": NEW, **figures, "share": speedup / possible}


def answer(model: Decoder, prompts: Tensor) -> None:
    engine = Engine(model, EngineOptions(running=len(prompts), prefixes=False, window=prompts.shape[1] + NEW))
    for prompt in prompts:
        engine.submit(Request(prompt=tuple(prompt.tolist()), max_new_tokens=NEW))
    while not engine.idle:
        engine.step()


def bound(model: Decoder, context: int, requests: int, peaks: Peaks, retention: tuple[float, ...]) -> float:
    """The least seconds of the load: its prompts one after the other, then all texts a token at a time."""
    prompts = requests * prefill_work(model, context, retention).seconds(peaks)
    share, levels = 1.0, {-1: Level.whole(context, requests, NEW)}
    for level, kept in zip(model.resamplers, retention, strict=True):
        share *= kept
        reached = 1 - (1 - share) ** requests
        levels[level.index] = Level(share * (context + NEW / 2), share * requests, reached)
    works: list[Work] = decode_work(model, Load(levels))
    return prompts + NEW * sum(work.seconds(peaks) for work in works)


if __name__ == "__main__":
    main()
