"""The generation settings of a folder: ids of special tokens, and the defaults in `generation_config.json`.

`transformers` keeps them there, and ids also in `config.json`; a tokenizer may know fewer (Llama 3 ends a turn with one
token and a text with another; Qwen names its bos in the config only). They stay with the model and are written back.
As in `transformers`, an eos of `config.json` counts only where there is no `generation_config.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError, shown
from longwave.files import OpenFolder

FILE = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation(folder: OpenFolder, values: dict[str, Any]) -> dict[str, Any]:
    """The content of `generation_config.json`, completed by ids in `config.json` (its parsed `values`).

    UserError for an id that is neither a number nor a list of numbers.
    """
    given = folder.object(FILE) if FILE in folder else {}
    ids = {name: values[name] for name in IDS if values.get(name) is not None}
    for where, content in ((folder / "config.json", ids), (folder / FILE, given)):
        for name in IDS:
            value = content.get(name)
            if not all(
                type(one) is int for one in (value if isinstance(value, list) else [value]) if value is not None
            ):
                raise UserError(f"{where}: {name} = {shown(value)}: a token id, or a list of them")
    if FILE in folder:
        ids.pop("eos_token_id", None)
    return ids | {name: value for name, value in given.items() if value is not None}


def completed(generation: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The same, with the ids that only the tokenizer knows."""
    own = {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {name: id for name, id in own.items() if id is not None} | generation


def write_generation(generation: dict[str, Any], folder: Path) -> None:
    """Writes `generation_config.json`, if there is anything to say."""
    if generation:
        (folder / FILE).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def end_ids(generation: dict[str, Any], tokenizer: Tokenizer | None) -> set[int]:
    """Every token that ends a text: those that the settings name, or else the tokenizer's eos."""
    ends = generation.get("eos_token_id")
    if ends is None:
        return set() if tokenizer is None or tokenizer.eos_id is None else {tokenizer.eos_id}
    return set(ends if isinstance(ends, list) else [ends])
