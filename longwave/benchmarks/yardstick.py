"""`transformers`' own model as a subject, used as its own `generate` uses it.

Legend: `B` sequences of `N` tokens each, `S` steps of decoding, `V` vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from inspect import signature
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from longwave.benchmarks.profile import Part
from longwave.benchmarks.roofline import Level, Load
from longwave.benchmarks.subjects import Decoding, computing_in, training_task
from longwave.benchmarks.timing import Task
from longwave.hf import transformers_from
from longwave.model import Decoder


class Transformers:
    """Their model over the weights of a decoder; UserError if that is of no family that they have."""

    name = "transformers"

    def __init__(self, model: Decoder) -> None:
        self.model, self.llama = model, transformers_from(model)
        takes_cache = "cache" in signature(self.llama.forward).parameters
        self._cache_name = "cache" if takes_cache else "past_key_values"  # as it was called before transformers 5.24

    def prefill(self, context: Int64[Tensor, " N"]) -> Callable[[], Float[Tensor, " V"]]:
        return lambda: self._filled(context)[1]

    def after(self, context: Int64[Tensor, " N"]) -> Callable[[Int64[Tensor, "B S"]], dict[str, Decoding]]:
        filled, _ = self._filled(context)
        kinds = {"dynamic": self._dynamic}
        if not any(cast(Any, layer).is_sliding for layer in filled.layers):  # of which a static one forgets no step
            kinds["static"] = self._static
        return lambda following: {
            f"{self.name}, {kind} cache": decoding(filled, len(context), following) for kind, decoding in kinds.items()
        }

    def loss(self, tokens: Int64[Tensor, "B N"], precision: str) -> float:
        self.llama.train()
        with torch.no_grad(), computing_in(precision, tokens.device):
            return float(self._mean_loss(tokens))

    def trainer(self, tokens: Int64[Tensor, "B N"], precision: str) -> Task:
        return training_task(self.llama, lambda: self._mean_loss(tokens), precision, tokens.device)

    def parts(self) -> list[Part]:
        """What every layer holds, and what stands beside the layers, by the names of `transformers`."""
        own = [(name, module) for name, module in self.llama.named_modules() if name and _is_part(name)]
        return [Part(name, re.sub(r"\d+\.", "", name), module) for name, module in own]

    def _mean_loss(self, tokens: Tensor) -> Tensor:
        return self.llama(tokens, labels=tokens, use_cache=False).loss

    def _filled(self, context: Tensor) -> tuple[DynamicCache, Tensor]:
        """The cache after a context, and the logits of its last token."""
        cache = DynamicCache(config=self.llama.config)
        places = torch.arange(len(context), device=context.device)
        return cache, self._run(context.unsqueeze(0), places.unsqueeze(0), cache)[0]

    @torch.inference_mode()
    def _run(self, tokens: Tensor, places: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) after new tokens (B, n) at the given places."""
        self.llama.eval()
        remembered = {self._cache_name: cache, "use_cache": True}
        output = self.llama(tokens, position_ids=places, logits_to_keep=1, **remembered)
        return output.logits[:, 0]

    @torch.inference_mode()
    def _dynamic(self, filled: DynamicCache, context: int, following: Tensor) -> Decoding:
        cache = copy.deepcopy(filled)
        cache.batch_repeat_interleave(len(following))
        before = [dict(vars(layer)) for layer in cache.layers]

        def forget() -> None:
            for layer, attributes in zip(cache.layers, before, strict=True):
                vars(layer).update(attributes)  # a step makes new tensors and leaves the old ones as they are

        return self._decoding(cache, context, following, forget)

    @torch.inference_mode()
    def _static(self, filled: DynamicCache, context: int, following: Tensor) -> Decoding:
        batch, steps = following.shape
        cache = StaticCache(config=self.llama.config, max_cache_len=context + steps)
        for index, (key, value) in enumerate(_arrays(filled)):
            cache.update(key.repeat(batch, 1, 1, 1), value.repeat(batch, 1, 1, 1), index)

        def forget() -> None:
            for layer in cache.layers:
                cast(Any, layer).cumulative_length.fill_(context)

        return self._decoding(cache, context, following, forget)

    def _decoding(self, cache: Cache, context: int, following: Tensor, forget: Callable[[], None]) -> Decoding:
        batch, steps = following.shape
        places = torch.arange(context, context + steps, device=following.device).expand(batch, -1)

        @torch.inference_mode()
        def run() -> Tensor:
            pieces = [slice(step, step + 1) for step in range(steps)]
            logits = [self._run(following[:, piece], places[:, piece], cache) for piece in pieces]
            forget()
            return torch.stack(logits, dim=1)

        arrays = [one for pair in _arrays(cache) for one in pair]
        used = sum(one.nbytes * min(context, one.shape[-2]) // one.shape[-2] for one in arrays)
        reserved = sum(one.nbytes for one in arrays)
        return Decoding(run, Load({-1: Level.whole(context, batch, steps)}), used, reserved)


def _is_part(name: str) -> bool:
    """`lm_head`, `model.norm`, `model.layers.3.mlp`; not what they are made of, nor lists of layers."""
    return bool(re.fullmatch(r"(model\.)?((?!layers\b|model\b)\w+|layers\.\d+\.\w+)", name))


def _arrays(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (B, G, capacity, K) of each layer."""
    return [(cast(Any, layer).keys, cast(Any, layer).values) for layer in cache.layers]
