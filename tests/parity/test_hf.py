"""longwave inside transformers: the same logits, loss and greedy tokens as longwave alone, padded in any way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import LAYOUTS, LENGTHS, ROWS, alone, decoder, greedy, in_class, near, padded
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import longwave.hf
from longwave.checkpoints import load, save
from longwave.config import ModelConfig, build
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.files import MANIFEST
from longwave.hf import LongwaveCache, LongwaveConfig, LongwaveForCausalLM
from longwave.hf.cache import NAME
from longwave.model import Decoder
from longwave.resamplers import Kept
from longwave.streams import Stream

every_layout = pytest.mark.parametrize("layout", LAYOUTS)

Model = Callable[[str], LongwaveForCausalLM]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """Models through a folder and AutoModelForCausalLM, by the name of their layout."""
    return lambda layout: in_class(decoder(layout), tmp_path / layout)


def near_in_fp32(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_auto_classes_find_longwave(model: Model, tmp_path: Path):
    loaded = model("subllm")
    assert type(loaded) is LongwaveForCausalLM
    assert not loaded.training
    config = AutoConfig.from_pretrained(tmp_path / "subllm")
    assert type(config) is LongwaveConfig
    assert config.decoder_config() == loaded.decoder.config
    shape = (config.vocab_size, config.hidden_size, config.num_attention_heads, config.max_position_embeddings)
    assert shape == (31, 16, 2, 2048)


def test_model_from_a_config_is_drawn_by_longwave(model: Model):
    config = model("subllm").config
    drawn = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for (name, weight), other in zip(
        drawn.decoder.state_dict().items(), Decoder(config.decoder_config()).state_dict().values(), strict=True
    ):
        assert torch.equal(weight, other), name


@every_layout
def test_logits_are_those_of_the_decoder(model: Model, layout: str):
    ours = model(layout)
    with torch.no_grad(), ours.decoder.watching(kept := Kept.of(ours.decoder.resamplers)):
        output = ours(ROWS)
    assert output.logits.shape == (4, 12, 31)
    assert output.loss is None
    for row, tokens in enumerate(ROWS):
        near(output.logits[row], alone(decoder(layout), tokens))
    if layout == "subllm":
        assert len(kept.shares) == 2
        assert all(0 < share < 1 for share in kept.shares)


@pytest.mark.parametrize("side", ["left", "right"])
@every_layout
def test_padded_rows_are_what_each_is_alone(model: Model, layout: str, side: str):
    ids, mask = padded(side)
    with torch.no_grad():
        logits = model(layout)(ids, attention_mask=mask).logits
    for row, length in enumerate(LENGTHS):
        expected = alone(decoder(layout), ROWS[row, :length])
        near(logits[row, mask[row].bool()], expected)
        pads = logits[row, ~mask[row].bool()]
        before = expected[-1:] if side == "right" else torch.zeros(1, 31, dtype=torch.float64)
        near(pads, before.expand_as(pads))


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@every_layout
def test_greedy_generate_is_longwaves_own(model: Model, layout: str, side: str, use_cache: bool):
    """Right-padded too: there the pads repeat the logits of the last token."""
    ids, mask = (ROWS, None) if side == "none" else padded(side)
    lengths = (12,) * 4 if side == "none" else LENGTHS
    made = model(layout).generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=use_cache)
    for row, length in enumerate(lengths):
        assert made[row, 12:].tolist() == greedy(decoder(layout), ROWS[row, :length], 8)
    assert len(set(made[:, 12:].flatten().tolist())) > 3


def test_generation_is_that_of_transformers_llama(tmp_path: Path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "initializer_range": 0.3}
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=31, num_hidden_layers=2, eos_token_id=None, **shape)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    save(load(tmp_path / "hf"), tmp_path / "lw")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "lw")
    ids, mask = padded("left")
    options = {"attention_mask": mask, "max_new_tokens": 16, "pad_token_id": 7}
    for extra in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        assert torch.equal(ours.generate(ids, **options, **extra), theirs.generate(ids, **options, **extra))


@pytest.mark.parametrize("cuts", [(12,), (4, 8), (1,) * 12, (3, 1, 8)])
@every_layout
def test_any_chunking_through_the_cache_is_one_forward(model: Model, layout: str, cuts: tuple[int, ...]):
    ours = model(layout)
    for side in ("left", "right"):
        ids, mask = padded(side)
        cache, pieces, done = None, [], 0
        with torch.no_grad():
            expected = ours(ids, attention_mask=mask, use_cache=False)
            for cut in cuts:
                piece, done = ids[:, done : done + cut], done + cut
                output = ours(piece, attention_mask=mask[:, :done], past_key_values=cache)
                cache = output[NAME]
                pieces.append(output.logits)
        assert expected.get(NAME) is None
        assert isinstance(cache, LongwaveCache)
        assert (cache.get_seq_length(), cache.state.seen) == (12, list(LENGTHS))
        near(torch.cat(pieces, 1), expected.logits)


@every_layout
def test_generation_goes_on_from_a_returned_cache(model: Model, layout: str):
    ours = model(layout)
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = ours.generate(ROWS, max_new_tokens=4, **options)
    second = ours.generate(first.sequences, max_new_tokens=4, **{NAME: first[NAME]}, **options)
    assert torch.equal(second.sequences, ours.generate(ROWS, max_new_tokens=8, do_sample=False))
    assert second[NAME].get_seq_length() == 12 + 8 - 1


@every_layout
def test_cropped_and_selected_cache_is_that_of_a_fresh_run(model: Model, layout: str):
    ours = model(layout)
    with torch.no_grad():
        cache = ours(ROWS[:, :6])[NAME]
        cache.batch_select_indices(torch.tensor([3, 1]))
        cache.batch_repeat_interleave(2)
        ours(ROWS[:, 6:8], past_key_values=cache)
        if layout == "hybrid":
            with pytest.raises(ValueError, match="length 6 cannot be returned to: a recurrent state has forgotten it"):
                cache.crop(-2)
        elif layout != "window":  # which may have forgotten what would be visible again
            cache.crop(-2)
            ours(ROWS[:, 6:8], past_key_values=cache)
        found = ours(ROWS[:, 8:], past_key_values=cache).logits
        for row, source in enumerate((3, 3, 1, 1)):
            expected = alone(decoder(layout), torch.cat([ROWS[source, :6], ROWS[row, 6:]]))[8:]
            near(found[row], expected)
        cache.reset()
        assert torch.equal(ours(ROWS, past_key_values=cache).logits, ours(ROWS).logits)


def test_pads_after_a_reordered_cache_repeat_the_right_rows(model: Model):
    ours, pads = model("subllm"), torch.zeros(4, 1, dtype=torch.int64)
    with torch.no_grad():
        output = ours(ROWS)
        output[NAME].reorder_cache(torch.tensor([2, 2, 0, 1]))
        found = ours(pads, attention_mask=pads, past_key_values=output[NAME]).logits
    near(found, output.logits[[2, 2, 0, 1], -1:])


def manual_loss(decoder: Decoder, labels: Tensor, rows: list[Tensor]) -> Tensor:
    """Cross-entropy of every row by itself, the mean over the labels that count."""
    logits = torch.cat([alone(decoder, row)[:-1] for row in rows])
    return F.cross_entropy(logits, labels, ignore_index=-100)


@every_layout
def test_loss_is_the_mean_cross_entropy(model: Model, layout: str):
    labels = ROWS.clone()
    labels[0, 3:7] = -100
    with torch.no_grad():
        output = model(layout)(ROWS, labels=labels)
    expected = manual_loss(decoder(layout), labels[:, 1:].flatten(), list(ROWS))
    near(output.loss, expected)
    assert output.logits.shape == (4, 12, 31)


@pytest.mark.parametrize("side", ["left", "right"])
@every_layout
def test_loss_of_padded_rows_counts_no_pad(model: Model, layout: str, side: str):
    """Whatever the labels at the pads."""
    ids, mask = padded(side)
    with torch.no_grad():
        loss = model(layout)(ids, attention_mask=mask, labels=ids).loss
    rows = [ROWS[row, :length] for row, length in enumerate(LENGTHS)]
    expected = manual_loss(decoder(layout), torch.cat([row[1:] for row in rows]), rows)
    near(loss, expected)


def test_loss_is_that_of_transformers_llama(tmp_path: Path):
    shape = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    theirs = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, initializer_range=0.5, **shape)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    ours = LongwaveForCausalLM.from_pretrained(tmp_path / "hf")
    ids, mask = padded("right")
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, labels=labels).loss
        near_in_fp32(ours(ids, attention_mask=mask, labels=labels).loss, expected)


def test_loss_without_any_label_is_zero(model: Model):
    ours = model("llama").train()
    loss = ours(ROWS[:, :1], labels=ROWS[:, :1]).loss
    loss.backward()
    assert loss.item() == 0


@every_layout
def test_training_makes_no_logits_and_no_cache_and_every_gradient(model: Model, layout: str):
    ours = model(layout).train()
    ours.decoder.set_step(0)
    output = ours(ROWS, labels=ROWS)
    assert output.logits is None
    assert output.get(NAME) is None
    output.loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in ours.parameters())
    twin = decoder(layout).train()
    twin.set_step(0)
    targets = F.pad(ROWS[:, 1:], (0, 1), value=-100).flatten()
    (twin.loss(ROWS.flatten(), targets, Stream.of([12] * 4)) / 44).backward()
    for (name, weight), mine in zip(ours.decoder.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, mine.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert ours(ROWS, labels=ROWS, logits_to_keep=2).logits.shape == (4, 2, 31)


def test_subllm_in_training_asks_for_its_step(model: Model):
    ours = model("subllm").train()
    with pytest.raises(UserError, match="set_step"):
        ours(ROWS, labels=ROWS)
    ours.decoder.set_step(0)
    with pytest.raises(UserError, match=r"without a cache; call model\.eval\(\)"):
        ours.generate(ROWS, max_new_tokens=2)
    with pytest.raises(UserError, match=r"without a cache; call model\.eval\(\)"):
        ours(ROWS, past_key_values=LongwaveCache(ours.decoder, 4))


@pytest.mark.parametrize("keep", [1, 3, 0, torch.tensor([0, 5])], ids=str)
def test_logits_to_keep(model: Model, keep: int | Tensor):
    ours, (ids, mask) = model("subllm"), padded("left")
    with torch.no_grad():
        everything = ours(ids, attention_mask=mask).logits
        kept = ours(ids, attention_mask=mask, logits_to_keep=keep).logits
    columns = slice(-keep, None) if isinstance(keep, int) else keep
    near(kept, everything[:, columns])


def test_pads_never_enter_the_model(model: Model):
    ours, (ids, mask) = model("subllm"), padded("left")
    seen: list[int] = []
    ours.decoder.stack.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with torch.no_grad():
        ours(ids, attention_mask=mask)
    assert seen == [sum(LENGTHS)]


def test_return_dict_false_gives_a_tuple(model: Model):
    ours = model("llama")
    with torch.no_grad():
        loss, logits = ours(ROWS, labels=ROWS, return_dict=False)
    assert loss.ndim == 0
    assert logits.shape == (4, 12, 31)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype_is_asked_for(model: Model, tmp_path: Path, dtype: torch.dtype | str):
    model("subllm")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "subllm", dtype=dtype)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    assert loaded.dtype == loaded.config.dtype == torch.bfloat16
    assert loaded.generate(ROWS, max_new_tokens=3, do_sample=False).shape == (4, 15)
    as_saved = AutoModelForCausalLM.from_pretrained(tmp_path / "subllm", dtype="auto", device_map={"": "cpu"})
    assert as_saved.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("norm.weight"), r"missing tensor norm\.weight"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "unexpected tensor extra"),
        (lambda tensors: tensors.update({"norm.weight": torch.ones(3)}), r"norm\.weight has shape \[3\]"),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_tensor_that_does_not_fit_is_an_error(
    model: Model, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], named: str
):
    model("llama")
    path = tmp_path / "llama/model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    (tmp_path / "llama" / MANIFEST).unlink()
    with pytest.raises(UserError, match=named):
        AutoModelForCausalLM.from_pretrained(tmp_path / "llama")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dtype": "bfloat17"}, "dtype = 'bfloat17'"),
        ({"device_map": {"model": "cpu", "head": "disk"}}, "device_map = "),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ({"variant": "fp16"}, "variant = 'fp16' is not supported"),
    ],
)
def test_option_that_would_have_no_effect_is_refused(model: Model, tmp_path: Path, options: dict[str, Any], named: str):
    model("llama")
    with pytest.raises(UserError, match=named):
        LongwaveForCausalLM.from_pretrained(tmp_path / "llama", **options)


def test_config_of_another_model_is_refused(model: Model, tmp_path: Path):
    other = model("subllm").config
    model("llama")
    with pytest.raises(UserError, match="another model"):
        LongwaveForCausalLM.from_pretrained(tmp_path / "llama", config=other)


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"past_key_values": DynamicCache()}, "is a DynamicCache; longwave models use LongwaveCache"),
        ({"attention_mask": torch.ones(4, 11)}, r"attention_mask has shape \[4, 11\]; expected \[4, 12 or more\]"),
        ({"attention_mask": torch.ones(4, 1, 12, 12)}, r"attention_mask has shape \[4, 1, 12, 12\]"),
    ],
)
def test_input_that_does_not_fit_is_named(model: Model, inputs: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        model("llama")(ROWS, **inputs)


@every_layout
def test_saved_model_is_the_same_folder_again(model: Model, tmp_path: Path, layout: str):
    ours = model(layout)
    ours.generation_config.eos_token_id = 5
    ours.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for (name, weight), other in zip(ours.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name
    assert again.generation_config.eos_token_id == 5
    ours.save_pretrained(tmp_path / "again")
    with pytest.raises(UserError, match="push_to_hub"):
        ours.save_pretrained(tmp_path / "again", push_to_hub=True)


def test_tokenizer_of_the_folder_ends_generation(tmp_path: Path):
    tokenizer = Tokenizer.train(["some text of some words"], 280)
    shape = {"vocab_size": 280, "hidden_size": 16, "layout": "F", "attention": {"heads": 2}, "mlp": {"size": 24}}
    ours = Decoder(build(ModelConfig, shape, "test"))
    with torch.no_grad():
        ours.head_weight.zero_()
        ours.norm.weight.fill_(1.0)
    save(ours, tmp_path / "m", tokenizer=tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert (loaded.generation_config.bos_token_id, loaded.generation_config.eos_token_id) == (0, 1)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = theirs("some words", return_tensors="pt").input_ids
    assert ids.tolist()[0] == tokenizer.encode("some words", add_bos=True)
    made = loaded.generate(ids, max_new_tokens=6, do_sample=False, suppress_tokens=[0])
    assert made[0, ids.shape[1] :].tolist() == [1], "equal logits: the first token that may come is the end"


def test_published_llama_folder_loads_through_the_class_too(tmp_path: Path):
    save(decoder("llama"), tmp_path / "hf", format="llama")
    loaded = LongwaveForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        near(loaded(ROWS[:1]).logits[0], alone(decoder("llama"), ROWS[0]))
    assert loaded.config.model_type == longwave.hf.native.MODEL_TYPE
