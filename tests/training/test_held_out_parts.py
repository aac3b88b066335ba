"""Held-out loss in parts, by context and by source: the parts are the whole, and each is what it is called."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import runs
import torch

import longwave as lw
from longwave import files
from longwave.config import ModelConfig, build
from longwave.data import shards
from longwave.data.documents import Document
from longwave.data.packed import PackedTokens
from longwave.data.prepared import META_FILE, SOURCES_FILE, PreparedInfo
from longwave.data.shards import prepare
from longwave.data.tokenizer import Tokenizer
from longwave.streams import Stream

TEXTS = {"wiki": ["12 34 567\n" * 9, "8\n"], "code": ["abc(de): f\n" * 5], "": ["xyz xyz\n" * 7]}


def corpus():
    for number in range(6):
        for source, texts in TEXTS.items():
            for place, text in enumerate(texts):
                yield Document(f"{source}-{place}-{number}", text, source=source)


@pytest.fixture(scope="module", params=[1 << 28, 60])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In one shard, and in several."""
    folder = tmp_path_factory.mktemp("sources") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", request.param)
        prepare(corpus, folder, vocab_size=270, held_out=0.5, seed=1)
    return folder


@pytest.fixture(scope="module")
def model(data: Path) -> lw.Decoder:
    shape = {"vocab_size": 270, "hidden_size": 32, "layout": "F subllm(0.5: F) F", "context_window": 48}
    values = {**shape, "attention": {"heads": 2}, "mlp": {"size": 48}}
    return lw.Decoder(build(ModelConfig, values, "test")).double().eval()


def test_the_parts_are_those_of_a_plain_scoring(model: lw.Decoder, data: Path):
    """Every document scored by itself, piece by piece of its windows, and added up by hand."""
    found = lw.evaluate(model, data)
    info, packed = PreparedInfo.read(data), PackedTokens(data, "held_out", 48, keep_last=True)
    stored = np.fromfile(data / "held_out" / SOURCES_FILE, "<i4")
    contexts, sources = dict[int, list[float]](), dict[str, list[float]]()
    for number in range(len(packed)):
        batch, start = packed.batch([number]), 0
        for length, document in zip(batch.runs, batch.documents, strict=True):
            ids, targets = batch.tokens[start : start + length], batch.targets[start : start + length]
            logs = model(ids, Stream.of([length])).log_softmax(-1).detach()
            for place in range(length):
                if targets[place] != -100:
                    loss = -float(logs[place, targets[place]])
                    contexts.setdefault(place.bit_length(), []).append(loss)
                    sources.setdefault(info.sources[stored[document]], []).append(loss)
            start += length
    assert [(one.tokens, one.loss) for one in found.by_context] == [
        (len(losses), pytest.approx(sum(losses) / len(losses), rel=1e-10)) for _, losses in sorted(contexts.items())
    ]
    assert {one.source: (one.tokens, one.loss) for one in found.by_source} == {
        name: (len(losses), pytest.approx(sum(losses) / len(losses), rel=1e-10)) for name, losses in sources.items()
    }
    for parts in (found.by_context, found.by_source):
        assert sum(one.tokens for one in parts) == found.tokens
        assert sum(one.tokens * one.loss for one in parts) == pytest.approx(found.tokens * found.loss, rel=1e-10)
    spans = [(one.first, one.last) for one in found.by_context]
    assert spans == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 48)][: len(spans)]
    assert {one.source for one in found.by_source} == {"wiki", "code", "not named"}


def test_losses_of_documents_alone_tell_whose_they_are(model: lw.Decoder, data: Path):
    """Where a source's tokens are made likely, its loss falls, and that of no other source."""
    before = {one.source: one.loss for one in lw.evaluate(model, data).by_source}
    packed = PackedTokens(data, "held_out", 48, keep_last=True)
    batch, wiki = packed.batch(range(len(packed))), packed.source_names.index("wiki")
    of_tokens = packed.sources()[torch.tensor(batch.documents)].repeat_interleave(torch.tensor(batch.runs))
    only = set(batch.targets[of_tokens == wiki].tolist()) - set(batch.targets[of_tokens != wiki].tolist())
    bias = torch.zeros(270, dtype=torch.float64)
    bias[list(only)] = 9
    hook = model.head.register_forward_hook(lambda module, given, output: output + bias)
    after = {one.source: one.loss for one in lw.evaluate(model, data).by_source}
    hook.remove()
    assert after["wiki"] < before["wiki"]
    assert all(after[name] > before[name] for name in ("code", "not named"))


def test_sources_are_files_folders_or_fields(tmp_path: Path):
    (tmp_path / "text" / "books").mkdir(parents=True)
    (tmp_path / "text" / "books" / "a.txt").write_text("a book\n")
    (tmp_path / "text" / "books" / "b.txt").write_text("another book\n")
    (tmp_path / "text" / "c.txt").write_text("a text\n")
    rows = [{"text": "a row"}, {"text": "of a web page", "source": "web"}, {"text": "odd", "source": "\ud800"}]
    (tmp_path / "text" / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = prepare(tmp_path / "text", tmp_path / "data", vocab_size=270, held_out=0)
    assert set(info.sources) == {"books", "c.txt", "d.jsonl", "web", "?"}
    assert len(np.fromfile(tmp_path / "data" / "train" / SOURCES_FILE, "<i4")) == 6


def test_sources_beyond_the_first_share_one(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_SOURCES", 3)
    info = prepare(
        lambda: (Document(str(n), "text\n", source=str(n)) for n in range(9)),
        tmp_path / "d",
        vocab_size=270,
        held_out=0,
    )
    assert info.sources == ["0", "1", "2", "others"]
    assert np.fromfile(tmp_path / "d" / "train" / SOURCES_FILE, "<i4").tolist() == [0, 1, 2, *[3] * 6]


def test_folders_from_before_sources_were_kept_are_read(model: lw.Decoder, data: Path, tmp_path: Path):
    with files.folder(tmp_path / "old") as old:
        for path in data.rglob("*"):
            if path.is_file() and path.name not in (SOURCES_FILE, files.MANIFEST):
                (old / path.relative_to(data)).parent.mkdir(exist_ok=True)
                (old / path.relative_to(data)).write_bytes(path.read_bytes())
        meta = json.loads((old / META_FILE).read_bytes())
        del meta["sources"]
        (old / META_FILE).write_text(json.dumps(meta))
    found, now = lw.evaluate(model, tmp_path / "old"), lw.evaluate(model, data)
    assert found.by_source == ()
    assert (found.loss, found.by_context) == (now.loss, now.by_context)


def test_windows_of_several_sizes_are_told_apart(longwave, refuses, model: lw.Decoder, data: Path, tmp_path: Path):
    """Each as it is alone; everything else is of the longest."""
    found = lw.evaluate(model, data, window="16,48,24")
    alone = {size: lw.evaluate(model, data, window=size) for size in (16, 24, 48)}
    assert [(one.window, one.tokens, one.loss) for one in found.by_window] == [
        (size, one.tokens, one.loss) for size, one in alone.items()
    ]
    assert (found.loss, found.by_context) == (alone[48].loss, alone[48].by_context)
    assert alone[48].by_window == ()
    assert found.by_window[0].loss != found.loss
    model.tokenizer = Tokenizer.load(data)
    lw.save(model, tmp_path / "model")
    shown = longwave("eval", tmp_path / "model", data, "--window", "16,48")
    assert "window" in shown.out
    assert "perplexity" in shown.out
    refuses("eval", tmp_path / "model", data, "--window", "x", says=["window = x: 'x' is no number of tokens"])


def test_tables_are_printed_and_in_json(longwave, tmp_path: Path):
    trained = lw.train(runs.write_recipe(tmp_path / "tiny.toml", "llama", steps=3), output=tmp_path / "run")
    found = longwave("eval", trained.model, runs.prepared(), "--json")
    assert "tokens seen" in found.out
    assert "33 to 64" in found.out
    assert found.json["by_context"][0].keys() == {"first", "last", "tokens", "loss"}
    assert sum(one["tokens"] for one in found.json["by_source"]) == found.json["tokens"]
