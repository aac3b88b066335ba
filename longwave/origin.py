"""The folder that a model was loaded from, apart from the weights: tokenizer, generation settings, foreign config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longwave.data.tokenizer import Tokenizer


@dataclass
class Origin:
    """The parts of a model's folder that its forward pass does not use, kept so that saving can write them back.

    format: the folder's format, such as "llama"; None for a model that was not loaded from a folder.
    config: the parsed `config.json`, which may hold keys that longwave does not know.
    generation: the content of `generation_config.json`, with the ids of special tokens.
    source: the model of the hub that the weights came from, with its commit: `org/name@commit`.
    training: facts about the training, for the model card: its data, tokens and losses by name.
    tokenizer: from text to the model's token ids, and back.
    """

    format: str | None = None
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    generation: dict[str, Any] = field(default_factory=dict[str, Any])
    source: str | None = None
    training: Mapping[str, str | int | float] = field(default_factory=dict[str, str | int | float])
    tokenizer: Tokenizer | None = None
