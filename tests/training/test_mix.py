"""A mix of prepared folders: shares at every moment, one order for any cut of a run, and each folder measured apart."""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from chats import talk
from hypothesis import given
from hypothesis import strategies as st
from runs import CrashAt, StopAt, differing, in_double, losses, trained

from longwave.cli import main
from longwave.config import build
from longwave.data.conversations import Conversation
from longwave.data.documents import Document
from longwave.data.packed import NO_TARGET
from longwave.data.shards import prepare
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.evaluation.held_out import held_out_loss
from longwave.training.data import TrainingData
from longwave.training.loop import Interrupted, Trainer
from longwave.training.mix import PERIOD, MixOrder
from longwave.training.recipe import Recipe

_KEPT = tempfile.TemporaryDirectory(prefix="longwave-tests-")
SHARES = [
    (1.0, 1.0),
    (0.7, 0.3),
    (99.0, 1.0),
    (1.0, 9999.0),
    (1.0, 1.0, 1.0),
    (0.5, 0.3, 0.2),
    (0.9, 0.05, 0.03, 0.02),
    (5.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    (0.34, 0.33, 0.32, 0.01),
]


def conversations():
    for number in range(60):
        messages = talk(f"what is {number}?", f"it is {number} " * (number % 5 + 1))
        yield Conversation(f"chat:{number}", " ".join(one["content"] for one in messages), tuple(messages))


def counting():
    for number in range(60):
        yield Document(f"count:{number}", " ".join(str(number + step) for step in range(40)))


@functools.cache
def folders() -> dict[str, Path]:
    """Prepared conversations, real text and numbers, of one tokenizer."""
    parent = Path(_KEPT.name)
    prepare(conversations, parent / "chats", vocab_size=runs.VOCABULARY, held_out=0.3, seed=1)
    tokenizer = Tokenizer.load(parent / "chats")
    prepare(runs.corpus(), parent / "text", tokenizer=tokenizer, held_out=0.3, seed=1)
    prepare(counting, parent / "numbers", tokenizer=tokenizer, held_out=0.3, seed=1)
    return {name: parent / name for name in ("chats", "text", "numbers")}


def mixed(shares: dict[str, float], model: str = "llama", optimizer: str = "adamw", **training: Any) -> Recipe:
    mix = [{"folder": str(folders()[name]), "share": share} for name, share in shares.items()]
    return build(Recipe, {**runs.values(model, optimizer, **training), "data": {"mix": mix}}, "tests")


THREE = {"text": 0.5, "numbers": 0.3, "chats": 0.2}


# --- the order --------------------------------------------------------------------------------------------------------


def require_order(shares: Sequence[float], positions: int) -> None:
    """Every folder has given its share within one window at every moment, and its windows in its own order."""
    order, given = MixOrder(shares), [0] * len(shares)
    whole = [order.at(2 * PERIOD + place)[0] for place in range(PERIOD)]
    exact = [whole.count(number) / PERIOD for number in range(len(shares))]
    for number, share in enumerate(shares):
        assert abs(exact[number] - share / sum(shares)) < 1 / PERIOD
    for position in range(positions):
        number, place = order.at(position)
        assert place == given[number]
        given[number] += 1
        for share, count in zip(exact, given, strict=True):
            assert abs(share * (position + 1) - count) < 1


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_every_folder_has_given_its_share_at_every_moment(shares: Sequence[float]):
    require_order(shares, PERIOD + 500)


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=12))
def test_the_same_for_any_shares(shares: list[float]):
    require_order(shares, 400)


def test_places_go_on_from_one_period_to_the_next():
    order, given = MixOrder((0.6, 0.4)), [0, 0]
    for position in range(2 * PERIOD + 10):
        number, place = order.at(position)
        assert place == given[number]
        given[number] += 1


@pytest.mark.parametrize("shares", [(1.0, 1e-6), (1.0, 1.0, 1e-9)], ids=str)
def test_a_share_that_would_give_nothing_is_refused(shares: Sequence[float]):
    with pytest.raises(
        UserError, match=r"data\.mix: folder \d gives .* of the windows: at least one in 10,000 would do"
    ):
        MixOrder(shares)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_windows_come_from_their_folders_in_these_orders():
    data, order = TrainingData(mixed(THREE)), MixOrder([0.5, 0.3, 0.2])
    for position in range(300):
        number, place = order.at(position)
        batch, source = data.batch(range(position, position + 1)), data.sources[number]
        alone = source.train.batch([place], source.sampler)
        assert torch.equal(batch.tokens, alone.tokens)
        assert torch.equal(batch.targets, alone.targets)
        assert (batch.runs, batch.windows, batch.samples) == (alone.runs, alone.windows, (position,))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_a_batch_is_its_windows_end_to_end(size: int):
    data = TrainingData(mixed(THREE))
    whole, parts = data.batch(range(12)), [data.batch(range(at, at + size)) for at in range(0, 12, size)]
    assert torch.equal(whole.tokens, torch.cat([one.tokens for one in parts]))
    assert torch.equal(whole.targets, torch.cat([one.targets for one in parts]))
    for name in ("runs", "windows", "samples", "documents"):
        assert getattr(whole, name) == sum((getattr(one, name) for one in parts), ())
    assert sum(whole.runs) == sum(whole.windows) == len(whole.tokens)
    assert whole.predicted == int((whole.targets != NO_TARGET).sum())


def test_every_window_of_a_folder_comes_once_before_any_comes_twice():
    data = TrainingData(mixed(THREE))
    for number, source in enumerate(data.sources):
        rounds = [source.sampler.window(place) for place in range(2 * len(source.train))]
        assert (
            sorted(rounds[: len(source.train)]) == sorted(rounds[len(source.train) :]) == list(range(len(source.train)))
        )
        assert number == 0 or source.sampler.seed != data.sources[0].sampler.seed


@pytest.mark.parametrize("name", ["text", "chats"])
def test_a_mix_of_one_folder_is_that_folder_to_the_bit(tmp_path: Path, name: str):
    values = runs.values("causal", "adamw", steps=4)
    plain = build(Recipe, {**values, "data": {"folder": str(folders()[name])}}, "tests")
    one, other = trained(plain, tmp_path / "plain"), trained(mixed({name: 3}, "causal", steps=4), tmp_path / "mix")
    assert differing(runs.contents(one), runs.contents(other)) == []
    assert losses(tmp_path / "plain") == losses(tmp_path / "mix")


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "optimizer", "observer"),
    [("llama", "muon", StopAt(3)), ("published", "scaled_adam", CrashAt(5)), ("causal", "adamw", CrashAt(3))],
)
def test_a_run_over_a_mix_resumes_to_the_bit(tmp_path: Path, model: str, optimizer: str, observer: StopAt):
    recipe = mixed(THREE, model, optimizer, checkpoint_every=2)
    straight = trained(recipe, tmp_path / "straight")
    with pytest.raises((Interrupted, ConnectionAbortedError)):
        trained(recipe, tmp_path / "broken", observer)
    resumed = trained(recipe, tmp_path / "broken")
    assert differing(runs.contents(resumed), runs.contents(straight)) == []
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


def test_micro_batches_of_a_mix_change_nothing(tmp_path: Path):
    one = in_double(mixed(THREE, steps=3), tmp_path / "whole")
    other = in_double(mixed(THREE, steps=3, micro_windows=1), tmp_path / "parts")
    one.run(), other.run()
    assert runs.furthest(runs.contents(one), runs.contents(other)) < 1e-9


@pytest.mark.parametrize("model", ["llama", "causal"])
def test_each_folder_is_measured_by_itself_and_all_by_their_shares(tmp_path: Path, model: str):
    trainer = trained(mixed(THREE, model), tmp_path)
    *_, last = losses(tmp_path)
    alone = [held_out_loss(trainer.model, one.held_out, windows=4) for one in trainer.data.sources]
    for source, found in zip(trainer.data.sources, alone, strict=True):
        assert last[f"held_out_loss/{source.name}"] == found.loss
    assert last["held_out_loss"] == pytest.approx(
        sum(a * one.loss for a, one in zip((0.5, 0.3, 0.2), alone, strict=True))
    )
    levels = zip(*(one.retention for one in alone), strict=True)
    expected = [sum(a * kept for a, kept in zip((0.5, 0.3, 0.2), level, strict=True)) for level in levels]
    assert last.get("retention", []) == pytest.approx(expected)
    assert trainer.result().held_out_by_folder == {name: last[f"held_out_loss/{name}"] for name in THREE}


def test_folders_that_are_called_alike_are_told_by_their_paths(tmp_path: Path):
    shutil.copytree(folders()["text"], tmp_path / "text")
    mix = [{"folder": str(folder), "share": 1} for folder in (folders()["text"], tmp_path / "text")]
    data = TrainingData(build(Recipe, {**runs.values("llama"), "data": {"mix": mix}}, "tests"))
    assert [one.name for one in data.sources] == [str(folders()["text"]), str(tmp_path / "text")]


def test_a_mix_may_be_moved_and_its_shares_may_not_change(tmp_path: Path):
    for name, folder in folders().items():
        shutil.copytree(folder, tmp_path / name)

    def recipe(parent: Path, **shares: float) -> Recipe:
        mix = [{"folder": str(parent / name), "share": share} for name, share in (THREE | shares).items()]
        return build(Recipe, {**runs.values("llama", "adamw"), "data": {"mix": mix}}, "tests")

    with pytest.raises(Interrupted):
        trained(recipe(folders()["text"].parent), tmp_path / "run", StopAt(3))
    assert Trainer(recipe(tmp_path), tmp_path / "run").step == 3
    with pytest.raises(UserError, match=r"data\.mix = \[0\.5, 0\.3, 0\.2\] there, \[0\.6, 0\.3, 0\.2\] here"):
        Trainer(recipe(tmp_path, text=0.6), tmp_path / "run")
    shutil.rmtree(tmp_path / "numbers")
    tokenizer = Tokenizer.load(tmp_path / "text")
    prepare(counting, tmp_path / "numbers", tokenizer=tokenizer, held_out=0.4, seed=2)
    with pytest.raises(UserError, match=r"other data than .*step-00000003 was trained on \(2/"):
        Trainer(recipe(tmp_path), tmp_path / "run")


# --- what is refused, and what is told --------------------------------------------------------------------------------


def toml(*tables: str, **training: Any) -> str:
    values = runs.values("llama", "adamw", steps=3, **training)
    del values["data"]
    return "\n".join([*runs._toml(values), *tables]) + "\n"


def table(name: str, share: object = 1) -> str:
    return f"[[data.mix]]\nfolder = {json.dumps(str(folders().get(name, name)))}\nshare = {share}"


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([table("text", 0)], r"data\.mix\.share = 0\.0: a number above 0"),
        ([table("text", -1)], r"data\.mix\.share = -1\.0: a number above 0"),
        ([table("text", "nan")], r"data\.mix\.share = nan: a number above 0"),
        ([table("text", "inf")], r"data\.mix\.share = inf: a number above 0"),
        ([table("text"), table("text")], r"data\.mix\.folder = .*text'?: named twice"),
        ([table("text"), table("nowhere")], r"nowhere: not a prepared folder"),
        (
            [table("text"), table(str(runs.prepared()))],
            r"has another tokenizer than .*text; prepare it with --tokenizer",
        ),
        (["[data]\nfolder = 'x'", table("text")], r"data\.mix: in place of data\.folder; leave one out"),
        (["[data]\nmix = []"], r"data\.folder is missing; give it, or \[\[data\.mix\]\]"),
        (["[data]"], r"data\.folder is missing; give it, or \[\[data\.mix\]\]"),
        ([table("text"), table("numbers", 1e-7)], r"data\.mix: folder 2 gives 1e-07 of the windows"),
        ([table("text") + "\nweight = 2"], r"data\.mix\.0?\.?weight"),
    ],
)
def test_a_mix_that_cannot_be_is_one_line(tmp_path: Path, capsys: Any, tables: list[str], message: str):
    path = tmp_path / "r.toml"
    path.write_text(toml(*tables))
    assert main(["train", str(path), "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.search(message, said[0]), said[0]
    assert not (tmp_path / "run").exists()


def test_a_command_tells_shares_rounds_and_the_loss_of_each_folder(tmp_path: Path, capsys: Any):
    path = tmp_path / "r.toml"
    path.write_text(toml(table("text", 3), table("numbers", 1)))
    assert main(["train", str(path), "--output", str(tmp_path / "run")]) == 0
    said, loss = capsys.readouterr(), losses(tmp_path / "run")[-1]
    assert "data.mix: text gives 75.0% of the windows: the run goes through its" in said.err
    assert "data.mix: numbers gives 25.0% of the windows: the run goes through its" in said.err
    for name in ("text", "numbers"):
        assert f"{name}: held-out loss {loss[f'held_out_loss/{name}']:.4f}" in said.out
    assert "text 75%, numbers 25%" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_comparison_over_a_mix_is_refused(tmp_path: Path, capsys: Any):
    path = tmp_path / "r.toml"
    path.write_text(toml(table("text", 3), table("numbers", 1)))
    words = ["compare", str(path), "--tokens", "1k", "--output", str(tmp_path / "compared")]
    assert main(words) == 2
    assert "data.mix: a comparison is over one folder; give data.folder in its place" in capsys.readouterr().err
