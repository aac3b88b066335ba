"""The same model on a GPU: parity with the CPU, cached decoding, and a training step."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import runs
import torch
from op_inputs import of_runs, of_stream
from torch import Tensor

from longwave.config import ModelConfig, build
from longwave.layers.mlp import MLPConfig
from longwave.mixers import AttentionConfig, InfllmConfig, WindowConfig
from longwave.model import Decoder
from longwave.ops.attention import Pattern, attention
from longwave.ops.block_sparse import Geometry, block_sparse_attention
from longwave.resamplers import SubllmConfig
from longwave.streams import Places, Runs, Stream, Windows
from longwave.training.loop import Interrupted
from longwave.training.recipe import Recipe

pytestmark = pytest.mark.gpu

LAYOUTS = ["3F", "2W 2F", "F subllm(0.64: F subllm(0.64: F) F) F", "S 2L S", "L subllm(0.64: S L) L"]
SPARSE = InfllmConfig(kernel_size=2, kernel_stride=1, block_size=2, window_size=4, topk=2, dense_len=9)


def decoder(layout: str) -> Decoder:
    tables = {"W": {"window": WindowConfig(8)}, "S": {"infllm": SPARSE}}
    needs = {name: table for letter in tables if letter in layout for name, table in tables[letter].items()}
    shape = AttentionConfig(heads=4, kv_heads=2)
    model = Decoder(ModelConfig(97, 64, layout, attention=shape, mlp=MLPConfig(96), **needs))
    for resampler in model.resamplers:
        resampler.score.weight.data *= 20
    return model


def error(found: Tensor, right: Tensor, floor: float = 0.0) -> float:
    """Relative to the norm of what is right, or to `floor` where that is less."""
    return float((found.detach().double() - right).norm() / right.norm().clamp(min=floor))


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
        assert error(theirs.grad.cpu(), mine.grad) < 1e-6  # cosines in fp32 differ in their last bit


def test_block_sparse_attention_is_that_of_the_cpu():
    """The torch form: lists, outputs and gradients, of queries before and after they choose."""
    geometry = Geometry(kernel_size=4, stride=2, block_size=8, init_blocks=1, local_blocks=2, topk=6)
    inputs = [torch.randn(150, heads, 32, dtype=torch.float64) for heads in (4, 2, 2)]
    found = []
    for device in ("cpu", "cuda"):
        own = [one.to(device).requires_grad_() for one in inputs]
        laid = of_stream(*own[1:], (100, 50))
        output = block_sparse_attention(own[0], *laid, geometry, scale=0.2, form="torch")
        found.append([output, *torch.autograd.grad(output.square().sum(), own)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs.cpu(), mine, atol=1e-10, rtol=0)


@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("lengths", [(300, 4, 41), (0, 130, 1), (64, 64), (500,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_over_ragged_runs(lengths: tuple[int, ...], window: int | None, dtype: torch.dtype):
    """All runs in one kernel in bf16, one after the other in fp32; against the plain form over the same inputs."""
    shapes = [(sum(lengths), heads, 64) for heads in (6, 2, 2)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    found = []
    for device, wide, form in (("cuda", dtype, "torch"), ("cpu", torch.float64, "reference")):
        own = [one.to(device, wide).requires_grad_() for one in inputs]
        laid, pattern = of_stream(*own[1:], lengths), Pattern(window)
        output = attention(own[0], *laid, pattern=pattern, scale=0.125, form=form).output
        found.append([output, *torch.autograd.grad(output.square().sum(), own)])
    for mine, theirs in zip(*found, strict=True):
        floor = 16 * theirs.numel() ** 0.5  # a query that sees one key has no gradient: terms of this size cancel out
        assert error(mine.cpu(), theirs, floor) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_a_chunk_after_a_long_past_holds_no_mask(dtype: torch.dtype):
    """2,048 queries against 32,768 keys: their scores would take 1.5 GiB in bf16."""
    query = torch.randn(2048, 12, 64, dtype=dtype, device="cuda")
    keys, values = (torch.randn(4, 32768, 64, dtype=dtype, device="cuda") for _ in range(2))
    runs_and_places = Runs.of([2048], "cuda"), Places(*torch.tensor([[0], [32768]], device="cuda"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = attention(query, keys, values, *runs_and_places, scale=0.125).output
    assert torch.cuda.max_memory_allocated() - before < 300 << 20
    rows = torch.tensor([0, 1, 1000, 2047], device="cuda")
    for row in rows:
        past = 32768 - 2048 + int(row) + 1
        one = of_runs([keys[:, :past]], [values[:, :past]], (1,))
        alone = attention(query[row : row + 1], *one, scale=0.125, form="reference").output
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-2 if dtype == torch.bfloat16 else 1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_single_queries_after_a_past(dtype: torch.dtype):
    query = torch.randn(3, 12, 64, dtype=dtype, device="cuda")
    pasts = [torch.randn(2, 4, length, 64, dtype=dtype, device="cuda") for length in (5000, 1, 77)]
    keys, values = ([past[side] for past in pasts] for side in (0, 1))
    for window in (None, 50):
        options = {"pattern": Pattern(window), "scale": 0.125}
        found = attention(query, *of_runs(keys, values, (1, 1, 1)), **options).output
        wide = of_runs(*([part.double() for part in side] for side in (keys, values)), (1, 1, 1))
        right = attention(query.double(), *wide, **options, form="reference").output
        assert error(found, right) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("selection", ["published", "causal"])
def test_a_training_step_in_bf16_over_documents(selection: str):
    """Ragged documents under autocast: the loss and the gradients of the CPU in fp32, within bf16's precision."""
    shape = {"attention": AttentionConfig(heads=4, kv_heads=2), "mlp": MLPConfig(192)}
    layout = "F subllm(0.64: F subllm(0.64: F) F) F"
    model = Decoder(ModelConfig(97, 128, layout, **shape, subllm=SubllmConfig(selection=selection)))
    other = copy.deepcopy(model).cuda()
    tokens, sizes = torch.randint(0, 97, (512,)), (256, 256)
    losses = []
    for one, device in ((model, "cpu"), (other, "cuda")):
        one.set_step(0)
        stream = Stream.of((100, 156, 7, 249), windows=Windows(sizes, (0, 1)), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = one.loss(tokens.to(device), tokens.roll(-1).to(device), stream)
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    mine, theirs = (torch.cat([p.grad.flatten().cpu() for p in one.parameters()]) for one in (model, other))
    assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.98


@pytest.mark.parametrize("model", runs.MODELS)
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, model: str):
    """In bf16, over windows so long that the backward pass of attention adds from several blocks of queries."""
    run = {"device": "cuda", "precision": "bf16", "window": 1024, "evaluate_every": 0, "deterministic": True}
    values = runs.values(model, "adamw", **run)
    values["model"] |= {"context_window": 1024, "hidden_size": 128}
    recipe = build(Recipe, values, "test")
    straight = runs.trained(recipe, tmp_path / "straight")
    with pytest.raises(Interrupted):
        runs.trained(recipe, tmp_path / "resumed", runs.StopAt(3))
    resumed = runs.trained(recipe, tmp_path / "resumed")
    assert runs.losses(tmp_path / "resumed") == runs.losses(tmp_path / "straight")
    assert runs.differing(runs.contents(resumed), runs.contents(straight)) == []
