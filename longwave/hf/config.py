"""The content of a longwave folder's `config.json` as a `transformers` config."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from longwave.checkpoints import native
from longwave.config import ModelConfig


class LongwaveConfig(PretrainedConfig):
    """The config of a longwave model in `transformers`.

    model: the decoder's config as plain values, from which the other attributes that `transformers` asks for are
    derived. use_cache: whether a forward outside training makes a cache, unless told otherwise.
    """

    model_type = native.MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        longwave_format: int = native.FORMAT,
        longwave_version: str = "",
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.model = model or {}
        self.longwave_format, self.longwave_version = longwave_format, longwave_version
        self.use_cache = use_cache
        super().__init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: transformers would copy this file beside every saved config that was loaded by remote code."""

    def decoder_config(self) -> ModelConfig:
        """The config of the decoder. Raises UserError for a format or a key that this version does not know."""
        values = {"longwave_format": self.longwave_format, "model": self.model}
        return native.config_from(values, self.name_or_path or type(self).__name__)

    def _described(self) -> ModelConfig:
        """The decoder's config, for properties.

        Raises AttributeError for an empty config, which `transformers` makes to compare others with its defaults.
        """
        if not self.model:
            raise AttributeError("an empty LongwaveConfig describes no model")
        return self.decoder_config()

    @property
    def vocab_size(self) -> int:
        return self._described().vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.model = {**self.model, "vocab_size": size}

    @property
    def hidden_size(self) -> int:
        return self._described().hidden_size

    @property
    def num_attention_heads(self) -> int:
        return self._described().table("attention").heads

    @property
    def max_position_embeddings(self) -> int:
        return self._described().context_window

    @property
    def tie_word_embeddings(self) -> bool:
        return self._described().tie_embeddings

    @property
    def logit_scale(self) -> float:
        """The factor of the logits. TRL multiplies by the head's weights itself, and takes the factor from here."""
        return self._described().scales.logits
