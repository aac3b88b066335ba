"""Runs of `transformers.Trainer` over ragged rows of tokens, for the tests of longwave.hf."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hf_models import near
from torch import Tensor
from transformers import Trainer, TrainingArguments

from longwave.hf import StepCallback
from longwave.model import Decoder

LR, SEED = 0.05, 11
GENERATOR = torch.Generator().manual_seed(4)
TEXTS = [torch.randint(0, 31, (length,), generator=GENERATOR) for length in (9, 14, 3, 11, 14, 6, 8, 12, 5, 14, 10, 7)]


class Rows:
    """Pads rows to the longest, or leaves them alone where all are cut to one length; remembers every batch."""

    def __init__(self, cut: int | None = None) -> None:
        self.cut, self.batches = cut, list[list[Tensor]]()

    def __call__(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        rows = [example["input_ids"][: self.cut] for example in examples]
        self.batches.append(rows)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 6,
            "optim": "sgd",
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "seed": SEED,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            **options,
        },
    )


def trainer(model: Any, folder: Path, collator: Callable[..., Any] | None = None, **options: Any) -> Trainer:
    texts = [{"input_ids": text, "labels": text} for text in TEXTS]
    callbacks = options.pop("callbacks", [StepCallback()])
    others = {name: options.pop(name) for name in ("eval_dataset", "compute_metrics") if name in options}
    collator = collator or Rows()
    return Trainer(model, arguments(folder, **options), collator, texts, callbacks=callbacks, **others)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def same_weights(one: Decoder, other: Decoder, close: Callable[[Tensor, Tensor], None] = near) -> None:
    for (name, weight), twin in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert weight.shape == twin.shape, name
        close(weight, twin)


def exactly(one: Tensor, other: Tensor) -> None:
    assert torch.equal(one, other)
