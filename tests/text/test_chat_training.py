"""Training on conversations and from weights: packed is separate, only answers count, and a start is a start."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import chats
import pytest
import runs
import torch
from chats import EOS, talk
from runs import CrashAt, StopAt, contents, differing, furthest, in_double, losses, trained

import longwave as lw
from longwave.config import build
from longwave.data import packed
from longwave.data.packed import NO_TARGET, PackedTokens
from longwave.data.prepared import PreparedInfo, SplitTokens
from longwave.data.shards import prepare
from longwave.data.sources import Conversation
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.evaluation.held_out import held_out_loss
from longwave.model import Decoder
from longwave.planning import model_config
from longwave.streams import Stream
from longwave.training.loop import Interrupted, Trainer
from longwave.training.recipe import Recipe, read_recipe

every_model = pytest.mark.parametrize("model", runs.MODELS)
every_optimizer = pytest.mark.parametrize("optimizer", runs.OPTIMIZERS)
WINDOW = 192  # several conversations
_KEPT = tempfile.TemporaryDirectory(prefix="longwave-tests-")


def conversations():
    """Questions and answers of several lengths, of one to three turns, with something in them to learn."""
    for number in range(60):
        contents = [f"what is {number}?", f"it is {number} " * (number % 5 + 1), "and then?", f"then {number + 1}"]
        system = "think " * 30 if number % 9 == 8 else None  # longer than a window by itself
        messages = talk(*contents[: 2 * (number % 2) + 2], system=system)
        yield Conversation(f"chat:{number}", " ".join(one["content"] for one in messages), tuple(messages))


@functools.cache
def prepared(loss_on: Any = "assistant") -> Path:
    folder = Path(_KEPT.name) / f"data-{loss_on}"
    prepare(conversations, folder, vocab_size=runs.VOCABULARY, held_out=0.3, seed=1, loss_on=loss_on)
    return folder


@functools.cache
def start(model: str = "llama") -> Path:
    """A trained model of the tokenizer that the conversations have."""
    trained(recipe(model), Path(_KEPT.name) / model)
    return Path(_KEPT.name) / model / "model"


def recipe(model: str = "llama", optimizer: str = "adamw", **training: Any) -> Recipe:
    values = runs.values(model, optimizer, **training)
    return build(Recipe, {**values, "data": {"folder": str(prepared())}}, "tests")


def further(folder: Path | str, optimizer: str = "adamw", **training: Any) -> Recipe:
    """A recipe that starts from a folder."""
    return read_recipe(write(Path(_KEPT.name) / "further.toml", folder, optimizer, **training))


def write(path: Path, folder: Path | str, optimizer: str = "adamw", model: str = "", **training: Any) -> Path:
    values = runs.values("llama", optimizer, start_from=str(folder), **training)
    del values["model"]
    lines = runs._toml({**values, "data": {"folder": str(prepared())}})
    path.write_text("\n".join(lines) + "\n" + model)
    return path


# --- packed is separate -----------------------------------------------------------------------------------------------


def alone(model: Decoder, split: str, window: int) -> list[torch.Tensor]:
    """The loss of every conversation of a split by itself."""
    tokens, found, start = SplitTokens(prepared(), split), [], 0  # type: ignore[arg-type]
    for document in tokens.documents():
        stop = start + len(document)
        ids = torch.tensor(document.astype("int64"))
        targets = torch.where(torch.tensor(tokens.learned(start + 1, stop + 1)), ids.roll(-1), NO_TARGET)
        targets[-1] = NO_TARGET
        size = min(window, len(document))
        found.append(model.loss(ids[:size], targets[:size], Stream.of([size])))
        start = stop
    return found


def model_in_double(model: str) -> Decoder:
    made = Decoder(recipe(model).model, seed=3).double()
    made.set_step(0)
    return made


@pytest.mark.parametrize(
    ("model", "mode"), [("llama", "train"), ("llama", "eval"), ("published", "eval"), ("causal", "eval")]
)
def test_the_loss_of_packed_conversations_is_the_sum_of_each_alone(model: str, mode: str):
    made = model_in_double(model).train(mode == "train")
    data = PackedTokens(prepared(), "train", WINDOW)
    batch = data.batch(range(len(data)))
    assert len(batch.runs) > 2 * len(batch.windows)
    both = [made.loss(*batch.inputs("cpu")), torch.stack(alone(made, "train", WINDOW)).sum()]
    grads = [torch.autograd.grad(loss, list(made.parameters()), allow_unused=True) for loss in both]
    torch.testing.assert_close(both[0], both[1], rtol=1e-12, atol=0)
    for one, other in zip(*grads, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_windows_that_cut_conversations_would_show(monkeypatch: pytest.MonkeyPatch):
    """The control of the test above: an answer cut off from its question has another loss."""
    even = packed._EvenCuts.of
    monkeypatch.setattr(packed._WholeDocuments, "of", lambda tokens, window: even(tokens, window, keep_last=True))
    data, made = PackedTokens(prepared(), "train", WINDOW), model_in_double("llama")
    with torch.no_grad():
        apart, together = (
            made.loss(*data.batch(range(len(data))).inputs("cpu")),
            torch.stack(alone(made, "train", WINDOW)).sum(),
        )
    assert abs(apart - together) > 1e-6 * apart  # the law holds to 1e-12


# --- only answers count -----------------------------------------------------------------------------------------------


def test_what_is_not_an_answer_moves_nothing():
    """Other targets outside the answers change no bit of the gradients; within them they do."""
    made, data = model_in_double("llama").train(), PackedTokens(prepared(), "train", runs.WINDOW)
    batch = data.batch(range(4))
    stream = Stream.of(batch.runs)
    learned = batch.targets != NO_TARGET
    assert 0.2 < learned.double().mean() < 0.8
    assert batch.predicted == int(learned.sum())
    hidden = made.hidden(batch.tokens, stream)
    [slope] = torch.autograd.grad(made.loss(batch.tokens, batch.targets, stream), [made.embed.weight])
    logits = (hidden @ made.head_weight.T)[learned]
    expected = torch.nn.functional.cross_entropy(logits, batch.targets[learned], reduction="sum")
    [same] = torch.autograd.grad(expected, [made.embed.weight])
    torch.testing.assert_close(slope, same, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_weigh_by_their_answers(tmp_path: Path, micro: int):
    one = in_double(recipe(steps=3), tmp_path / "whole")
    other = in_double(recipe(steps=3, micro_windows=micro), tmp_path / "parts")
    counts = [one.data.batch(range(place, place + 1)).predicted for place in range(12)]
    assert len(set(counts)) > 3
    one.run(), other.run()
    assert furthest(contents(one), contents(other)) < 1e-9


@every_optimizer
@pytest.mark.parametrize("model", ["llama", "published"])
def test_a_step_without_any_answer_leaves_numbers_numbers(tmp_path: Path, model: str, optimizer: str):
    """At a window that the longest questions fill."""
    trainer = trained(recipe(model, optimizer, batch_windows=1, window=40, steps=20), tmp_path)
    counts = [trainer.data.batch(range(place, place + 1)).predicted for place in range(20)]
    entries = losses(tmp_path)
    assert [entry["step"] for entry in entries if entry["loss"] == 0] == [i + 1 for i, n in enumerate(counts) if n == 0]
    assert 0 in counts
    assert all(math.isfinite(entry[name]) for entry in entries for name in ("loss", "grad_norm"))
    assert all(torch.isfinite(tensor).all() for tensor in contents(trainer).values())


def test_tokens_are_those_that_were_there(tmp_path: Path):
    trainer = trained(recipe(), tmp_path)
    batches = [trainer.data.batch(range(4 * step, 4 * step + 4)) for step in range(runs.STEPS)]
    seen = [sum(batch.tokens.numel() for batch in batches[: step + 1]) for step in range(runs.STEPS)]
    assert [entry["tokens"] for entry in losses(tmp_path)] == seen
    assert seen[-1] < runs.STEPS * 4 * runs.WINDOW


def test_evaluation_is_over_answers_of_whole_conversations():
    model = lw.load(start()).double()
    result = held_out_loss(model, PackedTokens(prepared(), "held_out", runs.WINDOW))
    info = PreparedInfo.read(prepared())
    assert result.loss == pytest.approx(
        float(torch.stack(alone(model, "held_out", runs.WINDOW)).sum()) / result.tokens, rel=1e-12
    )
    judged = lw.evaluate(start(), prepared(), device="cpu")
    assert (judged.loss, judged.loss_on) == (pytest.approx(result.loss, rel=1e-5), "assistant")
    assert judged.tokens < info.held_out.targets < info.held_out.tokens
    assert judged.bits_per_byte == pytest.approx(
        judged.loss / math.log(2) * info.held_out.targets / info.held_out.bytes
    )
    on_all = lw.evaluate(start(), prepared("all"), device="cpu")
    assert (on_all.loss_on, on_all.tokens > judged.tokens) == ("all", True)


# --- a start from weights ---------------------------------------------------------------------------------------------


@every_model
def test_training_starts_from_the_weights_of_a_folder(tmp_path: Path, model: str):
    trainer = Trainer(further(start(model)), tmp_path)
    folder = lw.load(start(model))
    assert differing(trainer.model.state_dict(), folder.state_dict()) == []
    assert trainer.recipe.model == folder.config
    trainer.run()
    assert losses(tmp_path)[-1]["held_out_loss"] < losses(Path(_KEPT.name) / model)[-1]["held_out_loss"]


def test_a_hugging_face_folder_and_one_in_bf16_are_starts_too(tmp_path: Path):
    model = lw.load(start(), dtype=torch.bfloat16)
    lw.save(model, tmp_path / "llama", format="llama")
    trainer = Trainer(further(tmp_path / "llama"), tmp_path / "run")
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert differing(trainer.model.state_dict(), model.float().state_dict()) == []
    trained(further(tmp_path / "llama"), tmp_path / "run")


def test_what_the_start_says_of_generation_stays(tmp_path: Path):
    """The tokens that end an answer may be known to `generation_config.json` alone."""
    model = lw.load(start())
    model.origin.generation = {"eos_token_id": [1, 7], "temperature": 0.6}
    lw.save(model, tmp_path / "start")
    run = further(tmp_path / "start")
    with pytest.raises(Interrupted):
        trained(run, tmp_path / "run", StopAt(2))
    trained(run, tmp_path / "run")
    assert lw.load(tmp_path / "run" / "model").origin.generation == {"bos_token_id": 0, **model.origin.generation}


@pytest.mark.parametrize("model", ["llama", "published"])
def test_a_run_from_weights_resumes_to_the_bit(tmp_path: Path, model: str):
    run = further(start(model), micro_windows=2, checkpoint_every=2)
    straight = trained(run, tmp_path / "straight")
    with pytest.raises(Interrupted):
        trained(run, tmp_path / "resumed", StopAt(3))
    with pytest.raises(ConnectionAbortedError):
        trained(run, tmp_path / "resumed", CrashAt(7))
    resumed = trained(run, tmp_path / "resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    assert differing(contents(resumed), contents(straight)) == []
    progress = json.loads((tmp_path / "resumed" / "checkpoints" / "step-00000006" / "trainer.json").read_text())
    assert progress["recipe"]["training"]["start_from"] == str(start(model))
    assert build(Recipe, progress["recipe"], "tests") == run


def test_a_run_does_not_go_on_from_another_start(tmp_path: Path):
    with pytest.raises(Interrupted):
        trained(further(start()), tmp_path, StopAt(2))
    with pytest.raises(UserError, match=r"another run \(training.start_from = .*, None here\)"):
        Trainer(recipe(), tmp_path)


def test_a_model_table_may_repeat_the_start_but_not_contradict_it(tmp_path: Path):
    same = write(tmp_path / "same.toml", start(), model="[model]\nhidden_size = 32\n[model.mlp]\nsize = 48\n")
    assert read_recipe(same) == further(start())
    assert model_config(same) == lw.load(start()).config
    for name, value in {"hidden_size": "64", "layout": "'4F'", "norm_eps": "1e-3", "rotary": "{ base = 5e3 }"}.items():
        path = write(tmp_path / "other.toml", start(), model=f"[model]\n{name} = {value}\n")
        with pytest.raises(UserError, match=rf"model\.{name}.* = .*: .*model, from which .*start_from starts, has"):
            Trainer(read_recipe(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_how_a_subllm_trains_may_differ_from_its_start_and_what_it_is_may_not(tmp_path: Path):
    path = write(tmp_path / "a.toml", start("published"), model="[model.subllm]\nbypass_floor = 0.2\n")
    trainer = Trainer(read_recipe(path), tmp_path / "run")
    assert [level.config.bypass_floor for level in trainer.model.resamplers] == [0.2, 0.2]
    path = write(tmp_path / "b.toml", start("causal"), model="[model.subllm]\nselection = 'published'\n")
    with pytest.raises(UserError, match=r"model\.subllm\.selection = 'published': .* has 'causal'"):
        Trainer(read_recipe(path), tmp_path / "run")
    path = write(tmp_path / "c.toml", start(), model="[model.subllm]\nbypass_floor = 0.2\n")
    with pytest.raises(UserError, match="subllm has no effect"):
        Trainer(read_recipe(path), tmp_path / "run")


def test_a_start_needs_the_tokenizer_of_the_data(tmp_path: Path):
    model = lw.load(start())
    model.tokenizer = chats.tokenizer(None, eos=EOS)
    lw.save(model, tmp_path / "other")
    with pytest.raises(UserError, match=r"tokenizer = .*prepare it with the model's own tokenizer"):
        Trainer(further(tmp_path / "other"), tmp_path / "run")
    model.tokenizer = None
    lw.save(model, tmp_path / "bare")
    assert (
        Trainer(further(tmp_path / "bare"), tmp_path / "run").data.tokenizer.fingerprint
        == Tokenizer.load(prepared()).fingerprint
    )
    with pytest.raises(UserError, match="nowhere: no such folder"):
        further(tmp_path / "nowhere")
