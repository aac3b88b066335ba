"""PEFT's LoRA over longwave models: on every projection, trained by Trainer, merged, saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import ROWS, alone, decoder, in_class, near, padded, wrapped
from hf_runs import exactly, losses, same_weights, trainer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longwave.hf import LongwaveForCausalLM, StepCallback

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
both = pytest.mark.parametrize("layout", ["llama", "subllm"])


def lora(model: Any, targets: Any = PROJECTIONS, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **options))
    return adapted.to(model.dtype)


def stirred(adapted: PeftModel) -> PeftModel:
    """With adapters that do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(adapted.named_parameters()):
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return adapted.eval()


@both
def test_lora_sits_on_every_projection_and_at_first_changes_nothing(layout: str):
    adapted = lora(wrapped(decoder(layout))).eval()
    blocks = len(decoder(layout).blocks)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 7 * blocks
    assert {name for name, weight in adapted.named_parameters() if weight.requires_grad} == {
        name for name, _ in adapted.named_parameters() if "lora_" in name
    }
    with torch.no_grad():
        near(adapted(ROWS[:1]).logits[0], alone(decoder(layout), ROWS[0]))


@both
def test_all_linear_leaves_the_head_alone(layout: str):
    adapted = lora(wrapped(decoder(layout)), "all-linear")
    found = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert found == set(PROJECTIONS)


@both
def test_merged_adapters_give_the_same_model_and_a_folder(layout: str, tmp_path: Path):
    adapted, (ids, mask) = stirred(lora(wrapped(decoder(layout)))), padded("left")
    with torch.no_grad():
        expected = adapted(ids, attention_mask=mask).logits
        made = adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert (expected - wrapped(decoder(layout))(ids, attention_mask=mask).logits).abs().max() > 0.1
    merged = adapted.merge_and_unload()
    assert type(merged) is LongwaveForCausalLM
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        near(again(ids, attention_mask=mask).logits, expected)
    assert torch.equal(again.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), made)


@both
def test_adapters_are_saved_and_loaded_over_the_folder(layout: str, tmp_path: Path):
    base = in_class(decoder(layout), tmp_path / "base")
    adapted = stirred(lora(base))
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        near(again(ROWS).logits, adapted(ROWS).logits)
        with again.disable_adapter():
            near(again(ROWS[:1]).logits[0], alone(decoder(layout), ROWS[0]))


@pytest.mark.parametrize("options", [{"targets": ["q_proj", "head"]}, {"modules_to_save": ["head"]}], ids=str)
def test_an_adapter_around_the_head_counts_in_logits_and_loss(options: dict[str, Any]):
    adapted = lora(wrapped(decoder("subllm")), **options)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "head" in name and ("lora_B" in name or "modules_to_save" in name):
                weight.normal_(generator=torch.Generator().manual_seed(1))
        logits = adapted.eval()(ROWS).logits
        assert (logits - wrapped(decoder("subllm"))(ROWS).logits).abs().max() > 0.1
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ROWS[:, 1:].flatten())
        torch.testing.assert_close(adapted(ROWS, labels=ROWS).loss, expected.float(), check_dtype=False)


@both
def test_trainer_trains_adapters_alone_and_resumes(layout: str, tmp_path: Path):
    """StepCallback finds the decoder inside PEFT's wrappers."""
    straight = trainer(lora(wrapped(decoder(layout))), tmp_path / "straight", max_steps=4)
    straight.train()
    first = trainer(lora(wrapped(decoder(layout))), tmp_path / "run", save_strategy="steps", save_steps=2)
    first.args.max_steps = 2
    first.train()
    second = trainer(lora(wrapped(decoder(layout))), tmp_path / "run", max_steps=4)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(straight)
    for one, other in zip(second.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with second.model.disable_adapter():
        base = second.model.unload()
    same_weights(base.decoder, decoder(layout), exactly)


def test_lora_fine_tuning_of_a_llama_has_the_loss_curve_of_transformers_own(tmp_path: Path):
    """The same folder, adapters and batches in single precision: within 1e-3 at every one of 20 steps."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=31, num_hidden_layers=3, initializer_range=0.1, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    ours = lora(LongwaveForCausalLM.from_pretrained(tmp_path / "hf"))
    theirs = lora(LlamaForCausalLM.from_pretrained(tmp_path / "hf"))
    for mine, yours in zip(adapters(ours), adapters(theirs), strict=True):
        assert mine.shape == yours.shape
        mine.data.copy_(yours.data)
    curves = []
    for model, callbacks in ((ours, [StepCallback()]), (theirs, [])):
        options = {"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 20, "max_grad_norm": 1.0}
        run = trainer(model, tmp_path, callbacks=callbacks, **options)
        run.train()
        curves.append(torch.tensor(losses(run)))
    assert len(curves[0]) == 20
    assert (curves[0] - curves[1]).abs().max() < 1e-3
    assert curves[0][-1] < curves[0][0] - 0.3, "something was learnt"


def adapters(adapted: nn.Module) -> list[Tensor]:
    """The adapters' weights in the order in which a Llama's projections stand, which both models share."""
    return [weight for name, weight in adapted.named_parameters() if "lora_" in name]
