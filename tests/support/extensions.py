"""Parts that longwave does not have, as somebody would write them who may not touch it: none needs a line elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import contract
import pytest
import torch
from list_store import ListStore
from torch import Tensor, nn

from longwave import config as configs
from longwave.blocks import BLOCKS, PARTS, Kind
from longwave.config import ModelConfig, Strict
from longwave.layers.linear import Linear
from longwave.mixers import FullAttention
from longwave.ops.attention import ATTENTION, sdpa
from longwave.ops.forms import Call, Form
from longwave.part import Part, Site
from longwave.resamplers import BRACKETS, Bracket, Resampler, Selection
from longwave.resamplers.base import runs_above
from longwave.states import PerSequence, State, StateSpec, memory_of
from longwave.streams import Stream


@dataclass(frozen=True)
class AverageConfig(Strict):
    """A running mean of `size` channels."""

    size: int


class Average(Part):
    """A mixer: each token gets the mean of its past, projected; the state is a sum and a count."""

    tables: ClassVar[Mapping[str, type]] = {"average": AverageConfig}

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__(config, site)
        self.size: int = config.table("average").size
        self.in_proj = Linear(config.hidden_size, self.size, bias=False)
        self.o_proj = Linear(self.size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, stream: Stream, state: State | None) -> Tensor:
        memory = memory_of(state, self.site.name, stream)
        values = nn.functional.pad(self.in_proj(hidden), (0, 1), value=1.0)  # a channel of ones counts the tokens
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        before = memory.recall("sum")
        before = wide.new_zeros(stream.runs.count, self.size + 1) if before is None else before
        pieces = [sums + piece.cumsum(0) for sums, piece in zip(before, wide.split(stream.lengths), strict=True)]
        memory.replace(
            sum=torch.stack([[sums, *piece][-1] for sums, piece in zip(before, pieces, strict=True)])
            if pieces
            else before
        )
        sums = torch.cat(pieces) if pieces else wide
        return self.o_proj((sums[:, :-1] / sums[:, -1:]).to(hidden.dtype))

    def state_spec(self) -> StateSpec:
        return StateSpec(level=self.site.level, per_sequence={"sum": PerSequence((self.size + 1,))})

    def prefill_flops(self, tokens: int) -> int:
        return tokens * self.decode_flops(0)

    def decode_flops(self, context: int) -> int:
        return 4 * self.in_proj.in_features * self.size


class Shift(Part):
    """A feed-forward over a token and the one before it (RWKV's channel mix, arXiv 2305.13048)."""

    role = "mlp"

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__(config, site)
        width = config.hidden_size
        self.share = nn.Parameter(torch.full((width,), 0.3))
        self.up_proj = Linear(width, 2 * width, bias=False)
        self.down_proj = Linear(2 * width, width, bias=False)

    def forward(self, hidden: Tensor, stream: Stream, state: State | None) -> Tensor:
        memory, runs = memory_of(state, self.site.name, stream), stream.runs
        before = memory.recall("last")
        before = hidden.new_zeros(runs.count, hidden.shape[1]) if before is None else before
        with_last = torch.cat([nn.functional.pad(hidden, (0, 0, 1, 0)), before.to(hidden)])
        rows = torch.arange(runs.tokens, device=hidden.device)
        carried = runs.tokens + 1 + runs.of_token  # where the row stands that the run's sequence left
        earlier = with_last.index_select(0, torch.where(runs.places == 0, carried, rows))
        ends = torch.arange(runs.count, device=hidden.device) + runs.tokens + 1
        memory.replace(last=with_last.index_select(0, torch.where(runs.sizes > 0, runs.bounds[1:], ends)))
        return self.down_proj(torch.relu(self.up_proj(torch.lerp(hidden, earlier, self.share))).square())

    def state_spec(self) -> StateSpec:
        return StateSpec(level=self.site.level, per_sequence={"last": PerSequence((self.up_proj.in_features,))})

    def prefill_flops(self, tokens: int) -> int:
        return tokens * self.decode_flops(0)

    def decode_flops(self, context: int) -> int:
        return 4 * self.up_proj.in_features * self.up_proj.out_features


class ListedAttention(FullAttention):
    """Full attention whose keys and values lie in a store of its own."""

    def state_spec(self) -> StateSpec:
        return replace(super().state_spec(), store=ListStore)


class EverySecond(Resampler):
    """A level without arguments or weights, which keeps every second of its tokens: those at even places.

    Inside another one, those whose place can be halved twice.
    """

    @property
    def retention(self) -> Fraction:
        return Fraction(1, 2)

    def select(self, hidden: Tensor, stream: Stream) -> Selection:
        kept = (stream.order >> (self.site.level + 1)) % 2 == 0
        rows, runs = runs_above(kept, stream.runs)
        windows = None if stream.windows is None else stream.windows.by_run(runs)
        return Selection(rows, runs, hidden.new_ones(rows.shape[0]), kept.to(hidden.dtype), windows)

    def mix(self, hidden: Tensor, kept: Tensor, changed: Tensor, selection: Selection, stream: Stream) -> Tensor:
        return hidden.index_add(0, selection.rows, changed - kept)


class Blend(Bracket):
    """A bracket without arguments: x + g (body(x) - x), with a learned gate for each channel."""

    def __init__(self, config: ModelConfig, arguments: tuple[str, ...], site: Site) -> None:
        super().__init__(config, arguments, site)
        self.gate = nn.Parameter(torch.full((config.hidden_size,), 0.7))

    def forward(self, hidden: Tensor, stream: Stream, state: State | None) -> Tensor:
        return torch.lerp(hidden, self.body(hidden, stream, state), self.gate)


def on(kind: str) -> Form:
    """PyTorch's attention as a form for one kind of device."""

    def takes(call: Call) -> str | None:
        return None if call.device.type == kind else f"not on {call.device.type}"

    return Form(sdpa.attention, f"ours, on {kind} only", takes)


LETTERS = {"A": Kind(("average",)), "T": Kind(("full", "shift")), "P": Kind(("listed", "mlp"))}
LEVELS: dict[str, type[Bracket]] = {"every_second": EverySecond, "blend": Blend}
NEEDS = {"average": AverageConfig(24)}
TABLES = {name: configs._KINDS.pop(name) for name in NEEDS}  # known only while they are registered


@contextmanager
def registered() -> Iterator[None]:
    """The tables of longwave with all of these in them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, part in {"average": Average, "shift": Shift, "listed": ListedAttention}.items():
            patch.setitem(PARTS, name, part)
        for table, entries in ((BLOCKS, LETTERS), (BRACKETS, LEVELS), (configs._KINDS, TABLES)):
            for name, entry in entries.items():
                patch.setitem(table, name, entry)
        patch.setitem(contract.NEEDS, "A", NEEDS)
        patch.setattr(ATTENTION, "forms", ATTENTION.forms)
        ATTENTION.register("elsewhere", on("cuda"))
        ATTENTION.register("here", on("cpu"))
        yield
