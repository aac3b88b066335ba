"""Which file of a folder holds its weights: the one that `transformers` takes, whatever else earlier saves left.

The order is that of `transformers` 5.24 (`modeling_utils._get_resolved_checkpoint_files`): shards of a distributed
checkpoint, which longwave refuses; the file that `config.json` names by `transformers_weights`; one whole file; an
index of shards. An index beside a whole file, and shards that no index names, say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longwave.errors import UserError, shown
from longwave.files import OpenFolder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
NAMED = "transformers_weights"  # the key of config.json
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def weights_file(folder: OpenFolder, values: dict[str, Any] | None = None) -> str:
    """The name of the whole file or of the index with a folder's weights.

    values: of its parsed `config.json`. UserError naming a file whose weights `transformers` would take, or might be
    meant, and which is not read.
    """
    names = sorted(folder.names)
    distributed = next(filter(_DISTRIBUTED.fullmatch, names), None)
    if distributed is not None:
        why = "a shard of a distributed checkpoint, which is not read; save the model whole (transformers)"
        raise UserError(f"{folder / distributed}: {why}")
    named = (values or {}).get(NAMED)
    if named is not None:
        return _named(folder, named)
    found = next((name for name in (WEIGHTS, INDEX) if name in names), None)
    if found is None:
        raise UserError(f"{folder.path}: no {WEIGHTS} and no {INDEX}{_hint(names)}")
    return found


def refuse_adapter(folder: OpenFolder) -> None:
    """UserError for the folder of a PEFT adapter, with or without its base model beside it."""
    if ADAPTER in folder:
        why = "an adapter, which is not read; merge it into its model (PEFT's merge_and_unload) and save that"
        raise UserError(f"{folder / ADAPTER}: {why}")


def _named(folder: OpenFolder, name: object) -> str:
    """The file that config.json names, which must be one of the folder's own."""
    right = (
        isinstance(name, str) and name == Path(name).name and name.endswith((".safetensors", ".safetensors.index.json"))
    )
    if not right:
        raise UserError(f"{folder / 'config.json'}: {NAMED} = {shown(name)}: a safetensors file of this folder")
    return str(name)


def _hint(names: Iterable[str]) -> str:
    """What lies there instead, in words for an error."""
    for name in names:
        if name.endswith(PICKLES):
            return f"; {name} holds pickled weights, which are not read: save them as safetensors (transformers does)"
        if name.endswith(".safetensors"):
            return f"; if {name} holds the weights, name it {WEIGHTS}"
    return ""
