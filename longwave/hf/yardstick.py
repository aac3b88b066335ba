"""`transformers`' own model with the weights of a longwave decoder, for comparison in benchmarks.

Legend: `B` sequences of `N` tokens each, `S` steps of decoding, `V` vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.initialization import no_init_weights

from longwave.checkpoints import huggingface
from longwave.checkpoints.families import EMBEDDING, FAMILIES, HEAD, TABLE, family_of
from longwave.checkpoints.foreign import disassemble
from longwave.errors import UserError
from longwave.model import Decoder


def transformers_from(decoder: Decoder) -> PreTrainedModel:
    """`transformers`' own model (SDPA attention) that shares the weights of a decoder.

    Raises UserError for a decoder of which `transformers` has no model.
    """
    family = family_of(decoder.config)
    if family is None or not family.in_transformers:
        known = ", ".join(one.model_type for one in FAMILIES if one.in_transformers)
        raise UserError(f"layout = {decoder.config.layout!r}: not a model that transformers has ({known})")
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


@dataclass(frozen=True)
class FilledCache:
    """A cache filled with the same context for every sequence of a batch.

    context: number of tokens of each sequence. forget: takes the cache back to the context after decoding.
    """

    cache: Cache
    context: int
    forget: Callable[[], None]

    def used_bytes(self) -> int:
        """Bytes of the keys and values of the context, or of its last tokens in layers with a sliding window."""
        return sum(one.nbytes * min(self.context, one.shape[-2]) // one.shape[-2] for one in self._arrays())

    def reserved_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(one.nbytes for one in self._arrays())

    def _arrays(self) -> list[Tensor]:
        return [one for pair in _keys_and_values(self.cache) for one in pair]


class Yardstick:
    """`transformers`' model with the weights of a decoder, run as its `generate` and `Trainer` run it.

    Raises UserError for a decoder of which `transformers` has no model.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.model = transformers_from(decoder)
        takes_cache = "cache" in signature(self.model.forward).parameters
        self._cache_name = "cache" if takes_cache else "past_key_values"  # the name before transformers 5.24

    def loss(self, tokens: Int64[Tensor, "B N"]) -> Tensor:
        """The mean next-token loss in nats."""
        return self.model(tokens, labels=tokens, use_cache=False).loss

    def prefill(self, context: Int64[Tensor, " N"]) -> tuple[DynamicCache, Float[Tensor, " V"]]:
        """The cache after a context, and the logits of its last token."""
        cache = DynamicCache(config=self.model.config)
        places = torch.arange(len(context), device=context.device)
        return cache, self._logits(context.unsqueeze(0), places.unsqueeze(0), cache)[0]

    @torch.inference_mode()
    def decode(self, following: Int64[Tensor, "B S"], filled: FilledCache) -> Float[Tensor, "B S V"]:
        """The logits after each of the tokens, decoded one by one after the context; then the cache forgets them."""
        batch, steps = following.shape
        places = torch.arange(filled.context, filled.context + steps, device=following.device).expand(batch, -1)
        pieces = [slice(step, step + 1) for step in range(steps)]
        logits = [self._logits(following[:, piece], places[:, piece], filled.cache) for piece in pieces]
        filled.forget()
        return torch.stack(logits, dim=1)

    def caches(self, filled: DynamicCache, context: int, batch: int, steps: int) -> dict[str, FilledCache]:
        """The cache of one sequence copied for a batch that decodes `steps` tokens, by kind: "dynamic" and "static".

        There is no static cache for models with a sliding window, since it could not forget the decoded tokens.
        """
        caches = {"dynamic": _dynamic(filled, context, batch)}
        if not any(cast(Any, layer).is_sliding for layer in filled.layers):
            caches["static"] = self._static(filled, context, batch, steps)
        return caches

    @torch.inference_mode()
    def _static(self, filled: DynamicCache, context: int, batch: int, steps: int) -> FilledCache:
        cache = StaticCache(config=self.model.config, max_cache_len=context + steps)
        for index, (key, value) in enumerate(_keys_and_values(filled)):
            cache.update(key.repeat(batch, 1, 1, 1), value.repeat(batch, 1, 1, 1), index)

        def forget() -> None:
            for layer in cache.layers:
                cast(Any, layer).cumulative_length.fill_(context)

        return FilledCache(cache, context, forget)

    @torch.inference_mode()
    def _logits(self, tokens: Tensor, places: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) after new tokens (B, n) at the given places."""
        self.model.eval()
        remembered = {self._cache_name: cache, "use_cache": True}
        output = self.model(tokens, position_ids=places, logits_to_keep=1, **remembered)
        return output.logits[:, 0]


@torch.inference_mode()
def _dynamic(filled: DynamicCache, context: int, batch: int) -> FilledCache:
    cache = copy.deepcopy(filled)
    cache.batch_repeat_interleave(batch)
    before = [dict(vars(layer)) for layer in cache.layers]

    def forget() -> None:
        for layer, attributes in zip(cache.layers, before, strict=True):
            vars(layer).update(attributes)  # decoding makes new tensors, so the old ones still hold the context

    return FilledCache(cache, context, forget)


def _keys_and_values(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (B, G, capacity, K) of each layer."""
    return [(cast(Any, layer).keys, cast(Any, layer).values) for layer in cache.layers]
