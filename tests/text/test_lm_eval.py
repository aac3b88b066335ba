"""Tasks of lm-eval through `longwave eval`: longwave's own figures, and no prompt cut to fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import runs
import torch

import longwave as lw
from longwave.config import build
from longwave.data.tokenizer import Tokenizer
from longwave.intervals import wilson
from longwave.model import Decoder
from longwave.streams import Stream

TEXTS = ("def main(argv):", "the cat sat", "import json\nimport re", "return self.value")
TASK = """
task: tiny_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
"""
METRIC = "metric_list:\n  - metric: {}\n"
GREEDY = "generation_kwargs: {until: ['~~~'], max_gen_toks: 4, do_sample: false}\n"
KINDS = {
    "rolling": ("loglikelihood_rolling", "", "{{text}}", METRIC.format("bits_per_byte")),
    "greedy": ("generate_until", "{{text}}", "{{answer}}", METRIC.format("exact_match") + GREEDY),
    "choice": ("multiple_choice", "{{text}}", "{{label}}", "doc_to_choice: [a, b]\n" + METRIC.format("acc")),
}


@pytest.fixture(scope="module")
def model() -> Decoder:
    shape = {"vocab_size": runs.VOCABULARY, "hidden_size": 32, "layout": "F L", "context_window": 48}
    values = {**shape, "attention": {"heads": 2}, "mlp": {"size": 48}}
    model = Decoder(build(lw.ModelConfig, values, "test")).eval()
    model.tokenizer = Tokenizer.load(runs.prepared())
    return model


@pytest.fixture
def tasks(model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Names of tasks by their kind: each a file, over the same rows."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    answers = [lw.generate(model, text, max_new_tokens=4) for text in TEXTS]
    pairs = zip(TEXTS, answers, strict=True)
    rows = [{"text": text, "answer": answer, "label": n % 2} for n, (text, answer) in enumerate(pairs)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, (kind, text, target, rest) in KINDS.items():
        (tmp_path / f"{name}.yaml").write_text(
            TASK.format(name=name, data=tmp_path / "data.jsonl", kind=kind, text=text, target=target) + rest
        )
    return {name: f"lm-eval:{tmp_path}/{name}.yaml" for name in KINDS}


def nats(model: Decoder, prompt: str, text: str) -> float:
    assert model.tokenizer is not None
    first, whole = model.tokenizer.encode(prompt, add_bos=True), model.tokenizer.encode(prompt + text, add_bos=True)
    with torch.no_grad():
        logs = model(torch.tensor(whole[:-1]), Stream.of([len(whole) - 1])).log_softmax(-1)
    return -sum(float(logs[place - 1, whole[place]]) for place in range(len(first), len(whole)))


def test_figures_are_longwaves_own(model: Decoder, tasks: dict[str, str]):
    found = lw.evaluate(model, tasks=list(tasks.values()))
    values = {one.task: one for one in found.lm_eval}
    bits = sum(nats(model, "", text) for text in TEXTS) / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert values["tiny_rolling"].value == pytest.approx(bits, rel=1e-5)
    assert (values["tiny_greedy"].value, values["tiny_greedy"].interval) == (1.0, wilson(4, 4))
    right = sum((nats(model, text, " b") < nats(model, text, " a")) == n % 2 for n, text in enumerate(TEXTS))
    assert values["tiny_choice"].value == right / 4
    assert {one.samples for one in found.lm_eval} == {4}


def test_prompts_that_do_not_fit_are_refused(model: Decoder, tasks: dict[str, str], tmp_path: Path):
    rows = [{"text": "the cat sat " * 30, "answer": "a", "label": 0}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("greedy", "choice"):
        with pytest.raises(
            lw.UserError, match=r"take \d+ tokens; the model's context_window is 48, and nothing is cut"
        ):
            lw.evaluate(model, tasks=tasks[name])
    [score] = lw.evaluate(model, tasks=tasks["rolling"]).lm_eval  # whole texts run window by window
    assert math.isfinite(score.value)


def test_the_command_line(longwave, refuses, model: Decoder, tasks: dict[str, str], tmp_path: Path):
    lw.save(model, tmp_path / "model")
    found = longwave("eval", tmp_path / "model", "--tasks", tasks["choice"], "--limit", "2", "--json")
    assert [(one["metric"], one["samples"]) for one in found.json["lm_eval"]] == [("acc,none", 2)]
    assert "2 rows" in found.out
    refuses("eval", tmp_path / "model", "--tasks", "lm-eval:none.yaml", says=["none.yaml: no such file"])
    refuses("eval", tmp_path / "model", "--tasks", tasks["choice"], "--shots", "2", says=["shots = 2: has no effect"])
    (tmp_path / "odd.yaml").write_text("task: odd\noutput_type: nothing\n")
    refuses("eval", tmp_path / "model", "--tasks", f"lm-eval:{tmp_path}/odd.yaml", says=["lm-eval: "])
