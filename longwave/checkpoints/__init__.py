"""Models in folders: `load` any format of the table `FORMATS`, `save` in one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longwave import files
from longwave.checkpoints import gguf, huggingface, native, subllm
from longwave.checkpoints.card import source_in, training_facts, write_card
from longwave.checkpoints.families import FAMILIES, Family
from longwave.checkpoints.foreign import respelled
from longwave.checkpoints.generation import IDS, completed, read_generation, write_generation
from longwave.checkpoints.hub import CONFIGS, fetched_from, find, is_hub_id
from longwave.checkpoints.located import refuse_adapter
from longwave.config import ModelConfig
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError, require, shown
from longwave.files import OpenFolder
from longwave.files.jsonfile import read_object
from longwave.model import Decoder
from longwave.origin import Origin

__all__ = [
    "FORMATS",
    "Format",
    "find",
    "format_of",
    "is_hub_id",
    "load",
    "load_config",
    "origin_of",
    "read",
    "require_format",
    "save",
]

CONFIG = "config.json"
_Values = dict[str, Any]  # of a parsed config.json


@dataclass(frozen=True)
class Format:
    """A kind of model folder, and how it is read and written.

    config: parsed `config.json` and where it comes from -> the model's config.
    read: the opened folder, parsed `config.json` and the dtype that is asked for -> model.
    write: model, folder and the ids of special tokens. describe: model and these ids -> the values of `config.json`;
    UserError for a model that the format cannot hold.
    """

    config: Callable[[_Values, str], ModelConfig]
    read: Callable[[OpenFolder, _Values, torch.dtype | None], Decoder]
    write: Callable[[Decoder, Path, _Values], None]
    describe: Callable[[Decoder, _Values], _Values]


def _of_family(family: Family) -> Format:
    return Format(
        partial(huggingface.config_from, family),
        partial(huggingface.read_model, family),
        partial(huggingface.write_model, family),
        partial(huggingface.config_json, family),
    )


FORMATS: dict[str, Format] = {
    native.MODEL_TYPE: Format(native.config_from, native.read_model, native.write_model, native.config_json),
    **{family.model_type: _of_family(family) for family in FAMILIES},
    subllm.MODEL_TYPE: Format(subllm.config_from, subllm.read_model, subllm.write_model, subllm.config_json),
}


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tokenizer: bool = False,
) -> Decoder:
    """Loads a model folder: longwave's own, a published SUBLLM, or a Hugging Face folder of a family in `FORMATS`.

    path: a folder, or a hub id (`org/name`), which needs a network the first time. dtype: of the weights; as they were
    saved by default. tokenizer: whether `model.tokenizer` is to be the folder's, if it has one. UserError for a folder
    that does not fit: a missing, unexpected or misshapen tensor, an unknown or quantised family, a file that differs
    from its checksum.
    """
    return files.read_whole(find(path), lambda folder: read(folder, dtype, tokenizer)).to(device)


def read(folder: OpenFolder, dtype: torch.dtype | None, tokenizer: bool = False) -> Decoder:
    """The model in an opened folder, on the CPU; arguments and errors are those of `load`."""
    refuse_adapter(folder)
    files.refuse_other(folder, unread=".safetensors")  # weights are compared while they are read
    values = _config(folder)
    model = FORMATS[format_of(values, folder.path)].read(folder, values, dtype)
    model.origin = origin_of(folder, values)
    model.tokenizer = Tokenizer.find(folder) if tokenizer else None
    return model


def origin_of(folder: OpenFolder, values: _Values) -> Origin:
    """What a model keeps of the folder it came from; values: of its parsed `config.json`."""
    generation, where = read_generation(folder, values), str(folder / CONFIG)
    source = fetched_from(folder.path) or source_in(values, where)
    return Origin(format_of(values, folder.path), values, generation, source, training_facts(values, where))


def save(
    model: Decoder, path: str | Path, *, tokenizer: Tokenizer | None = None, format: str = native.MODEL_TYPE
) -> None:
    """Saves a model, with a card that says what it is, so that the folder appears whole or not at all.

    format: "longwave"; "subllm" for the published format of a SUBLLM; or a family such as "llama" or "qwen3", for an
    ordinary `transformers` folder. A model that was loaded from that format keeps the spelling and the unknown keys of
    its `config.json`. "gguf" and "gguf-q8_0" write one file for llama.cpp, whose name ends in .gguf. UserError for a
    model that the format cannot hold.
    """
    if format not in (*FORMATS, *gguf.KINDS):
        raise UserError(f"format = {format!r}; use one of {', '.join((*FORMATS, *gguf.KINDS))}")
    require(not model.is_packed, "dtype = int8: rounded weights are for inference; save the model as it was loaded")
    if format in gguf.KINDS:
        return gguf.save(model, path, tokenizer, format)
    generation = completed(model.origin.generation, tokenizer)
    own = {name: model.origin.config[name] for name in IDS if name in model.origin.config}
    with files.folder(path) as staging:
        FORMATS[format].write(model, staging, own | generation)
        if format == model.origin.format != native.MODEL_TYPE:
            _respell(staging / CONFIG, model.origin.config, FORMATS[format])
        write_generation(generation, staging)
        write_card(model, staging, Path(path), format)
        if tokenizer is not None:
            tokenizer.save(staging)


def require_format(model: Decoder, format: str) -> None:
    """Raises UserError for a format that does not exist, or cannot hold the model, which may lie on `meta`."""
    if format not in FORMATS:
        raise UserError(f"format = {format!r}; use one of {', '.join(FORMATS)}")
    FORMATS[format].describe(model, {})


def load_config(path: str | Path) -> ModelConfig:
    """The config of the model in a folder or under a hub id, of which only `config.json` need exist."""
    return files.read_whole(find(path, CONFIGS), _read_config)


def _read_config(folder: OpenFolder) -> ModelConfig:
    values = _config(folder)
    return FORMATS[format_of(values, folder.path)].config(values, str(folder / CONFIG))


def format_of(values: dict[str, Any], folder: Path) -> str:
    """The format of the folder of a `config.json`; a published SUBLLM is known by the key `structure`."""
    name = subllm.MODEL_TYPE if "structure" in values else values.get("model_type")
    if not isinstance(name, str) or name not in FORMATS:
        raise UserError(f"{folder / CONFIG}: model_type = {shown(name)}; supported: {', '.join(FORMATS)}")
    return name


def _respell(path: Path, original: _Values, format: Format) -> None:
    values = respelled(read_object(path), original, format.config)
    path.write_text(json.dumps(values, indent=2) + "\n")


def _config(folder: OpenFolder) -> _Values:
    """The parsed `config.json` of an opened folder."""
    if CONFIG not in folder:
        raise UserError(f"{folder.path}: no {CONFIG}; give a model folder{_meant(folder)}")
    return folder.object(CONFIG)


def _meant(folder: OpenFolder) -> str:
    """The model's folder below, such as `model` of a run, in words for an error."""
    below = [name for name in sorted(folder.names) if (folder.path / name / CONFIG).is_file()]
    meant = "model" if "model" in below else below[-1] if below else None
    return "" if meant is None else f"; did you mean {folder / meant}?"
