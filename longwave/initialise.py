"""Initial weights, each drawn from a generator keyed by the seed and the tensor's own name.

Block 7 of a Llama and block 7 of a SUBLLM of the same shape therefore begin with the same weights.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longwave.draws import key

if TYPE_CHECKING:
    from longwave.model import Decoder

_OUTPUT_PROJECTIONS = ("o_proj", "down_proj")


def initialise(model: Decoder, seed: int) -> None:
    """Fills every weight in place, as `config.init` says; several at a time, since none waits for another's draws."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for drawn in [pool.submit(draw) for draw in _draws(model, seed)]:
            drawn.result()


def _draws(model: Decoder, seed: int) -> Iterator[Callable[[], object]]:
    init, width = model.config.init, model.config.hidden_size
    yield _normal(model.embed.weight, init.embedding_std or width**-0.5, seed, "embed")
    if model.head is not None:
        yield _uniform(model.head.weight, width**-0.5, seed, "head")
    for block in model.blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                deep = math.sqrt(2 * (block.site.depth + 1)) if name.endswith(_OUTPUT_PROJECTIONS) else 1
                yield _normal(module.weight, init.std / deep, seed, f"{block.site.name}.{name}")
                if module.bias is not None:
                    yield partial(nn.init.zeros_, module.bias)
    for resampler in model.resamplers:
        yield _uniform(resampler.score.weight, width**-0.5, seed, resampler.site.name)


def _normal(weight: Tensor, std: float, seed: int, name: str) -> Callable[[], Tensor]:
    return partial(nn.init.trunc_normal_, weight, std=std, a=-3 * std, b=3 * std, generator=_generator(seed, name))


def _uniform(weight: Tensor, bound: float, seed: int, name: str) -> Callable[[], Tensor]:
    return partial(nn.init.uniform_, weight, -bound, bound, generator=_generator(seed, name))


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(key(seed, zlib.crc32(name.encode())) >> 1)
