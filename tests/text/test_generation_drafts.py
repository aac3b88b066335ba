"""Drafts of `lw.generate` and `longwave generate`: every kind that can be named, and no text that they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_folders import small
from test_generation import tiny, tokenizer

import longwave as lw
from longwave.engine.engine import Engine
from longwave.inference.drafter import drafter
from longwave.model import Decoder

PROMPTS = ["import os\nimport os\nimport", "def main("]
DRAFTS = ["lookup", "layers:1", "folder", "path", "model"]


@pytest.fixture(scope="module")
def model() -> Decoder:
    found = tiny("llama")
    found.tokenizer = tokenizer()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Decoder) -> Path:
    """Another model with the same tokens, which drafts badly."""
    place = tmp_path_factory.mktemp("drafts") / "small"
    other = small("F", vocab_size=model.config.vocab_size, context_window=model.config.context_window)
    other.tokenizer = tokenizer()
    lw.save(other, place)
    return place


def named(draft: str, folder: Path) -> Any:
    """A draft as people give it."""
    return {"folder": str(folder), "path": folder, "model": lw.load(folder)}.get(draft, draft)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 3}, {"stop": "e"}], ids=["greedy", "drawn", "stop"]
)
def test_drafts_change_no_text(
    model: Decoder, folder: Path, draft: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    engines, step = set[Engine](), Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (engines.add(engine), step(engine))[1])
    plain = lw.generate(model, PROMPTS, max_new_tokens=24, **options)
    engines.clear()
    drafted = lw.generate(model, PROMPTS, max_new_tokens=24, draft=named(draft, folder), **options)
    assert [(one, one.ended) for one in drafted] == [(one, one.ended) for one in plain]
    [engine] = engines
    assert engine.metrics.drafted_tokens > 0
    pieces = lw.stream(model, PROMPTS[0], max_new_tokens=24, draft=named(draft, folder), **options)
    assert "".join(pieces) == lw.generate(model, PROMPTS[0], max_new_tokens=24, **options)


def test_the_command_takes_the_same_drafts(longwave, model: Decoder, folder: Path, tmp_path: Path):
    lw.save(model, tmp_path / "model")
    words = ["generate", tmp_path / "model", "--prompt", PROMPTS[0], "--max-new-tokens", 12]
    plain = longwave(*words).out
    for draft in ("lookup", "layers:1", folder):
        assert longwave(*words, "--draft", draft).out == plain


@pytest.mark.parametrize(
    ("draft", "says"),
    [
        ("layers:0", "draft = layers:0: layers = 0: from 1 to"),
        ("layers:99", "draft = layers:99: layers = 99"),
        ("layers:", "layers:"),
        ("nowhere/at/all", "nowhere/at/all"),
        ("other tokens", "another tokenizer"),
        (3, "draft = 3"),
        (b"lookup", "draft ="),
    ],
)
def test_what_drafts_nothing_is_one_line(model: Decoder, tmp_path: Path, draft: Any, says: str):
    if draft == "other tokens":
        lw.save(small("F"), tmp_path / "other")
        draft = tmp_path / "other"
    with pytest.raises(lw.UserError, match=says) as refused:
        lw.generate(model, "import", draft=draft)
    assert "\n" not in str(refused.value)
    assert drafter(None, model, 1) is None
