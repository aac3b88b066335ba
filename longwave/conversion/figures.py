"""A file of measured figures, which is whole at any moment, and belongs to certain models and settings alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from longwave import files
from longwave.checkpoints.names import flat_names
from longwave.config import Strict, build
from longwave.errors import require, shown
from longwave.files.jsonfile import read_object, to_json
from longwave.model import Decoder

_ADVICE = "give another folder, or remove the file"


@dataclass(frozen=True)
class Figure(Strict):
    """A measured figure. linear: the layers that were replaced in the model. seconds: that measuring it took."""

    measure: str
    linear: tuple[int, ...]
    value: float
    seconds: float

    def __post_init__(self) -> None:
        require(math.isfinite(self.value), f"{self.measure} = {self.value}: a finite number")


@dataclass(frozen=True)
class _Content(Strict):
    """The file. models: their fingerprints. settings: of every measure. figures: in the order of measuring."""

    models: Mapping[str, str] = field(default_factory=dict[str, str])
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    figures: tuple[Figure, ...] = ()


class Figures:
    """The figures in a file.

    models: fingerprints. settings: of the measures that may be added now; figures of further ones stay. UserError for a
    file of other models or settings, and for one that is damaged.
    """

    def __init__(self, path: Path, models: Mapping[str, str], settings: Mapping[str, Mapping[str, Any]]) -> None:
        self._path, self._models = path, dict(models)
        read = build(_Content, read_object(path), str(path)) if path.exists() else _Content(models)
        now = json.loads(to_json(settings))  # as they come back from a file
        for name, digest in models.items():
            require(read.models.get(name) == digest, f"{path}: measured with another {name} model; {_ADVICE}")
        for name in now.keys() & read.settings.keys():
            _require_same(path, name, read.settings[name], now[name])
        self._settings = {**read.settings, **now}
        self._known = {(one.measure, frozenset(one.linear)): one for one in read.figures}

    @property
    def all(self) -> tuple[Figure, ...]:
        """Every figure, in the order of measuring."""
        return tuple(self._known.values())

    def value(self, measure: str, linear: Sequence[int]) -> float | None:
        """The figure of a measure for the model in which these layers are replaced; None for one that is not known."""
        found = self._known.get((measure, frozenset(linear)))
        return None if found is None else found.value

    def add(self, figure: Figure) -> None:
        """Writes the file with one figure more."""
        self._known[figure.measure, frozenset(figure.linear)] = figure
        content = _Content(self._models, self._settings, self.all)
        files.write_file(self._path, (to_json(asdict(content), indent=1) + "\n").encode())


def fingerprint(model: Decoder, beginnings: tuple[str, ...] = ("",)) -> str:
    """SHA-256 of a model's config, and of the weights whose names in a folder begin so."""
    digest = hashlib.sha256(to_json(model.config.to_dict()).encode())
    state = model.state_dict()
    for inside, name in flat_names(model).items():
        if name.startswith(beginnings):
            digest.update(f"{name} {state[inside].dtype} {list(state[inside].shape)}".encode())
            digest.update(state[inside].cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_same(path: Path, measure: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UserError that names a setting which has changed."""
    for name in {**before, **now}:
        was, given = before.get(name), now.get(name)
        require(was == given, f"{path}: {measure}.{name} = {shown(was)}, and {shown(given)} is asked for; {_ADVICE}")
