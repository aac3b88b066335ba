"""What the contract tests share: small models of every registered part, and the ways to run a sequence through them.

A block letter or a resampler that is registered later is picked up from its table; what it needs in the config, beyond
what all the others need, goes into `NEEDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from longwave.blocks import BLOCKS
from longwave.config import InitConfig, ModelConfig, ScalesConfig
from longwave.laws import ALL, Law
from longwave.layers.mlp import MLPConfig
from longwave.mixers import AttentionConfig, InfllmConfig, LightningConfig, WindowConfig
from longwave.model import Decoder
from longwave.resamplers import BRACKETS
from longwave.resamplers.subllm import Subllm, SubllmConfig
from longwave.states import State
from longwave.stream import Stream, Windows

VOCABULARY, WIDTH, WINDOW = 61, 32, 5
SPARSE = InfllmConfig(kernel_size=2, kernel_stride=1, block_size=2, window_size=2, topk=2, dense_len=9)
NEEDS: dict[str, dict[str, Any]] = {"S": {"infllm": SPARSE}, "W": {"window": WindowConfig(WINDOW)}}
MINIMAX = LightningConfig(slopes="minimax", silu="qkv", qk_norm=False, rotary=False, scale="1")
ARGUMENTS = {"subllm": "0.6"}


@dataclass(frozen=True)
class Case:
    """A model to hold to the laws: a layout, and config fields by name."""

    layout: str
    fields: dict[str, Any] = field(default_factory=dict)

    def config(self) -> ModelConfig:
        attention = AttentionConfig(heads=4, kv_heads=2)
        needs = {name: value for part in NEEDS if part in self.layout for name, value in NEEDS[part].items()}
        plain = {"attention": attention, "mlp": MLPConfig(40), "init": InitConfig(std=0.2)}
        return ModelConfig(VOCABULARY, WIDTH, self.layout, **{**plain, **needs, **self.fields})


def _cases() -> dict[str, Case]:
    blocks = {f"block {letter}": Case(f"3{letter}") for letter in BLOCKS}
    levels = {name: f"{name}({ARGUMENTS.get(name, '0.5')}:" for name in BRACKETS}
    one = {f"resampler {name}": Case(f"F {level} F) F") for name, level in levels.items()}
    inside = {
        f"{name} around {letter}": Case(f"{letter} {level} {letter} {level} {letter}) {letter}) {letter}")
        for name, level in levels.items()
        for letter in BLOCKS
    }
    rich = AttentionConfig(heads=4, kv_heads=1, head_size=6, qkv_bias=True, output_bias=True, qk_norm=True)
    scales = ScalesConfig(embedding=3.0, residual=0.7, logits=0.5)
    causal, document = SubllmConfig(selection="causal"), SubllmConfig(ranking="document")
    nested = "F subllm(0.6: W subllm(0.6: F) F) F"
    return {
        **blocks,
        **one,
        **inside,
        "biases, norms and scales": Case("2F", {"attention": rich, "scales": scales, "tie_embeddings": True}),
        "subllm on the embeddings, and beside another": Case("subllm(0.5: F) F subllm(0.5: W)"),
        "sparse without a threshold": Case("2S", {"infllm": replace(SPARSE, regime="sparse")}),
        "dense, scaled by the position": Case("2S", {"infllm": InfllmConfig(regime="dense", logit_scaling=3.0)}),
        "linear layers by distance in the sequence": Case(
            "L subllm(0.6: L subllm(0.6: S L) L) L",
            {"lightning": LightningConfig(distance="original"), "infllm": SPARSE},
        ),
        "subllm around a hybrid": Case(
            "2S subllm(0.64: 3L S 3L S subllm(0.64: 4L) 3L) 2S",
            {"subllm": SubllmConfig(selection="causal"), **NEEDS["S"]},
        ),
        "linear layers of MiniMax": Case("3L", {"lightning": MINIMAX}),
        "linear layers of TransNormer, fewer KV heads": Case(
            "3L", {"lightning": LightningConfig(kv_heads=2, slopes="transnormer", silu="qk", rotary=False, scale="1")}
        ),
        "subllm causal": Case(nested, {"subllm": causal}),
        "subllm ranked draws": Case(nested, {"subllm": SubllmConfig(discard_sampling="ranked")}),
        "subllm by document": Case(nested, {"subllm": document}),
    }


CASES = _cases()


def decoder(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> Decoder:
    """A model whose scores are large enough that tokens are kept and dropped at every level, and weighed in between."""
    model = Decoder(case.config(), seed)
    with torch.no_grad():
        for resampler in model.resamplers:
            if not isinstance(resampler, Subllm):
                continue
            resampler.score.weight.mul_(8)
            resampler.bypass.uniform_(0.3, 1.1, generator=torch.Generator().manual_seed(seed))
            if resampler.config.selection == "causal":
                resampler.threshold.low.fill_(0.1)
                resampler.threshold.high.fill_(0.9)
    return model.to(dtype).eval()


@cache
def model_of(name: str, training: bool = False, dtype: torch.dtype = torch.float64) -> Decoder:
    """The model of a case, made once; nobody may change it."""
    model = decoder(CASES[name], dtype=dtype).train(training)
    model.set_step(3, seed=1)
    return model


def declared(model: Decoder, training: bool) -> frozenset[Law]:
    """The laws that every part of the model keeps."""
    laws = [part.laws for part in model.parts]
    return ALL.intersection(*(one.training if training else one.inference for one in laws))


@torch.no_grad()
def alone(model: Decoder, tokens: Sequence[int], sample: int = 0) -> Tensor:
    """Logits (T, V) of one sequence at once; in training it is the window `sample` of its data."""
    windows = Windows((len(tokens),), (sample,)) if model.training else None
    return model(torch.tensor(tokens), Stream.of([len(tokens)], windows=windows))


@torch.no_grad()
def together(model: Decoder, sequences: Sequence[Sequence[int]], windows: Windows | None = None) -> list[Tensor]:
    """Logits of sequences that share a stream."""
    lengths = [len(tokens) for tokens in sequences]
    flat = torch.tensor([token for tokens in sequences for token in tokens], dtype=torch.int64)
    return list(model(flat, Stream.of(lengths, windows=windows)).split(lengths))


@torch.no_grad()
def step(model: Decoder, state: State, pieces: Sequence[Sequence[int]], slots: Sequence[int] | None = None) -> Tensor:
    """Logits of the next piece of each slot."""
    flat = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64)
    return model(flat, state.stream([len(piece) for piece in pieces], slots), state)


def in_pieces(model: Decoder, tokens: Sequence[int], cuts: Sequence[int], state: State | None = None) -> Tensor:
    """Logits of one sequence that is run piece by piece, cut before each place in `cuts`."""
    state = model.state() if state is None else state
    bounds = [0, *cuts, len(tokens)]
    return torch.cat([step(model, state, [tokens[a:b]], [0]) for a, b in pairwise(bounds)])


@contextmanager
def rows_run(model: Decoder) -> Iterator[list[int]]:
    """Collects the number of tokens that each resampler's body runs on."""
    rows: list[int] = []
    hooks = [
        resampler.body.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[0]))
        for resampler in model.resamplers
    ]
    yield rows
    for hook in hooks:
        hook.remove()


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference; NaN counts as infinite."""
    assert one.shape == other.shape
    return (one - other).abs().nan_to_num(nan=float("inf")).max().item() if one.numel() else 0.0


def sequences(most: int = 24, least: int = 1) -> st.SearchStrategy[list[int]]:
    """Token ids of one sequence."""
    return st.lists(st.integers(0, VOCABULARY - 1), min_size=least, max_size=most)


def cuts_of(draw: Callable[..., Any], length: int, most: int = 8) -> list[int]:
    """Places to cut a sequence of `length` at, ascending; a place may come twice, which makes an empty piece."""
    return sorted(draw(st.lists(st.integers(0, length), max_size=most)))
