"""The same model on a GPU: parity with the CPU, cached decoding, and a training step."""

from __future__ import annotations

import copy

import pytest
import torch

from longwave.config import AttentionConfig, InfllmConfig, MLPConfig, ModelConfig
from longwave.model import Decoder
from longwave.ops.block_sparse import Geometry, block_sparse_attention
from longwave.stream import Stream, Windows

pytestmark = pytest.mark.gpu

LAYOUTS = ["3F", "2W 2F", "F subllm(0.64: F subllm(0.64: F) F) F", "S 2L S", "L subllm(0.64: S L) L"]
SPARSE = InfllmConfig(kernel_size=2, kernel_stride=1, block_size=2, window_size=4, topk=2, dense_len=9)


def decoder(layout: str) -> Decoder:
    window = 8 if "W" in layout else None
    shape = AttentionConfig(heads=4, kv_heads=2, window=window)
    sparse = SPARSE if "S" in layout else None
    model = Decoder(ModelConfig(97, 64, layout, attention=shape, mlp=MLPConfig(96), infllm=sparse))
    for resampler in model.resamplers:
        resampler.score.weight.data *= 20
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_cpu(layout: str):
    model = decoder(layout).eval()
    tokens, lengths = torch.randint(0, 97, (60,)), [13, 40, 7]
    expected = model(tokens, Stream.of(lengths))
    found = copy.deepcopy(model).cuda()(tokens.cuda(), Stream.of(lengths, device="cuda"))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_decoding_in_pieces_is_one_pass(layout: str):
    model = decoder(layout).eval().cuda().double()
    tokens = torch.randint(0, 97, (40,), device="cuda")
    state, pieces, start = model.state(1), [], 0
    for length in (20, 1, 7, 1, 11):
        pieces.append(model(tokens[start : start + length], state.stream([length]), state))
        start += length
    expected = model(tokens, Stream.of([40], device="cuda"))
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_cpu(layout: str):
    model = decoder(layout).double()
    other = copy.deepcopy(model).cuda()
    tokens, sizes = torch.randint(0, 97, (64,)), (32, 32)
    for one, device in ((model, "cpu"), (other, "cuda")):
        one.set_step(0)
        stream = Stream.of(sizes, windows=Windows(sizes, (0, 1)), device=device)
        one.loss(tokens.to(device), tokens.roll(-1).to(device), stream).backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad.cpu(), mine.grad, atol=1e-8, rtol=1e-6)


def test_block_sparse_attention_is_that_of_the_cpu():
    """The torch form: lists, outputs and gradients, of queries before and after they choose."""
    geometry = Geometry(kernel_size=4, stride=2, block_size=8, init_blocks=1, local_blocks=2, topk=6)
    inputs = [torch.randn(150, heads, 32, dtype=torch.float64) for heads in (4, 2, 2)]
    found = []
    for device in ("cpu", "cuda"):
        own = [one.to(device).requires_grad_() for one in inputs]
        output = block_sparse_attention(*own, (100, 50), geometry, scale=0.2, form="torch")
        found.append([output, *torch.autograd.grad(output.square().sum(), own)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs.cpu(), mine, atol=1e-10, rtol=0)
