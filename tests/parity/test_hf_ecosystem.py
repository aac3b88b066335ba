"""What people run on top of transformers, on longwave folders: pipelines, TRL's SFTTrainer, lm-eval."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import alone, decoder
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, pipeline

import longwave as lw
from longwave.checkpoints import save
from longwave.data.tokenizer import Tokenizer
from longwave.hf import StepCallback

both = pytest.mark.parametrize("layout", ["llama", "subllm"])
QUESTIONS = [f"question {number} is what?" for number in range(12)]
TOKENIZER = Tokenizer.train(QUESTIONS, 280)


@pytest.fixture
def folder(layout: str, tmp_path: Path) -> Path:
    """A model in single precision with its tokenizer."""
    save(decoder(layout, torch.float32, TOKENIZER.vocab_size), tmp_path / layout, tokenizer=TOKENIZER)
    return tmp_path / layout


@both
def test_a_text_generation_pipeline_gives_longwaves_own_text(folder: Path):
    write = pipeline("text-generation", model=str(folder), device="cpu")
    prompts = ["question 3", "question 3 is what"]
    made = write(prompts, max_new_tokens=6, do_sample=False, return_full_text=False)
    for prompt, (result,) in zip(prompts, made, strict=True):
        assert result["generated_text"] == lw.generate(lw.load(folder), prompt, max_new_tokens=6)


# --- TRL --------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "A:{% generation %}{{ message.content }}<|eos|>{% endgeneration %}"
    "{% else %}Q:{{ message.content }}{% endif %}{% endfor %}"
)


def chats() -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "well " * (1 + number % 3)}]}
        for number, asked in enumerate(QUESTIONS)
    ]


def loss_on_answers(folder: Path, tokenizer: PreTrainedTokenizerBase) -> float:
    """The mean loss of the assistant's tokens, each chat by itself."""
    model, total, count = lw.load(folder), 0.0, 0
    for chat in chats():
        options = {"return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
        parts = tokenizer.apply_chat_template(chat["messages"], **options)
        ids, answers = parts["input_ids"][0], torch.as_tensor(parts["assistant_masks"]).flatten()[1:].bool()
        losses = F.cross_entropy(alone(model, ids)[:-1], ids[1:], reduction="none")[answers]
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@both
def test_sft_trainer_learns_from_chats(folder: Path, packing: bool, tmp_path: Path):
    """The loss before training is longwave's own over the answers, in packed rows too: no chat sees another."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats())))
    data = load_dataset("json", data_files=str(tmp_path / "chats.jsonl"), split="train", cache_dir=str(tmp_path / "c"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 12, "max_length": 80}
    steps = {"max_steps": 8, "learning_rate": 0.02, "logging_steps": 1}
    options |= {"assistant_only_loss": True, "packing": packing, **sizes, **steps}
    trainer = SFTTrainer(
        str(folder),
        SFTConfig(str(tmp_path / "out"), **options),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        callbacks=[StepCallback()],
    )
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(loss_on_answers(folder, tokenizer), rel=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3
    trainer.save_model()
    assert loss_on_answers(tmp_path / "out", tokenizer) == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)


# --- lm-eval ----------------------------------------------------------------------------------------------------------

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
metric_list:
  - metric: {metric}
"""


def write_tasks(folder: Path, tmp_path: Path) -> Path:
    """Two tasks: how well the questions are predicted, and whether greedy answers are longwave's own."""
    model = lw.load(folder)
    rows = [{"text": text, "answer": lw.generate(model, text, max_new_tokens=4)} for text in QUESTIONS[:3]]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    common = {"data": tmp_path / "data.jsonl"}
    rolling = {"kind": "loglikelihood_rolling", "text": "", "target": "{{text}}", "metric": "bits_per_byte"}
    greedy = {"kind": "generate_until", "text": "{{text}}", "target": "{{answer}}", "metric": "exact_match"}
    options = "generation_kwargs: {until: ['~~~'], max_gen_toks: 4, do_sample: false}\n"
    (tasks / "rolling.yaml").write_text(TASK.format(name="rolling", **common, **rolling))
    (tasks / "greedy.yaml").write_text(TASK.format(name="greedy", **common, **greedy) + options)
    return tasks


def bits_per_byte(folder: Path) -> float:
    """Of the questions, each with the token that begins a document, before which lm-eval puts another one."""
    model, nats = lw.load(folder), 0.0
    for text in QUESTIONS[:3]:
        ids: Tensor = torch.tensor([0, *TOKENIZER.encode(text, add_bos=True)])
        nats += float(F.cross_entropy(alone(model, ids)[:-1], ids[1:], reduction="sum"))
    return nats / math.log(2) / sum(len(text.encode()) for text in QUESTIONS[:3])


def check(results: dict[str, Any], folder: Path) -> None:
    assert results["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits_per_byte(folder), rel=1e-4)
    assert results["tiny_greedy"]["exact_match,none"] == 1.0


@both
def test_lm_eval_measures_what_longwave_measures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    manager = TaskManager(include_path=str(write_tasks(folder, tmp_path)), include_defaults=False)
    asked = {"model": "hf", "model_args": {"pretrained": str(folder)}, "tasks": ["tiny_rolling", "tiny_greedy"]}
    check(simple_evaluate(**asked, device="cpu", batch_size=2, task_manager=manager)["results"], folder)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["subllm"])
def test_the_command_line_of_lm_eval_takes_a_folder(folder: Path, tmp_path: Path):
    """A process that only knows `trust_remote_code`."""
    arguments = {
        "--model": "hf",
        "--model_args": f"pretrained={folder},trust_remote_code=True",
        "--tasks": "tiny_rolling,tiny_greedy",
        "--include_path": str(write_tasks(folder, tmp_path)),
        "--device": "cpu",
        "--output_path": str(tmp_path / "out"),
    }
    run = [sys.executable, "-m", "lm_eval", *(part for pair in arguments.items() for part in pair)]
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(run, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    check(json.loads(written.read_text())["results"], folder)


@both
def test_chat_templates_render_through_the_tokenizer_of_the_folder(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    inputs = tokenizer.apply_chat_template(chats()[0]["messages"][:1], return_dict=True, return_tensors="pt")
    made = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(made[0]).startswith("Q:question 0")
