"""Loading and saving of the `transformers` classes, through `longwave.checkpoints`, so that a mismatch is an error.

Options of `from_pretrained` and `save_pretrained` that longwave cannot follow are refused, unless they ask for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from longwave import files
from longwave.checkpoints import native, origin_of, read
from longwave.checkpoints.card import write_card
from longwave.checkpoints.generation import FILE as GENERATION
from longwave.checkpoints.generation import IDS
from longwave.checkpoints.located import INDEX
from longwave.checkpoints.names import flat_names
from longwave.checkpoints.weights import WeightFiles, check, write
from longwave.config import ModelConfig
from longwave.errors import UserError, shown
from longwave.files import OpenFolder
from longwave.hf.config import DERIVED, LongwaveConfig
from longwave.layers.head import Head
from longwave.model import Decoder

_CHANGING_NOTHING = {  # options that say how files are found or read elsewhere
    *("_from_auto", "_from_pipeline", "adapter_kwargs", "ignore_mismatched_sizes", "low_cpu_mem_usage", "proxies"),
    *("trust_remote_code", "use_safetensors", "weights_only"),
}
_LOAD_DEFAULTS = {"attn_implementation": "sdpa", "max_memory": None}
SAVE_DEFAULTS = {"safe_serialization": True, "save_peft_format": True, "save_original_format": True}
_CLASSIFIER = {"score.weight": "classifier.weight"}  # names in the class, and in a folder
_ON_ACCELERATOR = ("auto", "balanced", "balanced_low_0", "sequential")


def config_of(
    decoder: Decoder, source: str | Path, given: LongwaveConfig | None, options: dict[str, Any]
) -> LongwaveConfig:
    """The config of a loaded decoder. given: the caller's config, if any. options: values to change in the config.

    Raises UserError for options that no config value has, and for a given config of another model.
    """
    options = {name: value for name, value in options.items() if name not in _CHANGING_NOTHING}
    if given is None:
        values = _said(decoder) | {"name_or_path": str(source)}
        given, options = cast(Any, LongwaveConfig).from_dict(values, return_unused_kwargs=True, **options)
    assert given is not None
    for name in IDS:  # which older folders have in generation_config.json alone
        if getattr(given, name) is None and decoder.origin.generation.get(name) is not None:
            setattr(given, name, decoder.origin.generation[name])
    check_options("from_pretrained", options, _LOAD_DEFAULTS)
    given.dtype = decoder.embed.weight.dtype
    return given


def _said(decoder: Decoder) -> dict[str, Any]:
    """What the folder of a decoder says of it, where longwave wrote it, and what is known of any decoder."""
    said = decoder.origin.config if decoder.origin.format == native.MODEL_TYPE else {}
    return {name: value for name, value in said.items() if name not in DERIVED} | native.config_json(decoder)


def conform(decoder: Decoder, wanted: ModelConfig, source: object) -> None:
    """Gives a loaded decoder the config that its caller wants, where its weights allow it.

    They allow another context window, and a head of its own in place of a tied one. UserError for anything else.
    """
    loaded = decoder.config
    if loaded.tie_embeddings and not wanted.tie_embeddings:
        set_head(decoder, decoder.head_weight.clone())
    decoder.config = replace(decoder.config, context_window=wanted.context_window)
    if decoder.config != wanted:
        ours, theirs = loaded.to_dict(), wanted.to_dict()
        name = next(name for name in ours | theirs if ours.get(name) != theirs.get(name) and name != "context_window")
        asked = f"{name} = {shown(theirs.get(name))}, where the folder has {shown(ours.get(name))}"
        raise UserError(f"{source}: the given config describes another model: {asked}")


def set_head(decoder: Decoder, weight: Tensor) -> None:
    """Gives a decoder a head (V, D) of its own."""
    with torch.device("meta"):
        head = Head(*reversed(weight.shape))
    head.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    decoder.head = head
    decoder.config = replace(decoder.config, tie_embeddings=False)


def saved_names(model: PreTrainedModel) -> dict[str, str]:
    """The name in a folder of every tensor in a class."""
    decoder = cast(Any, model.base_model).decoder
    prefix = "decoder." if model.base_model is model else "model.decoder."
    own = {f"{prefix}{name}": flat for name, flat in flat_names(decoder).items()}
    return own | {name: flat for name, flat in _CLASSIFIER.items() if hasattr(model, name.split(".")[0])}


def read_with_classifier(
    path: Path, dtype: torch.dtype | None, device: torch.device | str
) -> tuple[Decoder, dict[str, Tensor]]:
    """The decoder of a folder, and the tensors of its classifier under their names in the class: none if it has none.

    Whoever asks for the decoder alone gets an error that names the classifier, which would be lost.
    """
    decoder, stored = files.read_whole(path, lambda folder: _read(folder, dtype))
    weight = decoder.to(device).embed.weight
    return decoder, {name: stored[flat].to(weight) for name, flat in _CLASSIFIER.items() if flat in stored}


def _read(folder: OpenFolder, dtype: torch.dtype | None) -> tuple[Decoder, dict[str, Tensor]]:
    """The decoder in an opened folder, and the tensors of its classifier under their names there."""
    values = folder.object("config.json") if "config.json" in folder else {}
    if values.get("model_type") != native.MODEL_TYPE:
        return read(folder, dtype), {}
    files.refuse_other(folder, unread=".safetensors")
    decoder = native.read_model(folder, values, dtype, ignoring=tuple(_CLASSIFIER.values()))
    decoder.origin = origin_of(folder, values)
    stored = WeightFiles(folder)
    return decoder, stored.load(flat for flat in _CLASSIFIER.values() if flat in stored.found)


def save(
    model: PreTrainedModel, target: str | Path, weights: Mapping[str, Tensor] | None, max_shard_size: int | str | None
) -> None:
    """Saves a longwave folder. Other files of a folder that exists stay.

    weights: the weights to save, under their names in the class; by default the model's.
    max_shard_size: of one file, in bytes or as transformers writes it ("5GB"); one file for all by default.
    """
    names, own = saved_names(model), model.state_dict()
    if weights is not None:
        check({name: own[name].shape for name in own}, weights, "save_pretrained: state_dict")
    tensors = {names[name]: (weights or own)[name] for name in own}
    with files.add_to(target, replaced="model*.safetensors*") as staging:  # of a save in another number of files
        _describe(model, staging)
        write_card(cast(Any, model.base_model).decoder, staging, Path(target))
        _write_shards(tensors, staging, max_shard_size or sum(tensor.nbytes for tensor in tensors.values()))


def _describe(model: PreTrainedModel, staging: Path) -> None:
    """Writes `config.json`, the module that it names, and the generation settings as they are."""
    decoder = cast(Any, model.base_model).decoder
    native.write_description(decoder, staging)
    values = model.config.to_diff_dict() | native.config_json(decoder) | {"architectures": [type(model).__name__]}
    (staging / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    settings: GenerationConfig | None = getattr(model, "generation_config", None)
    if settings is not None:
        settings.to_json_file(staging / GENERATION)  # save_pretrained would refuse what published folders hold


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
    for name, saved in saved_names(cast(PreTrainedModel, module)).items():
        if name != saved and f"{prefix}{saved}" in state_dict:
            state_dict[f"{prefix}{name}"] = state_dict.pop(f"{prefix}{saved}")


def under_class_names(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model under their names in its class, given under those, a folder's, or another class's.

    UserError unless they are the model's, but for a classifier, which may be missing.
    """
    names = {saved: name for name, saved in saved_names(model).items()}
    for own, saved in flat_names(cast(Any, model.base_model).decoder).items():
        names |= dict.fromkeys((f"decoder.{own}", f"model.decoder.{own}"), names[saved])
    found = {names.get(name, name): tensor for name, tensor in tensors.items()}
    expected = {
        name: tensor.shape for name, tensor in model.state_dict().items() if name in found or name not in _CLASSIFIER
    }
    check(expected, found, "from_pretrained: state_dict")
    return found


def check_options(caller: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises UserError for the first option that asks for anything.

    None asks for nothing, nor does the default of an option in `defaults`, nor a false value of any other option.
    """
    for name, value in options.items():
        if value is not None and (value != defaults[name] if name in defaults else value):
            raise UserError(f"{caller}: {name} = {shown(value)} is not supported by longwave models; leave it out")


def dtype_of(name: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of a name such as "bfloat16"; for None and "auto" it is None: weights stay as they were saved."""
    found = None if name in (None, "auto") else getattr(torch, name, name) if isinstance(name, str) else name
    if found is not None and not isinstance(found, torch.dtype):
        raise UserError(f"dtype = {name!r}: use 'auto' or a floating type such as 'bfloat16'")
    return found


def device_of(device_map: torch.device | str | int | dict[str, Any] | None) -> torch.device | str:
    """The device of a `device_map`: one by its name, or "auto" for the only accelerator, or the CPU where is none.

    UserError for any other, since a longwave model lies on one device.
    """
    if isinstance(device_map, dict) and len(set(device_map.values())) == 1:
        device_map = next(iter(device_map.values()))
    if device_map is None:
        return "cpu"
    if device_map in _ON_ACCELERATOR:
        count = torch.accelerator.device_count()
        if count > 1:
            raise UserError(f"device_map = {device_map!r}: there are {count} accelerators; name one, such as 'cuda:0'")
        return torch.accelerator.current_accelerator() or "cpu" if count else "cpu"
    try:
        return torch.device(cast(Any, device_map))
    except (RuntimeError, TypeError):
        raise UserError(f"device_map = {shown(device_map)}: give one device, such as 'cpu' or 'cuda'") from None
