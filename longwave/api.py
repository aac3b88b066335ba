"""The public face of the library: `load`, `save`, `generate` and `stream`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import torch

from longwave import checkpoints
from longwave.config import build
from longwave.data.tokenizer import Tokenizer
from longwave.engine.sampling import Sampling
from longwave.errors import UserError, require, shown
from longwave.inference.drafter import Draft
from longwave.inference.text import Continuation, generate_text, joined
from longwave.machine import device_of, dtype_of
from longwave.model import Decoder

Prompts = list[str] | tuple[str, ...]
_OF_TEXT = ("max_new_tokens", "stop", "chat", "draft")  # options of `generate_text`; the others are those of `Sampling`


class GenerateOptions(TypedDict, total=False):
    """How `generate` and `stream` continue prompts.

    max_new_tokens: the most of each prompt (128). temperature: 0, the default, takes the likeliest token. top_k, top_p,
    seed: of the draw, where there is a temperature (`Sampling`). stop: a string that ends a text, or several; a special
    token's name ends it at that token. chat: whether a prompt is a user's message, which the assistant answers.
    draft: who drafts tokens that the model only checks, which changes no text: `lookup` (what followed the last tokens
    before), `layers:N` (the model's own first), or a smaller model with the same tokens, loaded or by its folder.
    """

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    stop: str | Sequence[str]
    chat: bool
    draft: Draft


def load(path: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu") -> Decoder:
    """Loads a model and its tokenizer (`model.tokenizer`) from a folder of any supported format, or a hub id.

    dtype: of the weights, such as `"bf16"` or `torch.bfloat16`; as they were saved by default. `"int8"`, for inference
    only, rounds the weights of the products in blocks to int8 (`Decoder.pack`), and holds all else in bf16.
    device: `cpu`, `cuda`, `cuda:1`, or `auto` for a GPU where there is one. Raises UserError for a folder that does not
    fit.
    """
    packed = dtype in ("int8", torch.int8)
    place, kind = device_of(device), None if dtype is None else dtype_of("bf16" if packed else dtype)
    model = checkpoints.load(path, dtype=kind, device=place, tokenizer=True)
    return model.pack() if packed else model


def save(model: Decoder, path: str | Path, *, format: str = "longwave", layout: str | None = None) -> None:
    """Saves a model with its tokenizer; the folder appears whole or not at all.

    format: "longwave", or the foreign format to write, such as "llama" for an ordinary `transformers` folder; or "gguf"
    and, with matrices of eight bits, "gguf-q8_0", for one file for llama.cpp, whose name ends in .gguf.
    layout: the former name of `format`, which still works and warns.
    """
    if layout is not None:
        warnings.warn(f"a folder's kind is its format: write format={layout!r}", DeprecationWarning, stacklevel=2)
    checkpoints.save(model, path, tokenizer=model.tokenizer, format=layout or format)


@overload
def generate(model: Decoder, prompt: str, **options: Unpack[GenerateOptions]) -> Continuation: ...
@overload
def generate(model: Decoder, prompt: Prompts, **options: Unpack[GenerateOptions]) -> list[Continuation]: ...
def generate(
    model: Decoder, prompt: str | Prompts, **options: Unpack[GenerateOptions]
) -> Continuation | list[Continuation]:
    """The model's continuation of a prompt, or a list of those of several, which run together.

    A `Continuation` is a string whose `ended` says why it ends: `end_token`, `stop`, `max_new_tokens` or
    `context_window`.

    options: as in `GenerateOptions`. Raises UserError for a prompt or an option that does not fit, and MachineError for
    a model whose logits are not finite.
    """
    found = joined(stream(model, prompt, **options))
    return found[0] if isinstance(prompt, str) else found


def stream(model: Decoder, prompt: str | Prompts, **options: Unpack[GenerateOptions]) -> Iterator[Continuation]:
    """The same in pieces, as the model writes them; joined, the pieces of a prompt are what `generate` returns.

    A piece's `prompt` is the index of the prompt that it continues. The last one of a prompt says in `ended` why the
    text ends, and may be empty.
    """
    texts, draw = dict[str, Any](), dict[str, Any]()
    for name, value in options.items():
        (texts if name in _OF_TEXT else draw)[name] = value
    sampling = build(Sampling, draw, "generate")  # refuses what is no option
    prompts = [prompt] if isinstance(prompt, str) else prompt
    return generate_text(model, _tokenizer_of(model), prompts, sampling=sampling, **texts)


def _tokenizer_of(model: Any) -> Tokenizer:
    require(isinstance(model, Decoder), f"model = {shown(model)}: give a model, such as lw.load(folder)")
    if model.tokenizer is None:
        raise UserError("this model has no tokenizer: load a folder with tokenizer.json, or set model.tokenizer")
    return model.tokenizer
