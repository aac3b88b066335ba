"""A `longwave.model.Decoder` behind the interface of `transformers`: its body, a language model, a classifier.

A padded batch becomes a stream without pads on entry, so that no pad ever enters the model; hidden states leave as a
padded batch, as `transformers` and the libraries on top of it expect.

Legend: `B` sequences, `N` columns of the batch (pads included), `T` tokens, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from longwave.errors import UserError
from longwave.hf import cache as caches
from longwave.hf import folder
from longwave.hf.cache import LongwaveCache
from longwave.hf.config import LongwaveConfig
from longwave.hf.padding import Columns
from longwave.hf.pretrained import LongwavePreTrainedModel
from longwave.layers.head import Head, TiedHead
from longwave.model import Decoder
from longwave.resamplers import Clock

logger = logging.get_logger(__name__)
_IGNORE = -100
_SAYS_AS_MUCH = {  # arguments of other models' forward that only repeat what the other arguments say
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "token_type_ids", "is_causal"),
    "tokenizer",  # of stop strings, which generate passes on
}


class LongwaveModel(LongwavePreTrainedModel):
    """The decoder over padded batches, up to the hidden states.

    It keeps the head that it does not use, frozen, so that what it saves is a whole model again.
    """

    def __init__(self, config: LongwaveConfig, decoder: Decoder | None = None, headless: bool = True) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.decoder_config()) if decoder is None else decoder
        self._clock: Clock | None = None
        self._windows = 0  # training windows run in this optimizer step, so that micro-batches get different draws
        if headless:
            self.decoder.head.requires_grad_(False)
        if not self.decoder.embed.weight.is_meta:
            for module in self.decoder.modules():
                cast(Any, module)._is_hf_initialized = True  # the decoder has drawn or loaded its weights
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The hidden states (B, N, D) after the final norm; at a pad, the last token's before it, or zeros.

        input_ids: (B, N). attention_mask: (B, N), or (B, past + N) with a cache; 0 marks a pad, on either side.
        position_ids: optional. Without a cache a row may hold several documents, each with positions from 0; attention
            then keeps them apart.
        cache (or past_key_values): a `LongwaveCache` to continue.
        inputs_embeds: (B, N, D), rows of the embedding, or any others in their place, instead of input_ids.
        use_cache: whether to make a cache; by default as the config says, but not in training, nor with position_ids.
        output_hidden_states: whether to give the input of every block, and last_hidden_state, as `hidden_states`.
        """
        past = caches.given({"cache": cache, "past_key_values": past_key_values})
        self._check_arguments(kwargs, past)
        embedded = self._embedded(input_ids, inputs_embeds, attention_mask)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and position_ids is None
        if past is None and use_cache:
            past = LongwaveCache(self.decoder, len(embedded))
        self._check_training(past)
        self._follow_attention()
        columns = Columns.of(embedded, attention_mask)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with self._recorded(columns, bool(wanted)) as states:
            hidden = columns.pad(*self._hidden(columns, embedded, position_ids, past))
        if past is not None:
            past.advance(embedded.shape[1], hidden[:, -1])
        named = {"last_hidden_state": hidden, caches.NAME: past, "hidden_states": (*states, hidden) if wanted else None}
        return BaseModelOutputWithPast(**cast(Any, named))

    def _embedded(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None
    ) -> Float[Tensor, "B N D"]:
        """The inputs as rows of the embedding; UserError unless one kind of them is given, of a fitting shape."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds")
        if inputs_embeds is not None:
            _check_shape("inputs_embeds", inputs_embeds, self.decoder.config.hidden_size)
            return inputs_embeds.to(self.decoder.embed.weight)
        assert input_ids is not None
        _check_shape("input_ids", input_ids)
        if attention_mask is not None:  # a pad may be any number, of no embedding
            input_ids = input_ids.masked_fill(~Columns.of(input_ids, attention_mask).real, 0)
        try:
            return self.decoder.embed(input_ids.to(self.decoder.embed.weight.device))
        except IndexError:  # which only a CPU raises
            size = self.config.vocab_size
            raise UserError(f"input_ids reach {int(input_ids.max())}: the vocabulary has 0 to {size - 1}") from None

    def _hidden(
        self, columns: Columns, embedded: Tensor, position_ids: Tensor | None, cache: LongwaveCache | None
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "B D"]]:
        """The hidden states of the new tokens, row after row, and of each row's last token before them."""
        stream = columns.stream(position_ids, cache, self._samples(len(embedded)), embedded.device)
        hidden = self.decoder.hidden_of(columns.unpad(embedded), stream, None if cache is None else cache.state)
        return hidden, hidden.new_zeros(len(embedded), hidden.shape[1]) if cache is None else cache.last

    @contextmanager
    def _recorded(self, columns: Columns, wanted: bool) -> Iterator[list[Tensor]]:
        """While the block runs, the input of every block of the decoder is noted, as a padded batch with zeros at pads.

        The block then reads what was noted, so that gradients can be kept there, unless it will run again in the
        backward pass. UserError for a model with brackets, which may run their blocks on fewer tokens.
        """
        states: list[Tensor] = []
        if wanted and self.decoder.brackets:
            raise UserError("output_hidden_states: blocks inside a bracket may have fewer tokens; see model.decoder")

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            hidden = inputs[0]
            states.append(columns.pad(hidden, hidden.new_zeros(len(columns.real), hidden.shape[1])))
            again = self.gradient_checkpointing and self.training
            return None if again else (columns.unpad(states[-1]), *inputs[1:])

        hooks = [block.register_forward_pre_hook(note) for block in self.decoder.blocks] if wanted else []
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def _samples(self, rows: int) -> tuple[int, ...]:
        """The index of each row among the training windows of the present optimizer step, which keys its draws."""
        clock = self.decoder.clock
        if clock is not self._clock:
            self._clock, self._windows = clock, 0
        first = self._windows if self.training else 0
        if self.training:
            self._windows += rows
        return tuple(range(first, first + rows))

    def _check_arguments(self, named: dict[str, Any], cache: LongwaveCache | None) -> None:
        """Raises UserError for an argument that asks for something longwave cannot do."""
        if named.get("output_attentions") is None:
            named = {**named, "output_attentions": self.config.output_attentions}
        if (places := named.pop("cache_position", None)) is not None:
            seen = 0 if cache is None else cache.columns
            if places.flatten().tolist() != list(range(seen, seen + places.numel())):
                raise UserError(f"cache_position does not go on from the {seen} columns seen; leave it out")
        asking = [name for name, value in named.items() if value is not None and value is not False]
        if unknown := [name for name in asking if name not in _SAYS_AS_MUCH]:
            raise UserError(f"{unknown[0]} is not supported by longwave models; leave it out")

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


class LongwaveForCausalLM(LongwavePreTrainedModel, GenerationMixin):
    """A longwave model in `transformers`.

    In training mode every row is a training window, and a SUBLLM has to be told the optimizer step: by
    `longwave.hf.StepCallback` in a `Trainer`, otherwise by `model.decoder.set_step(step, seed)`.
    """

    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch, the labels of all micro-batches of a step

    def __init__(self, config: LongwaveConfig, decoder: Decoder | None = None) -> None:
        super().__init__(config)
        self.model = LongwaveModel(config, decoder, headless=False)
        self.post_init()

    @property
    def decoder(self) -> Decoder:
        """The longwave model itself."""
        return self.model.decoder

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Int64[Tensor, "B N"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, N, V), and with `labels` the loss. The other arguments are those of `LongwaveModel.forward`.

        Two of them stay among kwargs: `position_ids`, since `generate` would give it by name and count pads on the
        right, and `shift_labels`, since Trainer evaluates nothing unless all labels in the signature are given.

        labels: (B, N), not shifted: a token's target is the label of the row's next token; -100 does not count.
        kwargs["shift_labels"]: (B, N), the target of each token, in place of labels.
        num_items_in_batch: the divisor of the summed loss; by default the number of labels that count.
        use_cache: by default as the config says, but not in training, nor with labels or position_ids.
        logits_to_keep: the number of last columns whose logits to return (0: all), or the columns' indices; by default
            all, but none in training with labels.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        learning = labels is not None or shift_labels is not None
        if use_cache is None and learning:
            use_cache = False
        named = {"cache": cache, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds, **kwargs}
        body = self.model(input_ids, attention_mask, use_cache=use_cache, return_dict=True, **named)
        hidden, loss = body.last_hidden_state, None
        if learning:
            loss = self._loss(hidden, attention_mask, labels, shift_labels, num_items_in_batch)
        if logits_to_keep is None and not (self.training and learning):
            logits_to_keep = 0
        logits = None if logits_to_keep is None else self._logits(hidden, logits_to_keep)
        outputs = {"loss": loss, "logits": logits, caches.NAME: body.get(caches.NAME)}
        return CausalLMOutputWithPast(**cast(Any, outputs), hidden_states=body.get("hidden_states"))

    def _loss(
        self,
        hidden: Float[Tensor, "B N D"],
        attention_mask: Tensor | None,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        count: Tensor | int | None,
    ) -> Float[Tensor, ""]:
        """The mean loss per label, computed in chunks of rows, so that not all logits are held at once."""
        columns = Columns.of(hidden, attention_mask)
        if shift_labels is not None:
            targets = columns.unpad(shift_labels)
        else:
            targets = columns.following(cast(Tensor, labels), _IGNORE)
        targets = targets.to(hidden.device)
        head, rows, scale = self.decoder.head, columns.unpad(hidden), self.decoder.config.scales.logits
        if isinstance(head, Head | TiedHead):
            total = head(rows, targets, scale)
        else:  # an adapter around the head, which knows nothing of targets
            total = F.cross_entropy(self.decoder.logits(rows).float(), targets, ignore_index=_IGNORE, reduction="sum")
        if count is None:
            return total / (targets != _IGNORE).sum().clamp(min=1)
        return total / (count.to(total) if isinstance(count, Tensor) else count)

    def _logits(self, hidden: Float[Tensor, "B N D"], keep: int | Tensor) -> Float[Tensor, "B kept V"]:
        kept = hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return self.decoder.logits(kept.flatten(0, 1)).unflatten(0, kept.shape[:2])

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

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """UserError: transformers' own server of many requests, which `generate_batch` is, wants paged attention."""
        raise UserError("continuous batching (generate_batch) wants paged attention; give generate a padded batch")

    def get_output_embeddings(self) -> nn.Module:
        """The head; with tied embeddings, one whose weight is the embedding's."""
        return self.decoder.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Makes another module the head; a model whose head was tied to its embedding then has one of its own."""
        if cast(Any, new_embeddings).weight is self.decoder.embed.weight:
            return
        if type(new_embeddings) is not nn.Linear:
            self.decoder.head = cast(Any, new_embeddings)
        elif new_embeddings.bias is not None:
            raise UserError("set_output_embeddings: a head with a bias; give a linear module with bias=False")
        else:
            folder.set_head(self.decoder, new_embeddings.weight)
        cast(Any, self.decoder.head)._is_hf_initialized = True  # it comes with its weights
        self.config.tie_word_embeddings = self.decoder.config.tie_embeddings


class LongwaveForSequenceClassification(GenericForSequenceClassification, LongwavePreTrainedModel):
    """A longwave model that gives scores of classes at the last token of each row, read by a matrix of its own."""

    def __init__(self, config: LongwaveConfig, decoder: Decoder | None = None) -> None:
        LongwavePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LongwaveModel(config, decoder)
        weight = self.decoder.embed.weight
        self.score = nn.Linear(config.hidden_size, config.num_labels or 2, False, weight.device, weight.dtype)
        self.post_init()

    @property
    def decoder(self) -> Decoder:
        """The longwave model itself."""
        return self.model.decoder

    @classmethod
    def _read(
        cls, path: Path, dtype: torch.dtype | None, device: torch.device | str
    ) -> tuple[Decoder, dict[str, Tensor]]:
        return folder.read_with_classifier(path, dtype, device)

    def _adopt(self, tensors: dict[str, Tensor]) -> None:
        """Takes the classifier of the folder; without one, and for another number of classes, it stays newly drawn."""
        weight = tensors.get("score.weight")
        if weight is None or weight.shape != self.score.weight.shape:
            logger.warning(
                "score.weight is newly drawn: the folder has no classifier of this size; train it before use"
            )
        else:
            self.score.weight.data.copy_(weight)


def _check_shape(name: str, inputs: Tensor, *rest: int) -> None:
    """Raises UserError unless the inputs are (sequences, columns, *rest), with a column at least."""
    if inputs.ndim != 2 + len(rest) or inputs.shape[2:] != rest or inputs.shape[1] == 0:
        expected = ", ".join(("sequences", "columns", *map(str, rest)))
        raise UserError(f"{name} has shape {list(inputs.shape)}; expected [{expected}], with one column or more")
