"""Small longwave models for the tests of longwave.hf, one per kind of layout, and padded batches for them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longwave.checkpoints import save
from longwave.config import ModelConfig, build
from longwave.hf import LongwaveConfig, LongwaveForCausalLM
from longwave.model import Decoder
from longwave.streams import Stream

LAYOUTS: dict[str, dict[str, Any]] = {
    "llama": {"layout": "3F", "attention": {"heads": 4, "kv_heads": 2}, "tie_embeddings": True},
    "subllm": {"layout": "F subllm(0.64: F subllm(0.5: F) F) F", "scales": {"logits": 0.5}},
    "window": {"layout": "F 2W", "window": {"size": 5}},
    "hybrid": {
        "layout": "S 2L S",
        "infllm": {"kernel_size": 2, "kernel_stride": 1, "block_size": 2, "window_size": 2, "topk": 2, "dense_len": 9},
    },
}
RETURNING = [name for name, shape in LAYOUTS.items() if "L" not in shape["layout"]]  # can take back a token
VOCABULARY = 31
ROWS = torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
LENGTHS = (12, 5, 1, 8)


def decoder(layout: str, dtype: torch.dtype = torch.float64, vocab_size: int = VOCABULARY) -> Decoder:
    """A small random model; large scores, so that every level keeps some tokens and drops some.

    In double precision, where two ways to the same function differ by 1e-12 or so: these weights are so large that each
    way's own error is 1e-5 in single precision.
    """
    shape = {"vocab_size": vocab_size, "hidden_size": 16, "attention": {"heads": 2}, "mlp": {"size": 24}}
    model = Decoder(build(ModelConfig, {**shape, **LAYOUTS[layout]}, "test")).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            scale = 2.0 if "score" in name else 0.4
            weight.copy_(scale * torch.randn(weight.shape, generator=generator) + ("norm" in name))
    return model.to(dtype)


def in_class(model: Decoder, folder: Path) -> LongwaveForCausalLM:
    """The model through a folder and AutoModelForCausalLM."""
    save(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def wrapped(model: Decoder) -> LongwaveForCausalLM:
    """The very model in the class, without a folder."""
    return LongwaveForCausalLM(LongwaveConfig(model.config.to_dict()), model).eval()


def alone(model: Decoder, tokens: Tensor) -> Tensor:
    """Longwave's own logits of one sequence."""
    with torch.no_grad():
        return model(tokens, Stream.of([len(tokens)]))


def greedy(model: Decoder, tokens: Tensor, count: int) -> list[int]:
    """Longwave's own greedy loop, without any cache."""
    for _ in range(count):
        tokens = torch.cat([tokens, alone(model, tokens)[-1:].argmax(-1)])
    return tokens[-count:].tolist()


def padded(side: str) -> tuple[Tensor, Tensor]:
    """ROWS cut to LENGTHS, with pads of a token that occurs as a real one too, and the mask of what is real."""
    ids, mask = torch.full_like(ROWS, 7), torch.zeros_like(ROWS)
    for row, length in enumerate(LENGTHS):
        real = slice(ROWS.shape[1] - length, None) if side == "left" else slice(0, length)
        ids[row, real], mask[row, real] = ROWS[row, :length], 1
    return ids, mask


def near(found: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of double precision."""
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
