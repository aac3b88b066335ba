"""Parts of a model that a run leaves as they are: parameters that are frozen by name (`training.freeze`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import translate

from torch import Tensor, nn

from longwave.errors import require, shown
from longwave.units import short

_PATTERNS, _LETTERS = 100, 200  # that a recipe may have, so that looking for names takes no time


def frozen_names(patterns: Sequence[str], names: Collection[str]) -> set[str]:
    """The names of parameters that patterns freeze.

    A pattern, in which `*` stands for any letters, matches a name, or the beginning of one up to a dot: `embed` and
    `blocks.*.mixer` do. After `!` it exempts what earlier patterns froze. Raises UserError for a pattern that matches
    none of the names, if nothing is left to be trained, and for more than anybody would write.
    """
    require(len(patterns) <= _PATTERNS, f"training.freeze: {len(patterns):,} patterns; at most {_PATTERNS}")
    frozen = set[str]()
    for pattern in patterns:
        fits = len(pattern) <= _LETTERS
        require(fits, f"training.freeze = {shown(pattern)}: {len(pattern):,} letters; at most {_LETTERS}")
        found = _matches(pattern.removeprefix("!"), names)
        require(bool(found), f"training.freeze = {shown(pattern)}: matches no parameter{_nearest(pattern, names)}")
        frozen = frozen - found if pattern.startswith("!") else frozen | found
    exempt = "leave a pattern out, or exempt some with one like '!blocks.*.mixer'"
    require(len(frozen) < len(names) or not patterns, f"training.freeze: freezes all {len(names)} tensors; {exempt}")
    return frozen


def freeze(weights: Mapping[str, Tensor], patterns: Sequence[str]) -> None:
    """Freezes the parameters among these tensors whose names the patterns match; raises what `frozen_names` does."""
    for name in frozen_names(patterns, parameters_of(weights)):
        weights[name].requires_grad_(False)


def freeze_notes(weights: Mapping[str, Tensor], patterns: Sequence[str]) -> list[str]:
    """A line for people that says how much of a model stays as it is, if anything does."""
    names = parameters_of(weights)
    frozen = frozen_names(patterns, names)
    numbers = short(sum(weights[name].numel() for name in frozen))
    told = f"{len(frozen)} of {len(names)} tensors, {numbers} parameters, stay as they are"
    return [f"training.freeze: {told}"] if frozen else []


def parameters_of(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of those tensors that are parameters, and not buffers."""
    return [name for name, tensor in weights.items() if isinstance(tensor, nn.Parameter)]


def _matches(pattern: str, names: Iterable[str]) -> set[str]:
    matches = re.compile(f"{translate(pattern)}|{translate(f'{pattern}.*')}").match
    return {name for name in names if matches(name)}


def _nearest(pattern: str, names: Collection[str]) -> str:
    nearest = get_close_matches(pattern, names, 1, cutoff=0.0)
    return "".join(f"; the nearest is {name}" for name in nearest)
