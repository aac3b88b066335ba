"""What longwave's model classes in `transformers` share: loading, saving, embeddings, attention, checkpointing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as initial

from longwave.checkpoints import load
from longwave.checkpoints.hub import FETCHING, find
from longwave.errors import UserError
from longwave.hf import folder
from longwave.hf.config import LongwaveConfig
from longwave.layers.constant import Constant
from longwave.layers.norm import RMSNorm
from longwave.model import Decoder

_ATTENTION = ("sdpa", "eager")


class LongwavePreTrainedModel(PreTrainedModel):
    """Base of longwave's model classes; the base model `model` holds the decoder."""

    config_class = LongwaveConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_context_parallel = False
    config: LongwaveConfig

    def __init__(self, config: LongwaveConfig) -> None:
        if config._attn_implementation not in (None, *_ATTENTION):
            raise UserError(
                f"attn_implementation = {config._attn_implementation!r}: longwave runs 'sdpa', its own fast forms, or "
                "'eager', the plain maths"
            )
        if config.output_attentions:
            raise UserError("output_attentions is not supported by longwave models; leave it out")
        super().__init__(config)
        self.gradient_checkpointing = False
        self._attention_form = "sdpa"  # in which the decoder runs at present
        self.register_load_state_dict_pre_hook(folder.accept_saved_names)

    @property
    def body(self) -> Decoder:
        """The longwave model itself, in every class."""
        return cast(Any, self.base_model).decoder

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *,
        config: LongwaveConfig | None = None,
        state_dict: dict[str, Tensor] | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads a model folder of any family that longwave reads, or with None a config and a state_dict.

        kwargs: dtype (of the weights; by default as they were saved), device_map (one device, or "auto" for the only
        accelerator), generation_config, values of the config, and for a hub id options of fetching it, such as
        `revision`. output_loading_info: gives a pair of the model and a report, which is empty, since a tensor that
        does not fit is an error. Raises UserError for that, and for other options that ask for anything.
        """
        if torch.get_default_device().type == "meta":
            raise RuntimeError("You are using `from_pretrained` with a meta device context manager; use from_config")
        source = pretrained_model_name_or_path
        if source is None:
            if config is not None and state_dict is not None:
                with torch.device("meta"):
                    state_dict = folder.under_class_names(cast(Any, cls)(config), state_dict)
            options = {"state_dict": state_dict, "output_loading_info": output_loading_info, **kwargs}
            return super().from_pretrained(None, config=config, **options)
        if state_dict is not None:
            raise UserError(f"from_pretrained: state_dict and the folder {source}: give None in place of one of them")
        model = cls._from_folder(source, config, kwargs)
        report = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, report) if output_loading_info else model

    @classmethod
    def _from_folder(cls, source: str | Path, config: LongwaveConfig | None, options: dict[str, Any]) -> Any:
        dtype, old_dtype = options.pop("dtype", None), options.pop("torch_dtype", None)
        dtype, device = folder.dtype_of(dtype or old_dtype), folder.device_of(options.pop("device_map", None))
        generation = options.pop("generation_config", None)
        adapter = (options.get("adapter_kwargs") or {}).get("_adapter_model_path")
        path = find(source, **{name: options.pop(name) for name in FETCHING if name in options})
        decoder, rest = cls._read(path, dtype, device)
        config = folder.config_of(decoder, source, config, options)
        folder.conform(decoder, config.decoder_config(), source)
        model = cast(Any, cls)(config, decoder)
        model._adopt(rest)
        if generation is None and decoder.origin.generation:
            generation = GenerationConfig.from_dict(decoder.origin.generation)
        if generation is not None and model.can_generate():
            model.generation_config = generation
        if adapter is not None:
            model.load_adapter(adapter)
        return model.eval()

    @classmethod
    def _read(
        cls, path: Path, dtype: torch.dtype | None, device: torch.device | str
    ) -> tuple[Decoder, dict[str, Tensor]]:
        """The decoder of a folder, and the tensors of the class that are none of the decoder's."""
        return load(path, dtype=dtype, device=device), {}

    def _adopt(self, tensors: dict[str, Tensor]) -> None:
        """Takes the tensors that are none of the decoder's."""

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves a longwave folder. A new one appears whole or not at all; in an existing one other files stay.

        state_dict: the weights to write, under the names of `self.state_dict()`. max_shard_size: of one file; one file
        for all weights by default. Adapters that `load_adapter` or `add_adapter` put on are saved alone, as
        transformers does. Raises UserError for any other option that is not at its default, such as `push_to_hub=True`
        (use `model.push_to_hub(...)`).
        """
        folder.check_options("save_pretrained", kwargs, folder.SAVE_DEFAULTS)
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, is_main_process, state_dict)
        elif is_main_process:
            folder.save(self, save_directory, state_dict, max_shard_size)

    def to(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Moves the model, or changes its dtype; UserError while it lies on `meta`, without weights to move."""
        try:
            return super().to(*args, **kwargs)
        except NotImplementedError:
            raise UserError(
                "the model has no weights yet: load them with from_pretrained(..., device_map=...), not by accelerate"
            ) from None

    def get_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """The model without a head, as `transformers` calls it; `decoder` is longwave's own."""
        return self.base_model

    def _follow_attention(self) -> None:
        """Runs attention in the form that the config says at present: the fast one, or for "eager" the plain maths."""
        wanted = self.config._attn_implementation or "sdpa"
        if wanted == self._attention_form:
            return
        self.body.use_form(None)
        if wanted == "eager":
            for op in {op.name for part in self.body.parts for op in part.ops}:
                self.body.use_form("reference", op)
        self._attention_form = wanted

    def _init_weights(self, module: nn.Module) -> None:
        """Fills a module that transformers made, or that came from `meta`; a decoder has drawn its weights before."""
        if isinstance(module, Constant):
            module.restore(module.value.device)
        elif isinstance(module, nn.Embedding | nn.Linear):
            initial.normal_(module.weight, std=self.body.config.init.std)
        elif isinstance(module, RMSNorm):
            initial.ones_(module.weight)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Makes blocks keep only their inputs and run again in the backward pass.

        Of torch's options `use_reentrant` is followed; UserError for any other.
        """
        plain = getattr(gradient_checkpointing_func, "func", checkpoint) is checkpoint
        options = dict(gradient_checkpointing_func.keywords) if isinstance(gradient_checkpointing_func, partial) else {}
        reentrant = bool(options.pop("use_reentrant", False))
        if enable and (every_n_layers != 1 or not plain or any(options.values())):
            asked = {**options, "every_n_layers": every_n_layers, "offload": not plain}
            raise UserError(f"activation checkpointing of longwave models takes use_reentrant alone, not {asked}")
        cast(Any, self.base_model).gradient_checkpointing = self.gradient_checkpointing = enable
        self.body.checkpoint_blocks(enable, reentrant)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Changes the vocabulary size of embedding and head; new rows are drawn around the mean of the old ones."""
        embed = super().resize_token_embeddings(*args, **kwargs)
        self.body.config = replace(self.body.config, vocab_size=embed.num_embeddings)
        return embed

    def get_input_embeddings(self) -> nn.Module:
        return self.body.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.body.embed = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module | None:
        """None: there is no head."""
