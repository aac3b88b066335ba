"""Model folders: the Llama format in depth, the published SUBLLM format, and every way a folder can fail.

What the other families add is in `test_families.py`, damage of every kind in `test_damaged_folders.py`.
"""

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import TOKENS, filled, greedy, logits, reconfigure, rewrite, same, small, their_llama
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from longwave.checkpoints import families, load, save, subllm
from longwave.checkpoints.foreign import Row, disassemble, stored_tensors
from longwave.checkpoints.names import flat_names
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.files import MANIFEST
from longwave.layers.head import TiedHead
from longwave.model import Decoder
from longwave.resamplers import Kept

LLAMAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 2},
    "attention_bias": {"attention_bias": True, "num_key_value_heads": 1},
    "mlp_bias": {"mlp_bias": True, "tie_word_embeddings": True},
    "head_dim": {"head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "eps": {"rms_norm_eps": 0.1},
}
NAMES = "longwave, llama, qwen2, qwen3, mistral, minicpm, minicpm_sala, hypenet, hybrid, subllm"
PUBLISHED = {
    "num_embeddings": 29,
    "decoder_embed_dim": 16,
    "hidden_size": 16,
    "decoder_ffn_embed_dim": 24,
    "decoder_layers": 6,
    "decoder_attention_heads": 2,
    "structure": "T(T(T)T(T))T",
    "downsampling_factor_denominator": "0.64",
    "tokens_per_sample": 64,
    "n_positions": 128,
    "padding_idx": 1,
    "scale_token_embedding": True,
    "tie_weights": False,
    "qk_bias": False,
    "norm_name": "rmsnorm",
    "mlp_name": "swiglu",
    "attn_type": "flash",
}


def published(folder: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> dict[str, Tensor]:
    """Random weights named as the specification's section 8 names them, and their folder."""
    config = {**PUBLISHED, **keys}
    width, inner, rows = config["decoder_embed_dim"], config["decoder_ffn_embed_dim"], config["num_embeddings"]
    shapes: dict[str, tuple[int, ...]] = {
        "decoder.embed_tokens.weight": (rows, width),
        "decoder.output_projection.weight": (rows, width),
        "decoder.layer_norm.weight": (width,),
    }
    for i in range(config["decoder_layers"]):
        block = f"decoder.layers.{i}"
        shapes |= {f"{block}.{norm}.weight": (width,) for norm in ("self_attn_layer_norm", "final_layer_norm")}
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{block}.self_attn.{part}.weight"] = (width, width)
        shapes[f"{block}.feedforward.swiglu.w12.weight"] = (2 * inner, width)
        shapes[f"{block}.feedforward.swiglu.w3.weight"] = (width, inner)
    for j in range(config["structure"].count("(")):
        shapes[f"decoder.downsamplers.{j}.to_scores.weight"] = (1, width)
        shapes[f"decoder.bypasses.{j}.bypass_scale"] = (width,)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    filled(tensors)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return tensors


# --- Llama ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", LLAMAS.values(), ids=LLAMAS)
def test_logits_are_those_of_transformers(tmp_path: Path, keys: dict[str, Any]):
    theirs = their_llama(tmp_path / "hf", **keys)
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
    found = logits(load(tmp_path / "hf"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_close_to_those_of_transformers(tmp_path: Path, dtype: torch.dtype):
    theirs = their_llama(tmp_path / "hf", dtype, num_key_value_heads=2)
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
    ours = load(tmp_path / "hf")
    assert {tensor.dtype for tensor in ours.parameters()} == {dtype}
    found = logits(ours)
    assert found.dtype == dtype
    error = (found - expected).float().std() / expected.float().std()
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("keys", [{}, {"num_key_value_heads": 2, "attention_bias": True}], ids=["plain", "biases"])
def test_greedy_generation_of_32_tokens_is_that_of_transformers(tmp_path: Path, keys: dict[str, Any]):
    theirs = their_llama(tmp_path / "hf", eos_token_id=None, **keys)
    prompt = TOKENS[:9]
    expected = theirs.generate(prompt[None], max_new_tokens=32, do_sample=False)[0, 9:].tolist()
    assert greedy(load(tmp_path / "hf"), prompt, 32) == expected
    assert len(expected) == 32
    assert len(set(expected)) > 3


def test_sharded_folder_is_the_whole_one(tmp_path: Path):
    their_llama(tmp_path / "whole")
    their_llama(tmp_path / "shards", shard="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    same(load(tmp_path / "shards").state_dict(), load(tmp_path / "whole").state_dict())


def test_missing_shard_is_named(tmp_path: Path):
    their_llama(tmp_path / "hf", shard="20KB")
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        load(tmp_path / "hf")


def test_folder_of_transformers_4_is_read(tmp_path: Path):
    """`rope_theta` beside `rope_scaling`, `torch_dtype`, and rotation buffers among the weights."""
    their_llama(tmp_path / "hf", rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    expected = load(tmp_path / "hf")
    old = {"rope_theta": 777.0, "rope_scaling": None, "rope_parameters": ..., "torch_dtype": "float32", "dtype": ...}
    reconfigure(tmp_path / "hf", **old)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(tmp_path / "hf", lambda tensors: tensors.update(buffer))
    found = load(tmp_path / "hf")
    assert found.config == expected.config
    assert found.config.rotary.base == 777.0
    same(found.state_dict(), expected.state_dict())


def test_keys_left_out_mean_what_they_mean_to_transformers(tmp_path: Path):
    their_llama(tmp_path / "hf")
    optional = ("rms_norm_eps", "rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings")
    reconfigure(tmp_path / "hf", **dict.fromkeys(optional, ...), attention_bias=..., mlp_bias=..., hidden_act=...)
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(tmp_path / "hf")(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits(load(tmp_path / "hf")), expected, atol=1e-4, rtol=0)


def test_tied_folder_may_hold_an_equal_head_only(tmp_path: Path):
    their_llama(tmp_path / "hf", tie_word_embeddings=True)
    expected = load(tmp_path / "hf").state_dict()
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({"lm_head.weight": tensors[families.EMBEDDING].clone()}))
    same(load(tmp_path / "hf").state_dict(), expected)
    rewrite(tmp_path / "hf", lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(tmp_path / "hf")


@pytest.mark.parametrize("keys", LLAMAS.values(), ids=LLAMAS)
def test_written_llama_is_loaded_by_transformers_bit_by_bit(tmp_path: Path, keys: dict[str, Any]):
    theirs = their_llama(tmp_path / "hf", **keys)
    ours = load(tmp_path / "hf")
    save(ours, tmp_path / "back", format="llama")
    again, report = LlamaForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    same(again.state_dict(), theirs.state_dict())
    mine, original = (LlamaConfig.from_pretrained(tmp_path / name).to_dict() for name in ("back", "hf"))
    for unknown in ("bos_token_id", "eos_token_id", "transformers_version"):
        del mine[unknown], original[unknown]
    assert mine == original
    assert load(tmp_path / "back").config == ours.config


def test_written_llama_in_bfloat16_stays_so(tmp_path: Path):
    theirs = their_llama(tmp_path / "hf", torch.bfloat16)
    save(load(tmp_path / "hf"), tmp_path / "back", format="llama")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert again.dtype == torch.bfloat16
    same(again.state_dict(), theirs.state_dict())


def test_written_llama_carries_its_tokenizer_and_its_ids(tmp_path: Path):
    tokenizer = Tokenizer.train(["some text of some words"], 280)
    save(small(vocab_size=280), tmp_path / "back", format="llama", tokenizer=tokenizer)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (0, 1)
    assert AutoTokenizer.from_pretrained(tmp_path / "back").eos_token_id == 1


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"layout": "2W", "window": {"size": 4}}, "layout = '2W'"),
        ({"layout": "F subllm(0.5: F)"}, r"layout = 'F subllm\(0.5: F\)'"),
        ({"attention": {"heads": 2, "qk_norm": True}}, "attention.qk_norm = True"),
        ({"attention": {"heads": 2, "qkv_bias": True}}, "attention.output_bias = False"),
        ({"attention": {"heads": 3, "head_size": 4}}, "hidden_size = 16"),
        ({"scales": {"residual": 0.5}}, "scales = .*residual=0.5"),
    ],
)
def test_what_is_no_plain_llama_is_not_written_as_one(tmp_path: Path, keys: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        save(small(**keys), tmp_path / "out", format="llama")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_act", "gelu", "hidden_act = 'gelu': supported: 'silu'"),
        ("quantization_config", {"bits": 4}, "quantization_config = {'bits': 4}: quantised folders are not read"),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1.0}, "rope_parameters: factor is missing"),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_scaling: type = 'dynamic': supported: 'default'"),
        ("rope_scaling", {"type": "linear", "factor": "2"}, "rope_scaling: factor = '2': expected float"),
        ("rope_scaling", {"mrope_section": [1, 2]}, "rope_scaling: mrope_section = [1, 2]: supported: none"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("num_attention_heads", 5, "num_attention_heads = 5"),
        ("num_hidden_layers", "3", "num_hidden_layers = '3': expected int"),
        ("num_key_value_heads", 3, "kv_heads = 3"),
        ("vocab_size", ..., "vocab_size is missing"),
        (
            "model_type",
            "gpt2",
            f"model_type = 'gpt2'; supported: {NAMES}",
        ),
    ],
)
def test_unsupported_llama_key_is_named(tmp_path: Path, key: str, value: Any, named: str):
    their_llama(tmp_path / "hf")
    reconfigure(tmp_path / "hf", head_dim=..., **{key: value})
    with pytest.raises(UserError) as caught:
        load(tmp_path / "hf")
    assert named in str(caught.value)
    assert "config.json" in str(caught.value)


# --- the published SUBLLM format --------------------------------------------------------------------------------------


def test_every_published_tensor_lands_in_its_module(tmp_path: Path):
    """Three levels: `(` opens 0, 1, 2 and `)` closes 1, 2, 0, so a bypass numbered like its downsampler would show."""
    theirs = published(tmp_path / "xiaomi")
    model = load(tmp_path / "xiaomi")
    assert model.config.layout == "F subllm(0.64: F subllm(0.64: F) F subllm(0.64: F)) F"
    blocks = [model.stack.layers[0], *(block for block in model.blocks[1:])]
    for i, block in enumerate(blocks):
        prefix, mixer, mlp = f"decoder.layers.{i}.", block.mixer, block.mlp
        landed = {
            "self_attn_layer_norm": block.mixer_norm,
            "final_layer_norm": block.mlp_norm,
            "self_attn.q_proj": mixer.q_proj,
            "self_attn.k_proj": mixer.k_proj,
            "self_attn.v_proj": mixer.v_proj,
            "self_attn.out_proj": mixer.o_proj,
            "feedforward.swiglu.w3": mlp.down_proj,
        }
        for name, module in landed.items():
            assert torch.equal(module.weight, theirs[f"{prefix}{name}.weight"]), name
        w12 = theirs[f"{prefix}feedforward.swiglu.w12.weight"]
        assert torch.equal(mlp.gate_proj.weight, w12[:24])
        assert torch.equal(mlp.up_proj.weight, w12[24:])
    outer = model.stack.layers[1]
    first, second = outer.body.layers[1], outer.body.layers[3]
    for level, opening, closing in ((outer, 0, 2), (first, 1, 0), (second, 2, 1)):
        assert torch.equal(level.score.weight, theirs[f"decoder.downsamplers.{opening}.to_scores.weight"][0])
        assert torch.equal(level.bypass, theirs[f"decoder.bypasses.{closing}.bypass_scale"])
        assert (level.threshold.low.item(), level.threshold.high.item()) == (0.0, 1.0)
    assert torch.equal(model.embed.weight, theirs["decoder.embed_tokens.weight"])
    assert torch.equal(model.head_weight, theirs["decoder.output_projection.weight"])
    assert torch.equal(model.norm.weight, theirs["decoder.layer_norm.weight"])


class Reference:
    """The published model at inference, one sequence in double precision, as the specification's section 1 says it."""

    def __init__(self, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.weights = {name.removeprefix("decoder."): tensor.double() for name, tensor in weights.items()}
        self.heads, self.inner, self.structure = (
            config["decoder_attention_heads"],
            config["decoder_ffn_embed_dim"],
            config["structure"],
        )
        self.layer = self.opened = self.closed = 0

    def logits(self, tokens: Tensor) -> Tensor:
        x, positions = self.weights["embed_tokens.weight"][tokens], torch.arange(len(tokens))
        entered: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for character in self.structure:
            if character == "T":
                x = self.block(x, positions)
            elif character == "(":
                scores = x @ self.weights[f"downsamplers.{self.opened}.to_scores.weight"][0]
                self.opened += 1
                entered.append((x, positions, scores > 0, scores[scores > 0].clamp(0, 1)))
                x, positions = x[scores > 0], positions[scores > 0]
            else:
                before, positions, kept, w = entered.pop()
                up = before.clone()
                up[kept] = w[:, None] * x + (1 - w[:, None]) * before[kept]
                c = self.weights[f"bypasses.{self.closed}.bypass_scale"]
                self.closed += 1
                x = (1 - c) * before + c * up
        return self.norm(x, "layer_norm") @ self.weights["output_projection.weight"].T

    def block(self, x: Tensor, positions: Tensor) -> Tensor:
        name = f"layers.{self.layer}"
        self.layer += 1
        x = x + self.attention(self.norm(x, f"{name}.self_attn_layer_norm"), positions, f"{name}.self_attn")
        both = self.norm(x, f"{name}.final_layer_norm") @ self.weights[f"{name}.feedforward.swiglu.w12.weight"].T
        mixed = F.silu(both[:, : self.inner]) * both[:, self.inner :]
        return x + mixed @ self.weights[f"{name}.feedforward.swiglu.w3.weight"].T

    def attention(self, x: Tensor, positions: Tensor, name: str) -> Tensor:
        q, k, v = (
            (x @ self.weights[f"{name}.{part}_proj.weight"].T).unflatten(1, (self.heads, -1)).transpose(0, 1)
            for part in "qkv"
        )
        half = q.shape[-1] // 2
        angles = positions[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        q, k = (
            torch.cat([h[..., :half] * angles.cos() - h[..., half:] * angles.sin(),
                       h[..., half:] * angles.cos() + h[..., :half] * angles.sin()], -1)
            for h in (q, k)
        )  # fmt: skip
        causal = torch.ones(len(x), len(x)).triu(1).bool()
        weights = (q @ k.transpose(1, 2) * (2 * half) ** -0.5).masked_fill(causal, -torch.inf).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1) @ self.weights[f"{name}.out_proj.weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.weights[f"{name}.weight"]


@pytest.mark.parametrize("structure", ["T(T(T)T(T))T", "(TTT)TTT", "TTTTTT", "TT(TT)(TT)"])
def test_logits_are_those_of_the_published_formulas(tmp_path: Path, structure: str):
    theirs = published(tmp_path / "xiaomi", structure=structure)
    model = load(tmp_path / "xiaomi", dtype=torch.float64)
    expected = Reference(theirs, {**PUBLISHED, "structure": structure}).logits(TOKENS)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    with model.watching(kept := Kept.of(model.resamplers)):
        logits(model)
    assert all(0 < share < 1 for share in kept.shares), "both outcomes must occur at each level"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_folder_is_written_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype):
    theirs = published(tmp_path / "xiaomi", dtype)
    model = load(tmp_path / "xiaomi")
    save(model, tmp_path / "back", format="subllm")
    same(load_file(tmp_path / "back/model.safetensors"), theirs)
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert {key: PUBLISHED[key] for key in written} == {**written, "n_positions": 128}
    assert load(tmp_path / "back").config == model.config


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "model"])
@pytest.mark.parametrize("zipped", [False, True], ids=["old", "zip"])
def test_torch_saved_state_dict_is_read(tmp_path: Path, wrapped: bool, zipped: bool):
    theirs = published(tmp_path / "xiaomi")
    expected = load(tmp_path / "xiaomi").state_dict()
    (tmp_path / "xiaomi/model.safetensors").unlink()
    buffers = {f"decoder.layers.{i}.self_attn.position.inv_freq": torch.ones(4) for i in range(6)}
    content = {**theirs, **buffers}
    path = tmp_path / "xiaomi/checkpoint_best.pt"
    torch.save({"model": content} if wrapped else content, path, _use_new_zipfile_serialization=zipped)
    same(load(tmp_path / "xiaomi").state_dict(), expected)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def compressed(path: Path) -> bytes:
    """What `torch.save` writes, compressed: a thousandth of what reading it takes."""
    torch.save({"a": torch.zeros(1 << 16)}, path)
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda path: path.write_bytes(pickle.dumps({"a": Bomb()}, 2)), "cannot be read as a state dict"),
        (lambda path: torch.save({"a": Bomb()}, path), "cannot be read as a state dict"),
        (lambda path: torch.save([torch.ones(2)], path), "holds a list"),
        (lambda path: torch.save({"epoch": 3}, path), "epoch is a int, not a tensor"),
        (lambda path: path.write_bytes(b"PK\x03\x04 and then nothing"), "cannot be read as a state dict"),
        (lambda path: path.write_bytes(compressed(path)), "cannot be read as a state dict.*compressed"),
        (lambda path: torch.save({"a": torch.ones(1).expand(1 << 40)}, path), "a does not hold its own numbers"),
        (lambda path: torch.save({"a": torch.ones(2, 2).to_sparse()}, path), "a does not hold its own numbers"),
        (lambda path: torch.save({"a": torch.ones(2, device="meta")}, path), "a does not hold its own numbers"),
        (lambda path: torch.save({"a\nb": 1}, path), r"'a\\nb' is a int, not a tensor"),
        (lambda path: None, r"exactly one \*.pt, \*.pth, \*.bin is needed; found: none"),
    ],
    ids=[
        *("bomb", "bomb in a zip", "list", "number", "cut", "compressed", "expanded", "sparse", "meta", "odd name"),
        "nothing",
    ],
)
def test_torch_file_of_anything_but_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Callable[[Path], object], named: str
):
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "xiaomi")
    (tmp_path / "xiaomi/model.safetensors").unlink()
    content(tmp_path / "xiaomi/model.pt")
    with pytest.raises(UserError, match=named):
        load(tmp_path / "xiaomi")
    assert not (tmp_path / "exploded").exists()


def test_two_torch_files_are_a_question(tmp_path: Path):
    published(tmp_path / "xiaomi")
    (tmp_path / "xiaomi/model.safetensors").unlink()
    for name in ("a.pt", "b.bin"):
        torch.save({}, tmp_path / "xiaomi" / name)
    with pytest.raises(UserError, match=r"exactly one .* found: a\.pt, b\.bin"):
        load(tmp_path / "xiaomi")


def test_split_tensors_are_views_of_what_was_read(tmp_path: Path):
    """Loading holds the weights once."""
    published(tmp_path / "xiaomi")
    mlp = load(tmp_path / "xiaomi").blocks[0].mlp
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    assert up.data_ptr() == gate.data_ptr() + gate.nbytes


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("structure", "T(T(T)T(T)T", "structure, character 2: is never closed: 'T>>(<<T(T)T(T)T'"),
        ("structure", "TTT)TTT", "structure, character 4: closes nothing: 'TTT>>)<<TTT'"),
        ("structure", "TTT()TTT", "structure, character 5: no T inside: 'TTT(>>)<<TTT'"),
        ("structure", "TT TTTT", "structure, character 3: only T, ( and ) are known: 'TT>> <<TTTT'"),
        ("structure", "T(T)T", "structure = 'T(T)T': has 3 T, yet decoder_layers = 6"),
        ("structure", 6, "structure = 6: expected str"),
        ("qk_bias", True, "qk_bias = True: supported: False"),
        ("norm_name", "layernorm", "norm_name = 'layernorm': supported: 'rmsnorm'"),
        ("mlp_name", "gelu", "mlp_name = 'gelu': supported: 'swiglu'"),
        ("downsampling_factor_denominator", "0.64,0.5", "holds 2 ratios, yet structure has 3 pairs"),
        ("downsampling_factor_denominator", "2", "downsampling_factor_denominator = '2': one number in (0, 1]"),
        ("downsampling_factor_denominator", ..., "downsampling_factor_denominator = None"),
        ("decoder_attention_heads", 3, "decoder_attention_heads = 3"),
        ("hidden_size", 32, "hidden_size = 32: supported: 16"),
        ("decoder_layers", ..., "decoder_layers is missing"),
    ],
)
def test_unsupported_subllm_key_is_named(tmp_path: Path, key: str, value: Any, named: str):
    published(tmp_path / "xiaomi")
    reconfigure(tmp_path / "xiaomi", **{key: value})
    with pytest.raises(UserError) as caught:
        load(tmp_path / "xiaomi")
    assert named in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("written", "layout"),
    [
        ("0.5, 0.75,1", "F subllm(0.5: F subllm(0.75: F) F subllm(1: F)) F"),
        (0.64, "F subllm(0.64: F subllm(0.64: F) F subllm(0.64: F)) F"),
    ],
)
def test_retention_is_one_number_or_one_per_level(written: Any, layout: str):
    values = {**PUBLISHED, "downsampling_factor_denominator": written}
    assert subllm.config_from(values, "config.json").layout == layout


def test_published_model_is_tied_unless_its_config_says_otherwise(tmp_path: Path):
    """True is the default of the published class; its state dict then holds the matrix twice."""
    published(tmp_path / "xiaomi")
    reconfigure(tmp_path / "xiaomi", tie_weights=...)
    with pytest.raises(UserError, match=r"decoder\.output_projection\.weight differs"):
        load(tmp_path / "xiaomi")
    rewrite(
        tmp_path / "xiaomi", lambda t: t["decoder.output_projection.weight"].copy_(t["decoder.embed_tokens.weight"])
    )
    model = load(tmp_path / "xiaomi")
    assert isinstance(model.head, TiedHead)
    assert model.head_weight is model.embed.weight
    save(model, tmp_path / "back", format="subllm")
    same(load(tmp_path / "back").state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"layout": "F W", "window": {"size": 4}}, "layout = 'F W'"),
        ({"attention": {"heads": 2, "kv_heads": 1}}, "attention.kv_heads = 1"),
        ({"attention": {"heads": 2, "head_size": 4}}, "attention.head_size = 4"),
        ({"attention": {"heads": 2, "qkv_bias": True}}, "attention.qkv_bias"),
        ({"attention": {"heads": 2, "output_bias": True}}, "attention.output_bias"),
        ({"attention": {"heads": 2, "qk_norm": True}}, "attention.qk_norm"),
        ({"mlp": {"size": 24, "bias": True}}, "mlp.bias"),
        ({"scales": {"logits": 2.0}}, "scales"),
        ({"norm_eps": 1e-6}, "norm_eps = 1e-06"),
        ({"rotary": {"base": 500.0}}, "rotary.base = 500.0"),
        ({"layout": "subllm(0.5: F)", "subllm": {"selection": "causal"}}, "subllm.selection = 'causal'"),
    ],
)
def test_what_the_published_code_cannot_be_is_not_written_so(tmp_path: Path, keys: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        save(small(**keys), tmp_path / "out", format="subllm")
    assert not (tmp_path / "out").exists()


STRUCTURES = st.recursive(
    st.just("T"), lambda inner: st.lists(st.one_of(inner, inner.map(lambda one: f"({one})")), min_size=1).map("".join)
)


@given(structure=STRUCTURES.filter(lambda one: len(one) < 40))
def test_structure_comes_back_from_its_layout(structure: str):
    count = structure.count("T")
    values = {**PUBLISHED, "structure": structure, "decoder_layers": count}
    with torch.device("meta"):
        model = Decoder(subllm.config_from(values, "config.json"))
    assert subllm.config_json(model, {})["structure"] == structure
    assert model.layout.depth == count


@given(structure=STRUCTURES)
def test_closing_order_counts_the_brackets_that_close(structure: str):
    """Read off the text: the place of each `(`'s partner among all `)`."""
    for opening, closing in enumerate(subllm.closing_order(structure)):
        begin = [at for at, character in enumerate(structure) if character == "("][opening]
        end = [at for at, character in enumerate(structure) if character == ")"][closing]
        inside = structure[begin + 1 : end]
        assert begin < end
        assert inside.count("(") == inside.count(")")
        assert all(inside[:at].count(")") <= inside[:at].count("(") for at in range(len(inside)))


# --- every format -----------------------------------------------------------------------------------------------------

FOLDERS: dict[str, Callable[[Path], object]] = {
    "longwave": lambda path: save(small("F subllm(0.5: F)"), path),
    "llama": their_llama,
    "subllm": published,
}
every_format = pytest.mark.parametrize("make", FOLDERS.values(), ids=FOLDERS)


@pytest.mark.parametrize(
    ("table", "layout", "keys"),
    [
        (families.TABLE, "3F", {"attention": {"heads": 2, "qkv_bias": True, "output_bias": True}}),
        (families.TABLE, "2F", {"tie_embeddings": True, "mlp": {"size": 24, "bias": True}}),
        (subllm.TABLE, "F subllm(0.5: F subllm(0.5: F) F) F", {}),
    ],
)
def test_table_read_backwards_is_its_inverse(table: tuple[Row, ...], layout: str, keys: dict[str, Any]):
    """Every native tensor but a threshold lies in exactly one foreign one, and comes out of it as it went in."""
    model, numbering = small(layout, **keys), {"closing": [1, 0]}
    names = flat_names(model)
    own = {names[name]: tensor for name, tensor in model.state_dict().items() if ".threshold." not in name}
    stored, foreign = stored_tensors(own, table, numbering), disassemble(model, table, numbering)
    assert sorted(name for one in stored.values() for name in one.ours) == sorted(own)
    back: dict[str, Tensor] = {}
    for theirs, one in stored.items():
        assert foreign[theirs].shape == one.expected(own).shape
        back |= one.split(foreign[theirs], own)
    same(back, own)


@every_format
def test_missing_tensor_is_named(tmp_path: Path, make: Callable[[Path], object]):
    make(tmp_path / "m")
    for name in load_file(tmp_path / "m/model.safetensors"):
        shutil.copytree(tmp_path / "m", tmp_path / "broken", dirs_exist_ok=True)
        rewrite(tmp_path / "broken", lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(UserError) as caught:
            load(tmp_path / "broken")
        assert str(caught.value).endswith(f"missing tensor {name}")


@every_format
def test_unexpected_tensor_is_named(tmp_path: Path, make: Callable[[Path], object]):
    make(tmp_path / "m")
    rewrite(tmp_path / "m", lambda tensors: tensors.update(extra=torch.ones(1), more=torch.ones(1)))
    with pytest.raises(UserError, match="unexpected tensor extra and 1 more"):
        load(tmp_path / "m")


@every_format
def test_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path, make: Callable[[Path], object]):
    make(tmp_path / "m")
    for name, tensor in load_file(tmp_path / "m/model.safetensors").items():
        shutil.copytree(tmp_path / "m", tmp_path / "broken", dirs_exist_ok=True)
        wrong = torch.ones(*tensor.shape, 1)
        rewrite(tmp_path / "broken", lambda tensors, name=name, wrong=wrong: tensors.update({name: wrong}))
        with pytest.raises(UserError) as caught:
            load(tmp_path / "broken")
        shapes = f"tensor {name} has shape {list(wrong.shape)}, the config says {list(tensor.shape)}"
        assert str(caught.value).endswith(shapes)


@every_format
def test_cut_weights_are_refused(tmp_path: Path, make: Callable[[Path], object]):
    make(tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    (tmp_path / "m" / MANIFEST).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read as safetensors"):
        load(tmp_path / "m")


@every_format
def test_dtype_is_that_of_every_weight(tmp_path: Path, make: Callable[[Path], object]):
    make(tmp_path / "m")
    model, as_saved = load(tmp_path / "m", dtype=torch.bfloat16), load(tmp_path / "m")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} <= {torch.float64, torch.int64}
    for (name, weight), saved in zip(model.named_parameters(), as_saved.parameters(), strict=True):
        assert torch.equal(weight, saved.bfloat16()), name
    assert not model.training


@every_format
def test_training_a_loaded_model_leaves_its_folder_alone(tmp_path: Path, make: Callable[[Path], object]):
    make(tmp_path / "m")
    model, expected = load(tmp_path / "m"), load(tmp_path / "m").double().state_dict()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    same(load(tmp_path / "m").double().state_dict(), expected)


@every_format
def test_native_folder_of_any_model_is_the_same_model(tmp_path: Path, make: Callable[[Path], object]):
    make(tmp_path / "m")
    model = load(tmp_path / "m")
    save(model, tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config == model.config
    same(again.state_dict(), model.state_dict())


def test_shared_blocks_have_shared_names():
    """Blocks are numbered in the order of the layout: a Llama and a SUBLLM of one shape agree on their names."""
    plain, nested = flat_names(small("5F")), flat_names(small("F subllm(0.5: F subllm(0.5: F) F) F"))
    assert set(plain.values()) < set(nested.values())
    own = {"score.weight", "bypass", "threshold.low", "threshold.high", "threshold.following"}
    assert set(nested.values()) - set(plain.values()) == {f"resamplers.{i}.{name}" for i in (0, 1) for name in own}


def test_causal_thresholds_are_kept_in_double_precision(tmp_path: Path):
    model = small("F subllm(0.5: F)", subllm={"selection": "causal"})
    model.resamplers[0].threshold.low.fill_(0.1)
    save(model, tmp_path / "m")
    assert load(tmp_path / "m", dtype=torch.bfloat16).resamplers[0].threshold.low.item() == 0.1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not a JSON object"),
        (
            '{"model_type": "longwave", "longwave_format": 99}',
            "longwave_format = 99; this longwave reads formats 1 to 2",
        ),
        ('{"model_type": "longwave", "longwave_format": 1, "model": {}}', "vocab_size is missing"),
        ('{"model_type": "longwave", "longwave_format": 1, "model": {"vocab_size": "many"}}', "vocab_size = 'many'"),
    ],
)
def test_bad_config_is_named(tmp_path: Path, text: str, named: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=named):
        load(tmp_path)


def test_folder_without_config_and_unknown_format_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(UserError, match=f"format = 'onnx'; use one of {NAMES}, gguf, gguf-q8_0"):
        save(small(), tmp_path / "out", format="onnx")
