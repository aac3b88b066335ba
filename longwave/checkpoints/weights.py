"""Reading and writing safetensors: whole folders, sharded or not; every mismatch is an error that names the tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longwave.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFiles:
    """The tensors of a folder by name, read one at a time from `model.safetensors` or from the shards of its index."""

    def __init__(self, folder: Path, file: str = WEIGHTS) -> None:
        sharded = file == WEIGHTS and (folder / INDEX).exists()
        self._files = self._index(folder) if sharded else self._single(folder / file)

    def names(self) -> set[str]:
        """Every tensor in the folder."""
        return set(self._files)

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, memory-mapped until they are used; each file is opened once."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        return {name: tensor for path, wanted in by_file.items() for name, tensor in self._read(path, wanted).items()}

    def _read(self, path: Path, names: list[str]) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read as safetensors: {error}") from None

    def _single(self, path: Path) -> dict[str, Path]:
        if not path.exists():
            raise UserError(f"{path.parent}: no {path.name}" + (f" and no {INDEX}" if path.name == WEIGHTS else ""))
        try:
            with safe_open(path, framework="pt") as file:
                return dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read as safetensors: {error}") from None

    def _index(self, folder: Path) -> dict[str, Path]:
        try:
            files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
            return {str(name): self._shard(folder, file) for name, file in files.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / INDEX}: not an index of safetensors shards: {error}") from None

    def _shard(self, folder: Path, file: str) -> Path:
        path = folder / Path(file).name
        if not path.exists():
            raise UserError(f"{path}: named in {INDEX} but missing")
        return path


def assign(model: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str], source: str) -> None:
    """Gives a model (its tensors may be on the meta device) its weights, in the dtype in which they come.

    names: module-tree name -> name in `tensors`. UserError for a missing, unexpected or misshapen tensor.
    """
    expected = model.state_dict(keep_vars=True)
    check({theirs: expected[name].shape for name, theirs in names.items()}, tensors, source)
    model.load_state_dict({name: tensors[theirs] for name, theirs in names.items()}, assign=True)


def check(expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], source: str) -> None:
    """UserError naming the first tensor that is missing, unexpected or misshapen."""
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unexpected:
        what, which = ("missing", missing) if missing else ("unexpected", unexpected)
        more = f" and {len(which) - 1} more" if len(which) > 1 else ""
        raise UserError(f"{source}: {what} tensor {which[0]}{more}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            shapes = f"{list(tensors[name].shape)}, the config says {list(shape)}"
            raise UserError(f"{source}: tensor {name} has shape {shapes}")


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes one safetensors file, readable by `transformers` too."""
    save_file(
        {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
    )
