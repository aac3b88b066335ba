"""longwave folders inside Hugging Face's `transformers`: the only file that touches its model classes.

After `import longwave.hf`, `AutoModelForCausalLM.from_pretrained(DIR)` loads what `longwave.checkpoints.save` wrote,
with `generate`, a cache, and a loss. Weights go through `longwave.checkpoints`, so that what does not fit is an error,
never a random weight. A padded batch becomes a ragged stream at the door: no pad ever enters the model.

Legend: `B` sequences, `N` columns of the batch (pads included), `T` tokens, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast

from longwave.checkpoints import huggingface, load, native, save
from longwave.checkpoints.families import EMBEDDING, FAMILIES, HEAD, TABLE, family_of
from longwave.checkpoints.foreign import disassemble
from longwave.config import ModelConfig
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.ops.cross_entropy import cross_entropy
from longwave.stream import Stream

_IGNORE = -100
_WITHOUT_EFFECT = {  # what Auto classes hand down for folders on the hub
    *("_from_auto", "adapter_kwargs", "cache_dir", "force_download", "local_files_only", "low_cpu_mem_usage"),
    *("proxies", "revision", "token", "trust_remote_code", "use_safetensors"),
}


class LongwaveConfig(PretrainedConfig):
    """The content of a longwave folder's `config.json`; `model` describes the decoder."""

    model_type = native.MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

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

    def decoder_config(self) -> ModelConfig:
        """The config of the decoder; UserError for a format or a key that this longwave does not know."""
        values = {"longwave_format": self.longwave_format, "model": self.model}
        return native.config_from(values, self.name_or_path or type(self).__name__)

    @property
    def vocab_size(self) -> int:
        return self.decoder_config().vocab_size

    @property
    def hidden_size(self) -> int:
        return self.decoder_config().hidden_size

    @property
    def num_attention_heads(self) -> int:
        return self.decoder_config().attention.heads

    @property
    def max_position_embeddings(self) -> int:
        return self.decoder_config().context_window

    @property
    def tie_word_embeddings(self) -> bool:
        return self.decoder_config().tie_embeddings


class LongwaveCache(Cache):
    """A longwave `State` as `transformers` wants a cache: one slot per row of the batch.

    columns: of the batch seen so far, pads included; attention masks are that wide. last: hidden (B, D) of the newest
    token of each row, which pads after it repeat.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        super().__init__(layers=[])
        self.state = decoder.state(rows)
        self.columns = 0
        self.last = decoder.embed.weight.new_zeros(rows, decoder.config.hidden_size)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return self.state.slots

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.state.reorder(beam_idx.tolist())
        self.last = self.last.index_select(0, beam_idx.to(self.last.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(torch.arange(self.batch_size)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest `-tokens_to_remove` columns, which must hold no pads."""
        for slot, seen in enumerate(self.state.seen):
            self.state.truncate(slot, seen + tokens_to_remove)
        self.columns += tokens_to_remove
        self.last = torch.full_like(self.last, torch.nan)  # unknown until the next token comes

    def reset(self) -> None:
        for slot in range(self.batch_size):
            self.state.release(slot)
        self.columns = 0
        self.last = torch.zeros_like(self.last)


class LongwaveForCausalLM(PreTrainedModel, GenerationMixin):
    """A `longwave.model.Decoder` with the face of a `transformers` model.

    In training mode every row is one training window, and a SUBLLM needs `model.decoder.set_step(step, seed)` before
    each optimizer step.
    """

    config_class = LongwaveConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    config: LongwaveConfig

    def __init__(self, config: LongwaveConfig, decoder: Decoder | None = None) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.decoder_config()) if decoder is None else decoder
        self.post_init()

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: LongwaveConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LongwaveForCausalLM:
        """Loads a model folder of any family that longwave reads.

        dtype: of the weights; as they were saved by default. device_map: one device. UserError for anything else that
        would change what is loaded, and for every tensor that does not fit.
        """
        ignored = [name for name, value in kwargs.items() if name not in _WITHOUT_EFFECT and value]
        if ignored:
            raise UserError(
                f"from_pretrained: {ignored[0]} = {kwargs[ignored[0]]!r} is not supported by longwave folders"
            )
        folder = Path(pretrained_model_name_or_path)
        decoder = load(folder, dtype=_dtype(dtype or torch_dtype), device=_device(device_map))
        if config is None:
            config = LongwaveConfig.from_dict(native.config_json(decoder) | {"name_or_path": str(folder)})
        if config.decoder_config() != decoder.config:
            raise UserError(f"{folder}: the given config describes another model than the folder's config.json")
        config.dtype = decoder.embed.weight.dtype
        model = cls(config, decoder)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.eval()

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | Path, **kwargs: Any
    ) -> None:
        """Saves a longwave folder, which appears whole or not at all; it takes no option but `is_main_process`."""
        is_main_process = kwargs.pop("is_main_process", True)
        unknown = [name for name, value in kwargs.items() if value]
        if unknown:
            raise UserError(f"save_pretrained: {unknown[0]} is not supported; leave it out")
        if is_main_process:
            save(self.decoder, save_directory)
            self.generation_config.save_pretrained(save_directory)

    def forward(
        self,
        input_ids: Int64[Tensor, "B N"],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Int64[Tensor, "B N"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, N, V) and the mean loss of `labels`.

        attention_mask: (B, N), or (B, past + N) with a cache; 0 marks a pad, on whichever side. A pad's logits are
            those of the last token before it, zeros if there is none.
        labels: shifted here; each token is judged by the label of the row's next token, -100 does not count.
        use_cache: by default where the config says so, outside training and without labels.
        logits_to_keep: the last so many columns (0: all), or their indices; all by default, but none while training
            with labels.
        """
        if past_key_values is not None and not isinstance(past_key_values, LongwaveCache):
            raise UserError(f"past_key_values is a {type(past_key_values).__name__}; longwave models use LongwaveCache")
        real = _real_columns(input_ids, attention_mask)
        cache = past_key_values
        if cache is None and self._wants_cache(use_cache, labels is not None):
            cache = LongwaveCache(self.decoder, input_ids.shape[0])
        if cache is not None and self.training and self.decoder.resamplers:
            raise UserError("a SUBLLM in training mode ranks whole windows, without a cache; call model.eval() first")
        hidden = self._hidden(input_ids, real, cache)
        loss = None if labels is None else self._loss(hidden, labels, real)
        before = hidden.new_zeros(len(real), hidden.shape[1]) if cache is None else cache.last
        rows, places = torch.cat([before.to(hidden), hidden]), _places(real).to(hidden.device)
        if cache is not None:
            cache.columns += input_ids.shape[1]
            cache.last = rows[places[:, -1]]
        if logits_to_keep is None and not (self.training and labels is not None):
            logits_to_keep = 0
        logits = None if logits_to_keep is None else self._logits(rows, places, logits_to_keep)
        output = CausalLMOutputWithPast(loss=cast(Any, loss), logits=cast(Any, logits), past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _wants_cache(self, use_cache: bool | None, has_labels: bool) -> bool:
        by_default = self.config.use_cache and not self.training and not has_labels
        return by_default if use_cache is None else use_cache

    def _hidden(self, input_ids: Tensor, real: Tensor, cache: LongwaveCache | None) -> Float[Tensor, "T D"]:
        """Normalised hidden states of the tokens without the pads, row after row."""
        lengths = real.sum(1).tolist()
        tokens = input_ids[real].to(self.decoder.embed.weight.device)
        if cache is None:
            return self.decoder.hidden(tokens, Stream.of(lengths, device=tokens.device))
        return self.decoder.hidden(tokens, cache.state.stream(lengths), cache.state)

    def _loss(self, hidden: Tensor, labels: Tensor, real: Tensor) -> Float[Tensor, ""]:
        """Mean over the labels that count, made in chunks of rows so that the logits are never all held."""
        following = labels[real].roll(-1)
        ends = real.sum(1).cumsum(0) - 1
        following[ends[real.any(1)]] = _IGNORE  # the last token of a row has no next one
        following = following.to(hidden.device)
        total = cross_entropy(hidden, self.decoder.head_weight, following, self.decoder.config.scales.logits)
        return total / (following != _IGNORE).sum().clamp(min=1)

    def _logits(self, rows: Tensor, places: Tensor, keep: int | Tensor) -> Float[Tensor, "B kept V"]:
        columns = slice(-keep, None) if isinstance(keep, int) else keep
        kept = rows[places[:, columns]]
        return F.linear(kept, self.decoder.head_weight) * self.decoder.config.scales.logits

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the decoder has drawn or loaded its own."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` brings no cache of its own; the first forward makes one."""
        return False

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.head or self.decoder.embed


def _real_columns(input_ids: Tensor, attention_mask: Tensor | None) -> Bool[Tensor, "B N"]:
    """Which of the new columns hold tokens."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    rows, columns = input_ids.shape
    if attention_mask.ndim != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < columns:
        raise UserError(f"attention_mask has shape {list(attention_mask.shape)}; expected [{rows}, {columns} or more]")
    return attention_mask[:, -columns:].bool().to(input_ids.device)


def _places(real: Bool[Tensor, "B N"]) -> Int64[Tensor, "B N"]:
    """For every column, where its hidden state stands behind B rows of the past: the row's last token up to there."""
    lengths, seen = real.sum(1), real.cumsum(1)
    begins = len(real) + lengths.cumsum(0) - lengths
    past = torch.arange(len(real), device=real.device).unsqueeze(1)
    return torch.where(seen > 0, begins.unsqueeze(1) + seen - 1, past)


def _dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of a name; None, for weights as they were saved, of None and "auto"."""
    found = None if name in (None, "auto") else getattr(torch, name, name) if isinstance(name, str) else name
    if found is not None and not isinstance(found, torch.dtype):
        raise UserError(f"dtype = {name!r}; use 'auto' or a floating type such as 'bfloat16'")
    return found


def _device(device_map: torch.device | str | dict[str, Any] | None) -> torch.device | str:
    """The one device of a `device_map`."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return "cpu"
    try:
        return torch.device(cast(Any, device_map))
    except (RuntimeError, TypeError):
        raise UserError(f"device_map = {device_map!r}; give one device, such as 'cpu' or 'cuda'") from None


AutoConfig.register(native.MODEL_TYPE, LongwaveConfig)
AutoModelForCausalLM.register(LongwaveConfig, LongwaveForCausalLM)


def transformers_from(decoder: Decoder) -> PreTrainedModel:
    """`transformers`' own model (SDPA attention) over the very weights of a decoder, which it shares.

    UserError for a decoder that is of no family that `transformers` has.
    """
    family = family_of(decoder.config)
    if family is None or not family.in_transformers:
        known = ", ".join(one.model_type for one in FAMILIES if one.in_transformers)
        raise UserError(f"layout = {decoder.config.layout!r}: this model is none that transformers has ({known})")
    values = huggingface.config_json(family, decoder, {})
    config = AutoConfig.for_model(**values, attn_implementation="sdpa")
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    tensors = disassemble(decoder, TABLE)
    if decoder.config.tie_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return cast(Any, model).to(decoder.embed.weight.device).eval()
