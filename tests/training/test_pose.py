"""PoSE: positions of a long window in a short one, drawn for every window by itself, which rotation alone goes by."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from contract import Case
from hypothesis import given
from hypothesis import strategies as st
from runs import CrashAt, StopAt, contents, differing, furthest, in_double, losses, trained

import longwave as lw
from longwave.cli import main
from longwave.config import build
from longwave.data.packed import Batch, PackedTokens
from longwave.evaluation.held_out import held_out_loss
from longwave.mixers import InfllmConfig, LightningConfig
from longwave.model import Decoder
from longwave.streams import Stream, Windows
from longwave.training.data import TrainingData
from longwave.training.loop import Interrupted, Trainer
from longwave.training.pose import PoseConfig, jumping, with_jumps
from longwave.training.recipe import Recipe, read_recipe

TARGET = 512


def recipe(model: str = "llama", target: int = TARGET, chunks: int = 2, mix: bool = False, **training: Any) -> Recipe:
    values = runs.values(model, "adamw", pose={"window": target, "chunks": chunks}, **training)
    values["model"]["context_window"] = TARGET
    if mix:
        values["data"] = {"mix": [{"folder": str(runs.prepared()), "share": 2.0}]}
    return build(Recipe, values, "tests")


def plain(model: str = "llama", **training: Any) -> Recipe:
    made = recipe(model, **training)
    return replace(made, training=replace(made.training, pose=None))


# --- positions --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(2, 9), st.integers(0, 5000), st.integers(0, 1 << 62))
def test_positions_rise_and_stay_within_the_long_window(length: int, chunks: int, room: int, key: int):
    positions = jumping(length, chunks, room, key)
    assert positions.shape == (length,)
    assert positions[0] == 0
    assert bool((positions.diff() >= 1).all())
    assert int(positions[-1]) <= length - 1 + room
    assert int((positions.diff() > 1).sum()) < chunks
    assert room > 0 or torch.equal(positions, torch.arange(length))


@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_all_distances_of_the_long_window_are_seen(chunks: int):
    """The published check: 4,000 windows of 256 tokens cover every distance of 2,048."""
    seen = torch.zeros(2048, dtype=torch.bool)
    for sample in range(4000):
        positions = jumping(256, chunks, 2048 - 256, key=sample)
        begins = [0, *((positions.diff() > 1).nonzero().flatten() + 1).tolist(), 256]
        ends = [(int(positions[begin]), int(positions[end - 1])) for begin, end in pairwise(begins)]
        for (first, last), (begin, end) in combinations_with_replacement(ends, 2):
            seen[max(begin - last, 0) : end - first + 1] = True
    assert seen.float().mean() > 0.999


def test_jumps_and_cuts_are_uniform():
    drawn = [jumping(101, 2, 1000, key=sample) for sample in range(4000)]
    jumps = torch.tensor([int(one[-1]) - 100 for one in drawn], dtype=torch.float64)
    cuts = torch.tensor([int((one.diff() > 1).nonzero()[0]) for one in drawn if one[-1] > 100], dtype=torch.float64)
    assert (int(jumps.min()), int(jumps.max())) == (0, 1000)
    for found, mean, spread in ((jumps, 500.0, 1001 / 12**0.5), (cuts, 49.5, 100 / 12**0.5)):
        assert abs(float(found.mean()) - mean) < 4 * spread / 4000**0.5
        assert float(found.std()) == pytest.approx(spread, rel=0.03)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("chunks", [2, 4])
def test_every_document_of_a_window_has_jumps_of_its_own(chunks: int, mix: bool):
    data = TrainingData(recipe(chunks=chunks, mix=mix))
    batch, room = data.batch(range(40)), TARGET - runs.WINDOW
    assert batch.positions is not None
    pieces = batch.positions.split(list(batch.runs))
    for piece, length in zip(pieces, batch.runs, strict=True):
        assert piece[0] == 0
        assert bool((piece.diff() >= 1).all())
        assert int(piece[-1]) <= length - 1 + room < TARGET
    assert len({tuple((piece - torch.arange(len(piece))).unique().tolist()) for piece in pieces}) > len(pieces) // 2
    tokens, _, stream = batch.inputs("cpu")
    assert torch.equal(stream.positions, batch.positions)
    assert torch.equal(stream.order, Stream.of(batch.runs).order)
    assert torch.equal(tokens, TrainingData(plain()).batch(range(40)).tokens)


def test_the_draws_of_a_window_are_its_own_whatever_it_lies_beside():
    data = TrainingData(recipe())
    whole, apart = data.batch(range(12)), [data.batch(range(at, at + 3)) for at in range(0, 12, 3)]
    assert torch.equal(whole.positions, torch.cat([one.positions for one in apart]))


def test_a_window_has_other_jumps_in_every_epoch_and_of_every_seed():
    data, count = TrainingData(recipe()), len(TrainingData(recipe()).sources[0].train)
    sampler = data.sources[0].sampler
    again = next(place for place in range(count, 2 * count) if sampler.window(place) == sampler.window(0))
    first, second = data.batch(range(1)), data.batch(range(again, again + 1))
    assert torch.equal(first.tokens, second.tokens)
    assert not torch.equal(first.positions, second.positions)
    given = Batch(first.tokens, first.targets, first.runs, first.windows, first.samples, first.documents)
    other = with_jumps(given, PoseConfig(TARGET), runs.WINDOW, seed=1)
    assert not torch.equal(first.positions, other.positions)


# --- what goes by positions, and what by the order --------------------------------------------------------------------

HYPE = InfllmConfig(kernel_size=2, kernel_stride=1, block_size=2, window_size=2, topk=2, dense_len=9, logit_scaling=9.0)
UNTURNED = {"infllm": HYPE, "lightning": LightningConfig(rotary=False)}
ROWS = 24


def outputs(model: Decoder, positions: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
    stream = Stream.of([ROWS], windows=Windows((ROWS,), (0,)))
    tokens = torch.arange(ROWS) % 61 if tokens is None else tokens
    with torch.no_grad():
        return model(tokens, replace(stream, positions=positions))


def of_layout(layout: str, **fields: Any) -> Decoder:
    model = Decoder(Case(layout, fields).config(), seed=2).double().eval()
    with torch.no_grad():  # scores that keep some tokens and drop some
        for level in model.resamplers:
            level.score.weight.normal_(generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("layout", ["S", "L", "S L S", "subllm(0.6: L) S", "S subllm(0.6: S L) L"])
@pytest.mark.parametrize("training", [False, True])
def test_what_does_not_rotate_does_not_see_the_positions(layout: str, training: bool):
    """Blocks of keys, HyPE's growing queries, decays and levels: all by the order, to the bit."""
    fields = {name: table for name, table in UNTURNED.items() if {"infllm": "S", "lightning": "L"}[name] in layout}
    model = of_layout(layout, **fields).train(training)
    model.set_step(0)
    assert torch.equal(outputs(model, torch.arange(ROWS)), outputs(model, jumping(ROWS, 3, 4000, key=5)))


@pytest.mark.parametrize("layout", ["2F", "2W", "2L", "F subllm(0.6: F L) W"])
def test_what_rotates_sees_distances_of_positions_alone(layout: str):
    model, jumped = of_layout(layout), jumping(ROWS, 3, 4000, key=5)
    found = outputs(model, jumped)
    assert torch.allclose(found, outputs(model, jumped + 1000), atol=1e-3)
    assert not torch.allclose(found, outputs(model, torch.arange(ROWS)), atol=1e-2)


@pytest.mark.parametrize("layout", ["F", "W", "L", "F subllm(0.6: W) F"])
def test_no_token_sees_a_later_one_across_a_jump(layout: str):
    model, jumped = of_layout(layout), jumping(ROWS, 3, 4000, key=5)
    tokens = torch.arange(ROWS) % 61
    found = outputs(model, jumped, tokens)
    for row in range(1, ROWS):
        later = tokens.clone()
        later[row:] = (later[row:] + 7) % 61
        assert torch.allclose(outputs(model, jumped, later)[:row], found[:row], atol=1e-12)


def test_a_sliding_window_counts_tokens_across_a_jump():
    model, size = of_layout("W"), 5
    positions = torch.arange(ROWS) + 4000 * (torch.arange(ROWS) >= 12)
    found = outputs(model, positions)
    for changed in range(ROWS):
        tokens = torch.arange(ROWS) % 61
        tokens[changed] = 60
        moved = (outputs(model, positions, tokens) - found).abs().amax(1) > 1e-9
        assert moved.nonzero().flatten().tolist() == list(range(changed, min(changed + size, ROWS)))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", runs.MODELS)
def test_a_target_of_the_window_itself_is_plain_training_to_the_bit(tmp_path: Path, model: str):
    posed = trained(recipe(model, target=runs.WINDOW, steps=4), tmp_path / "pose")
    assert differing(contents(posed), contents(trained(plain(model, steps=4), tmp_path / "plain"))) == []
    assert losses(tmp_path / "pose") == losses(tmp_path / "plain")


@pytest.mark.parametrize(
    ("model", "observer"), [("llama", StopAt(3)), ("published", CrashAt(5)), ("causal", CrashAt(3))]
)
def test_a_run_resumes_to_the_bit(tmp_path: Path, model: str, observer: StopAt):
    run = recipe(model, chunks=3, checkpoint_every=2)
    straight = trained(run, tmp_path / "straight")
    with pytest.raises((Interrupted, ConnectionAbortedError)):
        trained(run, tmp_path / "broken", observer)
    resumed = trained(run, tmp_path / "broken")
    assert differing(contents(resumed), contents(straight)) == []
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    with pytest.raises(lw.UserError, match=r"another run \(training\.pose"):
        Trainer(recipe(model, chunks=2, checkpoint_every=2), tmp_path / "broken")


def test_micro_batches_change_nothing(tmp_path: Path):
    one = in_double(recipe(steps=3), tmp_path / "whole")
    other = in_double(recipe(steps=3, micro_windows=1), tmp_path / "parts")
    one.run(), other.run()
    assert furthest(contents(one), contents(other)) < 1e-9


def test_held_out_text_has_ordinary_positions_and_costs_are_those_of_the_short_window(tmp_path: Path):
    trainer = trained(recipe(), tmp_path / "pose")
    trained(plain(), tmp_path / "plain")
    last, other = losses(tmp_path / "pose")[-1], losses(tmp_path / "plain")[-1]
    held_out = PackedTokens(runs.prepared(), "held_out", runs.WINDOW, keep_last=True)
    assert last["held_out_loss"] == held_out_loss(trainer.model, held_out, windows=4).loss
    assert last["loss"] != other["loss"]
    assert (last["flops"], last["tokens"]) == (other["flops"], other["tokens"])
    assert f"{TARGET}" in (tmp_path / "pose/model/README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.pose.window=32"], r"training\.pose\.window = 32: at least training\.window = 64"),
        (["training.pose.window=128"], r"training\.pose\.window = 128: at most model\.context_window = 64; give more"),
        (["training.pose.window=0"], r"training\.pose\.window = 0: 1 token or more"),
        (["training.pose.window=x"], r"training\.pose\.window = 'x'"),
        (["training.pose=3"], r"training\.pose = 3: a table"),
        (["training.pose.chunks=3"], r"training\.pose\.window is missing"),
        (["training.pose.window=64", "training.pose.chunks=1"], r"training\.pose\.chunks = 1: 2 or more"),
        (["training.pose.window=64", "training.pose.chunks=5000"], r"training\.pose\.chunks = 5000: .*at most 1024"),
        (["training.pose.target=64"], r"unknown key training\.pose\.target = 64"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(tmp_path: Path, capsys: Any, words: list[str], message: str):
    path = runs.write_recipe(tmp_path / "r.toml", "llama", "adamw")
    assert main(["train", str(path), *words, "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.search(message, said[0]), said[0]
    assert not (tmp_path / "run").exists()


def test_positions_that_nothing_goes_by_are_refused(tmp_path: Path):
    path = runs.write_recipe(tmp_path / "r.toml", "llama", "adamw")
    changes = {"model.layout": "2S", "training.pose.window": 64}
    with pytest.raises(lw.UserError, match=r"training\.pose has no effect: no part of the model rotates"):
        read_recipe(path, changes)
