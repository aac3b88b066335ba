"""Folders of the class: found without importing longwave, saved in every way that Trainer and PEFT ask for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hf_models import ROWS, alone, decoder, greedy, in_class, near, wrapped
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from longwave import files
from longwave.checkpoints import load, save
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.hf import LongwaveConfig, LongwaveForCausalLM

both = pytest.mark.parametrize("layout", ["llama", "subllm"])
WITHOUT_IMPORT = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
made = []
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = AutoTokenizer.from_pretrained(folder)("some words", return_tensors="pt")
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    tokens = again.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    made.append([type(config).__name__, type(model).__name__, inputs.input_ids.tolist()[0], tokens])
print(json.dumps(made))
"""


def test_trust_remote_code_finds_longwave_without_an_import(tmp_path: Path):
    """In a process of its own, which never names longwave; the names of the folders are no names of modules."""
    tokenizer = Tokenizer.train(["some text of some words"], 280)
    folders = [tmp_path / "a llama-1.5", tmp_path / "a subllm-1.5"]
    models = [decoder(name, vocab_size=tokenizer.vocab_size) for name in ("llama", "subllm")]
    for model, folder in zip(models, folders, strict=True):
        save(model, folder, tokenizer=tokenizer)
    run = [sys.executable, "-c", WITHOUT_IMPORT, *map(str, folders)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    prompt = tokenizer.encode("some words", add_bos=True)
    for (config, model, given, made), expected in zip(json.loads(done.stdout), models, strict=True):
        assert (config, model, given) == ("LongwaveConfig", "LongwaveForCausalLM", prompt)
        wanted = greedy(expected, torch.tensor(prompt), 8)
        assert made[len(prompt) :] == wanted[: wanted.index(1) + 1 if 1 in wanted else 8]


def test_the_module_for_trust_remote_code_is_under_the_manifest(tmp_path: Path):
    save(decoder("llama"), tmp_path / "m")
    assert files.verify(tmp_path / "m")
    stub = tmp_path / "m/modeling_longwave.py"
    stub.write_text(stub.read_text().replace("longwave.hf", "longwave.xx"))
    with pytest.raises(UserError, match=r"modeling_longwave\.py is damaged"):
        load(tmp_path / "m")


def test_a_folder_from_before_that_module_still_loads(tmp_path: Path):
    save(decoder("llama"), tmp_path / "m")
    for name in ("modeling_longwave.py", files.MANIFEST):
        (tmp_path / "m" / name).unlink()
    config = json.loads((tmp_path / "m/config.json").read_text())
    del config["auto_map"]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "m")) is LongwaveForCausalLM


def test_a_saved_config_copies_no_code(tmp_path: Path):
    LongwaveConfig.register_for_auto_class()
    LongwaveConfig(decoder("llama").config.to_dict()).save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_hub_id_is_fetched_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(decoder("llama"), tmp_path / "fetched")
    asked: dict[str, Any] = {}
    fetch = lambda name, **options: (asked.update(options, name=name), str(tmp_path / "fetched"))[1]  # noqa: E731
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    ours = LongwaveForCausalLM.from_pretrained("somebody/model", revision="v2", token="t", local_files_only=True)
    expected = {"name": "somebody/model", "revision": "v2", "token": "t", "local_files_only": True}
    assert asked.items() >= expected.items()
    assert ours.config.name_or_path == "somebody/model"
    LongwaveForCausalLM.from_pretrained(tmp_path / "fetched", revision="v2")  # a folder has none


# --- saving -----------------------------------------------------------------------------------------------------------


@both
def test_saving_keeps_what_else_a_folder_holds(layout: str, tmp_path: Path):
    """A tokenizer beside the weights, or the output folder of a Trainer with checkpoints in it."""
    tokenizer = Tokenizer.train(["some text"], 280)
    save(decoder(layout), tmp_path / "m", tokenizer=tokenizer)
    (tmp_path / "m/checkpoint-3").mkdir()
    (tmp_path / "m/checkpoint-3/model.safetensors").write_bytes(b"not ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        ours.decoder.norm.weight.add_(1.0)
    ours.save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(again.decoder.norm.weight, ours.decoder.norm.weight)
    assert Tokenizer.load(tmp_path / "m").fingerprint == tokenizer.fingerprint
    assert (tmp_path / "m/checkpoint-3/model.safetensors").read_bytes() == b"not ours"


@both
def test_saving_in_shards_and_in_one_file_again(layout: str, tmp_path: Path):
    ours = wrapped(decoder(layout))
    for size, count in (("4KB", 3), (None, 1), (5000, 3)):
        ours.save_pretrained(tmp_path / "m", max_shard_size=size, safe_serialization=True)
        found = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
        assert len(found) == 1 if count == 1 else len(found) >= count
        assert (tmp_path / "m/model.safetensors.index.json").exists() == (count > 1)
        assert files.verify(tmp_path / "m")
        with torch.no_grad():
            near(AutoModelForCausalLM.from_pretrained(tmp_path / "m")(ROWS).logits, ours(ROWS).logits)


@both
def test_saving_a_given_state_dict(layout: str, tmp_path: Path):
    ours = wrapped(decoder(layout))
    doubled = {name: 2 * tensor for name, tensor in ours.state_dict().items()}
    ours.save_pretrained(tmp_path / "m", state_dict=doubled)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in doubled.items())
    doubled.pop("model.decoder.norm.weight")
    with pytest.raises(UserError, match=r"state_dict: missing tensor model\.decoder\.norm\.weight"):
        ours.save_pretrained(tmp_path / "m", state_dict=doubled)


@pytest.mark.parametrize(
    "options", [{"push_to_hub": True}, {"safe_serialization": False}, {"variant": "fp16"}, {"repo_id": "a/b"}], ids=str
)
def test_an_option_that_saving_cannot_heed_is_refused(options: dict[str, Any], tmp_path: Path):
    with pytest.raises(UserError, match=f"save_pretrained: {next(iter(options))} = "):
        wrapped(decoder("llama")).save_pretrained(tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_another_process_than_the_main_one_saves_nothing(tmp_path: Path):
    wrapped(decoder("llama")).save_pretrained(tmp_path / "m", is_main_process=False)
    assert not (tmp_path / "m").exists()


def test_push_to_hub_uploads_a_longwave_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uploaded: dict[str, bytes] = {}
    hub = sys.modules["transformers.utils.hub"]
    monkeypatch.setattr(hub, "hf_api", MagicMock())
    monkeypatch.setattr(hub, "create_and_tag_model_card", MagicMock())
    monkeypatch.setattr(
        LongwaveForCausalLM,
        "_upload_modified_files",
        lambda self, folder, *_, **__: uploaded.update({p.name: p.read_bytes() for p in Path(folder).iterdir()}),
    )
    wrapped(decoder("subllm")).push_to_hub("somebody/model")
    for name, data in uploaded.items():
        (tmp_path / name).write_bytes(data)
    with torch.no_grad():
        near(AutoModelForCausalLM.from_pretrained(tmp_path)(ROWS[:1]).logits[0], alone(decoder("subllm"), ROWS[0]))


@both
def test_the_tensors_of_a_folder_load_into_the_class(layout: str, tmp_path: Path):
    """Under their names in the folder, also inside a wrapper; Trainer reads files itself."""
    in_class(decoder(layout), tmp_path / "m")
    blank = wrapped(decoder(layout))
    with torch.no_grad():
        for weight in blank.parameters():
            weight.zero_()
    done = blank.load_state_dict(load_file(tmp_path / "m/model.safetensors"), strict=False)
    assert (done.missing_keys, done.unexpected_keys) == ([], [])
    inside = nn.ModuleDict({"inner": wrapped(decoder(layout))})
    inside.load_state_dict({f"inner.{name}": t for name, t in load_file(tmp_path / "m/model.safetensors").items()})
    with torch.no_grad():
        near(blank(ROWS[:1]).logits[0], alone(decoder(layout), ROWS[0]))


# --- the rest of a model's face ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [40, 20])
@both
def test_another_vocabulary_keeps_the_tokens_that_stay(layout: str, size: int, tmp_path: Path):
    ours = wrapped(decoder(layout))
    tokens, kept = ROWS[:1] % 20, min(size, 31)
    with torch.no_grad():
        before = ours(tokens).logits
        embed = ours.resize_token_embeddings(size)
        assert embed is ours.get_input_embeddings()
        assert {ours.config.vocab_size, ours.decoder.config.vocab_size, len(ours.decoder.head_weight)} == {size}
        near(ours(tokens).logits[..., :kept], before[..., :kept])
        ours.save_pretrained(tmp_path / "m")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        near(again(tokens).logits, ours(tokens).logits)
    assert again.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 15)
    assert ours.resize_token_embeddings(pad_to_multiple_of=32).num_embeddings == -(-size // 32) * 32
    drawn = ours.resize_token_embeddings(200, mean_resizing=False).weight[-100:]
    assert drawn.std().item() == pytest.approx(ours.decoder.config.init.std, rel=0.2), "as new weights are drawn"


@both
def test_device_dtype_ties_and_counts(layout: str):
    ours = wrapped(decoder(layout, torch.bfloat16))
    assert (ours.device, ours.dtype) == (torch.device("cpu"), torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.tie_weights()
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())
    assert ours.num_parameters() == sum(weight.numel() for weight in decoder(layout).parameters())
    head = ours.get_output_embeddings()
    assert (head.weight is ours.get_input_embeddings().weight) == (layout == "llama")
    assert head.bias is None
    assert ours.decoder.resamplers == [] or ours.decoder.resamplers[0].threshold.low.dtype == torch.float64


def test_the_body_gives_what_the_head_reads():
    """TRL runs the body and multiplies by the head itself, scaled by the config's logit_scale."""
    ours = wrapped(decoder("subllm"))
    with torch.no_grad():
        hidden = ours.base_model(input_ids=ROWS).last_hidden_state
        near(hidden @ ours.get_output_embeddings().weight.T * ours.config.logit_scale, ours(ROWS).logits)
    assert ours.config.logit_scale == 0.5


def test_attention_that_longwave_does_not_run_is_refused(tmp_path: Path):
    save(decoder("llama"), tmp_path / "m")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="sdpa").dtype == torch.float64
    with pytest.raises(UserError, match=r"attn_implementation = 'flash_attention_2': longwave runs 'sdpa'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="flash_attention_2")


def test_values_of_the_config_can_be_given(tmp_path: Path):
    save(decoder("llama"), tmp_path / "m")
    for cls in (AutoModelForCausalLM, LongwaveForCausalLM):
        ours = cls.from_pretrained(tmp_path / "m", use_cache=False)
        assert ours(ROWS).to_tuple()[-1].shape == (4, 12, 31), "logits come last: there is no cache"
