"""Few-shot tasks: scores against a plain scoring of one sequence at a time, tasks from files, and what they refuse."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import CASES, decoder

import longwave as lw
from longwave.config import ModelConfig
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.evaluation import few_shot as few_shot_module
from longwave.evaluation import likelihood
from longwave.evaluation.few_shot import few_shot, named_task
from longwave.evaluation.likelihood import Question, answer_scores, plain_scores
from longwave.evaluation.synthetic import LABELS, synthetic
from longwave.evaluation.tasks import Template, from_file
from longwave.intervals import wilson
from longwave.layers.mlp import MLPConfig
from longwave.mixers import AttentionConfig

WORDS = ["good", "not good", "bad"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat and the dog are good, not bad\n"] * 9, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> lw.Decoder:
    return tiny(tokenizer, 400)


def tiny(tokenizer: Tokenizer, window: int, layout: str = "F subllm(0.5: F) F") -> lw.Decoder:
    shape = AttentionConfig(2)
    config = ModelConfig(300, 32, layout, context_window=window, attention=shape, mlp=MLPConfig(48))
    model = lw.Decoder(config).double().eval()
    model.tokenizer = tokenizer
    return model


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"text": f"the cat {number}", "label": WORDS[number % 3], **more} for number in range(count)]


# --- scores -----------------------------------------------------------------------------------------------------------


def questions(vocabulary: int, shared: int) -> list[Question]:
    """Questions of several lengths with answers of one to four tokens, after a beginning that all of them share."""
    draw = torch.Generator().manual_seed(shared)

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=draw).tolist()

    beginning = ids(shared)
    return [Question(beginning + ids(1 + 3 * n), [ids(1 + (n + k) % 4) for k in range(1 + n % 3)]) for n in range(5)]


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_one_sequence_at_a_time(name: str, monkeypatch):
    """Of every registered part, in batches of two questions and pieces of four tokens."""
    monkeypatch.setattr(likelihood, "_BATCH_QUESTIONS", 2)
    monkeypatch.setattr(likelihood, "_RUN_TOKENS", 4)
    model = decoder(CASES[name])
    asked = questions(model.config.vocab_size, len(name) % 2 * 5)
    expected = plain_scores(model, asked)
    for found, plain in zip(answer_scores(model, asked), expected, strict=True):
        assert found == pytest.approx(plain, abs=1e-10)
    context, answer = asked[2].context, asked[2].answers[1]
    with torch.no_grad():
        logits = model(torch.tensor(context + answer), lw.Stream.of([len(context + answer)])).log_softmax(-1)
    by_hand = sum(float(logits[len(context) - 1 + place, token]) for place, token in enumerate(answer))
    assert expected[2][1] == pytest.approx(by_hand, abs=1e-10)


def test_contexts_with_answers_are_whole_texts(model: lw.Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch):
    """Contexts and answers together are the texts with the answers in place, token by token."""
    seen = list[Question]()
    monkeypatch.setattr(few_shot_module, "answer_scores", lambda m, q: seen.extend(q) or plain_scores(m, q))
    task = from_file(write(tmp_path / "t.jsonl", rows(20)))
    few_shot(model, task, shots=2)
    prompt = "".join(task.template.example(row) + "\n\n" for row in task.examples(2, 0))
    for row, question in zip(task.tested, seen, strict=True):
        for label, answer in zip(task.labels, question.answers, strict=True):
            text = f"{prompt}{row.fields['text']}\nLabel: {label}"
            assert question.context + answer == tokenizer.encode(text, add_bos=True)
            assert tokenizer.decode(answer).strip() == label


def test_the_likeliest_label_is_chosen(model: lw.Decoder, monkeypatch):
    """Given scores that know the answer but for a liking for the first label, and nothing else."""
    task = synthetic(3)
    likes = [3.0, 0.0, 0.0, 0.0]

    def scores(_: object, asked: list[Question]) -> list[list[float]]:
        pairs = zip(task.tested, asked, strict=False)
        return [
            [(row.label == label) - 9.0 + like for label, like in zip(task.labels, likes, strict=True)]
            for row, _ in pairs
        ]

    monkeypatch.setattr(few_shot_module, "answer_scores", scores)
    found = few_shot(model, task, limit=100)
    assert (found.accuracy, found.calibrated, found.chance, found.majority) == (0.25, 1.0, 0.25, 0.25)
    assert found.predicted == {task.labels[0]: 100, **dict.fromkeys(task.labels[1:], 0)}
    likes[0] = 0.0
    found = few_shot(model, task, limit=100)
    assert found.accuracy == 1
    assert found.interval == wilson(100, 100)


def test_wilson_intervals_are_the_known_ones():
    """Of Newcombe 1998, table I."""
    known = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (right, count), interval in known.items():
        assert wilson(right, count) == pytest.approx(interval, abs=5e-5)


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_examples_take_labels_in_turn_and_go_by_the_seed(tmp_path: Path):
    task = from_file(write(tmp_path / "t.jsonl", rows(60, split="train") + rows(9, split="test")))
    assert (len(task.train), len(task.tested)) == (60, 9)
    for count in range(8):
        drawn = Counter(row.label for row in task.examples(count, 1))
        assert sum(drawn.values()) == count
        assert max(drawn.values(), default=0) - min((drawn[word] for word in WORDS), default=0) <= 1
    assert task.examples(6, 1) == task.examples(6, 1) != task.examples(6, 2)
    assert len({task.examples(3, seed)[-1].label for seed in range(9)}) == 3


def test_the_tested_rows_are_the_same_for_any_seed(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", rows(40))
    assert 4 <= len(from_file(path).train) <= 16
    assert from_file(path).tested == named_task(path, seed=5).tested


def test_the_synthetic_task_has_an_answer_in_its_text_and_each_label_as_often():
    rules = set[str]()
    for seed in range(6):
        task = synthetic(seed)
        assert Counter(row.label for row in task.tested) == dict.fromkeys(LABELS, len(task.tested) // 4)
        [rule] = [name for name in ("first", "last") if all(row.fields[name] == row.label for row in task.tested)]
        assert all(row.fields["first"] != row.fields["last"] for row in task.tested)
        rules.add(rule)
    assert rules == {"first", "last"}


def test_a_template_names_fields_and_braces_can_be_written(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"a": f"x{n}", "b": n, "label": n % 2} for n in range(20)])
    task = from_file(path, "{a} {{of}} {b}: {label}")
    assert task.labels == ["0", "1"]
    row = task.tested[0]
    assert task.template.example(row) == f"{row.fields['a']} {{of}} {row.fields['b']}: {row.label}"


@pytest.mark.parametrize(
    "text", ["", "{text}", "{label}", "{text} {label}.", "{label} {text}", "{text {label}", "{} {label}"]
)
def test_templates_that_are_none_are_refused(text: str):
    with pytest.raises(UserError, match=r"template = .*ends with its label"):
        Template(text)


def test_fewer_examples_where_no_more_fit(tokenizer: Tokenizer, tmp_path: Path):
    small = tiny(tokenizer, 60)
    found = few_shot(small, from_file(write(tmp_path / "t.jsonl", rows(60))), shots=8)
    assert 0 < found.shots < found.asked == 8


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model: lw.Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few-shot") / "model"
    lw.save(model, path)
    return path


BAD: dict[str, tuple[Any, list[str], list[str]]] = {
    "no label": ([*rows(9), {"text": "x"}], [], ["t.jsonl:10: no field 'label'"]),
    "no text": ([*rows(9), {"label": "x"}], [], ["t.jsonl:10: no field 'text'"]),
    "an empty text": ([{"text": " ", "label": "x"}], [], ["t.jsonl:1: text = ' '"]),
    "a label that is a list": ([{"text": "x", "label": []}], [], ["t.jsonl:1: label = []"]),
    "not an object": ([[1]], [], ["t.jsonl:1: a list"]),
    "one label": ([{"text": "x", "label": "y"}] * 9, [], ["every label is 'y'"]),
    "an empty file": ([], [], ["t.jsonl: no rows"]),
    "more examples than rows": (rows(40), ["--shots", "60"], ["shots = 60: ", "rows to draw examples from"]),
    "only rows for examples": (rows(9, split="train"), [], ["no row is left to be tested"]),
    "fewer than none": (rows(40), ["--shots=-1"], ["shots = -1: 0 examples or more"]),
    "no tested rows": (rows(40), ["--limit", "0"], ["limit = 0: 1 row or more"]),
    "a text longer than the window": (
        [*rows(9), {"text": "the " * 500, "label": "bad", "split": "test"}],
        ["--shots", "0"],
        ["t.jsonl:10: ", "without any example", "context_window is 400"],
    ),
    "a template without a label": (rows(40), ["--template", "{text}"], ["template = '{text}'", "ends with its label"]),
    "a template with another field": (rows(40), ["--template", "{a}{label}"], ["t.jsonl:1: no field 'a'"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(refuses, folder: Path, tmp_path: Path, name: str):
    content, words, says = BAD[name]
    refuses("eval", folder, "--tasks", write(tmp_path / "t.jsonl", content), *words, says=says)


def test_options_without_effect_and_nothing_to_do(refuses, folder: Path, tmp_path: Path):
    refuses("eval", folder, says=["nothing to evaluate"])
    refuses("eval", folder, "--shots", "2", says=["shots = 2: has no effect without a few-shot task"])
    refuses("eval", folder, "--tasks", "synthetic", "--window", "9", says=["window = 9: has no effect"])
    refuses(
        "eval",
        folder,
        "--tasks",
        "synthetic",
        "--template",
        "{first}{label}",
        says=["template = '{first}{label}': has no effect"],
    )
    refuses("eval", folder, "--tasks", "sst3", says=["sst3: no such file", "synthetic"])
    (tmp_path / "t.txt").write_text("text")
    refuses("eval", folder, "--tasks", tmp_path / "t.txt", says=["t.txt: text, not rows"])


def test_scores_that_are_not_finite_are_a_fault_of_the_model(refuses, folder: Path, tmp_path: Path):
    diverged = lw.load(folder)
    with torch.no_grad():
        diverged.head_weight.fill_(math.nan)
    lw.save(diverged, tmp_path / "diverged")
    refuses("eval", tmp_path / "diverged", "--tasks", "synthetic", says=["log-probability of a label = nan"], code=1)


def test_a_task_from_the_command_line_and_from_python(longwave, folder: Path, tmp_path: Path):
    path = write(tmp_path / "t.jsonl", rows(40))
    found = longwave("eval", folder, "--tasks", path, "--tasks", "synthetic", "--shots", "1", "--limit", "9", "--json")
    by_hand = lw.evaluate(folder, tasks=[path, "synthetic"], shots=1, limit=9)
    assert (
        [one["task"] for one in found.json["tasks"]] == [one.task for one in by_hand.tasks] == [str(path), "synthetic"]
    )
    assert [one["accuracy"] for one in found.json["tasks"]] == [one.accuracy for one in by_hand.tasks]
    assert "accuracy" in found.out
    assert "always the most frequent label" in found.out
