"""The content of a longwave folder's `config.json` as a `transformers` config."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, ClassVar

from transformers import PretrainedConfig

from longwave.checkpoints import native
from longwave.config import ModelConfig
from longwave.errors import UserError, require
from longwave.layout import Blocks, parse

_LAYER_TYPES = {"F": "full_attention", "W": "sliding_attention", "L": "linear_attention"}


@lru_cache(maxsize=32)
def _built(values: str, source: str) -> ModelConfig:
    """The decoder's config from its table as JSON text: kept, since every attribute asks for it."""
    return native.config_from(json.loads(values), source)


class SetByLayout(UserError, NotImplementedError):
    """A value of the config that only another layout could change; by this type `transformers` knows such values."""


class Entry:
    """An attribute of a `transformers` config that stands in the model's own table, under one name or two.

    path: where it stands, such as ("attention", "heads"). derive: its value where the table leaves it out.
    """

    def __init__(self, *path: str, derive: Callable[[ModelConfig], Any]) -> None:
        self.path, self.derive = path, derive

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: LongwaveConfig | None, owner: type) -> Any:
        if config is None:
            return self
        given: Any = config.model
        for name in self.path:
            given = given.get(name) if isinstance(given, Mapping) else None
        return config.described(self.derive) if given is None else given

    def __set__(self, config: LongwaveConfig, value: Any) -> None:
        if value == getattr(config, self.name, None):
            return  # what follows from other values stays so
        *outer, last = self.path
        table = config.model.get(outer[0]) or {} if outer else config.model
        changed = {**table, last: value}
        config.model = {**config.model, outer[0]: changed} if outer else changed


def _sliding_window(model: ModelConfig) -> int:
    require("window" in model.tables, f"layout = {model.layout!r} has no sliding window")
    return model.tables["window"].size


def _head_dim(model: ModelConfig) -> int:
    return model.table("attention").size_in(model.hidden_size)


def _layer_types(model: ModelConfig) -> list[str]:
    runs = [item for item in model.parsed.walk() if isinstance(item, Blocks) and item.letter in _LAYER_TYPES]
    known = len(runs) == len(list(model.parsed.walk()))
    require(known, f"layout = {model.layout!r} has layers that transformers has no name for")
    return [_LAYER_TYPES[run.letter] for run in runs for _ in range(run.count)]


class LongwaveConfig(PretrainedConfig):
    """The config of a longwave model in `transformers`.

    model: the decoder's config as plain values. The other attributes that `transformers` and its tools ask for, such as
    `hidden_size`, are read from it and set in it. use_cache: whether a forward outside training makes a cache, unless
    told otherwise. bos_token_id, eos_token_id, pad_token_id: ids of special tokens, or None.
    """

    model_type = native.MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    vocab_size = Entry("vocab_size", derive=lambda model: model.vocab_size)
    hidden_size = Entry("hidden_size", derive=lambda model: model.hidden_size)
    max_position_embeddings = Entry("context_window", derive=lambda model: model.context_window)
    tie_word_embeddings = Entry("tie_embeddings", derive=lambda model: model.tie_embeddings)
    num_attention_heads = Entry("attention", "heads", derive=lambda model: model.table("attention").heads)
    num_key_value_heads = Entry("attention", "kv_heads", derive=lambda model: model.table("attention").groups)
    head_dim = Entry("attention", "head_size", derive=_head_dim)
    intermediate_size = Entry("mlp", "size", derive=lambda model: model.table("mlp").size)
    rms_norm_eps = Entry("norm_eps", derive=lambda model: model.norm_eps)
    initializer_range = Entry("init", "std", derive=lambda model: model.init.std)
    sliding_window = Entry("window", "size", derive=_sliding_window)
    logit_scale = Entry("scales", "logits", derive=lambda model: model.scales.logits)
    """The factor of the logits. TRL multiplies by the head's weights itself, and takes the factor from here."""

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        longwave_format: int = native.FORMAT,
        longwave_version: str = "",
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.model = native.from_format_1(model or {}) if longwave_format == 1 else model or {}
        self.longwave_format = native.FORMAT if longwave_format == 1 else longwave_format
        self.longwave_version = longwave_version
        self.use_cache = use_cache
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        kwargs.pop("layer_types", None)  # follows from the layout
        super().__init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: transformers would copy this file beside every saved config that was loaded by remote code."""

    def decoder_config(self) -> ModelConfig:
        """The config of the decoder. Raises UserError for a format or a key that this version does not know."""
        values = json.dumps({"longwave_format": self.longwave_format, "model": self.model})
        return _built(values, self.name_or_path or type(self).__name__)

    def described(self, derive: Callable[[ModelConfig], Any]) -> Any:
        """What follows from the decoder's config, for attributes.

        Raises AttributeError where nothing follows, as from the empty config that `transformers` makes to compare
        others with its defaults.
        """
        try:
            return derive(self.decoder_config())
        except UserError as error:
            raise AttributeError(str(error)) from None

    @property
    def num_hidden_layers(self) -> int:
        """The number of blocks, those inside brackets included."""
        if "layout" not in self.model:
            raise AttributeError("a config without a layout has no layers")
        return parse(self.model["layout"]).depth

    @num_hidden_layers.setter
    def num_hidden_layers(self, number: int) -> None:
        """Changes the number of blocks of a layout that has one kind of them; SetByLayout for any other layout."""
        layout = self.model.get("layout", "F")
        letter = layout.strip("0123456789 ")
        if "layout" in self.model and number == self.num_hidden_layers:
            return
        if len(letter) != 1:
            raise SetByLayout(f"num_hidden_layers = {number}: layout = {layout!r} says it; set config.model['layout']")
        self.model = {**self.model, "layout": f"{number}{letter}"}

    @property
    def layer_types(self) -> list[str]:
        """The kind of attention of each block, in transformers' words; AttributeError where it has no word for one."""
        return self.described(_layer_types)

    def to_dict(self) -> dict[str, Any]:
        """All values, those that follow from `model` among them, since tools read them here."""
        found = {name: getattr(self, name, None) for name in DERIVED}
        return super().to_dict() | {name: value for name, value in found.items() if value is not None}

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds: `model` once, without the values that follow from it."""
        return {name: value for name, value in super().to_diff_dict().items() if name not in DERIVED}


DERIVED = (
    *(name for name, value in vars(LongwaveConfig).items() if isinstance(value, Entry)),
    *("num_hidden_layers", "layer_types"),
)
