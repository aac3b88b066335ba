"""Loading and saving of the `transformers` class, through `longwave.checkpoints`, so that a mismatch is an error.

Options of `from_pretrained` and `save_pretrained` that longwave cannot follow are refused, unless they ask for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from longwave import files
from longwave.checkpoints import native
from longwave.checkpoints.located import INDEX
from longwave.checkpoints.names import flat_names
from longwave.checkpoints.weights import check, write
from longwave.errors import UserError
from longwave.hf.config import LongwaveConfig
from longwave.model import Decoder

_OF_AUTO_CLASSES = {  # arguments that transformers' Auto classes pass on and that change nothing here
    *("_from_auto", "adapter_kwargs", "low_cpu_mem_usage", "proxies", "trust_remote_code", "use_safetensors"),
}
_LOAD_DEFAULTS = {"attn_implementation": "sdpa"}
SAVE_DEFAULTS = {"safe_serialization": True, "save_peft_format": True, "save_original_format": True}
_TREE = "model.decoder."  # the prefix of the decoder's tensors in the class


def config_of(
    decoder: Decoder, source: str | Path, given: LongwaveConfig | None, options: dict[str, Any]
) -> LongwaveConfig:
    """The config of a loaded decoder. given: the caller's config, if any. options: values to change in the config.

    Raises UserError for options that no config value has, and for a given config of another model.
    """
    options = {name: value for name, value in options.items() if name not in _OF_AUTO_CLASSES}
    if given is None:
        values = native.config_json(decoder) | {"name_or_path": str(source)}
        given, options = cast(Any, LongwaveConfig).from_dict(values, return_unused_kwargs=True, **options)
    assert given is not None
    check_options("from_pretrained", options, _LOAD_DEFAULTS)
    if given.decoder_config() != decoder.config:
        raise UserError(f"{source}: the given config describes another model than the folder's config.json")
    given.dtype = decoder.embed.weight.dtype
    return given


def save_decoder(
    decoder: Decoder, target: str | Path, weights: Mapping[str, Tensor] | None, max_shard_size: int | str | None
) -> None:
    """Saves a longwave folder. Other files of a folder that exists stay.

    weights: the weights to save, under their names in the class; by default the decoder's.
    max_shard_size: of one file, in bytes or as transformers writes it ("5GB"); one file for all by default.
    """
    names, own = flat_names(decoder), decoder.state_dict()
    if weights is not None:
        check({f"{_TREE}{name}": own[name].shape for name in own}, weights, "save_pretrained: state_dict")
        own = {name: weights[f"{_TREE}{name}"] for name in own}
    tensors = {names[name]: tensor for name, tensor in own.items()}
    with files.add_to(target) as staging:
        native.write_description(decoder, staging)
        _write_shards(tensors, staging, max_shard_size or sum(tensor.nbytes for tensor in tensors.values()))
        written = {path.name for path in staging.iterdir()}
    for stale in Path(target).glob("model*.safetensors*"):
        if stale.name not in written:  # weights of an earlier save with another number of files
            stale.unlink()


def _write_shards(tensors: dict[str, Tensor], staging: Path, size: int | str) -> None:
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=size)
    for file, names in split.filename_to_tensors.items():
        write({name: tensors[name] for name in names}, staging / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def accept_saved_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """A hook that renames the tensors of a saved folder to their names in the class before loading.

    Trainer needs it, since it reads the files itself on resuming.
    """
    for name, saved in flat_names(cast(Any, module).decoder).items():
        if f"{prefix}{saved}" in state_dict:
            state_dict[f"{prefix}{_TREE}{name}"] = state_dict.pop(f"{prefix}{saved}")


def check_options(caller: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises UserError for the first option that asks for anything.

    None asks for nothing, nor does the default of an option in `defaults`, nor a false value of any other option.
    """
    for name, value in options.items():
        if value is not None and (value != defaults[name] if name in defaults else value):
            raise UserError(f"{caller}: {name} = {value!r} is not supported by longwave models; leave it out")


def dtype_of(name: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of a name such as "bfloat16"; for None and "auto" it is None: weights stay as they were saved."""
    found = None if name in (None, "auto") else getattr(torch, name, name) if isinstance(name, str) else name
    if found is not None and not isinstance(found, torch.dtype):
        raise UserError(f"dtype = {name!r}: use 'auto' or a floating type such as 'bfloat16'")
    return found


def device_of(device_map: torch.device | str | int | dict[str, Any] | None) -> torch.device | str:
    """The device of a `device_map`, which may name one only; UserError for any other."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return "cpu"
    try:
        return torch.device(cast(Any, device_map))
    except (RuntimeError, TypeError):
        raise UserError(f"device_map = {device_map!r}: give one device, such as 'cpu' or 'cuda'") from None
