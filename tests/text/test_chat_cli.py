"""Conversations through the command line: prepared, learned, judged, answered; and every mistake is one line."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chats
import pytest
from chats import talk
from runs import losses

from longwave.cli import main
from longwave.data.tokenizer import Tokenizer

MODULES = (
    *("textwrap", "bisect", "heapq", "shlex", "json", "os", "os.path", "re", "string", "random", "math", "statistics"),
    *("itertools", "functools", "operator", "collections", "pathlib", "shutil", "tempfile", "glob", "csv", "argparse"),
    *("subprocess", "datetime", "calendar", "time", "copy", "pprint", "types", "contextlib", "traceback", "inspect"),
    *("ast", "tokenize", "pickle", "codecs", "zipfile", "hashlib", "urllib.parse", "decimal", "difflib", "ipaddress"),
)
RECIPE = """\
[model]
vocab_size = 400
hidden_size = 64
layout = "2F"
context_window = 192
attention = { heads = 4 }
mlp = { size = 128 }
[data]
folder = "FOLDER"
[training]
steps = 100
window = 192
batch_windows = 4
evaluate_every = 50
[optimizer]
kind = "adamw"
lr = 6e-3
[schedule]
kind = "cosine"
warmup_steps = 8
"""


def docstrings() -> Iterator[dict[str, Any]]:
    """What everything in the standard library says of itself in its first line, as questions and answers."""
    for module in MODULES:
        for name, thing in sorted(vars(importlib.import_module(module)).items()):
            said = thing.__doc__ if callable(thing) and not name.startswith("_") else None
            if isinstance(said, str) and said.strip():
                yield {"messages": talk(f"What does {module}.{name} do?", said.strip().splitlines()[0])}


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "docstrings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*docstrings(), {"messages": talk("No answer?")}]))
    return path


@pytest.fixture(scope="module")
def tuned(chat_file: Path) -> Path:
    """A folder with prepared conversations and a model that was trained on them, both through the command line."""
    folder = chat_file.parent
    words = ["--vocab-size", "400", "--held-out", "0.1"]
    assert main(["prepare", str(chat_file), str(folder / "data"), *words]) == 0
    (folder / "chat.toml").write_text(RECIPE.replace("FOLDER", str(folder / "data")))
    assert main(["train", str(folder / "chat.toml"), "--output", str(folder / "run")]) == 0
    return folder


def test_conversations_are_prepared_and_reported(longwave, chat_file: Path, tmp_path: Path):
    result = longwave("prepare", chat_file, tmp_path / "data", "--vocab-size", "300", "--held-out", "0.1", "--json")
    count = len(chat_file.read_text().splitlines())
    train, held_out = result.json["train"], result.json["held_out"]
    assert (result.code, result.json["kind"], result.json["left_out"]) == (0, "chat", 1)
    assert train["documents"] + held_out["documents"] == count - 1 > 500
    assert 0.2 < train["learned"] / train["tokens"] < 0.8
    share = f"{train['learned'] / train['tokens']:.0%} of the training tokens are learned"
    assert f"conversations: {share}; left out, for want of an answer: 1" in result.out
    on_all = ["--loss-on", "all", "--tokenizer", tmp_path / "data", "--held-out", "0.1", "--json"]
    everything = longwave("prepare", chat_file, tmp_path / "all", *on_all)
    assert (everything.json["left_out"], everything.json["train"]["learned"]) == (0, None)
    assert everything.json["tokenizer"] == result.json["tokenizer"]


def test_a_model_learns_to_answer(longwave, tuned: Path):
    """The held-out loss falls well below that of a model that knows the frequencies alone, and answers end."""
    entries = losses(tuned / "run")
    held_out = [entry["held_out_loss"] for entry in entries if "held_out_loss" in entry]
    assert held_out[-1] < held_out[0] < entries[0]["loss"]
    assert held_out[-1] < 0.75 * entries[0]["loss"]
    judged = longwave("eval", tuned / "run" / "model", tuned / "data", "--json")
    assert (judged.json["loss_on"], judged.json["loss"]) == ("assistant", pytest.approx(held_out[-1], rel=1e-5))
    asked = ["--prompt", "What does heapq.nothing do?", "--prompt", "What does os.nowhere do?", "--temperature", "1"]
    answered = longwave("generate", tuned / "run" / "model", "--chat", *asked, "--max-new-tokens", "150", "--json")
    tokenizer = Tokenizer.load(tuned / "data")
    lengths = [len(tokenizer.encode(text)) for text in answered.json["texts"]]
    assert all(0 < length < 120 for length in lengths), answered.json
    assert not any("assistant" in text for text in answered.json["texts"])


def test_a_chat_prompt_is_what_was_trained_on(longwave, tuned: Path):
    """Without --chat the same words are a text to go on with, and go on otherwise."""
    words = ["generate", tuned / "run" / "model", "--prompt", "What does os.nowhere do?", "--json"]
    plain, chat = longwave(*words).json["texts"], longwave(*words, "--chat").json["texts"]
    assert plain != chat
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tuned / "run" / "model")
    ours = Tokenizer.load(tuned / "data")
    text = theirs.apply_chat_template(talk("Why?", "So."), tokenize=False)
    assert text == "<|bos|>user\nWhy?<|eos|>\n<|bos|>assistant\nSo.<|eos|>\n"
    assert (
        theirs.apply_chat_template(talk("Why?", "So."))["input_ids"]
        == ours.twin().encode(text, add_special_tokens=False).ids
    )


def test_training_goes_on_from_the_model_with_its_tokenizer(longwave, tuned: Path, tmp_path: Path):
    """The whole way of a fine-tuning: the folder's tokenizer, its shape, its weights."""
    model, chat = tuned / "run" / "model", tmp_path / "chat.jsonl"
    rows = [{"prompt": f"Say {number}", "completion": f"{number} it is"} for number in range(80)]
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert longwave("prepare", chat, tmp_path / "data", "--tokenizer", model, "--held-out", "0.2").code == 0
    tables = RECIPE.partition("[data]")
    (tmp_path / "on.toml").write_text("[data]" + tables[2].replace("FOLDER", str(tmp_path / "data")))
    started = ["training.start_from=" + str(model), "training.steps=12", "schedule.warmup_steps=2"]
    result = longwave("train", tmp_path / "on.toml", *started, "--output", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    before = longwave("eval", model, tmp_path / "data", "--json").json["loss"]
    assert result.json["held_out_loss"] < 0.8 * before
    assert longwave("plan", tmp_path / "on.toml").code == 2
    again = longwave("train", tmp_path / "on.toml", *started, "--output", tmp_path / "run", "--json")
    assert "resuming after step 12" in again.err
    assert again.json == result.json


def test_conversations_too_long_for_a_window_are_told_of(longwave, tuned: Path, tmp_path: Path):
    output = ["--output", tmp_path / "run"]
    result = longwave(
        "train", tuned / "chat.toml", "training.steps=1", "training.window=40", "schedule.warmup_steps=0", *output
    )
    assert result.code == 0
    assert "documents longer than a window of 40 tokens: the end is lost" in result.err


# --- mistakes ---------------------------------------------------------------------------------------------------------


def row(role: str = "user", content: Any = "a") -> str:
    return json.dumps({"messages": [{"role": role, "content": content}]})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (row("bot"), ["chat.jsonl:2: messages[0].role = 'bot'", "use one of system, developer, user, assistant, tool"]),
        (row(content=["a"]), ["chat.jsonl:2: messages[0].content is a list; a string is expected"]),
        ('{"messages": []}', ["chat.jsonl:2: messages: a list of one message or more"]),
        ('{"id": 3}', ["chat.jsonl:2: no string field 'text', nor messages, conversations"]),
        ('{"text": "a"}', ["chat.jsonl:2: a text, yet chat.jsonl:1 is a conversation; prepare the two apart"]),
        ('{"messages": ', ["chat.jsonl:2: not a row of JSON"]),
    ],
)
def test_a_bad_line_is_refused(refuses, tmp_path: Path, line: str, says: list[str]):
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": talk("a", "b")}) + "\n" + line + "\n")
    refuses("prepare", chat, tmp_path / "data", "--vocab-size", "260", "--held-out", "0", says=says)
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]


@pytest.mark.parametrize(
    ("template", "eos", "says"),
    [
        ("{{ raise_exception('no cats') }}", chats.EOS, ["chat.jsonl:1: the chat template refuses", "no cats"]),
        ("{% for m in messages %}", chats.EOS, ["chat_template, line 1"]),
        ("{% for m in messages %}{{ m.content }} {% endfor %}", chats.EOS, ["chat.jsonl:1", "no token of its own"]),
        (None, None, ["tokenizer: it names no eos_token"]),
    ],
)
def test_a_tokenizer_that_cannot_do_it_is_refused(refuses, tmp_path: Path, template, eos, says):
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": talk("a", "b")}) + "\n")
    chats.tokenizer(template, eos=eos).save(tmp_path / "tokenizer")
    words = ["--tokenizer", tmp_path / "tokenizer", "--held-out", "0"]
    refuses("prepare", chat, tmp_path / "data", *words, says=says)
    assert not (tmp_path / "data").exists()


def test_settings_that_cannot_work_are_refused(refuses, tuned: Path, chat_file: Path, tmp_path: Path):
    text = tmp_path / "a.txt"
    text.write_text("line\n" * 50)
    refuses("prepare", text, tmp_path / "data", "--loss-on", "all", says=["loss_on = all: has no effect on texts"])
    refuses("prepare", chat_file, tmp_path / "data", "--loss-on", "none", says=["--loss-on", "assistant"])
    lonely = tmp_path / "lonely.jsonl"
    lonely.write_text(json.dumps({"messages": talk("a")}) + "\n")
    says = ["nothing to learn: 1 of the conversations have no answer"]
    refuses("prepare", lonely, tmp_path / "data", "--vocab-size", "260", "--held-out", "0", says=says)
    recipe, output = tuned / "chat.toml", ["--output", tmp_path / "run"]
    says = ["window = 3: every answer in", "begins beyond it"]
    refuses("train", recipe, "training.window=3", *output, says=says)
    refuses("train", recipe, "training.start_from=nowhere", *output, says=["nowhere: no such folder"])
    refuses("train", recipe, "training.start_from=3", *output, says=["training.start_from = 3", "string"])
    start = f"training.start_from={tuned / 'run' / 'model'}"
    says = ["model.hidden_size = 32", "has 64", "leave it out"]
    refuses("train", recipe, start, "model.hidden_size=32", *output, says=says)
    assert not (tmp_path / "run").exists()


def test_chat_prompts_need_a_template(refuses, tuned: Path, tmp_path: Path):
    import longwave as lw

    model = lw.load(tuned / "run" / "model")
    assert model.tokenizer is not None
    model.tokenizer = Tokenizer(model.tokenizer.twin(), {"eos_token": chats.EOS})
    lw.save(model, tmp_path / "bare")
    refuses("generate", tmp_path / "bare", "--chat", "--prompt", "a", says=["chat_template: this tokenizer has none"])
