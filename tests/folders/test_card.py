"""The model card of saved folders: what it says, and that it is people's to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from model_folders import reconfigure, small
from runs import recipe

import longwave
from longwave import files, hf
from longwave.checkpoints import save
from longwave.checkpoints.card import card
from longwave.errors import UserError
from longwave.training.loop import Trainer

LAYOUT = "F subllm(0.5: F) F"


def head(path: Path) -> dict[str, Any]:
    return yaml.safe_load((path / files.CARD).read_text().split("---")[1])


@pytest.mark.parametrize("format", ["longwave", "llama", "subllm"])
def test_a_saved_folder_says_what_it_is(tmp_path: Path, format: str):
    model = small("2F" if format == "llama" else "F subllm(0.5: F)", norm_eps=1e-5)
    save(model, tmp_path / "m", format=format)
    text = (tmp_path / "m" / files.CARD).read_text()
    assert f"`{model.config.layout}`" in text
    assert f"{sum(weight.numel() for weight in model.parameters()):,} parameters" in text
    assert f"| format | {format}, written by longwave" in text
    assert "Nothing about its training is known" in text
    library = "transformers" if format == "llama" else "longwave"
    assert head(tmp_path / "m") == {"library_name": library, "pipeline_tag": "text-generation", "tags": ["longwave"]}
    assert str(tmp_path) not in text
    assert ModelCard(text).data.library_name == library  # the hub's own reader


def test_a_trained_model_tells_its_data_and_losses_and_keeps_them(tmp_path: Path):
    run = recipe(steps=4, evaluate_every=2, checkpoint_every=2)
    trained = Trainer(run, tmp_path / "run").run()
    facts = trained.origin.training
    assert (facts["steps"], facts["tokens"]) == (4, 4 * run.training.batch_windows * run.training.window)
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert facts["held-out loss, nats a token"] == entries[-1]["held_out_loss"]
    assert facts["training loss, last step"] == entries[-1]["loss"]
    text = (tmp_path / "run/model" / files.CARD).read_text()
    assert f"| held-out loss, nats a token | {entries[-1]['held_out_loss']:.4g} |" in text
    assert f"| data | {Path(run.data.folder).name} |" in text
    assert str(Path(run.data.folder).parent) not in text
    Trainer(run, tmp_path / "run").run()  # a run that has ended, started again, knows as much
    assert (tmp_path / "run/model" / files.CARD).read_text() == text
    again = longwave.load(tmp_path / "run/model")
    longwave.save(again, tmp_path / "again")
    assert (tmp_path / "again" / files.CARD).read_text() == text


def test_a_card_may_be_edited(tmp_path: Path):
    """The folder stays whole; a card of one's own is kept, ours is written anew."""
    save(small("2F"), tmp_path / "m")
    ours = (tmp_path / "m" / files.CARD).read_text()
    (tmp_path / "m" / files.CARD).write_text("edited, with its last line\n" + ours)
    longwave.load(tmp_path / "m")
    save(small("3F"), tmp_path / "m")
    assert (tmp_path / "m" / files.CARD).read_text() == card(small("3F"))
    (tmp_path / "m" / files.CARD).write_text("# My model\n")
    save(small("2F"), tmp_path / "m")
    assert (tmp_path / "m" / files.CARD).read_text() == "# My model\n"
    (tmp_path / "m" / files.CARD).unlink()
    longwave.load(tmp_path / "m")


def test_save_pretrained_keeps_the_card_that_is_there(tmp_path: Path):
    save(small("2F"), tmp_path / "m")
    model = hf.LongwaveForCausalLM.from_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "new")
    assert "`2F`" in (tmp_path / "new" / files.CARD).read_text()
    (tmp_path / "new" / files.CARD).write_text("# Mine\n")
    model.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / files.CARD).read_text() == "# Mine\n"


def test_a_fact_cannot_leave_its_cell():
    model = small("2F")
    model.origin.training = {"data": "a | b\n\n# heading", "tokens": 1234567, "loss": 2.34567}
    text = card(model)
    assert "| data | a \\| b # heading |\n" in text
    assert "| tokens | 1,234,567 |\n| loss | 2.346 |\n" in text


@pytest.mark.parametrize("value", [[1], "x", {"a": None}, {"a": True}, {"a": {"b": 1}}])
def test_facts_that_are_none_are_named(tmp_path: Path, value: Any):
    save(small("2F"), tmp_path / "m")
    reconfigure(tmp_path / "m", training=value)
    (tmp_path / "m" / files.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"config\.json: training = .*: a table of texts and numbers"):
        longwave.load(tmp_path / "m")
