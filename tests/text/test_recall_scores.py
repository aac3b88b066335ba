"""Recall by generation: a perfect reader is always right, a guess by chance; figures say how sure they are."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from recall_solver import TOKENIZERS, solved

import longwave as lw
from longwave.config import ModelConfig
from longwave.data.recall import FAMILIES, Sample
from longwave.data.tokenizer import Tokenizer
from longwave.engine.generation import Emitted
from longwave.evaluation import recall as recall_module
from longwave.evaluation import sample_sets
from longwave.evaluation.recall import RecallAsked, recall, said, sets_of
from longwave.layers.mlp import MLPConfig
from longwave.mixers import AttentionConfig
from longwave.model import Decoder

WINDOW = 640


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(sample_sets, "folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return TOKENIZERS["byte-level, 300 entries"]()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    return stub(tokenizer)


def stub(tokenizer: Tokenizer) -> Decoder:
    """A model that knows nothing."""
    shape = {"context_window": WINDOW, "attention": AttentionConfig(2), "mlp": MLPConfig(48)}
    model = Decoder(ModelConfig(tokenizer.vocab_size, 32, "2F", **shape)).eval()
    model.tokenizer = tokenizer
    return model


def saying(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], str]) -> None:
    """Every model says what `answer` makes of its prompt from now on, as tokens that continue it."""

    class Said:
        def __init__(self, model: Any, prompts: Sequence[list[int]], max_new_tokens: int, **_: Any) -> None:
            self.stopped, self.tokens = set[int](), list[list[int]]()
            for prompt in prompts:
                text = model.tokenizer.decode(prompt)
                whole = model.tokenizer.encode(text + answer(text), add_bos=True)
                assert whole[: len(prompt)] == prompt
                self.tokens.append(whole[len(prompt) :][:max_new_tokens])

        def stop(self, prompt: int) -> None:
            self.stopped.add(prompt)

        def __iter__(self) -> Iterator[Emitted]:
            for place in range(max(map(len, self.tokens))):
                for prompt, tokens in enumerate(self.tokens):
                    if place < len(tokens) and prompt not in self.stopped:
                        yield Emitted(prompt, tokens[place])

    monkeypatch.setattr(recall_module, "Generation", Said)


# --- what is right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["byte-level, 300 entries", "SentencePiece"])
def test_a_perfect_reader_is_always_right(kind: str, name: str, monkeypatch: pytest.MonkeyPatch):
    saying(monkeypatch, lambda prompt: f" {', '.join(solved(prompt))}\nand more")
    found = recall(stub(TOKENIZERS[kind]()), FAMILIES[name], RecallAsked((480, 640), samples=5, depths=5))
    assert [(one.length, one.samples, one.right, one.accuracy, one.found) for one in found.by_length] == [
        (480, 5, 5, 1, 1),
        (640, 5, 5, 1, 1),
    ]
    cells = [(length, depth) for length in (480, 640) for depth in (0, 0.25, 0.5, 0.75, 1)]
    assert [(one.length, one.depth) for one in found.by_depth] == (cells if FAMILIES[name].has_depth else [])
    assert all((one.samples, one.right) == (1, 1) for one in found.by_depth)
    assert found.hits == (True,) * 10


@pytest.mark.parametrize(("name", "values"), {"key-value": r": (\w+)\n", "multi-key": r"is (\d+)\."}.items())
def test_a_guess_is_right_as_often_as_chance(name: str, values: str, tokenizer: Tokenizer, monkeypatch):
    draw = random.Random(5)
    saying(monkeypatch, lambda prompt: f" {draw.choice(re.findall(values, prompt))}\n")
    found = recall(stub(tokenizer), FAMILIES[name], RecallAsked((320,), samples=200))
    [score] = found.by_length
    assert score.interval[0] < score.chance < score.interval[1]
    assert score.interval[0] <= score.accuracy <= score.interval[1]


@pytest.mark.parametrize(
    ("form", "right"),
    [
        (" {}", True),
        (" {}\n", True),
        ("\n\n {}\n", True),
        (" It is {}.", True),
        (" {}, I think", True),
        (" {}4", False),
        (" 4{}", False),
        (" {}.5", False),
        (" none\n{}", False),
        ("", False),
        (" 1 2 3 4 5 6 7 8 9 10 11 12 13 14 {}", False),  # beyond the tokens that an answer may take
    ],
)
def test_an_answer_is_a_word_of_its_own_on_the_first_line(form: str, right: bool, tokenizer: Tokenizer, monkeypatch):
    saying(monkeypatch, lambda prompt: form.format(*solved(prompt)))
    found = recall(stub(tokenizer), FAMILIES["single"], RecallAsked((320,), samples=5))
    assert [one.accuracy for one in found.by_length] == [float(right)]


def test_some_of_the_answers_are_not_all_of_them(tokenizer: Tokenizer, monkeypatch):
    saying(monkeypatch, lambda prompt: f" {solved(prompt)[0]}\n")
    [score] = recall(stub(tokenizer), FAMILIES["multi-value"], RecallAsked((480,), samples=6)).by_length
    assert (score.accuracy, score.found) == (0, 0.25)


def test_what_is_said_is_what_the_model_generates(model: Decoder):
    """In company of other lengths as alone."""
    samples = sets_of(model, FAMILIES["single"], RecallAsked((260, 320), samples=2, depths=2))
    for sample, text in zip(samples, said(model, samples), strict=True):
        tokens = sample.length - sample.prompt_tokens + 8
        alone = lw.generate(model, sample.prompt, max_new_tokens=tokens)
        assert text == alone.lstrip().split("\n")[0]


# --- sets of samples --------------------------------------------------------------------------------------------------


def counting(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """The samples that are made from now on."""
    made, real = list[Sample](), sample_sets.sample

    def sample(*given: Any) -> Sample:
        made.append(real(*given))
        return made[-1]

    monkeypatch.setattr(sample_sets, "sample", sample)
    return made


def test_sets_are_kept_and_made_anew_where_they_are_damaged(model: Decoder, cache: Path, monkeypatch):
    asked = RecallAsked((320,), samples=4, depths=2)
    made = counting(monkeypatch)
    first = sets_of(model, FAMILIES["single"], asked)
    assert sets_of(model, FAMILIES["single"], asked) == first == made
    [kept] = cache.glob("recall-*.json")
    content = kept.read_bytes()
    for damaged in (content[:-9], content.replace(b"code", b"core", 1), b"", b"\n", b"x" * 99):
        kept.write_bytes(damaged)
        made.clear()
        assert sets_of(model, FAMILIES["single"], asked) == first == made
        assert kept.read_bytes() == content
    others = [RecallAsked((321,), 4, 2), RecallAsked((320,), 5, 2), RecallAsked((320,), 4, 1)]
    for other in [*others, RecallAsked((320,), 4, 2, 1)]:
        assert sets_of(model, FAMILIES["single"], other) != first
    assert len(list(cache.glob("recall-*.json"))) == 5


def test_without_a_private_folder_nothing_is_kept(model: Decoder, cache: Path, tmp_path: Path, monkeypatch):
    monkeypatch.undo()
    (tmp_path / "open" / "longwave").mkdir(parents=True)
    (tmp_path / "open" / "longwave").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "open"))
    assert len(sets_of(model, FAMILIES["copy"], RecallAsked((320,), samples=2, depths=1))) == 2
    assert list((tmp_path / "open" / "longwave").iterdir()) == list(cache.iterdir()) == []


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recall") / "model"
    lw.save(model, path)
    return path


def test_results_say_how_sure_they_are_and_how_they_were_made(longwave, folder: Path, tmp_path: Path):
    rows = [{"text": f"House {n} is red{n}.", "question": f"House {n}?", "answer": f"red{n}"} for n in range(40)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["single", f"questions:{tmp_path}/q.jsonl", "synthetic"]
    words = [part for name in names for part in ("--tasks", name)]
    words += ["--samples", "6", "--depths", "3", "--limit", "4"]
    found = longwave("eval", folder, *words, "--lengths", "200,320", "--json", "--seed", "2")
    assert found.code == 0, found.err
    assert [one["task"] for one in found.json["recall"]] == ["single", "questions"]
    assert found.json["versions"].keys() == {"longwave", "python", "torch", "tokenizers"}
    for one in found.json["recall"]:
        assert [(cell["length"], cell["samples"]) for cell in one["by_length"]] == [(200, 6), (320, 6)]
        assert len(one["by_depth"]) == 6
        assert all(cell["interval"][0] <= cell["accuracy"] <= cell["interval"][1] for cell in one["by_depth"])
    again = longwave(*found.json["command"].split()[1:], "--json")
    assert (again.json["recall"], again.json["tasks"]) == (found.json["recall"], found.json["tasks"])
    by_hand = lw.evaluate(folder, tasks=names, samples=6, depths=3, limit=4, lengths=[200, 320], seed=2)
    assert by_hand.command == found.json["command"]


def test_shares_of_few_samples_are_told_by_their_interval_alone(longwave, folder: Path, monkeypatch):
    saying(monkeypatch, lambda prompt: f" {solved(prompt)[0]}\n")
    few = longwave("eval", folder, "--tasks", "single", "--lengths", "200", "--samples", "99", "--depths", "1").out
    assert "  96.3% to 100.0%  " in few
    assert "100.0% (" not in few
    many = longwave("eval", folder, "--tasks", "single", "--lengths", "200", "--samples", "100", "--depths", "1").out
    assert "100.0% (96.3% to 100.0%)" in many
    assert "█    100" in many


BAD: dict[str, tuple[list[str], list[str]]] = {
    "longer than the window": (["single", "--lengths", "4k"], ["lengths = 4,096: the model's context_window is 640"]),
    "too short": (["single", "--lengths", "40"], ["length = 40: single takes ", "tokens or more with this tokenizer"]),
    "no length": (["single", "--lengths", "0"], ["'0' is no number of tokens"]),
    "a length twice": (["single", "--lengths", "300,300"], ["lengths = 300,300: name one or more, each once"]),
    "no samples": (["single", "--samples", "0"], ["samples = 0: 1 sample or more"]),
    "more depths than samples": (["single", "--samples", "2", "--depths", "3"], ["depths = 3: from 1 to the samples"]),
    "no depths": (["single", "--depths", "0"], ["depths = 0: from 1"]),
    "a task twice": (["single", "--tasks", "single"], ["tasks = 'single': named twice"]),
    "shots without effect": (["single", "--shots", "1"], ["shots = 1: has no effect without a few-shot task"]),
    "a limit without effect": (["single", "--limit", "1"], ["limit = 1: has no effect without a few-shot task"]),
    "lengths without effect": (["synthetic", "--lengths", "300"], ["lengths = '300': has no effect without a recall"]),
    "samples without effect": (["synthetic", "--samples", "3"], ["samples = 3: has no effect without a recall"]),
    "questions that are not there": (["questions:none.jsonl"], ["none.jsonl: no such file"]),
    "a name that is none": (["needle"], ["needle: no such file", "single"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(refuses, folder: Path, name: str):
    words, says = BAD[name]
    refuses("eval", folder, "--tasks", *words, says=says)
