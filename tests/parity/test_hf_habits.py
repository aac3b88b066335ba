"""The habits of transformers: calls that its users make of any model, over every kind of layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import load_checkpoint_and_dispatch
from hf_models import LAYOUTS, ROWS, alone, decoder, greedy, in_class, near, padded, wrapped
from hf_runs import trainer
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from longwave.checkpoints import load, save
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.hf import LongwaveConfig, LongwaveForCausalLM, LongwaveForSequenceClassification, LongwaveModel

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
FLAT = [name for name, shape in LAYOUTS.items() if "(" not in shape["layout"]]
ASKED = (
    *("num_hidden_layers", "num_key_value_heads", "head_dim", "intermediate_size", "hidden_size", "vocab_size"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "num_attention_heads", "max_position_embeddings"),
    *("tie_word_embeddings", "rms_norm_eps"),
)


def llama(folder: Path, **changes: Any) -> LlamaForCausalLM:
    """A Llama of transformers in a folder."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 31, "num_hidden_layers": 3, "initializer_range": 0.3, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**shape | changes)).eval().double()
    model.save_pretrained(folder)
    return model


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"bos_token_id": 0, "eos_token_id": [1, 3], "pad_token_id": 2, "tie_word_embeddings": True},
        {"bos_token_id": None, "eos_token_id": None, "head_dim": 8, "rms_norm_eps": 1e-3},
    ],
    ids=["ids", "sizes"],
)
def test_a_config_says_what_transformers_own_says(changes: dict[str, Any], tmp_path: Path):
    theirs = llama(tmp_path / "hf", **changes).config
    save(load(tmp_path / "hf"), tmp_path / "lw")
    for ours in (
        AutoConfig.from_pretrained(tmp_path / "lw"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "lw").config,
    ):
        assert {name: getattr(ours, name) for name in ASKED} == {name: getattr(theirs, name) for name in ASKED}
        assert set(ASKED) - {"bos_token_id", "eos_token_id", "pad_token_id"} <= set(ours.to_dict())
    assert len(DynamicCache(config=ours).layers) == 3


@every_layout
def test_a_config_describes_every_layout_and_comes_back(layout: str, tmp_path: Path):
    config = LongwaveConfig(decoder(layout).config.to_dict())
    assert config.num_hidden_layers == len(decoder(layout).blocks)
    assert hasattr(config, "sliding_window") == (layout == "window")
    assert hasattr(config, "layer_types") == (layout in ("llama", "window"))
    config.save_pretrained(tmp_path)
    assert not set(json.loads((tmp_path / "config.json").read_text())) & {"hidden_size", "num_hidden_layers"}
    again = AutoConfig.from_pretrained(tmp_path)
    again.name_or_path = ""
    assert again.to_dict() == LongwaveConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert again.decoder_config() == decoder(layout).config


def test_what_follows_from_the_table_is_set_in_it():
    config = LongwaveConfig(decoder("window").config.to_dict())
    config.max_position_embeddings, config.sliding_window, config.num_key_value_heads = 77, 3, 1
    model = config.decoder_config()
    assert (model.context_window, model.table("window").size, model.table("attention").kv_heads) == (77, 3, 1)
    with pytest.raises(UserError, match=r"num_hidden_layers = 5: layout = 'F 2W' says it"):
        config.num_hidden_layers = 5


@every_layout
def test_values_set_on_the_config_of_a_model_are_saved(layout: str, tmp_path: Path):
    ours = wrapped(decoder(layout))
    values = {"pad_token_id": 7, "eos_token_id": 3, "use_cache": False, "my_own": "value"}
    for name, value in values.items():
        setattr(ours.config, name, value)
    ours.save_pretrained(tmp_path)
    for again in (AutoConfig.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).config):
        assert {name: getattr(again, name) for name in values} == values
    assert load(tmp_path).config == decoder(layout).config


# --- loading ----------------------------------------------------------------------------------------------------------

LOADED: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "pad": ({"pad_token_id": 1}, lambda ours: ours.config.pad_token_id == 1),
    "window": ({"max_position_embeddings": 99}, lambda ours: ours.decoder.config.context_window == 99),
    "tuple": ({"return_dict": False}, lambda ours: isinstance(ours(ROWS), tuple)),
    "no cache": ({"use_cache": False}, lambda ours: len(ours(ROWS).to_tuple()) == 1),
    "auto": ({"device_map": "auto"}, lambda ours: (ours.device.type == "cpu") != torch.accelerator.is_available()),
    "mapped": ({"device_map": {"model": "cpu", "head": "cpu"}}, lambda ours: ours.device.type == "cpu"),
    "safe": ({"weights_only": True, "use_safetensors": True}, lambda ours: not ours.training),
    "eager": ({"attn_implementation": "eager"}, lambda ours: ours.config._attn_implementation == "eager"),
    "settings": (
        {"generation_config": GenerationConfig(max_new_tokens=2)},
        lambda ours: ours.generate(ROWS).shape[1] == 14,
    ),
}


@pytest.mark.parametrize("case", LOADED)
@every_layout
def test_a_value_given_to_from_pretrained_takes_effect(layout: str, case: str, tmp_path: Path):
    save(decoder(layout), tmp_path)
    options, holds = LOADED[case]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    with torch.no_grad():
        assert holds(ours)
        near(ours(ROWS[:1], return_dict=True).logits[0].cpu(), alone(decoder(layout), ROWS[0]))


def test_a_model_without_weights_says_how_to_load_them(tmp_path: Path):
    """accelerate passes over tensors whose names differ from the class's, and then moves the model."""
    save(decoder("llama"), tmp_path)
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(UserError, match="the model has no weights yet"):
        load_checkpoint_and_dispatch(blank, str(tmp_path), device_map={"": "cpu"})


def test_an_untied_head_begins_as_the_embedding(tmp_path: Path):
    save(decoder("llama"), tmp_path / "m")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m", tie_word_embeddings=False)
    assert ours.decoder.head_weight is not ours.decoder.embed.weight
    ours.save_pretrained(tmp_path / "again")
    assert not load(tmp_path / "again").config.tie_embeddings
    with torch.no_grad():
        near(ours(ROWS[:1]).logits[0], alone(decoder("llama"), ROWS[0]))


@every_layout
def test_a_report_of_loading_and_a_state_dict_without_a_folder(layout: str, tmp_path: Path):
    save(decoder(layout), tmp_path)
    ours, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    body = LongwaveModel(ours.config, ours.decoder).state_dict()
    for tensors in (ours.state_dict(), body, load_file(tmp_path / "model.safetensors")):  # under three kinds of names
        again = LongwaveForCausalLM.from_pretrained(None, config=ours.config, state_dict=tensors)
        with torch.no_grad():
            near(again(ROWS[:1]).logits[0], alone(decoder(layout), ROWS[0]))


@pytest.mark.parametrize("changes", [{"model.decoder.norm.weight": None}, {"odd": torch.ones(2)}], ids=["less", "more"])
@pytest.mark.parametrize("of", [LongwaveForCausalLM, LongwaveForSequenceClassification])
def test_a_state_dict_of_another_model_is_refused(of: Any, changes: dict[str, Any], tmp_path: Path):
    ours = in_class(decoder("window"), tmp_path / "m")
    tensors = {name: tensor for name, tensor in (ours.state_dict() | changes).items() if tensor is not None}
    with pytest.raises(UserError, match=f"^from_pretrained: state_dict: .*{next(iter(changes)).split('.')[-1]}"):
        of.from_pretrained(None, config=ours.config, state_dict=tensors)
    classifier = LongwaveForSequenceClassification.from_pretrained(
        None, config=ours.config, state_dict=ours.state_dict()
    )
    assert torch.equal(classifier.decoder.embed.weight, ours.decoder.embed.weight)


@every_layout
def test_a_folder_of_adapters_loads_with_its_base(layout: str, tmp_path: Path):
    adapted = get_peft_model(in_class(decoder(layout), tmp_path / "m"), LoraConfig(target_modules=["q_proj"], r=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
        adapted.save_pretrained(tmp_path / "adapter")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")(ROWS).logits
        torch.testing.assert_close(found, adapted.eval()(ROWS).logits, atol=1e-4, rtol=1e-4)
        assert (found[0] - alone(decoder(layout), ROWS[0])).abs().max() > 1e-2


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_are_those_of_transformers(side: str, tmp_path: Path):
    theirs = llama(tmp_path)
    ours, (ids, mask) = LongwaveForCausalLM.from_pretrained(tmp_path, output_hidden_states=True), padded(side)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        found = ours(ids, attention_mask=mask).hidden_states
    assert len(found) == len(expected) == 4
    real = mask.bool()
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine[real], other[real], atol=1e-5, rtol=1e-5)  # theirs turn in single precision


@pytest.mark.parametrize("layout", FLAT)
def test_gradients_can_be_kept_at_hidden_states(layout: str):
    ids, mask = padded("left")
    for model in (wrapped(decoder(layout)), wrapped(decoder(layout)).train()):
        output = model(ids, attention_mask=mask, labels=ids, output_hidden_states=True)
        for state in output.hidden_states:
            state.retain_grad()
        output.loss.backward()
        assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in output.hidden_states)
    plain = wrapped(decoder(layout))
    plain(ids, attention_mask=mask, labels=ids).loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        near(one.grad, other.grad)


@every_layout
def test_embedded_inputs_are_their_ids(layout: str):
    ours, (ids, mask) = wrapped(decoder(layout)), padded("left")
    embedded = ours.get_input_embeddings()(ids)
    with torch.no_grad():
        near(ours(inputs_embeds=embedded, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits)
    made = ours.generate(inputs_embeds=embedded[:1], max_new_tokens=5, do_sample=False)
    assert made[0].tolist() == greedy(decoder(layout), ids[0], 5)


@every_layout
def test_eager_is_the_plain_maths_and_can_be_taken_back(layout: str):
    ours, fast = wrapped(decoder(layout)), wrapped(decoder(layout))
    with torch.no_grad():
        for implementation in ("eager", "sdpa", "eager"):
            ours.set_attn_implementation(implementation)
            near(ours(ROWS).logits, fast(ROWS).logits)
            assert ("reference" in ours.decoder.describe()[0]) == (implementation == "eager")
    with pytest.raises(ValueError, match="foo"):
        ours.set_attn_implementation("foo")


@every_layout
def test_targets_that_are_shifted_already_give_the_same_loss(layout: str):
    ours, (ids, mask) = wrapped(decoder(layout)), padded("right")
    labels = ids.masked_fill(mask == 0, -100)
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    with torch.no_grad():
        expected = ours(ids, attention_mask=mask, labels=labels).loss
        near(ours(ids, attention_mask=mask, shift_labels=shifted).loss, expected)
        near(ours(ids, attention_mask=mask, labels=ids, shift_labels=shifted).loss, expected)


def test_positions_in_the_cache_are_checked():
    ours = wrapped(decoder("llama"))
    with torch.no_grad():
        cache = ours(ROWS[:, :5], cache_position=torch.arange(5)).to_tuple()[-1]
        with pytest.raises(UserError, match="cache_position does not go on from the 5 columns seen"):
            ours(ROWS[:, 5:], cache=cache, cache_position=torch.arange(7))
        near(ours(ROWS[:, 5:], cache=cache, cache_position=torch.arange(5, 12)).logits, ours(ROWS).logits[:, 5:])


REFUSED: dict[str, tuple[str, Callable[[LongwaveForCausalLM, Path], object]]] = {
    "empty": (r"input_ids has shape \[4, 0\]", lambda ours, _: ours(ROWS[:, :0])),
    "flat": (r"input_ids has shape \[12\]", lambda ours, _: ours(ROWS[0])),
    "outside": (r"input_ids reach 42: the vocabulary has 0 to 30", lambda ours, _: ours(ROWS + 12)),
    "nothing": ("give either input_ids or inputs_embeds", lambda ours, _: ours()),
    "both": ("give either", lambda ours, _: ours(ROWS, inputs_embeds=torch.ones(4, 12, 16))),
    "width": (r"inputs_embeds has shape \[4, 12, 3\]", lambda ours, _: ours(inputs_embeds=torch.ones(4, 12, 3))),
    "weights": ("output_attentions is not supported", lambda ours, _: ours(ROWS, output_attentions=True)),
    "batching": ("continuous batching", lambda ours, _: ours.generate_batch([[5, 6]])),
    "both sources": (
        "from_pretrained: state_dict and the folder",
        lambda ours, folder: ours.from_pretrained(folder, state_dict=ours.state_dict()),
    ),
    "vocabulary": (
        r"vocab_size = 40, where the folder has 31",
        lambda ours, at: ours.from_pretrained(at, vocab_size=40),
    ),
    "disk": ("device_map = ", lambda ours, folder: ours.from_pretrained(folder, device_map={"a": "cpu", "b": "disk"})),
    "long": ("quantization_config", lambda ours, folder: ours.from_pretrained(folder, quantization_config="x" * 9999)),
    "biased": ("a head with a bias", lambda ours, _: ours.set_output_embeddings(nn.Linear(16, 31))),
}


@pytest.mark.parametrize("case", REFUSED)
@every_layout
def test_what_has_no_meaning_is_one_short_line(layout: str, case: str, tmp_path: Path):
    message, call = REFUSED[case]
    ours = in_class(decoder(layout), tmp_path / "m")
    with pytest.raises(UserError, match=message) as caught:
        call(ours, tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


# --- the head, training, generation -----------------------------------------------------------------------------------


@every_layout
def test_another_head_is_used_and_saved(layout: str, tmp_path: Path):
    ours = wrapped(decoder(layout))
    head = nn.Linear(16, 31, bias=False, dtype=torch.float64)
    with torch.no_grad():
        hidden = ours.model(ROWS).last_hidden_state
        ours.set_output_embeddings(head)
        near(ours(ROWS).logits, head(hidden) * ours.config.logit_scale)
        assert torch.equal(ours.get_output_embeddings().weight, head.weight)
        ours.save_pretrained(tmp_path)
        near(AutoModelForCausalLM.from_pretrained(tmp_path)(ROWS).logits, ours(ROWS).logits)


def test_neftune_shakes_what_the_embedding_gives(tmp_path: Path):
    weights = []
    for alpha in (None, 5.0):
        run = trainer(wrapped(decoder("llama")), tmp_path / str(alpha), max_steps=1, neftune_noise_alpha=alpha)
        run.train()
        weights.append(run.model.decoder.embed.weight)
    assert not torch.equal(*weights)


def test_prompt_tuning_learns(tmp_path: Path):
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = get_peft_model(wrapped(decoder("llama").float()), config)
    loss = tuned(input_ids=ROWS, attention_mask=torch.ones_like(ROWS), labels=ROWS).loss
    loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in tuned.parameters() if weight.requires_grad)
    made = tuned.generate(input_ids=ROWS[:1], attention_mask=torch.ones(1, 12), max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 15)
    assert isinstance(tuned, PeftModel)


@every_layout
def test_settings_that_transformers_calls_inconsistent_are_kept(layout: str, tmp_path: Path):
    """A temperature without do_sample, as published folders have it; a Trainer saves such a model too."""
    model = decoder(layout)
    model.origin.generation = {"temperature": 0.9, "top_p": 0.6}
    save(model, tmp_path / "m")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ours.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text())["temperature"] == 0.9
    run = trainer(ours, tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    assert (tmp_path / "run/checkpoint-1/trainer_state.json").exists()


def test_stop_strings_stop_generate_and_pipelines(tmp_path: Path):
    tokenizer = Tokenizer.train(["some text of some words"], 280)
    save(decoder("llama", torch.float32, tokenizer.vocab_size), tmp_path, tokenizer=tokenizer)
    ours, theirs = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompt = theirs("some", return_tensors="pt", return_token_type_ids=False)
    written = ours.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
    stop = theirs.decode(written[4:5])
    made = ours.generate(**prompt, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=theirs)
    until = next(at for at in range(12) if stop in theirs.decode(written[: at + 1]))
    assert made[0, prompt.input_ids.shape[1] :].tolist() == written[: until + 1].tolist()
    write = pipeline("text-generation", model=ours, tokenizer=theirs)
    (result,) = write("some", max_new_tokens=3, do_sample=False, stop_sequence=stop)
    assert result["generated_text"].startswith("some")


# --- without a language model's head ----------------------------------------------------------------------------------


@every_layout
def test_the_body_alone_keeps_the_head_frozen_and_saves_it(layout: str, tmp_path: Path):
    save(decoder(layout), tmp_path / "m")
    body = AutoModel.from_pretrained(tmp_path / "m")
    assert type(body) is type(AutoModelForCausalLM.from_pretrained(tmp_path / "m").get_decoder()) is LongwaveModel
    with torch.no_grad():
        near(body(ROWS).last_hidden_state, wrapped(decoder(layout)).model(ROWS).last_hidden_state)
    body.save_pretrained(tmp_path / "again")
    assert all(weight.requires_grad != name.startswith("decoder.head") for name, weight in body.named_parameters())
    with torch.no_grad():
        near(
            AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ROWS[:1]).logits[0],
            alone(decoder(layout), ROWS[0]),
        )


@pytest.mark.parametrize("side", ["left", "right"])
@every_layout
def test_a_classifier_reads_the_last_token_and_comes_back(layout: str, side: str, tmp_path: Path):
    save(decoder(layout), tmp_path / "m")
    torch.manual_seed(0)
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", num_labels=3, pad_token_id=7)
    assert type(ours) is LongwaveForSequenceClassification
    ids, mask = padded(side)
    ids = torch.where((ids == 7) & mask.bool(), 8, ids)
    with torch.no_grad():
        scores = ours(ids, attention_mask=mask).logits
        for row, real in zip(range(4), mask.bool(), strict=True):
            near(scores[row], ours(ids[row, real][None]).logits[0])
        ours.save_pretrained(tmp_path / "again")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
        near(again(ids, attention_mask=mask).logits, scores)
    with pytest.raises(UserError, match=r"unexpected tensor classifier\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_a_classifier_learns(tmp_path: Path):
    ours = AutoModelForSequenceClassification.from_pretrained(_saved(tmp_path), num_labels=2, pad_token_id=30)
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.02)
    labels, losses = torch.tensor([0, 1, 1, 0]), []
    for _ in range(12):
        loss = ours.train()(ROWS, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def _saved(folder: Path) -> Path:
    save(decoder("llama"), folder / "m")
    return folder / "m"
