"""Heads in the order of how far back they look, before layers of fixed decays are dealt out to them.

A head of linear attention forgets at a rate that its place fixes. Which head of softmax attention gets which place is
free, since permuting heads together with their columns of the output projection changes nothing. So the head that looks
nearest can get the place that forgets soonest. The idea is our own; whether it pays is for measurement to say.

Legend: `N` tokens, `H` heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from longwave.errors import require
from longwave.mixers import FullAttention, LightningAttention
from longwave.model import Decoder
from longwave.ops.attention.weights import attention_weights
from longwave.part import Part
from longwave.streams import Stream


@torch.no_grad()
def attention_distances(model: Decoder, texts: Iterable[Int64[Tensor, " N"]]) -> dict[int, Float64[Tensor, " H"]]:
    """The mean distance in tokens from a query to what it attends to, for every head of every softmax layer.

    The layers are keyed by their block's number; those that no token reaches have no entry. The first token does not
    count as seen: heads rest on it when they look for nothing. Queries without other weight count for nothing then.
    """
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    with model.mode(training=False):
        parts = [part for block in model.blocks for part in block.parts if isinstance(part, FullAttention)]
        hooks = [part.register_forward_pre_hook(_Distances(sums)) for part in parts if part.sees_all]
        try:
            for text in texts:
                tokens = text.to(model.embed.weight.device)
                model.hidden(tokens, Stream.of((len(tokens),), device=tokens.device))
        finally:
            for hook in hooks:
                hook.remove()
    return {depth: far / weight.clamp(min=1e-300) for depth, (far, weight) in sums.items()}


class _Distances:
    """A forward hook that adds up attention weights, and weights times distances, by head."""

    def __init__(self, sums: dict[int, tuple[Tensor, Tensor]]) -> None:
        self._sums = sums

    def __call__(self, mixer: nn.Module, inputs: tuple[Any, ...]) -> None:
        hidden, stream = inputs[:2]
        assert isinstance(mixer, FullAttention)
        query, key = mixer.queries_and_keys(hidden, stream)
        far, seen = torch.zeros(2, mixer.heads, dtype=torch.float64)
        window = mixer.pattern.window
        for start, first, weights in attention_weights(query, key, window=window, scale=mixer.scale):
            own = weights.double().cpu()
            if first == 0:
                own[..., 0] = 0
            queries, keys = (torch.arange(at, at + own.shape[n]) for n, at in ((1, start), (2, first)))
            far += (own * (queries[:, None] - keys)).sum((1, 2))
            seen += own.sum((1, 2))
        before = self._sums.get(mixer.site.depth, (torch.zeros_like(far), torch.zeros_like(seen)))
        self._sums[mixer.site.depth] = before[0] + far, before[1] + seen


def order_for(distances: Sequence[float], decays: Sequence[float]) -> list[int]:
    """The head for each place: the nearest-looking head for the place that forgets soonest, and so on.

    distances: mean attention distance of every head. decays: what each place keeps of its memory at a token, or the log
    of it. Of equals the earlier head comes first.
    """
    require(len(distances) == len(decays), f"{len(distances)} heads for {len(decays)} places; one for each")
    near = sorted(range(len(distances)), key=lambda head: (distances[head], head))
    soon = sorted(range(len(decays)), key=lambda place: (decays[place], place))
    places = dict(zip(soon, near, strict=True))
    return [places[place] for place in range(len(decays))]


@torch.no_grad()
def reorder_heads(mixer: Part, order: Sequence[int]) -> None:
    """Puts the heads of a mixer into another order, `order[place]` being the head that stands there from now on.

    Softmax attention gives the same output as before. UserError for a mixer without heads, and where heads share keys
    and values: repeat these first.
    """
    known = isinstance(mixer, FullAttention | LightningAttention)
    require(known, f"{mixer.site.name}: {type(mixer).__name__} has no heads that could be put into another order")
    assert isinstance(mixer, FullAttention | LightningAttention)
    require(sorted(order) == list(range(mixer.heads)), f"order = {list(order)}: each of {mixer.heads} heads once")
    shared = mixer.kv_heads != mixer.heads
    require(not shared, f"kv_heads = {mixer.kv_heads}: {mixer.heads} heads share them; repeat them first")
    size, index = mixer.head_size, torch.tensor(order)
    for name, weight in _by_head(mixer).items():
        axis = 1 if name == "o_proj.weight" else 0
        heads = weight.unflatten(axis, (mixer.heads, size)).index_select(axis, index.to(weight.device))
        weight.copy_(heads.flatten(axis, axis + 1))


def _by_head(mixer: nn.Module) -> Mapping[str, Tensor]:
    """The weights that have a share for every head; norms of single heads have one for all."""
    names = [f"{part}_proj.{kind}" for part in "qkvz" for kind in ("weight", "bias")]
    names += ["o_proj.weight", "o_gate.weight", "o_gate.bias", "o_norm.weight"]
    held = mixer.state_dict(keep_vars=True)
    return {name: held[name] for name in names if name in held}
