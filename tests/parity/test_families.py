"""Every family of Hugging Face folders: parity with `transformers` or the published formulas, there and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import TOKENS, filled, greedy, logits, reconfigure, rewrite, same, small, theirs
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import longwave
from longwave.checkpoints import FORMATS, huggingface, load, load_config, save
from longwave.checkpoints.families import FAMILIES, TABLE, family_of
from longwave.checkpoints.foreign import disassemble, stored_tensors
from longwave.checkpoints.huggingface import _times
from longwave.checkpoints.names import flat_names
from longwave.config import LongRopeScaling, RotaryConfig, YarnScaling
from longwave.errors import UserError
from longwave.hf import transformers_from
from longwave.model import Decoder

SHORT, LONG = [1.0, 1.5, 2.0, 2.5], [3.0, 4.0, 5.0, 6.0]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama", {}),
    "llama 3": ("llama", {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 32}}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, longrope": ("llama", {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 16}}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2, no layer late enough": ("qwen2", {"use_sliding_window": True, "sliding_window": 5}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, biases": ("qwen3", {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN}),
    "qwen3, layer types": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral, window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 6}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 16, "rope_parameters": {"rope_theta": 1e6}}),
}
every_model = pytest.mark.parametrize(("family", "keys"), MODELS.values(), ids=MODELS)
MINICPM: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
    "model_type": "minicpm",
    "torch_dtype": "float32",
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {k: v for k, v in LONGROPE.items() if k != "rope_theta"} | {"original_max_position_embeddings": 16},
    "scale_emb": 12,
    "dim_model_base": 8,
    "scale_depth": 1.4,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 28],
    "pad_token_id": 2,
}


def minicpm(folder: Path, **keys: Any) -> dict[str, Tensor]:
    """A random MiniCPM folder as the published ones are; ... leaves a key out."""
    config = {name: value for name, value in {**MINICPM, **keys}.items() if value is not ...}
    width, inner, small_width = 32, 40, 8 * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (29, width), "model.norm.weight": (width,)}
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (29, width)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{block}.self_attn.{part}_proj.weight": (width, width) for part in "qo"}
        shapes |= {f"{block}.self_attn.{part}_proj.weight": (small_width, width) for part in "kv"}
        shapes |= {f"{block}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (width, inner)
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    filled(tensors)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


class MiniCPM:
    """MiniCPM's dense model in double precision, one sequence at once, after its technical report and config."""

    def __init__(self, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.config = {**MINICPM, **config}

    def logits(self, tokens: Tensor) -> Tensor:
        layers = self.config["num_hidden_layers"]
        scale = self.config["scale_depth"] / math.sqrt(layers)
        x = self.weights["model.embed_tokens.weight"][tokens] * self.config["scale_emb"]
        for i in range(layers):
            x = x + scale * self.attention(self.norm(x, f"model.layers.{i}.input_layernorm"), f"model.layers.{i}")
            x = x + scale * self.mlp(
                self.norm(x, f"model.layers.{i}.post_attention_layernorm"), f"model.layers.{i}.mlp"
            )
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self.norm(x, "model.norm") / (32 / self.config["dim_model_base"]) @ head.T

    def attention(self, x: Tensor, name: str) -> Tensor:
        q, k, v = (
            (x @ self.weights[f"{name}.self_attn.{part}_proj.weight"].T).unflatten(1, (-1, 8)).transpose(0, 1)
            for part in "qkv"
        )
        cos, sin = self.turns(len(x))
        q, k = (h * cos + torch.cat([-h[..., 4:], h[..., :4]], -1) * sin for h in (q, k))
        k, v = (h.repeat_interleave(4 // self.config["num_key_value_heads"], 0) for h in (k, v))
        future = torch.ones(len(x), len(x)).triu(1).bool()
        shares = (q @ k.transpose(1, 2) / math.sqrt(8)).masked_fill(future, -torch.inf).softmax(-1)
        return (shares @ v).transpose(0, 1).flatten(1) @ self.weights[f"{name}.self_attn.o_proj.weight"].T

    def turns(self, length: int) -> tuple[Tensor, Tensor]:
        """LongRoPE as MiniCPM's code has it: one factor per pair by the length, cosines and sines scaled."""
        frequencies = 10000.0 ** (-torch.arange(4).double() / 4)
        scale, rope = 1.0, self.config["rope_scaling"]
        if rope is not None and "factor" in rope:
            frequencies = frequencies / rope["factor"]
        elif rope is not None:
            original = rope["original_max_position_embeddings"]
            frequencies = frequencies / torch.tensor(rope["long_factor" if length > original else "short_factor"])
            scale = math.sqrt(1 + math.log(self.config["max_position_embeddings"] / original) / math.log(original))
        angles = torch.outer(torch.arange(length).double(), frequencies).repeat(1, 2)
        return angles.cos() * scale, angles.sin() * scale

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate, up, down = (self.weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.weights[f"{name}.weight"]


MINICPMS: dict[str, dict[str, Any]] = {
    "long": {},
    "short": {"rope_scaling": {**MINICPM["rope_scaling"], "original_max_position_embeddings": 128}},
    "no scaling": {"rope_scaling": None, "rope_theta": 10000.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "tied by default": {"tie_word_embeddings": ..., "num_key_value_heads": 4},
    "five layers": {"num_hidden_layers": 5, "scale_depth": 1.7, "dim_model_base": 3, "scale_emb": 1.5},
}
UP = "model.layers.0.mlp.up_proj"
every_minicpm = pytest.mark.parametrize("keys", MINICPMS.values(), ids=MINICPMS)


# --- parity -----------------------------------------------------------------------------------------------------------


@every_model
def test_logits_and_64_greedy_tokens_are_those_of_transformers(tmp_path: Path, family: str, keys: dict[str, Any]):
    model = theirs(tmp_path / "hf", family, eos_token_id=None, bos_token_id=None, **keys)
    ours = load(tmp_path / "hf")
    with torch.no_grad():
        expected = model(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits(ours), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1
    text = model.generate(TOKENS[None], max_new_tokens=64, do_sample=False)[0, len(TOKENS) :].tolist()  # pyright: ignore
    assert greedy(ours, TOKENS, 64) == text
    assert len(set(text)) > 3


@every_minicpm
def test_logits_and_64_greedy_tokens_are_those_of_minicpms_formulas(tmp_path: Path, keys: dict[str, Any]):
    oracle = MiniCPM(minicpm(tmp_path / "hf", **keys), keys)
    ours = load(tmp_path / "hf")
    torch.testing.assert_close(logits(ours).double(), oracle.logits(TOKENS), atol=1e-4, rtol=0)
    tokens = TOKENS
    for _ in range(64):
        tokens = torch.cat([tokens, oracle.logits(tokens)[-1:].argmax(-1)])
    assert greedy(ours, TOKENS, 64) == tokens[len(TOKENS) :].tolist()
    assert oracle.logits(TOKENS).std() > 0.1


def test_what_the_folder_says_is_seen_in_the_logits(tmp_path: Path):
    """Every setting above changes the result, so that parity means something."""
    seen = []
    for name, (family, keys) in MODELS.items():
        if name not in ("qwen2, no layer late enough", "mistral, no window"):
            theirs(tmp_path / name, family, **keys)
            seen.append(logits(load(tmp_path / name)))
    for name, keys in MINICPMS.items():
        minicpm(tmp_path / name, **keys)
        seen.append(logits(load(tmp_path / name)))
    for at, one in enumerate(seen):
        assert not any(torch.allclose(one, other, atol=1e-3) for other in seen[:at])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_low_precision_is_close_to_transformers(tmp_path: Path, family: str, dtype: torch.dtype):
    model = theirs(tmp_path / "hf", family, dtype)
    ours = load(tmp_path / "hf")
    assert {weight.dtype for weight in ours.parameters()} == {dtype}
    with torch.no_grad():
        expected = model(TOKENS[None]).logits[0].float()
    assert (logits(ours).float() - expected).std() / expected.std() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["llama 3.1", "qwen2, yarn", "qwen3", "mistral, window"])
def test_both_spellings_of_a_config_are_one(tmp_path: Path, name: str):
    """`rope_parameters` of transformers 5; `rope_theta`, `rope_scaling` and `torch_dtype` of transformers 4."""
    family, keys = MODELS[name]
    theirs(tmp_path / "hf", family, **keys)
    expected, values = load(tmp_path / "hf"), json.loads((tmp_path / "hf/config.json").read_text())
    rope = values["rope_parameters"]
    base, old = rope.pop("rope_theta"), rope if rope["rope_type"] != "default" else None
    for kind in ("rope_type", "type"):
        scaling = None if old is None else {kind if key == "rope_type" else key: value for key, value in old.items()}
        spelled = {"rope_parameters": ..., "rope_theta": base, "rope_scaling": scaling}
        reconfigure(tmp_path / "hf", **spelled, torch_dtype="float32", dtype=..., layer_types=...)
        found = load(tmp_path / "hf")
        assert found.config == expected.config
        same(found.state_dict(), expected.state_dict())
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        with torch.no_grad():
            torch.testing.assert_close(logits(found), again(TOKENS[None]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_keys_left_out_mean_what_they_mean_to_transformers(tmp_path: Path, family: str):
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8 if family == "mistral" else 32}
    theirs(tmp_path / "hf", family, hidden_size=64, head_dim=128 if family == "qwen3" else 2, **heads)
    optional = ("rms_norm_eps", "rope_parameters", "num_key_value_heads", "tie_word_embeddings", "sliding_window")
    optional += ("max_position_embeddings", "layer_types", "use_sliding_window", "max_window_layers", "hidden_act")
    reconfigure(tmp_path / "hf", **dict.fromkeys(optional, ...), head_dim=..., architectures=...)
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    ours = load_config(tmp_path / "hf")
    assert (ours.attention.groups, ours.context_window) == (config.num_key_value_heads, config.max_position_embeddings)
    assert (ours.norm_eps, ours.window and ours.window.size) == (config.rms_norm_eps, config.sliding_window)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits(load(tmp_path / "hf")), expected, atol=1e-4, rtol=0)


@every_model
def test_transformers_runs_on_the_very_weights_of_a_decoder(tmp_path: Path, family: str, keys: dict[str, Any]):
    theirs(tmp_path / "hf", family, **keys)
    ours = load(tmp_path / "hf")
    model = transformers_from(ours)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours), model(TOKENS[None]).logits[0], atol=1e-4, rtol=0)
    assert {weight.data_ptr() for weight in model.parameters()} == {weight.data_ptr() for weight in ours.parameters()}


def test_what_transformers_has_no_class_for_is_named(tmp_path: Path):
    minicpm(tmp_path / "hf")
    for model in (load(tmp_path / "hf"), small("F subllm(0.5: F)")):
        with pytest.raises(UserError, match=r"transformers has \(llama, qwen2, qwen3, mistral\)"):
            transformers_from(model)


# --- there and back ---------------------------------------------------------------------------------------------------


@every_model
def test_written_folder_is_loaded_by_transformers_bit_by_bit(tmp_path: Path, family: str, keys: dict[str, Any]):
    model = theirs(tmp_path / "hf", family, **keys)
    ours = load(tmp_path / "hf")
    save(ours, tmp_path / "back", format=family)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(again) is type(model)
    assert not any(report.values()), report
    same(again.state_dict(), model.state_dict())
    mine, original = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("back", "hf"))
    without_effect = {"_name_or_path", "transformers_version"}
    if "qwen" in family:  # `layer_types` decides
        idle = set() if ours.config.window else {"sliding_window", "use_sliding_window"}
        without_effect |= {"max_window_layers"} | idle
    rope, original_rope = mine.pop("rope_parameters"), original.pop("rope_parameters")
    assert rope.items() >= original_rope.items()
    kept = original.keys() - without_effect
    assert {name: mine[name] for name in kept} == {name: original[name] for name in kept}
    found = load(tmp_path / "back")
    assert found.config == ours.config
    assert torch.equal(logits(found), logits(ours))


@every_minicpm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_minicpm_is_the_same_folder(tmp_path: Path, keys: dict[str, Any], dtype: torch.dtype):
    published = minicpm(tmp_path / "hf", **keys)
    ours = load(tmp_path / "hf", dtype=dtype)
    save(ours, tmp_path / "back", format="minicpm")
    same(load_file(tmp_path / "back/model.safetensors"), {name: one.to(dtype) for name, one in published.items()})
    assert load(tmp_path / "back").config == ours.config
    written, original = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("back", "hf"))
    own = ("auto_map", "torch_dtype", "rope_scaling")
    assert {name: written[name] for name in original if name not in own} == {
        name: value for name, value in original.items() if name not in own
    }
    assert (written["rope_scaling"] or {}).items() >= (original["rope_scaling"] or {}).items()


@every_model
def test_table_read_backwards_is_its_inverse(tmp_path: Path, family: str, keys: dict[str, Any]):
    theirs(tmp_path / "hf", family, **keys)
    model = load(tmp_path / "hf")
    names = flat_names(model)
    own = {names[name]: tensor for name, tensor in model.state_dict().items()}
    stored, foreign = stored_tensors(own, TABLE), disassemble(model, TABLE)
    assert sorted(name for one in stored.values() for name in one.ours) == sorted(own)
    assert foreign.keys() == load_file(tmp_path / "hf/model.safetensors").keys()
    back = {ours: tensor for name, one in stored.items() for ours, tensor in one.split(foreign[name], own).items()}
    same(back, own)


@pytest.mark.parametrize("name", MODELS)
def test_sharded_folder_is_the_whole_one(tmp_path: Path, name: str):
    family, keys = MODELS[name]
    theirs(tmp_path / "whole", family, **keys)
    theirs(tmp_path / "shards", family, shard="20KB", **keys)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    same(load(tmp_path / "shards").state_dict(), load(tmp_path / "whole").state_dict())


@given(quotient=st.floats(1e-3, 1e3), divisor=st.integers(1, 200))
def test_a_factor_that_is_divided_again_is_the_same_to_the_bit(quotient: float, divisor: int):
    root = math.sqrt(divisor)
    assert _times(quotient / root, root) / root == quotient / root
    assert _times(1.4 / root, root) == 1.4


@pytest.mark.parametrize(
    ("format", "keys", "named"),
    [
        ("qwen2", {}, "attention.qkv_bias = False; qkv_bias must be True and output_bias False"),
        ("qwen3", {}, "attention.qk_norm = False; must be True"),
        ("mistral", {"layout": "F W", "window": {"size": 4}}, "layout = 'F W'; F blocks only, or W"),
        ("mistral", {"attention": {"heads": 2, "qkv_bias": True}}, "attention.qkv_bias = True; must be False"),
        ("mistral", {"mlp": {"size": 24, "bias": True}}, "mlp.bias = True; must be False"),
        ("qwen3", {"layout": "F subllm(0.5: F)"}, "layout = 'F subllm(0.5: F)'; F and W blocks only"),
        ("minicpm", {"layout": "2W", "window": {"size": 4}}, "layout = '2W'; F blocks only"),
        ("minicpm", {"attention": {"heads": 2, "head_size": 4}}, "attention.head_size = 4; hidden_size / heads"),
        (
            "minicpm",
            {"rotary": {"scaling": {"kind": "yarn", "factor": 2.0, "original_window": 8}}},
            "rotary.scaling.kind = 'yarn'; linear, longrope",
        ),
        (
            "minicpm",
            {
                "rotary": {
                    "scaling": {
                        "kind": "longrope",
                        "original_window": 8,
                        "short_factors": SHORT,
                        "long_factors": SHORT,
                        "attention_factor": 2.0,
                    }
                }
            },
            "rotary.scaling.attention_factor = 2.0; must be 1.91",
        ),
    ],
)
def test_a_model_of_another_family_is_not_written(tmp_path: Path, format: str, keys: dict[str, Any], named: str):
    with pytest.raises(UserError, match=re.escape(f"format = '{format}' cannot hold this model: {named}")):
        save(small(**keys), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_a_family_is_known_by_what_sets_it_apart():
    shapes: dict[str, dict[str, Any]] = {
        "llama": {},
        "qwen2": {"attention": {"heads": 2, "qkv_bias": True}},
        "qwen3": {"attention": {"heads": 2, "qk_norm": True}},
        "mistral": {"layout": "2W", "window": {"size": 4}},
        "minicpm": {"scales": {"residual": 0.5}},
    }
    found = {name: family_of(small(**keys).config) for name, keys in shapes.items()}
    assert {name: family and family.model_type for name, family in found.items()} == {name: name for name in shapes}
    assert family_of(small("F subllm(0.5: F)").config) is None
    assert {family.model_type for family in FAMILIES} <= FORMATS.keys()


# --- what a folder says beside its weights ----------------------------------------------------------------------------


def test_published_configs_are_read_as_what_they_are():
    """Shapes and scaling of published config.json files."""
    llama = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192}
    llama |= {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
    llama |= {"max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": True}
    llama |= {"rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}}
    config = read("llama", llama)
    assert (config.layout, config.attention.size_in(2048), config.rotary.base) == ("16F", 64, 5e5)
    with torch.device("meta"):
        assert sum(weight.numel() for weight in Decoder(config).parameters()) == 1_235_814_400
    qwen = {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072}
    qwen |= {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    qwen |= {"max_position_embeddings": 40960, "max_window_layers": 28, "sliding_window": None, "rope_scaling": None}
    qwen |= {"use_sliding_window": False, "tie_word_embeddings": True, "attention_bias": False, "rope_theta": 1e6}
    with torch.device("meta"):
        assert sum(weight.numel() for weight in Decoder(read("qwen3", qwen)).parameters()) == 596_049_920
    cpm = {**MINICPM, "vocab_size": 73448, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32}
    cpm |= {"num_attention_heads": 32, "num_key_value_heads": 2, "dim_model_base": 256}
    factors = {"short_factor": [1.0] * 64, "long_factor": [1.0] * 64, "original_max_position_embeddings": 32768}
    cpm |= {"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "longrope", **factors}}
    config = read("minicpm", cpm)
    assert (config.scales.embedding, config.scales.logits) == (12.0, 1 / 16)
    assert config.scales.residual == pytest.approx(0.2474874)
    with torch.device("meta"):
        assert sum(weight.numel() for weight in Decoder(config).parameters()) == 8_185_253_888


def read(family: str, values: dict[str, Any]) -> Any:
    return FORMATS[family].config(values, "config.json")


def test_scaling_takes_its_original_window_and_factor_from_where_transformers_does():
    shape = {"vocab_size": 29, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    yarn = {"rope_type": "yarn", "factor": 4.0}
    whole = read("qwen2", {**shape, "rope_scaling": yarn}).rotary.scaling
    assert whole == YarnScaling(4.0, 64)
    outside = read("qwen2", {**shape, "rope_scaling": yarn, "original_max_position_embeddings": 16}).rotary.scaling
    assert outside == YarnScaling(4.0, 16)
    deepseek = read("qwen2", {**shape, "rope_scaling": {**yarn, "mscale": 0.7, "mscale_all_dim": 0.3}}).rotary.scaling
    assert deepseek.attention_factor == (0.07 * math.log(4) + 1) / (0.03 * math.log(4) + 1)
    rope = {**LONGROPE, "original_max_position_embeddings": 16}
    found = read("llama", {**shape, "rope_parameters": {**rope, "factor": 2.0}}).rotary.scaling
    assert isinstance(found, LongRopeScaling)
    assert found.attention_factor == math.sqrt(1 + math.log(2) / math.log(16))


@pytest.mark.parametrize(
    ("make", "keys", "named"),
    [
        ("qwen2", {"use_sliding_window": "yes", "layer_types": ...}, "use_sliding_window = 'yes': expected bool"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types = ['full_attention']: 1 of them, yet"),
        ("qwen2", {"layer_types": ["linear_attention"] * 3}, "supported: 'full_attention', 'slid"),
        ("qwen2", {"layer_types": [["full_attention"]] * 3}, "supported: 'full_attention', 'slid"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window = False: true, and"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0, "layer_types": ...},
            "sliding_window = 0: 1 or",
        ),
        ("qwen3", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'quant_method': 'gptq'"),
        ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, "supported: ['Qwen3ForCausalLM']"),
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type = 'dynamic': supported: 'defau",
        ),
        ("qwen3", {"rope_scaling": {"rope_type": "proportional"}}, "rope_type = 'proportional': supported: 'default'"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types = ["),
        ("mistral", {"model_type": "ministral"}, "model_type = 'ministral'; supported: longwave, llama, qwen2"),
        ("llama", {"sliding_window": 4}, "sliding_window = 4: supported: none"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads = 0: 1 or more"),
        ("llama", {"num_hidden_layers": 4}, "missing tensor model.layers.3."),
        ("llama", {"num_hidden_layers": 99999}, "1 to 1024"),
        (
            "llama",
            {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 9999}},
            "at most max_position_emb",
        ),
        ("llama", {"rope_parameters": LONGROPE | {"long_factor": [1.0, "2"]}}, "long_factor = [1.0, '2']: expected"),
        (
            "llama",
            {"rope_parameters": LONGROPE | {"long_factor": [1.0]}},
            "long_factors has 1 factors; heads of 8",
        ),
        ("minicpm", {"sparse_config": {"topk": 64}}, "sparse_config = {'topk': 64}: supported: none"),
        ("minicpm", {"num_experts": 8}, "num_experts = 8: supported: 0"),
        ("minicpm", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn': supported: 'default'"),
        ("minicpm", {"rope_scaling": {**MINICPM["rope_scaling"], "factor": 2.0}}, "factor = 2.0: supported: none"),
        ("llama", {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 1}}, "more than 1, at most max"),
        ("minicpm", {"model_type": "minicpm3"}, "model_type = 'minicpm3'; supported"),
    ],
)
def test_what_would_be_another_model_is_named(tmp_path: Path, make: str, keys: dict[str, Any], named: str):
    minicpm(tmp_path / "hf") if make == "minicpm" else theirs(tmp_path / "hf", make)
    reconfigure(tmp_path / "hf", **keys)
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        load(tmp_path / "hf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(2, dtype=torch.int32)}),
            "up_proj.qweight b",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(40, 32, dtype=torch.int8)}),
            "is int8; supp",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}),
            "model.norm.weight is F8_E4M3; supported: F64, F32, F16, BF16",
        ),
    ],
    ids=["gptq", "int8", "fp8"],
)
def test_quantised_tensor_is_named(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], named: str):
    theirs(tmp_path / "hf")
    rewrite(tmp_path / "hf", change)
    with pytest.raises(UserError, match=re.escape(named)):
        load(tmp_path / "hf")


def test_weights_of_several_types_take_the_one_that_the_config_says(tmp_path: Path):
    theirs(tmp_path / "hf", "qwen2")
    rewrite(
        tmp_path / "hf", lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].bfloat16()})
    )
    expected = load_file(tmp_path / "hf/model.safetensors")["model.norm.weight"].float()
    model = load(tmp_path / "hf")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(model.norm.weight, expected)
    assert {weight.dtype for weight in load(tmp_path / "hf", dtype=torch.float16).parameters()} == {torch.float16}
    reconfigure(tmp_path / "hf", dtype=...)
    with pytest.raises(UserError, match=r"tensors of several types \(.*model\.norm\.weight is bfloat16.*give dtype"):
        load(tmp_path / "hf")


TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    """A Qwen3 folder with a tokenizer that knows fewer special tokens than the configs, and a chat template."""
    from longwave.data.tokenizer import Tokenizer

    folder = tmp_path / "chatty"
    theirs(folder, "qwen3", vocab_size=280, bos_token_id=3, eos_token_id=1, pad_token_id=5)
    Tokenizer.train(["some text of some words"], 280).save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    ids = {"eos_token_id": [1, 7], "temperature": 0.6, "do_sample": True, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    return folder


@pytest.mark.parametrize("format", ["qwen3", "longwave"])
def test_ids_defaults_and_chat_template_survive(chatty: Path, tmp_path: Path, format: str):
    model = longwave.load(chatty)
    assert model.origin.generation["eos_token_id"] == [1, 7]
    longwave.save(model, tmp_path / "back", format=format)
    written = json.loads((tmp_path / "back/generation_config.json").read_text())
    ids = {"bos_token_id": 3, "eos_token_id": [1, 7], "pad_token_id": 5}
    assert written == {**ids, "temperature": 0.6, "do_sample": True, "top_k": 20}
    again = longwave.load(tmp_path / "back")
    assert again.origin.generation == model.origin.generation
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == TEMPLATE
    if format == "qwen3":
        config = AutoConfig.from_pretrained(tmp_path / "back")
        assert {name: getattr(config, name) for name in ids} == ids


def test_text_ends_at_every_token_that_the_folder_names(chatty: Path):
    model = longwave.load(chatty)
    assert model.tokenizer is not None
    prompt = "some text"
    whole = greedy(model, torch.tensor(model.tokenizer.encode(prompt, add_bos=True)), 40)
    stop = next(token for at, token in enumerate(whole) if at and token not in whole[:at])
    model.origin.generation = {"eos_token_id": [279, stop]}
    expected = model.tokenizer.decode(whole[: whole.index(stop) + 1])
    assert longwave.generate(model, prompt, max_new_tokens=40) == expected
    model.origin.generation = {}
    assert len(longwave.generate(model, prompt, max_new_tokens=40)) > len(expected)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", 2.0, True, [1, None], {"a": 1}])
def test_an_id_that_is_none_is_named(chatty: Path, file: str, value: Any):
    path = chatty / file
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": value}))
    with pytest.raises(UserError, match=re.escape(f"{path}: eos_token_id = {value!r}: a token id, or a list of them")):
        load(chatty)


def test_harmless_keys_are_harmless(tmp_path: Path):
    """Keys of training, caches and code that other tools leave in config.json."""
    theirs(tmp_path / "hf")
    expected = logits(load(tmp_path / "hf"))
    reconfigure(
        tmp_path / "hf", attention_dropout=0.1, pretraining_tp=2, use_cache=False, _name_or_path="x", auto_map={}
    )
    assert torch.equal(logits(load(tmp_path / "hf")), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "minicpm"])
def test_keys_that_nothing_here_knows_are_written_back(tmp_path: Path, family: str):
    minicpm(tmp_path / "hf") if family == "minicpm" else theirs(tmp_path / "hf", family, head_dim=8)
    reconfigure(tmp_path / "hf", pretraining_tp=2, a_key_of_tomorrow={"deep": [None]}, max_position_embeddings=64)
    model = load(tmp_path / "hf")
    save(model, tmp_path / "back", format=family)
    said, written = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back"))
    assert written == said
    save(load(tmp_path / "hf", dtype=torch.float16), tmp_path / "half", format=family)
    key = "torch_dtype" if family == "minicpm" else "dtype"
    assert json.loads((tmp_path / "half/config.json").read_text()) == said | {key: "float16"}


def test_a_key_that_would_change_a_changed_model_is_left_behind(tmp_path: Path):
    """A window of the first training that stands beside the scaling, which the new scaling brings itself."""
    yarn = {"rope_type": "yarn", "factor": 4.0}
    theirs(tmp_path / "hf", "qwen2")
    reconfigure(tmp_path / "hf", rope_parameters=..., rope_scaling=yarn, original_max_position_embeddings=16, other=1)
    model = load(tmp_path / "hf")
    model.config = replace(model.config, rotary=RotaryConfig(scaling=YarnScaling(2.0, 32)))
    save(model, tmp_path / "back", format="qwen2")
    assert load(tmp_path / "back").config == model.config
    assert "original_max_position_embeddings" not in json.loads((tmp_path / "back/config.json").read_text())


def test_initial_spread_survives(tmp_path: Path):
    theirs(tmp_path / "hf", initializer_range=0.05)
    model = load(tmp_path / "hf")
    assert model.config.init.std == 0.05
    assert huggingface.config_json(FAMILIES[0], model, {})["initializer_range"] == 0.05
