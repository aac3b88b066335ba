"""Reuse of prefixes: what sequences of the past remember, for later ones that begin alike.

Token boundaries of sequences (branches of the state) hang in a tree of tokens (a radix tree, as in SGLang: Zheng et al.
2024), which compares tokens and not hashes of blocks, so that reuse begins and ends at any token. A branch shares the
pages of its sequence; of what recurs it holds a copy, in full precision.

A model that forgets nothing can continue from any place before a branch. Where something recurs, or a window forgets, a
sequence can continue from the boundaries alone that were kept: those of `stops`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longwave.states import Branch

_LEAST_APART = 256  # tokens between two kept boundaries of one prompt
_NODE = 1024  # bytes that a node of the tree and its branch take beside tokens and copies: Python's objects


@dataclass(eq=False)
class _Node:
    """A stretch of tokens that several sequences, or one, have in common. branch: the boundary at its end, if kept."""

    tokens: NDArray[np.int64]
    parent: _Node | None = None
    branch: Branch | None = None
    children: dict[int, _Node] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the node itself."""
        return _NODE + self.tokens.nbytes

    def split(self, length: int) -> _Node:
        """Cuts the stretch after so many tokens; the new node in front of the rest."""
        assert self.parent is not None
        front = _Node(self.tokens[:length].copy(), self.parent)
        self.parent.children[int(self.tokens[0])] = front
        self.tokens, self.parent = self.tokens[length:].copy(), front
        front.children[int(self.tokens[0])] = self
        return front


class Found(NamedTuple):
    """How a prompt begins. branch, length: where it can continue from, if anywhere. known: tokens met before."""

    branch: Branch | None
    length: int
    known: int


class PrefixCache:
    """The kept boundaries of a state, the least recently used of which go first.

    forgets: whether a boundary can be continued only where it was kept. limit: bytes of copies and of the tree. window:
    the longest sequence, by which boundaries are spaced so that one sequence takes a quarter of the limit at most.
    """

    def __init__(self, forgets: bool, limit: int, window: int) -> None:
        self._forgets, self._limit, self._window = forgets, limit, window
        self._root = _Node(np.zeros(0, np.int64))
        self._used: OrderedDict[_Node, None] = OrderedDict()  # nodes with a branch, the least recently used first
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._used)

    @property
    def nbytes(self) -> int:
        """Bytes of copies and of the tree."""
        return self._bytes

    def find(self, tokens: Sequence[int]) -> Found:
        """The longest beginning that a sequence can continue from: all but its last token at most, which has to run."""
        sought = np.asarray(tokens, np.int64)
        best, length, known, node = None, 0, 0, self._root
        for node, matched in self._path(sought):
            known += matched
            whole = matched == len(node.tokens)
            if whole and node.branch is not None and known < len(sought):
                best, length = node, known
        if not self._forgets and (below := self._below(node)) is not None:
            best, length = below, min(known, len(sought) - 1)
        if best is None or not length:
            return Found(None, 0, known)
        self._used.move_to_end(best)
        return Found(best.branch, length, known)

    def add(self, tokens: Sequence[int], branch: Branch) -> None:
        """Keeps a boundary, at the end of these tokens; the same one is kept once."""
        kept = np.asarray(tokens, np.int64)
        assert len(kept) == branch.seen
        node, at = self._root, 0
        for node, matched in self._path(kept):
            at += matched
            if matched < len(node.tokens):
                node = node.split(matched)
                self._bytes += _NODE
        if at < len(kept):
            node.children[int(kept[at])] = node = _Node(kept[at:].copy(), node)  # a view would hold the whole prompt
            self._bytes += node.nbytes
        if node is self._root or node.branch is not None or (node.children and not self._forgets):
            branch.drop()  # it is there, or a later one serves for it
        else:
            node.branch = branch
            self._bytes += branch.nbytes
            self._used[node] = None
            if not self._forgets:
                self._drop_above(node)
        while self._bytes > self._limit and self.drop_oldest():
            pass

    def stops(self, tokens: Sequence[int], found: Found, copy_bytes: int) -> list[int]:
        """The places at which a prompt's boundaries are to be kept, ascending.

        Where nothing is forgotten, its end; otherwise the place before its last token, which has to run again for an
        equal prompt; where it leaves what is known; and places so far apart that their copies fit.
        """
        end = len(tokens)
        if not self._forgets:
            return [end]
        apart = max(_LEAST_APART, -(-4 * copy_bytes * self._window // max(self._limit, 1)))
        places = {end - 1, found.known, *range(apart, end, apart)}
        return sorted(place for place in places if found.length < place < end)

    def drop_oldest(self) -> bool:
        """Lets go of the boundary that was used least recently; whether there was one."""
        if not self._used:
            return False
        self._drop(next(iter(self._used)))
        return True

    def clear(self) -> None:
        """Lets go of everything."""
        while self.drop_oldest():
            pass

    def _path(self, tokens: NDArray[np.int64]) -> Iterator[tuple[_Node, int]]:
        """The nodes along these tokens, and how many tokens of each agree; only the last may agree in part."""
        node, at = self._root, 0
        while at < len(tokens) and (child := node.children.get(int(tokens[at]))) is not None:
            piece = tokens[at : at + len(child.tokens)]
            unlike = np.flatnonzero(piece != child.tokens[: len(piece)])
            matched = int(unlike[0]) if len(unlike) else len(piece)
            following = matched == len(child.tokens)
            yield child, matched
            if not following:
                return
            node, at = child, at + matched

    def _below(self, node: _Node) -> _Node | None:
        """A node at or below this one that has a branch; every leaf has one."""
        while node.branch is None:
            if not node.children:
                return None
            node = next(iter(node.children.values()))
        return node

    def _drop_above(self, node: _Node) -> None:
        """Lets go of the boundaries that a later one of the same sequence makes needless."""
        above = node.parent
        while above is not None:
            higher = above.parent
            if above.branch is not None:
                self._drop(above)
            above = higher

    def _drop(self, node: _Node) -> None:
        assert node.branch is not None
        del self._used[node]
        self._bytes -= node.branch.nbytes
        node.branch.drop()
        node.branch = None
        while node.branch is None and not node.children and node.parent is not None:
            del node.parent.children[int(node.tokens[0])]
            self._bytes -= node.nbytes
            node = node.parent
