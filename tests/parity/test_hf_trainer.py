"""`transformers.Trainer` over longwave models: the very steps of a loop of one's own, told the step by StepCallback."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import LAYOUTS, alone, decoder, in_class, near, wrapped
from hf_runs import LR, SEED, TEXTS, Rows, exactly, losses, same_weights, trainer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from longwave.config import ModelConfig, build
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.streams import Stream, Windows

every_layout = pytest.mark.parametrize("layout", [*LAYOUTS, "causal"])


def fresh(layout: str) -> Decoder:
    if layout != "causal":
        return decoder(layout)
    config = decoder("subllm").config.to_dict()
    model = Decoder(build(ModelConfig, {**config, "subllm": {"selection": "causal"}}, "test")).eval().double()
    model.load_state_dict(decoder("subllm").state_dict())
    return model


def by_hand(model: Decoder, batches: list[list[Tensor]]) -> tuple[Decoder, list[float]]:
    """Longwave's own steps over micro-batches of rows, two to a step: the weights after them, and the loss of each."""
    model.train()
    found = []
    for step in range(len(batches) // 2):
        model.set_step(step, SEED)
        micro = batches[2 * step : 2 * step + 2]
        count = sum(len(row) - 1 for rows in micro for row in rows)
        total = torch.zeros((), dtype=torch.float64)
        for first, rows in ((0, micro[0]), (len(micro[0]), micro[1])):
            sizes = tuple(map(len, rows))
            stream = Stream.of(sizes, windows=Windows(sizes, tuple(range(first, first + len(rows)))))
            targets = torch.cat([F.pad(row[1:], (0, 1), value=-100) for row in rows])
            loss = model.loss(torch.cat(rows), targets, stream) / count
            loss.backward()
            total += loss.detach()
        found.append(float(total))
        with torch.no_grad():
            for weight in model.parameters():
                assert weight.grad is not None
                weight -= LR * weight.grad
                weight.grad = None
    model.set_step(len(batches) // 2, SEED)
    return model.eval(), found


@pytest.mark.parametrize("cut", [None, 3], ids=["padded", "unpadded"])
@every_layout
def test_trainer_is_the_loop_by_hand(layout: str, cut: int | None, tmp_path: Path):
    """Weights, thresholds and losses: schedules and draws follow the step, and micro-batches have their own draws."""
    rows = Rows(cut)
    run = trainer(wrapped(fresh(layout)), tmp_path, rows)
    run.train()
    expected, found = by_hand(fresh(layout), rows.batches)
    same_weights(run.model.decoder, expected)
    torch.testing.assert_close(losses(run), found, atol=1e-6, rtol=1e-6)
    assert len(found) == 6


@pytest.mark.parametrize("layout", ["subllm", "causal"])
def test_a_subllm_without_the_callback_says_what_to_do(layout: str, tmp_path: Path):
    run = trainer(wrapped(fresh(layout)), tmp_path, callbacks=[])
    with pytest.raises(UserError, match=r"give Trainer callbacks=\[longwave\.hf\.StepCallback\(\)\]"):
        run.train()


@pytest.mark.parametrize("layout", ["llama", "subllm", "causal"])
def test_resuming_continues_the_schedule_to_the_bit(layout: str, tmp_path: Path):
    straight = trainer(in_class(fresh(layout), tmp_path / "m"), tmp_path / "straight", max_steps=5)
    straight.train()
    first = trainer(in_class(fresh(layout), tmp_path / "m"), tmp_path / "run", save_strategy="steps", save_steps=3)
    first.args.max_steps = 3
    first.train()
    second = trainer(in_class(fresh(layout), tmp_path / "m"), tmp_path / "run", max_steps=5)
    told: list[int] = []
    set_step = second.model.decoder.set_step
    second.model.decoder.set_step = lambda step, seed=0: (told.append(step), set_step(step, seed))[1]
    second.train(resume_from_checkpoint=True)
    assert told == [3, 4, 5]
    same_weights(second.model.decoder, straight.model.decoder, exactly)
    assert losses(second)[-2:] == losses(straight)[-2:]


@pytest.mark.parametrize("layout", ["llama", "subllm"])
def test_evaluation_the_best_model_and_the_last_save(layout: str, tmp_path: Path):
    """The output folder then holds the model beside the checkpoints, and loads, though Trainer wrote into it before."""
    seen: list[tuple[int, ...]] = []
    run = trainer(
        in_class(fresh(layout), tmp_path / "m"),
        tmp_path / "run",
        eval_dataset=[{"input_ids": text, "labels": text} for text in TEXTS[:3]],
        compute_metrics=lambda prediction: (seen.append(prediction.predictions.shape), {"lowest": 0.0})[1],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        max_steps=4,
        load_best_model_at_end=True,
        per_device_eval_batch_size=1,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    kept = AutoModelForCausalLM.from_pretrained(best)
    same_weights(run.model.decoder, kept.decoder, exactly)
    expected = [
        F.cross_entropy(alone(kept.decoder, text)[:-1], text[1:], reduction="mean").item() for text in TEXTS[:3]
    ]
    evaluated = run.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert seen[-1] == (3, 14, 31)
    for _ in range(2):
        run.save_model()
        same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run").decoder, kept.decoder, exactly)
    assert best.exists()


def test_label_smoothing_is_that_of_trainer_over_shifted_labels(tmp_path: Path):
    """The class has to be known as a causal language model for that."""
    rows = Rows()
    options = {"label_smoothing_factor": 0.3, "max_steps": 1, "gradient_accumulation_steps": 1}
    run = trainer(wrapped(fresh("llama")), tmp_path, rows, **options)
    run.train()
    logs = [alone(fresh("llama"), row)[:-1].log_softmax(-1) for row in rows.batches[0]]
    plain = torch.cat([-log.gather(1, row[1:, None])[:, 0] for log, row in zip(logs, rows.batches[0], strict=True)])
    smooth = torch.cat([-log.mean(-1) for log in logs])
    assert losses(run)[0] == pytest.approx((0.7 * plain.mean() + 0.3 * smooth.mean()).item(), abs=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layout", ["llama", "subllm"])
def test_gradient_checkpointing_changes_no_step(layout: str, reentrant: bool, tmp_path: Path):
    runs = []
    for on in (False, True):
        model = wrapped(fresh(layout))
        torch.manual_seed(0)
        options = {"gradient_checkpointing": on, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        runs.append(trainer(model, tmp_path / str(on), max_steps=3, **options))
        runs[-1].train()
        assert model.decoder.stack.recompute is on
        assert model.gradient_checkpointing is on
        assert model.decoder.stack.reentrant is (on and reentrant)
    same_weights(runs[0].model.decoder, runs[1].model.decoder, near if reentrant else exactly)
    runs[1].model.gradient_checkpointing_disable()
    assert not runs[1].model.decoder.stack.recompute


def test_the_callback_needs_a_longwave_model(tmp_path: Path):
    run = trainer(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(UserError, match="StepCallback: a Linear holds no longwave model"):
        run.callback_handler.on_train_begin(run.args, run.state, run.control)


@pytest.mark.parametrize("options", [{"context_fn": print}, {"debug": True}], ids=str)
def test_checkpointing_in_another_way_is_refused(options: dict[str, Any]):
    with pytest.raises(UserError, match="activation checkpointing of longwave models takes use_reentrant alone"):
        wrapped(fresh("llama")).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@pytest.mark.parametrize("layout", ["llama", "subllm"])
def test_bf16_trains(layout: str, tmp_path: Path):
    """Mixed precision over weights in single precision: near the curve without it."""
    curves = []
    for bf16 in (False, True):
        run = trainer(wrapped(fresh(layout).float()), tmp_path / str(bf16), bf16=bf16, max_steps=2)
        run.train()
        curves.append(losses(run))
    torch.testing.assert_close(curves[0][0], curves[1][0], atol=0.05, rtol=0.05)
    assert all(torch.isfinite(torch.tensor(curves[1])))


@every_layout
def test_packed_documents_do_not_see_each_other(layout: str):
    """A row of several documents, as flattening collators make it, is those documents; the window is the row."""
    flat = DataCollatorWithFlattening()([{"input_ids": text.tolist()} for text in TEXTS[:4]])
    ours = wrapped(fresh(layout)).train()
    ours.decoder.set_step(0)
    ours(**flat).loss.backward()
    twin = fresh(layout).train()
    twin.set_step(0)
    sizes = tuple(map(len, TEXTS[:4]))
    targets = torch.cat([F.pad(text[1:], (0, 1), value=-100) for text in TEXTS[:4]])
    loss = twin.loss(torch.cat(TEXTS[:4]), targets, Stream.of(sizes, windows=Windows((sum(sizes),), (0,))))
    (loss / (sum(sizes) - 4)).backward()
    for weight, mine in zip(ours.parameters(), twin.parameters(), strict=True):
        near(weight.grad, mine.grad)
    with torch.no_grad():
        logits = ours.eval()(flat["input_ids"], position_ids=flat["position_ids"]).logits[0]
    near(logits, torch.cat([alone(ours.decoder, text) for text in TEXTS[:4]]))


@pytest.mark.parametrize("positions", [[0, 1, 3, 4], [1, 2, 3, 4], [0, 2, 0, 1]], ids=str)
def test_positions_that_count_no_document_are_refused(positions: list[int]):
    with pytest.raises(UserError, match="position_ids do not count"):
        wrapped(fresh("llama"))(TEXTS[0][None, :4], position_ids=torch.tensor([positions]))


def test_positions_of_padded_rows_may_be_given():
    ours, (ids, mask) = wrapped(fresh("subllm")), (torch.stack([TEXTS[0], TEXTS[0].flip(0)]), torch.ones(2, 9))
    mask[0, :4] = 0
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        near(ours(ids, mask, position_ids=positions).logits, ours(ids, mask).logits)
        cached = ours(ids[:, :6], mask[:, :6], position_ids=positions[:, :6], use_cache=True)
        following = ours(ids[:, 6:], mask, position_ids=positions[:, 6:], cache=cached.to_tuple()[-1])
    near(following.logits, ours(ids, mask).logits[:, 6:])
