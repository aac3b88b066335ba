"""Folders in shapes that people have: what is loaded is what `transformers` loads, or one line names the file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import TOKENS, logits, reconfigure, rewrite, small, theirs
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import longwave
from longwave.checkpoints import load, load_config, save
from longwave.checkpoints.generation import end_ids
from longwave.errors import UserError

Change = Callable[[Path], object]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that `transformers` saved: one model whole and in shards, another model, one tied, and other families."""
    home = tmp_path_factory.mktemp("made")
    for name, shard in (("whole", "1GB"), ("shards", "20KB")):
        theirs(home / name, "llama", shard=shard, num_hidden_layers=2)
    other = theirs(home / "other", "llama", num_hidden_layers=2)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(-1)  # pyright: ignore
    other.save_pretrained(home / "other", max_shard_size="20KB")
    theirs(home / "tied", "llama", num_hidden_layers=2, tie_word_embeddings=True)
    for family in ("qwen2", "qwen3", "mistral"):
        theirs(home / family, family, num_hidden_layers=2)
    return home


def outcome(folder: Path) -> tuple[torch.Tensor, Any] | str:
    """The logits of a folder and the ids that end a text, or the line that refuses it."""
    try:
        model = load(folder)
    except UserError as error:
        return str(error)
    return logits(model), end_ids(model.origin.generation, None)


def of_transformers(folder: Path) -> tuple[torch.Tensor, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends = model.generation_config.eos_token_id
    with torch.no_grad():
        return model(TOKENS[None]).logits[0], set() if ends is None else set(ends if isinstance(ends, list) else [ends])


def compare(folder: Path, named: str | None) -> None:
    """named: the text of the refusal; None where the folder is loaded as `transformers` loads it."""
    found = outcome(folder)
    if named is not None:
        assert isinstance(found, str), "loaded"
        assert "\n" not in found
        assert str(folder) in found
        assert named in found
        return
    assert not isinstance(found, str), found
    expected, ends = of_transformers(folder)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)
    assert found[1] == ends


# --- where the weights lie --------------------------------------------------------------------------------------------


def copied(*names: str, of: str = "other") -> Change:
    return lambda folder: [shutil.copy(folder.parent / of / name, folder / name) for name in names]


def moved(name: str, to: str) -> Change:
    def change(folder: Path) -> None:
        (folder / to).parent.mkdir(exist_ok=True)
        (folder / name).rename(folder / to)

    return change


def indexed(change: Callable[[dict[str, str]], object]) -> Change:
    """Changes what the index says."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / INDEX).read_text())
        change(values["weight_map"])
        (folder / INDEX).write_text(json.dumps(values))

    return edit


def swapped(listed: dict[str, str]) -> None:
    first, *_, last = sorted(listed, key=lambda name: listed[name])
    listed[first] = listed[last]


def shard_of(folder: Path) -> str:
    return sorted(path.name for path in folder.glob("model-*.safetensors"))[0]


def pickled(folder: Path) -> None:
    torch.save({name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}, folder / BIN)


def adapted(folder: Path) -> None:
    """An adapter that PEFT saved into the folder of its model, and that changes the logits."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        [weight.fill_(0.3) for name, weight in model.named_parameters() if "lora_B" in name]
    model.save_pretrained(folder)


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def removed(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def written(name: str, content: str | bytes = b"") -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def keyed(**keys: Any) -> Change:
    return lambda folder: reconfigure(folder, **keys)


def stored(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return lambda folder: rewrite(folder, change)


WHOLE, BIN = "model.safetensors", "pytorch_model.bin"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DISTRIBUTED = "shard-00000-model-00001-of-00002.safetensors"
WEIGHTS: dict[str, tuple[str, Change, str | None]] = {
    "whole": ("whole", all_of(), None),
    "shards": ("shards", all_of(), None),
    "an index left behind": ("whole", copied(INDEX, of="shards"), None),
    "an index that is no JSON left behind": ("whole", written(INDEX, "{"), None),
    "whole beside the shards of another save": (
        "whole",
        lambda folder: copied(INDEX, *(path.name for path in (folder.parent / "other").glob("model-*")))(folder),
        None,
    ),
    "a shard that no index names": ("shards", copied(WHOLE, of="whole"), None),
    "a leftover shard of another save": (
        "shards",
        lambda folder: shutil.copy(folder / shard_of(folder), folder / "model-00009-of-00009.safetensors"),
        None,
    ),
    "a shard is missing": ("shards", lambda folder: (folder / shard_of(folder)).unlink(), INDEX),
    "a tensor is in another shard": ("shards", indexed(swapped), "model-0000"),
    "a tensor that the index leaves out": ("shards", indexed(lambda listed: listed.pop(HEAD)), "model-0000"),
    "shards in a folder below": (
        "shards",
        all_of(indexed(lambda listed: listed.update({HEAD: f"below/{listed[HEAD]}"}))),
        f"{INDEX}: names 'below/model-0000",
    ),
    "an index without a map": ("shards", written(INDEX, "{}"), INDEX),
    "another name": ("whole", moved(WHOLE, "llama.safetensors"), "if llama.safetensors holds the weights, name it"),
    "a variant": ("whole", moved(WHOLE, "model.fp16.safetensors"), "model.fp16.safetensors"),
    "a consolidated file, too": ("whole", copied("consolidated.safetensors", of="consolidated"), None),
    "a consolidated file alone": ("whole", moved(WHOLE, "consolidated.safetensors"), "consolidated.safetensors"),
    "the config names the file": (
        "whole",
        all_of(moved(WHOLE, "a.safetensors"), keyed(transformers_weights="a.safetensors")),
        None,
    ),
    "the config names another file than the usual": (
        "whole",
        all_of(copied("consolidated.safetensors", of="consolidated"), keyed(transformers_weights=WHOLE)),
        None,
    ),
    "the config names the index": (
        "shards",
        all_of(moved(INDEX, "b.safetensors.index.json"), keyed(transformers_weights="b.safetensors.index.json")),
        None,
    ),
    "the config names a file outside": (
        "whole",
        keyed(transformers_weights="../other/model.safetensors"),
        "config.json",
    ),
    "the config names no file": ("whole", keyed(transformers_weights="none.safetensors"), "none.safetensors"),
    "the config names pickled weights": ("whole", keyed(transformers_weights=BIN), "config.json: transformers_weights"),
    "other pickled weights beside": ("whole", pickled, None),
    "pickled weights alone": ("whole", all_of(pickled, removed(WHOLE)), BIN),
    "pickled shards alone": ("whole", all_of(moved(WHOLE, "pytorch_model-00001-of-00002.bin")), "pytorch_model-0"),
    "no weights": ("whole", removed(WHOLE), f"no {WHOLE} and no {INDEX}"),
    "a folder in place of the weights": (
        "whole",
        lambda folder: (removed(WHOLE)(folder), (folder / WHOLE).mkdir()),
        WHOLE,
    ),
    "an adapter beside its model": ("whole", adapted, "adapter_config.json: an adapter"),
    "an adapter alone": ("whole", all_of(adapted, removed("config.json")), "adapter_config.json: an adapter"),
    "a distributed checkpoint": ("whole", copied(DISTRIBUTED, of="consolidated"), DISTRIBUTED),
    "what a trainer leaves": (
        "whole",
        all_of(written("optimizer.pt", b"x"), written("training_args.bin", b"x"), written("trainer_state.json", "{}")),
        None,
    ),
    "a tied head, stored": ("tied", stored(lambda t: t.update({HEAD: t[EMBEDDING].clone()})), None),
    "a tied head that differs": ("tied", stored(lambda t: t.update({HEAD: t[EMBEDDING] + 1})), WHOLE),
    "a tied head alone": ("tied", stored(lambda t: t.update({HEAD: t.pop(EMBEDDING)})), f"missing tensor {EMBEDDING}"),
    "a head that is missing": ("whole", stored(lambda t: t.pop(HEAD)), f"missing tensor {HEAD}"),
    "a tensor too many": ("whole", stored(lambda t: t.update({"model.more": torch.ones(1)})), "model.more"),
    "frequencies of rotation": (
        "whole",
        stored(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})),
        None,
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_those_that_transformers_takes(made: Path, tmp_path: Path, name: str):
    source, change, named = WEIGHTS[name]
    (made / "consolidated").mkdir(exist_ok=True)
    for file in ("consolidated.safetensors", DISTRIBUTED):
        save_file({"layers.0.attention.wq.weight": torch.ones(2)}, made / "consolidated" / file)
    for folder in made.iterdir():
        shutil.copytree(folder, tmp_path / folder.name)
    folder = tmp_path / "folder"
    shutil.copytree(tmp_path / source, folder)
    change(folder)
    compare(folder, named)


# --- what config.json says --------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"type": "linear", "factor": 2.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ...}
CONFIGS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "rope_scaling before rope_parameters": ("whole", {"rope_scaling": LINEAR, "rope_theta": 100.0}, None),
    "rope_scaling that is null": ("whole", {"rope_scaling": None}, None),
    "rope_scaling that is empty": ("whole", {"rope_scaling": {}}, None),
    "rope_parameters that are null": ("whole", {"rope_parameters": None, "rope_theta": 77.0}, None),
    "no spelling of rotation": ("whole", {"rope_parameters": ...}, None),
    "a base within and without": ("whole", {"rope_theta": 77.0}, None),
    "a base without": ("whole", {"rope_parameters": LINEAR, "rope_theta": 77.0}, None),
    "type beside rope_type": ("whole", {"rope_parameters": YARN | {"type": "linear"}}, None),
    "an original window without": ("whole", {"rope_parameters": YARN, "original_max_position_embeddings": 8}, None),
    "rotation by kinds of layers": ("qwen3", {"rope_parameters": {"full_attention": YARN}}, "full_attention"),
    "rotation of a part": ("whole", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "rotation of several axes": (
        "qwen2",
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}, "rope_parameters": ...},
        "'mrope'",
    ),
    "torch_dtype": ("whole", {"torch_dtype": "float32", "dtype": ...}, None),
    "torch_dtype beside dtype": ("whole", {"torch_dtype": "float16"}, None),
    "head_dim null": ("whole", {"head_dim": None}, None),
    "head_dim left out": ("whole", {"head_dim": ...}, None),
    "num_key_value_heads null": ("whole", {"num_key_value_heads": None}, None),
    "mistral without a window": ("mistral", {"sliding_window": None}, None),
    "mistral with its default window": ("mistral", {"sliding_window": ...}, None),
    "windows by layers": ("qwen2", WINDOWS | {"max_window_layers": 1}, None),
    "windows by layers of a default": ("qwen3", WINDOWS | {"max_window_layers": ...}, None),
    "windows that are off": ("qwen2", {"sliding_window": 5, "use_sliding_window": False}, None),
    "kinds of layers in a llama": ("whole", {"layer_types": ["full_attention"] * 2}, None),
    "windows in a llama": ("whole", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    "names of several": ("whole", {"architectures": None}, None),
    "causal, said": ("whole", {"is_causal": True}, None),
    "not causal": ("whole", {"is_causal": False}, "is_causal = False"),
    "layers with settings of their own": (
        "whole",
        {"per_layer_config": {"0": {"rms_norm_eps": 1.0}}},
        "per_layer_config",
    ),
    "shared keys and values": ("whole", {"kv_sharing_modes": ["own", "reuse"]}, "kv_sharing_modes"),
    "a table of text beside": ("whole", {"text_config": {"hidden_size": 99}}, "text_config"),
    "all in a table of text": (
        "whole",
        {"model_type": "llava", "text_config": {"model_type": "llama"}},
        "config.json: model_type = 'llava'",
    ),
    "a table of text of a llama": (
        "whole",
        {"text_config": {"model_type": "llama", "hidden_size": 32}, "hidden_size": ...},
        "config.json: text_config",
    ),
    "no kind": ("whole", {"model_type": ...}, "config.json: model_type"),
    "quantised": ("whole", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    "another activation": ("whole", {"hidden_act": "gelu"}, "hidden_act"),
    "another head": ("whole", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    "dropout and the rest of training": (
        "whole",
        {"attention_dropout": 0.1, "use_cache": False, "pretraining_tp": 2},
        None,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_means_what_it_means_to_transformers(made: Path, tmp_path: Path, name: str):
    source, keys, named = CONFIGS[name]
    shutil.copytree(made / source, tmp_path / "folder")
    reconfigure(tmp_path / "folder", **keys)
    compare(tmp_path / "folder", named)


LONG: dict[str, tuple[str, dict[str, Any], int]] = {
    "Qwen's recipe": ("qwen2", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
    "Qwen's recipe without the window": ("qwen2", {"type": "yarn", "factor": 4.0}, 256),
    "YaRN, half stretched": (
        "qwen3",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48},
        192,
    ),
    "YaRN, said already": ("qwen2", {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, 64),
    "linear": ("whole", {"type": "linear", "factor": 2.5}, 160),
    "Llama 3's, said already": (
        "whole",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        64,
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_a_recipe_for_long_texts_stretches_the_window(made: Path, tmp_path: Path, name: str):
    """`max_position_embeddings` is 64 everywhere: the window of before, of afterwards, or of neither."""
    source, scaling, window = LONG[name]
    folder = tmp_path / "folder"
    shutil.copytree(made / source, folder)
    reconfigure(folder, rope_parameters=..., rope_theta=1e4, rope_scaling=scaling, max_position_embeddings=64)
    ours = load(folder)
    assert ours.config.context_window == window
    tokens = torch.randint(0, 29, (window,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(tokens[None]).logits[0]
    torch.testing.assert_close(logits(ours, tokens), expected, atol=1e-4, rtol=0)
    save(ours, tmp_path / "back", format=ours.origin.format or "")
    assert load_config(tmp_path / "back") == ours.config


@pytest.mark.parametrize("window", [64, 100, 101])
@pytest.mark.parametrize(
    "scaling",
    [
        {"kind": "linear", "factor": 2.0},
        {"kind": "linear", "factor": 3.7},
        {"kind": "yarn", "factor": 2.0, "original_window": 64},
        {"kind": "llama3", "factor": 2.0, "original_window": 64},
    ],
)
def test_the_window_of_our_own_model_is_written_so_that_it_is_read_again(
    tmp_path: Path, window: int, scaling: dict[str, Any]
):
    model = small("2F", context_window=window, rotary={"scaling": scaling})
    save(model, tmp_path / "m", format="llama")
    assert load_config(tmp_path / "m") == model.config


def test_a_window_without_bounds_is_one_line(made: Path, tmp_path: Path):
    shutil.copytree(made / "whole", tmp_path / "folder")
    reconfigure(tmp_path / "folder", rope_scaling={"type": "linear", "factor": 1e300})
    with pytest.raises(UserError, match=r"config\.json: max_position_embeddings = 2048: 1e\+300 times as much"):
        load(tmp_path / "folder")


# --- what ends a text -------------------------------------------------------------------------------------------------

ENDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "both": ({"eos_token_id": 3}, {"eos_token_id": 4}),
    "a list": ({"eos_token_id": 3}, {"eos_token_id": [4, 5]}),
    "the config alone": ({"eos_token_id": [3, 4]}, None),
    "the settings name none": ({"eos_token_id": 3}, {"bos_token_id": 1}),
    "the settings say null": ({"eos_token_id": 3}, {"eos_token_id": None}),
    "the config says null": ({"eos_token_id": None}, {"eos_token_id": 4}),
    "neither": ({"eos_token_id": ...}, None),
    "both null": ({"eos_token_id": None}, {"eos_token_id": None}),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("again", [False, True], ids=["loaded", "saved again"])
def test_a_text_ends_where_transformers_ends_it(made: Path, tmp_path: Path, name: str, again: bool):
    keys, settings = ENDS[name]
    folder = tmp_path / "folder"
    shutil.copytree(made / "whole", folder)
    reconfigure(folder, **keys)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps(settings))
    said = json.loads((folder / "config.json").read_text()).get("eos_token_id")
    _, expected = of_transformers(folder)
    if again:
        save(load(folder), tmp_path / "again", format="llama")
        folder = tmp_path / "again"
        if said is not None and expected:  # an id that only the config names is not lost
            assert json.loads((folder / "config.json").read_text())["eos_token_id"] is not None
    compare(folder, None)
    assert of_transformers(folder)[1] == expected


# --- what a save leaves of an earlier one -----------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["shards", "whole"])
def test_saving_over_a_folder_leaves_nothing_of_the_earlier_model(made: Path, tmp_path: Path, before: str):
    """Neither shards and an index nor a tokenizer that the new model does not have."""
    from longwave import hf

    model = hf.LongwaveForCausalLM.from_pretrained(made / before)
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    save(small("2F"), tmp_path / "m")
    assert not [path.name for path in (tmp_path / "m").iterdir() if "-of-" in path.name or path.name == INDEX]
    expected = small("2F").state_dict()
    assert torch.equal(longwave.load(tmp_path / "m").state_dict()["embed.weight"], expected["embed.weight"])


def test_refusals_of_an_adapter_name_the_way_out(made: Path, tmp_path: Path):
    shutil.copytree(made / "whole", tmp_path / "m")
    adapted(tmp_path / "m")
    with pytest.raises(UserError, match=re.escape("merge it into its model (PEFT's merge_and_unload) and save that")):
        longwave.load(tmp_path / "m")
