"""The public face of the library: `load`, `save` and `generate`."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from longwave import checkpoints
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.inference.sampling import Sampling
from longwave.inference.text import complete
from longwave.model import Decoder


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Decoder:
    """Loads a model and its tokenizer (`model.tokenizer`) from a folder of any supported format, or a hub id.

    dtype: of the weights; as they were saved by default. Raises UserError for a folder that does not fit.
    """
    folder = checkpoints.find(path)
    model = checkpoints.load(folder, dtype=dtype, device=device)
    model.tokenizer = Tokenizer.find(folder)
    return model


def save(model: Decoder, path: str | Path, *, format: str = "longwave", layout: str | None = None) -> None:
    """Saves a model with its tokenizer; the folder appears whole or not at all.

    format: "longwave", or the foreign format to write, such as "llama" for an ordinary `transformers` folder.
    layout: the former name of `format`, which still works and warns.
    """
    if layout is not None:
        warnings.warn(f"a folder's kind is its format: write format={layout!r}", DeprecationWarning, stacklevel=2)
    checkpoints.save(model, path, tokenizer=model.tokenizer, format=layout or format)


def generate(
    model: Decoder,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
) -> str:
    """The model's continuation of a prompt, greedy at temperature 0. UserError for a prompt that does not fit."""
    if model.tokenizer is None:
        raise UserError("this model has no tokenizer: load a folder with tokenizer.json, or set model.tokenizer")
    sampling = Sampling(temperature, top_k, top_p, seed)
    return complete(model, model.tokenizer, [prompt], max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)[0]
