"""The folder that a model came from: everything in it beside the weights that stays with the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longwave.data.tokenizer import Tokenizer


@dataclass
class Origin:
    """The parts of a model's folder that the model does not run by, and that saving writes back.

    format: of the folder, such as "llama"; None for a model that was not loaded.
    config: the parsed `config.json`, which may hold keys that longwave does not know.
    generation: the content of `generation_config.json`, ids of special tokens among it.
    tokenizer: turns text into the token ids that the model speaks.
    """

    format: str | None = None
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    generation: dict[str, Any] = field(default_factory=dict[str, Any])
    tokenizer: Tokenizer | None = None
