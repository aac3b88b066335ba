"""A `longwave.model.Decoder` behind the interface of a `transformers` causal language model.

A padded batch becomes a stream without pads on entry, so that no pad ever enters the model; hidden states leave as a
padded batch, as `transformers` and the libraries on top of it expect.

Legend: `B` sequences, `N` columns of the batch (pads included), `T` tokens, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from longwave.checkpoints import load
from longwave.checkpoints.hub import FETCHING, find
from longwave.errors import UserError
from longwave.hf import cache as caches
from longwave.hf import folder
from longwave.hf.cache import LongwaveCache
from longwave.hf.config import LongwaveConfig
from longwave.hf.padding import Columns
from longwave.layers.head import TiedHead
from longwave.model import Decoder
from longwave.ops.cross_entropy import cross_entropy
from longwave.resamplers import Clock

_IGNORE = -100
_SAYS_AS_MUCH = {  # arguments of other models' forward that only repeat what the other arguments say
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "token_type_ids", "return_dict"),
}


class Backbone(nn.Module):
    """The decoder without its head, over padded batches."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self._clock: Clock | None = None
        self._windows = 0  # training windows run in this optimizer step, so that micro-batches get different draws

    def forward(
        self,
        input_ids: Int64[Tensor, "B N"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The hidden states (B, N, D) after the final norm; at a pad, the last token's before it, or zeros.

        attention_mask: (B, N), or (B, past + N) with a cache; 0 marks a pad, on either side.
        position_ids: optional. Without a cache a row may hold several documents, each with positions from 0; attention
            then keeps them apart.
        cache (or past_key_values): a `LongwaveCache` to continue.
        """
        cache = caches.given(kwargs)
        _check_arguments(input_ids, kwargs)
        assert input_ids is not None
        if cache is None and use_cache:
            cache = LongwaveCache(self.decoder, input_ids.shape[0])
        columns = Columns.of(input_ids, attention_mask)
        self._check_training(cache)
        hidden = columns.pad(*self._hidden(columns, input_ids, position_ids, cache))
        if cache is not None:
            cache.advance(input_ids.shape[1], hidden[:, -1])
        named = {"last_hidden_state": hidden, caches.NAME: cache}
        return BaseModelOutputWithPast(**cast(Any, named))

    def _hidden(
        self, columns: Columns, input_ids: Tensor, position_ids: Tensor | None, cache: LongwaveCache | None
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "B D"]]:
        """The hidden states of the new tokens, row after row, and of each row's last token before them."""
        device = self.decoder.embed.weight.device
        stream = columns.stream(position_ids, cache, self._samples(len(input_ids)), device)
        hidden = self.decoder.hidden(
            columns.unpad(input_ids).to(device), stream, None if cache is None else cache.state
        )
        return hidden, hidden.new_zeros(len(input_ids), hidden.shape[1]) if cache is None else cache.last

    def _samples(self, rows: int) -> tuple[int, ...]:
        """The index of each row among the training windows of the present optimizer step, which keys its draws."""
        clock = self.decoder.clock
        if clock is not self._clock:
            self._clock, self._windows = clock, 0
        first = self._windows if self.training else 0
        if self.training:
            self._windows += rows
        return tuple(range(first, first + rows))

    def _check_training(self, cache: LongwaveCache | None) -> None:
        if not self.training or not self.decoder.resamplers:
            return
        if cache is not None:
            raise UserError("a SUBLLM in training mode ranks whole windows, without a cache; call model.eval() first")
        if self.decoder.clock is None:
            raise UserError(
                "a SUBLLM in training mode follows the optimizer step, which it was not told: give Trainer "
                "callbacks=[longwave.hf.StepCallback()], or call model.decoder.set_step(step, seed) before each step"
            )


class LongwaveForCausalLM(PreTrainedModel, GenerationMixin):
    """A longwave model in `transformers`.

    In training mode every row is a training window, and a SUBLLM has to be told the optimizer step: by
    `longwave.hf.StepCallback` in a `Trainer`, otherwise by `model.decoder.set_step(step, seed)`.
    """

    config_class = LongwaveConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch, the labels of all micro-batches of a step
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    config: LongwaveConfig

    def __init__(self, config: LongwaveConfig, decoder: Decoder | None = None) -> None:
        super().__init__(config)
        if config._attn_implementation not in (None, "sdpa"):
            raise UserError(f"attn_implementation = {config._attn_implementation!r}: longwave runs 'sdpa'")
        self.model = Backbone(Decoder(config.decoder_config()) if decoder is None else decoder)
        self.gradient_checkpointing = False
        self.register_load_state_dict_pre_hook(folder.accept_saved_names)
        self.post_init()

    @property
    def decoder(self) -> Decoder:
        """The longwave model itself."""
        return self.model.decoder

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: LongwaveConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | int | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LongwaveForCausalLM:
        """Loads a model folder of any family that longwave reads.

        dtype: of the weights; by default as they were saved. device_map: one device. kwargs: values of the config, and
        for a hub id options of fetching it, such as `revision`. Raises UserError for other options that ask for
        anything, and for a tensor that does not fit.
        """
        source = pretrained_model_name_or_path
        fetching = {name: kwargs.pop(name) for name in FETCHING if name in kwargs}
        decoder = load(
            find(source, **fetching), dtype=folder.dtype_of(dtype or torch_dtype), device=folder.device_of(device_map)
        )
        model = cls(folder.config_of(decoder, source, config, kwargs), decoder)
        if decoder.origin.generation:
            model.generation_config = GenerationConfig.from_dict(decoder.origin.generation)
        return model.eval()

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
        for all weights by default. Raises UserError for any other option that is not at its default, such as
        `push_to_hub=True` (use `model.push_to_hub(...)`).
        """
        folder.check_options("save_pretrained", kwargs, folder.SAVE_DEFAULTS)
        if is_main_process:
            folder.save_decoder(self.decoder, save_directory, state_dict, max_shard_size)
            self.generation_config.save_pretrained(save_directory)

    def forward(
        self,
        input_ids: Int64[Tensor, "B N"] | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        labels: Int64[Tensor, "B N"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, N, V), and with `labels` the loss. kwargs: further arguments of `Backbone.forward`.

        labels: (B, N), not shifted: a token's target is the label of the row's next token; -100 does not count.
        num_items_in_batch: the divisor of the summed loss; by default the number of labels that count.
        use_cache: whether to make a cache; by default as the config says, but not in training, nor with labels or
            position_ids.
        logits_to_keep: the number of last columns whose logits to return (0: all), or the columns' indices; by default
            all, but none in training with labels.
        """
        named = {"cache": cache, "past_key_values": past_key_values, **kwargs}
        use_cache = self._wants_cache(labels, kwargs) if use_cache is None else use_cache
        body = self.model(input_ids, attention_mask, use_cache=use_cache, **named)
        hidden, loss = body.last_hidden_state, None
        if labels is not None:
            loss = self._loss(hidden, labels, Columns.of(labels, attention_mask), num_items_in_batch)
        if logits_to_keep is None and not (self.training and labels is not None):
            logits_to_keep = 0
        logits = None if logits_to_keep is None else self._logits(hidden, logits_to_keep)
        outputs = {"loss": loss, "logits": logits, caches.NAME: body.get(caches.NAME)}
        output = CausalLMOutputWithPast(**cast(Any, outputs))
        return output.to_tuple() if kwargs.get("return_dict") is False else output

    def _wants_cache(self, labels: Tensor | None, kwargs: dict[str, Any]) -> bool:
        whole = labels is not None or kwargs.get("position_ids") is not None
        return self.config.use_cache and not self.training and not whole

    def _loss(
        self, hidden: Float[Tensor, "B N D"], labels: Tensor, columns: Columns, count: Tensor | int | None
    ) -> Float[Tensor, ""]:
        """The mean loss per label, computed in chunks of rows, so that not all logits are held at once."""
        targets = columns.following(labels, _IGNORE).to(hidden.device)
        rows, scale = columns.unpad(hidden), self.decoder.config.scales.logits
        if self._has_plain_head():
            total = cross_entropy(rows, self.decoder.head_weight, targets, scale)
        else:
            total = F.cross_entropy(self._head(rows).float(), targets, ignore_index=_IGNORE, reduction="sum")
        if count is None:
            return total / (targets != _IGNORE).sum().clamp(min=1)
        return total / (count.to(total) if isinstance(count, Tensor) else count)

    def _logits(self, hidden: Float[Tensor, "B N D"], keep: int | Tensor) -> Float[Tensor, "B kept V"]:
        return self._head(hidden[:, slice(-keep, None) if isinstance(keep, int) else keep])

    def _head(self, hidden: Tensor) -> Tensor:
        if self._has_plain_head():
            logits = F.linear(hidden, self.decoder.head_weight)
        else:
            logits = self.decoder.head(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])
        return logits * self.decoder.config.scales.logits

    def _has_plain_head(self) -> bool:
        """Whether the head is a plain matrix; if PEFT has wrapped it in an adapter, its forward has to be called."""
        return isinstance(self.decoder.head, nn.Linear | TiedHead)

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: the decoder has already drawn or loaded its weights."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: `generate` is not to make a cache of its own class."""
        return False

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Makes the cache before the first forward, since assisted generation needs it by then."""
        for option in ("cache_implementation", "assistant_early_exit"):
            if (value := getattr(generation_config, option, None)) is not None:
                raise UserError(f"{option} = {value!r} is not supported by longwave models; leave it out")
        cast(Any, super())._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if caches.given(model_kwargs) is None and generation_config.use_cache is not False:
            batch = kwargs["batch_size"] if "batch_size" in kwargs else args[1]
            copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs[caches.NAME] = cache = LongwaveCache(self.decoder, batch * copies)
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Makes blocks keep only their inputs and run again in the backward pass; UserError for any other option."""
        options = gradient_checkpointing_func.keywords if isinstance(gradient_checkpointing_func, partial) else {}
        plain = getattr(gradient_checkpointing_func, "func", checkpoint) is checkpoint
        if enable and (every_n_layers != 1 or not plain or any(options.values())):
            asked = {**options, "every_n_layers": every_n_layers, "offload": not plain}
            raise UserError(f"activation checkpointing of longwave models takes no options, not {asked}")
        self.gradient_checkpointing = enable
        self.decoder.checkpoint_blocks(enable)

    def resize_token_embeddings(self, *args: Any, mean_resizing: bool = True, **kwargs: Any) -> nn.Embedding:
        """Changes the vocabulary size of embedding and head; new rows are drawn around the mean of the old ones."""
        if not mean_resizing:
            raise UserError("mean_resizing = False is not supported by longwave models; leave it out")
        embed = super().resize_token_embeddings(*args, **kwargs)
        self.decoder.config = replace(self.decoder.config, vocab_size=embed.num_embeddings)
        return embed

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        """The head; with tied embeddings, the embedding."""
        if not self.decoder.config.tie_embeddings:
            return self.decoder.head
        self.decoder.embed.__dict__["bias"] = None  # TRL reads the bias of the module, as a linear head has it
        return self.decoder.embed

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if not self.decoder.config.tie_embeddings:
            self.decoder.head = cast(Any, new_embeddings)


def _check_arguments(input_ids: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raises UserError for an argument that asks for something longwave cannot do."""
    if kwargs.get("inputs_embeds") is not None or input_ids is None:
        raise UserError("inputs_embeds is not supported by longwave models; give input_ids")
    unknown = [name for name, value in kwargs.items() if _asks(value) and name not in {*caches.NAMES, *_SAYS_AS_MUCH}]
    if unknown:
        raise UserError(f"{unknown[0]} is not supported by longwave models; leave it out")


def _asks(value: Any) -> bool:
    """Whether an argument asks for anything: whether it is neither None nor False."""
    return value is not None and value is not False
