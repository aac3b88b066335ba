"""A longwave `State` behind the interface of a `transformers` cache: one slot of the state per row of the batch.

Legend: `B` sequences, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from longwave.errors import UserError
from longwave.model import Decoder

NAMES = ("cache", "past_key_values")  # names of the cache argument in transformers: since 5.24, and before
NAME = next(name for name in NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)


class LongwaveCache(Cache):
    """The state of a model for a batch of sequences.

    columns: number of columns of the batch seen so far, pads included: the width of attention masks. last: the hidden
    states (B, D) of the newest token of each row, which the outputs at pads after it repeat.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        super().__init__(layers=[])
        self.state = decoder.state(rows)
        self.columns = 0
        self.last: Float[Tensor, "B D"] = decoder.embed.weight.new_zeros(rows, decoder.config.hidden_size)
        self._recording = False

    def advance(self, columns: int, last: Float[Tensor, "B D"]) -> None:
        """Notes that the model has run so many more columns; `last` holds the hidden states at the newest one."""
        self.columns += columns
        self.last = last.clone()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return self.state.slots

    @property
    def is_linear(self) -> list[bool]:
        """[False]: `generate` may then cut the tokens that the cache holds from the front of its input."""
        return [False]

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take tokens back: not in layers with a recurrent state, which cannot forget a token."""
        return not any(spec.per_sequence for spec in self.state.specs.values())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i takes the place of the former row `beam_idx[i]`, as beam search asks."""
        self.state.reorder(beam_idx.tolist())
        self.last = self.last.index_select(0, beam_idx.to(self.last.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(torch.arange(self.batch_size)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """From now on `crop` can take back all tokens since the last crop, in layers with a sliding window as well.

        Raises UserError for a model with recurrent layers.
        """
        if not self.is_croppable:
            raise UserError(
                "drafts cannot be taken back by layers whose state is recurrent; "
                "leave out assistant_model and prompt_lookup_num_tokens"
            )
        self._recording = True
        self._hold()

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Takes back the newest `-tokens_to_remove` columns at every level; they must hold no pads.

        Raises ValueError, with nothing changed, where a sliding window has dropped a key that would be seen again, or a
        recurrent state has taken in the tokens.
        """
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise UserError(f"tokens_to_remove = {tokens_to_remove}: minus the number of tokens to take back")
        for slot, seen in enumerate(self.state.seen):
            self.state.truncate(slot, seen + tokens_to_remove)
        if tokens_to_remove:
            self.advance(tokens_to_remove, torch.full_like(self.last, torch.nan))  # unknown until the next token comes
        self._hold()

    def reset(self) -> None:
        for slot in range(self.batch_size):
            self.state.release(slot)
        self.columns = 0
        self.last = torch.zeros_like(self.last)
        self._hold()

    def _hold(self) -> None:
        if self._recording:
            for slot in range(self.batch_size):
                self.state.hold(slot)


def given(named: Mapping[str, Any]) -> LongwaveCache | None:
    """The cache among the arguments, under either of its names; UserError for two caches, or one of another class."""
    found = [named[name] for name in NAMES if named.get(name) is not None]
    if len(found) > 1:
        raise UserError(f"{NAMES[0]} and {NAMES[1]} are names of one argument; give one")
    if found and not isinstance(found[0], LongwaveCache):
        raise UserError(f"{NAME} is a {type(found[0]).__name__}; longwave models use LongwaveCache")
    return found[0] if found else None
