"""The memory of an engine: how many tokens it has room for, and which sequences share what they have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from longwave.engine.drafts import Drafts
from longwave.engine.prefix import PrefixCache
from longwave.engine.scheduler import Piece, Sequence
from longwave.errors import require
from longwave.machine import free_memory
from longwave.model import Decoder
from longwave.states import PageOptions
from longwave.units import short_bytes

_SLACK = 1.25  # times the tokens that a level is meant to keep, since what it keeps depends on the text
_SHARE = 2  # one in so many of the bytes that are free is taken, where no number is given
_KEPT = 7  # times the tokens of all running sequences, as kept prefixes
_UNKNOWN = 8 << 30  # bytes taken to be free where the system does not tell


class Memory:
    """The state of the sequences that run, and the token boundaries that are kept for others to continue from.

    window: tokens of a sequence; fewer where there is no room for so many. bytes: for what is remembered token by
    token; None takes what slots and kept prefixes could fill, at most half of what is free. copies: bytes for copies of
    what recurs; None keeps no boundaries at all.
    """

    def __init__(
        self, model: Decoder, slots: int, window: int, bytes: int | None, page_size: int, copies: int | None
    ) -> None:
        sequences = slots if copies is None else (1 + _KEPT) * slots
        self.state = model.state(slots, pages=page_options(model, sequences, window, bytes, page_size))
        tables = [one for one in self.state.usage() if one.page_bytes]
        self.window = min([window, *(one.pages * one.size for one in tables)])
        specs = self.state.specs.values()
        self._copy_bytes = sum(one.bytes(self.state.dtype) for spec in specs for one in spec.per_sequence.values())
        self._forgets = any(spec.forgets for spec in specs)
        self.prefixes = None if copies is None else PrefixCache(self._forgets, copies, self.window)

    def enter(self, one: Sequence) -> None:
        """Lets a sequence that was given a slot begin where another has been, and says where it is to stop to be kept.

        The slot of a sequence that nobody has begun like is empty.
        """
        assert one.slot is not None
        if self.prefixes is None:
            return
        found = self.prefixes.find(one.tokens)
        if found.branch is not None:
            self.state.continue_from(one.slot, found.branch, found.length)
        one.seen = one.cached = found.length
        one.stops = self.prefixes.stops(one.tokens, found, self._copy_bytes)

    def settle(self, pieces: Iterable[tuple[Piece, int]]) -> None:
        """Ends a step, after which the state holds of every piece what was accepted of its drafts, and no more.

        A state that forgets cannot drop a token that it has taken in, and one path of a tree of drafts is not what
        stands first: there the piece is undone, and its tokens run again before the next ones.
        """
        pieces = list(pieces)
        undone = [piece for piece, accepted in pieces if self._is_undone(piece.drafts, accepted)]
        self.state.settle([piece.sequence.slot for piece in undone if piece.sequence.slot is not None])
        for piece, accepted in pieces:
            one = piece.sequence
            if piece in undone:
                continue
            one.seen += piece.length + accepted
            if accepted < len(piece.drafts.tokens):
                assert one.slot is not None
                self.state.truncate(one.slot, one.seen)

    def _is_undone(self, drafts: Drafts, accepted: int) -> bool:
        return accepted < len(drafts.tokens) and (self._forgets or drafts.branch)

    def passed(self, one: Sequence) -> None:
        """Keeps the boundary at which a sequence stands, if it was to stop here."""
        if one.stops and one.seen >= one.stops[0]:
            one.stops.pop(0)
            self._keep(one)

    def leave(self, one: Sequence, keep: bool) -> None:
        """Empties the slot of a sequence. keep: its last boundary, from which its text may be continued."""
        assert one.slot is not None
        if keep and one.seen:
            self._keep(one)
        self.state.release(one.slot)

    def make_room(self) -> bool:
        """Lets go of the boundary that was used least recently; whether there was one."""
        return self.prefixes is not None and self.prefixes.drop_oldest()

    def holds(self, tokens: list[int]) -> bool:
        """Whether a sequence of these tokens finds room; boundaries that it does not begin with are let go for it."""
        known = 0 if self.prefixes is None else self.prefixes.find(tokens).length
        while any(
            one.free * one.size < len(tokens) - known
            for one in self.state.usage()
            if one.level < 0 and one.window is None
        ):
            if not self.make_room():
                return False
        return True

    def _keep(self, one: Sequence) -> None:
        if self.prefixes is not None and one.slot is not None:
            self.prefixes.add(one.tokens[: one.seen], self.state.branch(one.slot))


def page_options(model: Decoder, sequences: int, window: int, bytes: int | None, size: int) -> PageOptions:
    """Pages for so many sequences of a window, or for as many tokens as there is memory for.

    UserError where there is no room for two pages.
    """
    most = sequences * (window + 2 * size)  # a page that is begun, and one that is copied, of every sequence
    shares, per_token = _shares(model), _bytes_per_token(model)
    rate = sum(bytes * min(1.0, _SLACK * shares[level]) for level, bytes in per_token.items())
    free = (free_memory(model.embed.weight.device) or _UNKNOWN) // _SHARE
    budget = free if bytes is None else bytes
    tokens = min(most, int(budget / rate)) if rate else most
    needed = f"{short_bytes(math.ceil(2 * size * rate))} or more"
    require(tokens >= 2 * size, f"memory = {short_bytes(budget)}: room for {tokens} tokens; give {needed}")
    levels = {level: min(tokens, max(math.ceil(tokens * share * _SLACK), window)) for level, share in shares.items()}
    return PageOptions(levels, size)


def _shares(model: Decoder) -> dict[int, float]:
    """The share of all tokens that each level is meant to keep; -1, the outermost, sees all."""
    shares = {-1: 1.0}
    for resampler in model.resamplers:  # outer ones first
        shares[resampler.index] = shares[resampler.site.level] * float(resampler.retention)
    return shares


def _bytes_per_token(model: Decoder) -> Mapping[int, float]:
    """Bytes of a token at each level, in all parts there."""
    found, dtype = dict[int, float](), model.embed.weight.dtype
    for spec in (part.state_spec() for part in model.parts):
        for entry in spec.per_token.values():
            bytes = entry.heads * entry.size * (entry.dtype or dtype).itemsize / entry.every
            found[spec.level] = found.get(spec.level, 0) + bytes
    return found
