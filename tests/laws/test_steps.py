"""A step's figures are made once, before its layers run: inside them the host neither sends numbers nor waits for any.

On a GPU each tensor that is made of Python numbers is a copy, and each figure that is read back a wait for the device.
Every op that is dispatched while the layers run is recorded; the embedding, the head, and what makes the stream of a
step are not among them. The CPU's own kernels are left out where they stand in for what a GPU does not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from contract import CASES, SPARSE, Case, decoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import longwave.streams
from longwave.mixers import AttentionConfig
from longwave.model import Decoder
from longwave.resamplers.subllm import SubllmConfig
from longwave.streams import Stream, Windows

WIDE = AttentionConfig(heads=4, kv_heads=2, head_size=32)  # as the compiled kernels take them
SHAPES = {
    **{name: CASES[name] for name in CASES if name.startswith(("block", "subllm"))},
    "wide heads": Case("F W", {"attention": WIDE}),
    "wide heads, sparse": Case("2S", {"attention": WIDE, "infllm": SPARSE}),
}
SENT = {"lift_fresh", "lift_fresh_copy"}
READ = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "equal", "_unique2"}


@dataclass
class Recorded:
    """What happened while the layers ran. waited: how often the host asked for the lengths of runs."""

    ops: list[str] = field(default_factory=list)
    waited: int = 0

    @property
    def sent(self) -> list[str]:
        """Tensors made of Python numbers."""
        return [op for op in self.ops if op in SENT]

    @property
    def read(self) -> list[str]:
        """Ops that end in a number, or in a tensor whose size is data."""
        return [op for op in self.ops if op in READ]


class Recorder(TorchDispatchMode):
    """Notes the name of every op that is dispatched."""

    def __init__(self, into: list[str]) -> None:
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("index") and any(_is_mask(index) for index in _indices(args)):
            name = "nonzero"  # which a mask is turned into
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            name = "item"
        self.into.append(name)
        return func(*args, **(kwargs or {}))


def _indices(args: Any) -> list[Any]:
    return args[1] if len(args) > 1 and isinstance(args[1], list) else []


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


@contextmanager
def recording(model: Decoder) -> Iterator[Recorded]:
    """Records all that the model's layers do."""
    recorded, reads, tolist = Recorded(), longwave.streams.to_host, Tensor.tolist
    modes: list[Recorder] = []

    def enter(*given: Any) -> None:
        modes.append(Recorder(recorded.ops))
        modes[-1].__enter__()

    def leave(*given: Any) -> None:
        modes.pop().__exit__(None, None, None)

    def waits(numbers: Tensor) -> tuple[int, ...]:
        recorded.waited += bool(modes)
        return tuple(tolist(numbers))

    def lists(numbers: Tensor) -> Any:
        recorded.ops += ["item"] if modes else []
        return tolist(numbers)

    hooks = [model.stack.register_forward_pre_hook(enter), model.stack.register_forward_hook(leave)]
    longwave.streams.to_host, Tensor.tolist = waits, lists
    try:
        yield recorded
    finally:
        longwave.streams.to_host, Tensor.tolist = reads, tolist
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    "act",
    [
        lambda: torch.tensor([1, 2]),
        lambda: torch.ones(1).item(),
        lambda: bool(torch.ones(1) > 0),
        lambda: torch.ones(2)[torch.tensor([True, False])],
        lambda: torch.ones(2).tolist(),
        lambda: torch.ones(2, dtype=torch.int64).repeat_interleave(torch.ones(2, dtype=torch.int64)),
        lambda: torch.ones(2).nonzero(),
    ],
)
def test_the_recorder_sees_what_it_is_there_for(act: Any):
    model = decoder(CASES["block F"])

    def acts(*given: Any) -> None:
        act()

    hook = model.stack.layers[0].register_forward_pre_hook(acts)
    with recording(model) as recorded:
        model(torch.arange(4), Stream.of([4]))
    hook.remove()
    assert recorded.sent or recorded.read


# --- at inference -----------------------------------------------------------------------------------------------------

STEPS = {"prefill": [20, 13, 7], "chunks beside a decoding sequence": [1, 6, 1], "decode": [1, 1, 1]}


def stepped(name: str, dtype: torch.dtype) -> Iterator[tuple[Decoder, str, Recorded]]:
    """What the layers do in each kind of step, over memory that need not grow."""
    model = decoder(SHAPES[name], dtype=dtype)
    state = model.state(3)
    state.make_room(60)
    for kind, lengths in STEPS.items():
        tokens, stream = torch.arange(sum(lengths)) % 61, state.stream(lengths)
        with torch.no_grad(), recording(model) as recorded:
            model(tokens, stream, state)
        yield model, kind, recorded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", SHAPES)
def test_at_inference_layers_send_nothing_and_wait_once_for_each_level(name: str, dtype: torch.dtype):
    for model, kind, recorded in stepped(name, dtype):
        assert recorded.ops, kind
        assert (kind, recorded.sent, recorded.read) == (kind, [], [])
        assert recorded.waited <= len(model.resamplers), kind


def test_without_a_state_neither():
    model = decoder(CASES["subllm around F"])
    with torch.no_grad(), recording(model) as recorded:
        model(torch.arange(40) % 61, Stream.of([25, 15]))
    assert (recorded.sent, recorded.read) == ([], [])
    assert recorded.waited == 2


# --- in training ------------------------------------------------------------------------------------------------------

DOCUMENTS = {
    "windows of one document": ([24, 24], Windows((24, 24), (3, 9))),
    "windows of one document and of two sizes": ([24, 17], Windows((24, 17), (3, 9))),
    "windows of several documents": ([10, 14, 5, 19], Windows((24, 24), (3, 9))),
}


def trained(config: SubllmConfig, documents: str) -> Recorded:
    """What the layers do in the forward pass of a training step."""
    model = decoder(Case("F subllm(0.6: F subllm(0.6: F) F) F", {"subllm": config})).train()
    model.set_step(3, seed=1)
    lengths, windows = DOCUMENTS[documents]
    stream = Stream.of(lengths, windows=windows)
    with recording(model) as recorded:
        loss = model.loss(torch.arange(sum(lengths)) % 61, torch.arange(sum(lengths)) % 61, stream)
    assert loss.requires_grad
    return recorded


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("ranking", ["window", "document"])
@pytest.mark.parametrize("sampling", ["uniform", "ranked"])
def test_published_training_waits_for_nothing(ranking: Any, sampling: Any, documents: str):
    """Each window keeps as many tokens as it is meant to, so the host knows all sizes beforehand.

    How those of a window fall into its documents it does not know. A CPU's attention asks, a GPU's takes the bounds.
    """
    recorded = trained(SubllmConfig(ranking=ranking, discard_sampling=sampling), documents)
    assert (recorded.sent, recorded.read) == ([], [])
    if ranking == "document" or "one" in documents:
        assert recorded.waited == 0
    else:
        assert recorded.waited <= 2


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_causal_training_waits_once_for_each_level(documents: str):
    """How many tokens exceed a threshold is data."""
    recorded = trained(SubllmConfig(selection="causal"), documents)
    assert (recorded.sent, recorded.read) == ([], [])
    assert recorded.waited == 2
