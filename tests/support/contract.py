"""What the contract tests share: small models of every registered part, ways to run them, and the laws as checks.

A block letter or a bracket that is registered later is picked up from its table; what it needs in the config, beyond
what all the others need, goes into `NEEDS`, and its arguments in a layout into `ARGUMENTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor

from longwave.blocks import BLOCKS, PARTS
from longwave.config import InitConfig, ModelConfig, ScalesConfig
from longwave.laws import ALL, Law
from longwave.layers.mlp import MLPConfig
from longwave.layout import Blocks, parse
from longwave.mixers import AttentionConfig, InfllmConfig, LightningConfig, WindowConfig
from longwave.model import Decoder
from longwave.part import Part
from longwave.resamplers import BRACKETS
from longwave.resamplers.subllm import Subllm, SubllmConfig
from longwave.states import State
from longwave.streams import Stream, Windows

VOCABULARY, WIDTH, WINDOW = 61, 32, 5
EXACT, CLOSE, LEAK = 1e-12, 1e-10, 1e-6  # the last bit of one product; what rounding explains; what it cannot
SPARSE = InfllmConfig(kernel_size=2, kernel_stride=1, block_size=2, window_size=2, topk=2, dense_len=9)
NEEDS: dict[str, dict[str, Any]] = {"S": {"infllm": SPARSE}, "W": {"window": WindowConfig(WINDOW)}}
ARGUMENTS: dict[str, str] = {"subllm": "0.6"}
PLAIN = {"attention": AttentionConfig(heads=4, kv_heads=2), "mlp": MLPConfig(40)}  # for layouts that read them
CROSSED = "FWLS"  # the blocks that every bracket is put around
MINIMAX = LightningConfig(slopes="minimax", silu="qkv", qk_norm=False, rotary=False, scale="1")


@dataclass(frozen=True)
class Case:
    """A model to hold to the laws: a layout, and config fields by name."""

    layout: str
    fields: dict[str, Any] = field(default_factory=dict)

    def config(self) -> ModelConfig:
        named = {item.letter if isinstance(item, Blocks) else item.name for item in parse(self.layout).walk()}
        read = {table for name in named for part in self._parts(name) for table in part.tables}
        plain = {table: value for table, value in PLAIN.items() if table in read}
        needs = {table: value for name in named for table, value in NEEDS.get(name, {}).items()}
        values = {"init": InitConfig(std=0.2), **plain, **needs, **self.fields}
        return ModelConfig(VOCABULARY, WIDTH, self.layout, **values)

    def _parts(self, name: str) -> list[type[Part]]:
        """The parts behind a letter, which may be the case's own, or the name of a bracket."""
        if name in BRACKETS:
            return [BRACKETS[name]]
        kind = self.fields.get("blocks", BLOCKS).get(name) or BLOCKS[name]
        return [PARTS[part] for part in kind.parts]


def around(bracket: str, body: str) -> str:
    """A body in a bracket, with the arguments that it takes."""
    arguments = ARGUMENTS.get(bracket)
    return f"{bracket}({body})" if arguments is None else f"{bracket}({arguments}: {body})"


def nested(bracket: str, letter: str) -> str:
    """A bracket in a bracket, and blocks of one kind around and in them."""
    inner = around(bracket, letter)
    return f"{letter} {around(bracket, f'{letter} {inner} {letter}')} {letter}"


def cases_of(letters: Iterable[str], brackets: Iterable[str]) -> dict[str, Case]:
    """Every block alone; every bracket alone, and nested around each of the blocks that it is crossed with."""
    blocks = {f"block {letter}": Case(f"3{letter}") for letter in letters}
    alone = {f"bracket {name}": Case(f"F {around(name, 'F')} F") for name in brackets}
    crossed = {f"{name} around {letter}": Case(nested(name, letter)) for name in brackets for letter in CROSSED}
    return blocks | alone | crossed


def _special_cases() -> dict[str, Case]:
    """Settings that change what a part computes, and parts that meet."""
    rich = AttentionConfig(heads=4, kv_heads=1, head_size=6, qkv_bias=True, output_bias=True, qk_norm=True)
    scales = ScalesConfig(embedding=3.0, residual=0.7, logits=0.5)
    nested = "F subllm(0.6: W subllm(0.6: F) F) F"
    return {
        "biases, norms and scales": Case("2F", {"attention": rich, "scales": scales, "tie_embeddings": True}),
        "subllm on the embeddings, and beside another": Case("subllm(0.5: F) F subllm(0.5: W)"),
        "sparse without a threshold": Case("2S", {"infllm": replace(SPARSE, regime="sparse")}),
        "sparse by the length of the call": Case("2S", {"infllm": replace(SPARSE, regime="auto_published")}),
        "dense, scaled by the position": Case("2S", {"infllm": InfllmConfig(regime="dense", logit_scaling=3.0)}),
        "linear layers by distance in the sequence": Case(
            "L subllm(0.6: L subllm(0.6: S L) L) L", {"lightning": LightningConfig(distance="original")}
        ),
        "subllm around a hybrid": Case(
            "2S subllm(0.64: 3L S 3L S subllm(0.64: 4L) 3L) 2S", {"subllm": SubllmConfig(selection="causal")}
        ),
        "linear layers of MiniMax": Case("3L", {"lightning": MINIMAX}),
        "linear layers of TransNormer, fewer KV heads": Case(
            "3L", {"lightning": LightningConfig(kv_heads=2, slopes="transnormer", silu="qk", rotary=False, scale="1")}
        ),
        "subllm causal": Case(nested, {"subllm": SubllmConfig(selection="causal")}),
        "subllm ranked draws": Case(nested, {"subllm": SubllmConfig(discard_sampling="ranked")}),
        "subllm by document": Case(nested, {"subllm": SubllmConfig(ranking="document")}),
    }


CASES = cases_of(BLOCKS, BRACKETS) | _special_cases()


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


# --- the laws as checks -----------------------------------------------------------------------------------------------
#
# Each draws a situation and gives the largest difference that it makes: at most CLOSE where the law is kept, and more
# than LEAK in some situation where it is not.

Draw: TypeAlias = Callable[..., Any]
Check: TypeAlias = Callable[[Decoder, Draw], float]


def by_itself(model: Decoder, tokens: Sequence[int], cuts: Sequence[int]) -> Tensor:
    """Logits of one sequence at once; in these pieces for a model whose outputs depend on how it is cut."""
    if Law.CHUNKING in declared(model, training=False):
        return alone(model, tokens)
    return in_pieces(model, tokens, cuts)


def chunking(model: Decoder, draw: Draw) -> float:
    """A sequence in drawn pieces, and at once."""
    tokens = draw(sequences())
    return distance(in_pieces(model, tokens, cuts_of(draw, len(tokens))), alone(model, tokens))


def company(model: Decoder, draw: Draw) -> float:
    """Sequences of drawn lengths, each cut into drawn pieces, served in a drawn order, and each by itself."""
    runs = draw(st.lists(sequences(14), min_size=2, max_size=4))
    served, cuts = _interleaved(model, runs, draw)
    own = [by_itself(model, tokens, places) for tokens, places in zip(runs, cuts, strict=True)]
    return max(distance(one, other) for one, other in zip(served, own, strict=True))


def _interleaved(model: Decoder, runs: list[list[int]], draw: Draw) -> tuple[list[Tensor], list[list[int]]]:
    """Logits of sequences that progress piece by piece, some in each call, empty pieces among them; and their cuts."""
    state, cuts = model.state(len(runs)), [list[int]() for _ in runs]
    logits: list[list[Tensor]] = [[] for _ in runs]
    while state.seen != [len(run) for run in runs]:
        done = state.seen
        slots = draw(st.permutations(range(len(runs))))[: draw(st.integers(1, len(runs)))]
        sizes = [draw(st.integers(0, len(runs[slot]) - done[slot])) for slot in slots]
        if not any(sizes):
            slots = [next(slot for slot, run in enumerate(runs) if done[slot] < len(run))]
            sizes = [len(runs[slots[0]]) - done[slots[0]]]
        pieces = [runs[slot][done[slot] : done[slot] + size] for slot, size in zip(slots, sizes, strict=True)]
        for slot, output in zip(slots, step(model, state, pieces, slots).split(sizes), strict=True):
            logits[slot].append(output)
            cuts[slot].append(done[slot])
    return [torch.cat(pieces) for pieces in logits], [places[1:] for places in cuts]


def company_without_a_state(model: Decoder, draw: Draw) -> float:
    """Whole sequences in one stream, and each by itself."""
    runs = draw(st.lists(sequences(14), min_size=2, max_size=5))
    outputs = together(model, runs)
    return max(distance(logits, alone(model, tokens)) for tokens, logits in zip(runs, outputs, strict=True))


def causality(model: Decoder, draw: Draw) -> float:
    """A sequence, and the same with other tokens from some place on: the outputs before it."""
    tokens = draw(sequences())
    place = draw(st.integers(0, len(tokens) - 1))
    others = draw(sequences(len(tokens) - place, len(tokens) - place))
    change, same_shapes = change_before(model, tokens, place, others)
    allowed = 0 if same_shapes else EXACT  # matrix products of other shapes round differently in their last bit
    return max(change, LEAK) if change > allowed else 0.0


def change_before(model: Decoder, tokens: list[int], place: int, others: list[int]) -> tuple[float, bool]:
    """How much the outputs before `place` change with the tokens from there on, and whether as many rows ran."""
    with rows_run(model) as rows:
        first = alone(model, tokens)
        half = len(rows)
        second = alone(model, tokens[:place] + others)
    return distance(first[:place], second[:place]), rows[:half] == rows[half:]


def snapshots(model: Decoder, draw: Draw) -> float:
    """A snapshot is returned to twice, after drawn tokens, and the rest then runs as if nothing had happened."""
    tokens, junk, state = draw(sequences()), draw(sequences(20)), model.state()
    place = draw(st.integers(0, len(tokens)))
    cuts = cuts_of(draw, place, 3)
    whole = by_itself(model, tokens, [*cuts, place])
    in_pieces(model, tokens[:place], cuts, state)
    used = state.used_bytes()
    snapshot = state.snapshot(0)
    for _ in range(2):
        in_pieces(model, junk, cuts_of(draw, len(junk), 3), state)
        state.restore(snapshot)
        assert (state.seen, state.used_bytes()) == ([place], used)
    return distance(in_pieces(model, tokens[place:], [], state), whole[place:])


def truncation(model: Decoder, draw: Draw) -> float:
    """A truncated sequence is a fresh run, or is refused: by what has forgotten, and then nothing has changed."""
    tokens, junk, state = draw(sequences()), draw(sequences(20)), model.state()
    place = draw(st.integers(0, len(tokens)))
    ran = tokens[:place] + junk
    cuts = cuts_of(draw, len(ran))
    if Law.CHUNKING not in declared(model, training=False):
        cuts = sorted({*cuts, place})  # what was run up to there can only be run again if a piece ended there
    in_pieces(model, ran, cuts, state)
    used = state.used_bytes()
    if refusal := refusal_of(state, place):
        assert "has forgotten" in refusal
        assert any(spec.forgets for spec in state.specs.values())
        assert (state.seen, state.used_bytes()) == ([len(ran)], used)
        whole = by_itself(model, ran + tokens, [*cuts, len(ran)])
        return distance(in_pieces(model, tokens, [], state), whole[len(ran) :])
    fresh = model.state()
    in_pieces(model, tokens[:place], [cut for cut in cuts if cut < place], fresh)
    assert (state.seen, state.used_bytes()) == (fresh.seen, fresh.used_bytes())
    whole = by_itself(model, tokens, [*(cut for cut in cuts if cut < place), place])
    return distance(in_pieces(model, tokens[place:], [], state), whole[place:])


def refusal_of(state: State, length: int) -> str:
    """What truncating slot 0 is refused with, or nothing."""
    try:
        state.truncate(0, length)
    except ValueError as refusal:
        return str(refusal)
    return ""


def reordering(model: Decoder, draw: Draw) -> float:
    """Beam search: slots are copied, dropped and swapped, and each copy then goes its own way."""
    runs = draw(st.lists(sequences(10), min_size=3, max_size=3))
    state = model.state(3)
    step(model, state, runs, [0, 1, 2])
    sources = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    state.reorder(sources)
    assert state.slots == len(sources)
    endings = [draw(sequences(5)) for _ in sources]
    outputs = step(model, state, endings).split([len(ending) for ending in endings])
    differences = []
    for source, ending, logits in zip(sources, endings, outputs, strict=True):
        start = len(runs[source])
        whole = by_itself(model, runs[source] + ending, [start])
        differences.append(distance(logits, whole[start:]))
    return max(differences)


AT_INFERENCE: Mapping[Law, tuple[Check, ...]] = {
    Law.CHUNKING: (chunking,),
    Law.COMPANY: (company, company_without_a_state),
    Law.CAUSALITY: (causality,),
    Law.ROLLBACK: (snapshots, truncation),
}
