"""A mixer taken away: what runs through it shows, and one that does nothing is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch

import longwave as lw
from longwave.config import build
from longwave.data.packed import PackedTokens
from longwave.data.tokenizer import Tokenizer
from longwave.evaluation.ablation import _by_chance, ablate, mixers_of, silenced
from longwave.evaluation.held_out import held_out_loss
from longwave.evaluation.recall import RecallAsked
from longwave.intervals import mean_interval
from longwave.model import Decoder
from longwave.streams import Stream

LAYOUTS = ("2F", "F L S", "F subllm(0.5: L) F")
ASKED = RecallAsked((64,))


def tiny(layout: str) -> Decoder:
    shape = {"vocab_size": runs.VOCABULARY, "hidden_size": 32, "layout": layout, "context_window": 64}
    tables = {"attention": {"heads": 2, "kv_heads": 1}, "mlp": {"size": 48}}
    if "S" in layout:
        tables["infllm"] = runs.MODELS["around a hybrid"]["infllm"]
    config = build(lw.ModelConfig, {**shape, **tables, "init": {"std": 0.2}}, "test")
    model = Decoder(config).double().eval()
    model.tokenizer = Tokenizer.load(runs.prepared())
    return model


def windows() -> PackedTokens:
    return PackedTokens(runs.prepared(), "held_out", 64, keep_last=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mixer_is_taken_away_and_the_others_stay(layout: str):
    """The same as a model whose mixer puts out nothing, and as it was before when it is done."""
    model = tiny(layout)
    before = held_out_loss(model, windows(), windows=8).loss
    found = ablate(model, windows(), (), ASKED)
    assert held_out_loss(model, windows(), windows=8).loss == before
    names = [(letter, part.site.name) for letter, part in mixers_of(model)]
    assert [(one.letter, one.mixer) for one in found.mixers] == names
    for one, (_, part) in zip(found.mixers, mixers_of(model), strict=True):
        kept = {name: tensor.clone() for name, tensor in part.o_proj.named_parameters()}  # pyright: ignore
        with torch.no_grad():
            part.o_proj.weight.zero_()  # pyright: ignore
        by_hand = held_out_loss(model, windows(), windows=64)
        assert one.loss is not None
        assert abs(one.loss - by_hand.loss) < 0.05  # means of windows, of which the last is shorter
        with torch.no_grad():
            part.o_proj.weight.copy_(kept["weight"])  # pyright: ignore
        assert one.change is not None
        assert found.loss is not None
        assert one.change.mean == pytest.approx(one.loss - found.loss, abs=1e-9)
        assert one.change.mean != 0


def test_a_mixer_that_does_nothing_is_named():
    model = tiny("3F")
    with torch.no_grad():
        mixers_of(model)[1][1].o_proj.weight.zero_()  # pyright: ignore
    found = ablate(model, windows(), (), ASKED)
    assert [one.changes_nothing for one in found.mixers] == [False, True, False]
    assert found.mixers[1].change == mean_interval([0.0] * found.windows)


def test_silence_ends_with_its_block_whatever_happens():
    model = tiny("2F")
    tokens, stream = torch.arange(9), Stream.of([9])
    whole = model(tokens, stream)
    try:
        with silenced(mixers_of(model)[0][1]):
            assert not torch.equal(model(tokens, stream), whole)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(model(tokens, stream), whole)


def test_answers_that_turn_by_chance_are_no_difference():
    assert _by_chance(0, 0) == 1
    assert _by_chance(3, 3) == 1
    assert _by_chance(5, 0) == pytest.approx(2 / 32)
    assert _by_chance(0, 6) == pytest.approx(2 / 64)


def test_from_the_command_line(longwave, refuses, tmp_path: Path):
    lw.save(tiny("F L"), tmp_path / "model")
    page = tmp_path / "page.html"
    found = longwave("eval", tmp_path / "model", runs.prepared(), "--ablate", "--json", "--page", page)
    assert [one["letter"] for one in found.json["ablation"]["mixers"]] == ["F", "L"]
    assert "blocks.1.mixer (L)" in found.out
    assert "blocks.1.mixer (L)" in page.read_text()
    assert found.json["command"].endswith("--ablate")
    asked = ["--tasks", "key-value", "--lengths", "60", "--samples", "3"]
    blind = longwave("eval", tmp_path / "model", *asked, "--ablate", "--json")
    assert [one["changes_nothing"] for one in blind.json["ablation"]["mixers"]] == [None, None]
    assert "the whole model answers too little right" in blind.out
    words = ["--tasks", "synthetic", "--ablate"]
    refuses("eval", tmp_path / "model", *words, says=["ablate: give prepared data or a recall"])
    for place, says in (
        (tmp_path, "a folder; give the name of a page"),
        (tmp_path / "no/p.html", "there is no folder"),
    ):
        refuses("eval", tmp_path / "model", *asked, "--page", place, says=[f"page = {place}: {says}"])
