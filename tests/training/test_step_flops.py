"""Counted FLOPs of a training step against its matrix products as they are dispatched, forward and backward.

In the `reference` forms every product is one that the formulas count, so both agree exactly. The `torch` forms, which
training runs in, multiply more: attention kernels also pairs that no query sees, and once more in the backward pass;
linear layers within chunks; block-sparse attention whole tiles. Of attention kernels the visible pairs are counted
here, by the masks that they are given. What the two other ops multiply is measured apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from longwave.mixers.infllm import InfllmAttention
from longwave.mixers.lightning import LightningAttention
from longwave.model import Decoder
from longwave.ops.block_sparse.differentiable import _Attend
from longwave.ops.block_sparse.geometry import attended_pairs
from longwave.ops.decay_linear.chunked import _Chunked
from longwave.streams import Stream, Windows
from longwave.training.flops import StepFlops
from longwave.training.recipe import read_recipe

PUBLISHED = ["model.subllm.selection=published", "model.subllm.threshold_memory=0.98"]
RECIPES: dict[str, tuple[str, list[str]]] = {
    "Llama": ("quickstart-llama", []),
    "SUBLLM, causal": ("quickstart-subllm", []),
    "SUBLLM, published": ("quickstart-subllm", PUBLISHED),
    "SALA": ("quickstart-sala", []),
    "SALA in SUBLLM": ("quickstart-sala-subllm", []),
}
SPARSER = ["model.infllm.topk=2", "model.infllm.window_size=16"]  # chooses 3 blocks of 16 keys, from 49 keys on

aten = torch.ops.aten


def step_of(name: str, runs: tuple[int, ...], form: str, *more: str) -> tuple[Decoder, Callable[[], Tensor], StepFlops]:
    """A model of a recipe, its training loss over documents of these lengths in one window, and what is counted."""
    recipe, changes = RECIPES[name]
    model = Decoder(read_recipe(recipe, [*changes, *more]).model).train()
    model.use_form(form)
    model.set_step(3)
    count = sum(runs)
    draw = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(4096, (2, count), generator=draw)
    targets[torch.tensor(runs).cumsum(0) - 1] = -100  # the last token of a document predicts nothing
    rows = (targets != -100).nonzero().flatten()
    stream = Stream.of(runs, windows=Windows((count,), (0,)))
    stream = Stream(stream.runs, stream.order, stream.positions, windows=stream.windows, outputs=rows)
    flops = StepFlops(model)

    def loss() -> Tensor:
        flops.began(stream)
        with model.watching(flops):
            return model.loss(tokens, targets, stream)

    return model, loss, flops


@pytest.mark.parametrize("name", RECIPES)
def test_counted_flops_are_the_products_of_the_reference_forms(name: str):
    _, loss, flops = step_of(name, (70, 1, 25), "reference", *(SPARSER if "SALA" in name else []))
    with FlopCounterMode(display=False) as measured:
        loss().backward()
    assert flops.total == measured.get_total_flops()


class Products(TorchDispatchMode):
    """Adds up the FLOPs of matrix products by their shapes, and of attention kernels by the pairs that are visible.

    by_op: those of products within an op that is measured apart, by its name, and of all others under "". The backward
    pass of attention counts as twice the forward; kernels compute the scores once more, as recomputed blocks would be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_op, self.within = Counter[str](), ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._overloadpacket
        if name in (aten.mm, aten.bmm):
            self.by_op[self.within] += 2 * args[0].numel() * args[1].shape[-1]
        elif name in (aten.addmm, aten.baddbmm):
            self.by_op[self.within] += 2 * args[1].numel() * args[2].shape[-1]
        elif name is aten._scaled_dot_product_flash_attention_for_cpu:
            self.by_op[self.within] += self._attention(*args[:2], causal=args[4], **kwargs)
        elif name is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.by_op[self.within] += 2 * self._attention(*args[1:3], causal=args[7], **kwargs)
        else:
            assert "attention" not in str(name), name
            assert "convolution" not in str(name), name
        return found

    def _attention(self, query: Tensor, key: Tensor, causal: bool, attn_mask: Any = None, **_: Any) -> int:
        assert causal or attn_mask is None
        batch, heads, length, size = query.shape
        pairs = length * (length + 1) // 2 if causal else length * key.shape[2]
        return 4 * batch * heads * size * pairs

    @contextmanager
    def apart(self, patch: pytest.MonkeyPatch, **functions: type[torch.autograd.Function]) -> Iterator[None]:
        """Products in the forward and backward passes of these functions count under their names."""
        for name, function in functions.items():
            for side in ("forward", "backward"):
                patch.setattr(function, side, staticmethod(self._noting(name, getattr(function, side))))
        with self:
            yield

    def _noting(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            self.within = name
            try:
                return run(*args)
            finally:
                self.within = ""

        return noted


@pytest.mark.parametrize("name", RECIPES)
def test_counted_flops_are_the_products_of_the_torch_forms(name: str, monkeypatch: pytest.MonkeyPatch):
    """Exactly, but for the scores of blocks, of which this form also computes some that it masks out."""
    model, loss, flops = step_of(name, (700, 324), "torch")
    measured, lengths = Products(), {-1: (700, 324)}
    with (
        measured.apart(monkeypatch, chunks=_Chunked, tiles=_Attend),
        model.watching(lambda level, stream, selection: lengths.update({level.index: selection.runs.lengths})),
    ):
        loss().backward()
    recurrences, chosen = apart(model, lengths)
    assert flops.total - recurrences - chosen == pytest.approx(measured.by_op[""], rel=0.002 if chosen else 0)
    assert (recurrences > 0, chosen > 0) == (measured.by_op["chunks"] > 0, measured.by_op["tiles"] > 0)
    assert recurrences <= measured.by_op["chunks"]
    assert chosen <= measured.by_op["tiles"] * 1.01
    print(f"{name}: {flops.total:,} counted; {recurrences:,}, {chosen:,} of them; {dict(measured.by_op)}")


def apart(model: Decoder, lengths: dict[int, tuple[int, ...]]) -> tuple[int, int]:
    """FLOPs, forward and backward, of recurrences and of attention to chosen blocks, which the form does otherwise."""
    recurrences = chosen = 0
    for part in model.parts:
        for count in lengths.get(part.site.level, ()):
            if isinstance(part, LightningAttention):
                recurrences += 3 * 4 * part.heads * part.head_size**2 * count
            elif isinstance(part, InfllmAttention):
                dense = min(count, part.geometry.dense(0))
                pairs = attended_pairs(count, part.geometry) - dense * (dense + 1) // 2
                chosen += 3 * 4 * part.heads * part.head_size * pairs
    return recurrences, chosen
