"""Folders in the formats of MiniCPM-SALA and HypeNet: inventory, the published maths, there and back."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from model_folders import greedy, logits, reconfigure, rewrite, same, small
from published_hybrids import HYPENET, SALA, SALA_9B, SPARSE_CONFIG, Published, publish, shapes, with_keys
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from longwave import cli
from longwave.checkpoints import FORMATS, load, load_config, save
from longwave.checkpoints.families import TABLE
from longwave.checkpoints.foreign import disassemble
from longwave.errors import UserError
from longwave.hf import LongwaveForCausalLM
from longwave.mixers import InfllmAttention, InfllmConfig, LightningConfig
from longwave.model import Decoder
from longwave.planning import meta_model
from longwave.streams import Stream

TOKENS = torch.randint(0, 97, (100,), generator=torch.Generator().manual_seed(3))
ALWAYS_SPARSE = SPARSE_CONFIG | {"dense_len": -1}
S, L = "minicpm4", "lightning-attn"
SALAS: dict[str, dict[str, Any]] = {
    "auto": {},
    "dense": {"sparse_config": None},
    "sparse": {"sparse_config": ALWAYS_SPARSE},
    "softmax only": {"mixer_types": [S] * 4},
    "linear only": {"mixer_types": [L] * 4},
    "linear first, other spellings": {"mixer_types": ["lightning", S, "lightning_attn", L]},
    "no parts": {"attn_use_output_gate": False, "use_output_gate": False, "use_output_norm": False, "qk_norm": False},
    "tied": {"tie_word_embeddings": True},
    "other rotation": {"attn_use_rope": True, "lightning_use_rope": False},
    "fewer heads to remember": {"lightning_nkv": 2},
    "other linear heads": {"lightning_nh": 8, "lightning_nkv": 8, "lightning_head_dim": 8},
    "sixteen heads a group": {
        "hidden_size": 256,
        "num_attention_heads": 16,
        "num_key_value_heads": 1,
        "lightning_nh": 16,
        "lightning_nkv": 16,
    },
}
HYPENETS: dict[str, dict[str, Any]] = {
    "scaled": {},
    "not scaled": {"attn_logits_scaling": None},
    "untied": {"tie_word_embeddings": False},
    "rotated softmax": {"attn_use_rope": True},
    "no parts": {
        "attn_use_output_gate": False,
        "lightning_use_qk_norm": False,
        "lightning_use_output_norm": False,
        "lightning_use_output_gate": False,
    },
}
CONFIGS = {
    **{f"sala, {name}": with_keys(SALA, **keys) for name, keys in SALAS.items()},
    **{f"hypenet, {name}": with_keys(HYPENET, **keys) for name, keys in HYPENETS.items()},
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def dense_below(config: dict[str, Any]) -> int:
    """Below which context a query is dense when tokens come one by one, as every query here."""
    length = (config.get("sparse_config") or {}).get("dense_len", 1 << 30)
    return 0 if length == -1 else length


def in_regime(folder: Path, regime: str) -> Decoder:
    """The model of a folder in double precision, in another regime than the folder says."""
    model = load(folder, dtype=torch.float64)
    assert model.config.infllm is not None
    infllm = dataclasses.replace(model.config.infllm, regime=regime)
    other = Decoder(dataclasses.replace(model.config, infllm=infllm)).double().eval()
    other.load_state_dict(model.state_dict())
    return other


def in_pieces(model: Decoder, tokens: Tensor, sizes: list[int]) -> Tensor:
    """Logits of all tokens, run in pieces through a state."""
    state, found = model.state(), []
    for piece in tokens.split(sizes):
        with torch.no_grad():
            found.append(model(piece, state.stream([len(piece)]), state))
    return torch.cat(found)


# --- inventory and costs ----------------------------------------------------------------------------------------------


def inventory(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    model = meta_model(FORMATS[config["model_type"]].config(config, "config.json"))
    return {name: tuple(tensor.shape) for name, tensor in disassemble(model, TABLE).items()}


def test_sala_has_its_395_tensors_and_9_477_203_968_parameters():
    found = inventory(SALA_9B)
    assert found == shapes(SALA_9B)
    assert len(found) == 395
    assert sum(map(math.prod, found.values())) == 9_477_203_968
    model = meta_model(FORMATS["minicpm_sala"].config(SALA_9B, "config.json"))
    assert model.config.layout == "S 8L S 6L 2S 4L S 6L 3S"
    assert model.config.scales.residual == pytest.approx(0.24748737, abs=1e-8)
    assert (model.config.scales.embedding, model.config.scales.logits) == (12.0, 1 / 16)
    assert model.config.infllm == InfllmConfig()
    assert model.config.lightning == LightningConfig(32, 32, 128)


@pytest.mark.parametrize(
    ("layers", "width", "inner", "heads", "softmax"),
    [
        (28, 2048, 6144, 16, {2, 3, 6, 8, 9, 21, 25}),
        (36, 2560, 9728, 32, {0, 1, 7, 14, 15, 22, 24, 31, 33}),
        (36, 4096, 12288, 32, {1, 2, 4, 6, 7, 10, 24, 33, 34}),
    ],
    ids=["2b", "5b", "9b"],
)
def test_hypenets_have_the_tensors_of_their_shapes(layers: int, width: int, inner: int, heads: int, softmax: set[int]):
    config = with_keys(
        HYPENET,
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        vocab_size=151936,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        lightning_nh=heads,
        lightning_nkv=heads,
        lightning_head_dim=128,
        mixer_types=["attn" if at in softmax else "lightning-attn" for at in range(layers)],
    )
    found = inventory(config)
    assert found == shapes(config)
    assert found[f"model.layers.{min(softmax)}.self_attn.o_gate.weight"] == (heads * 128, width)
    assert "lm_head.weight" not in found


def test_plan_of_a_config_alone_states_the_published_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """8 KiB and 320 B for each token (less the windows that are not complete), and 48 MiB."""
    (tmp_path / "config.json").write_text(json.dumps(SALA_9B))
    assert cli.main(["plan", str(tmp_path), "--context", "1M", "--dtype", "bf16", "--json"]) == 0
    *_, total = json.loads(capsys.readouterr().out.splitlines()[-1])["contexts"][str(1 << 20)]
    windows = (((1 << 20) - 32) // 16 + 1) + (((1 << 20) - 128) // 64 + 1)
    assert total["parameters"] == 9_477_203_968
    assert total["state_bytes"] == (8192 << 20) + windows * 8 * 512 + (48 << 20)
    assert total["state_bytes"] == pytest.approx((8192 + 320) * (1 << 20) + (48 << 20), abs=8193)
    (tmp_path / "config.json").write_text(json.dumps(HYPENET))
    assert cli.main(["plan", str(tmp_path), "--context", "64"]) == 0


# --- the published maths ----------------------------------------------------------------------------------------------


@every_config
def test_logits_are_those_of_the_published_formulas(tmp_path: Path, config: dict[str, Any]):
    published = Published(config, publish(tmp_path / "m", config), dense_below(config))
    expected = published.logits(TOKENS)
    assert expected.std() > 0.1
    model = load(tmp_path / "m", dtype=torch.float64)
    torch.testing.assert_close(logits(model, TOKENS), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(in_pieces(model, TOKENS, [37, 1, 25, 30, 7]), expected, atol=1e-10, rtol=0)


def test_every_setting_is_seen_in_the_logits(tmp_path: Path):
    """So that agreement above means something."""
    seen = list[Tensor]()
    for at, config in enumerate(CONFIGS.values()):
        publish(tmp_path / str(at), config)
        seen.append(logits(load(tmp_path / str(at), dtype=torch.float64), TOKENS))
        assert not any(torch.allclose(seen[-1], other, atol=1e-3) for other in seen[:-1])


@pytest.mark.parametrize("name", ["sala, auto", "sala, sparse", "sala, dense", "hypenet, scaled"])
def test_greedy_tokens_from_a_cache_are_those_of_the_published_formulas(tmp_path: Path, name: str):
    config = CONFIGS[name]
    published = Published(config, publish(tmp_path / "m", config), dense_below(config))
    tokens = TOKENS[:55]
    for _ in range(14):  # across the threshold
        tokens = torch.cat([tokens, published.logits(tokens)[-1:].argmax(-1)])
    assert greedy(load(tmp_path / "m", dtype=torch.float64), TOKENS[:55], 14) == tokens[55:].tolist()
    assert len(set(tokens[55:].tolist())) > 3


def test_transformers_generates_the_same_through_longwave(tmp_path: Path):
    """From the published folder, and from longwave's own by AutoModelForCausalLM."""
    publish(tmp_path / "m", SALA)
    model = load(tmp_path / "m", dtype=torch.float64)
    save(model, tmp_path / "own")
    expected = greedy(model, TOKENS[:55], 14)
    published = LongwaveForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    for ours in (published, AutoModelForCausalLM.from_pretrained(tmp_path / "own")):
        assert type(ours) is LongwaveForCausalLM
        made = cast(Any, ours).generate(TOKENS[None, :55], max_new_tokens=14, do_sample=False, eos_token_id=None)
        assert made[0, 55:].tolist() == expected
        assert ours.generation_config.eos_token_id == [2, 90]


def test_the_published_switch_goes_by_the_length_of_a_call(tmp_path: Path):
    """63 tokens at once are dense and 64 are sparse, for all of their queries; by query, only the last one changes."""
    published = Published(SALA, publish(tmp_path / "m", SALA))
    model, by_query = in_regime(tmp_path / "m", "auto_published"), load(tmp_path / "m", dtype=torch.float64)
    found = {length: logits(model, TOKENS[:length]) for length in (63, 64)}
    for length, one in found.items():
        torch.testing.assert_close(one, published.logits(TOKENS[:length]), atol=1e-10, rtol=0)
    assert torch.equal(found[64][:48], found[63][:48])  # up to there all blocks are seen
    assert (found[64][48:63] - found[63][48:]).abs().amax(-1).min() > 1e-4
    assert torch.allclose(logits(by_query, TOKENS[:64])[:63], found[63], atol=1e-12)
    ended = in_pieces(model, TOKENS[:64], [63, 1])  # one by one, the published code is what `auto` is
    torch.testing.assert_close(ended, logits(by_query, TOKENS[:64]), atol=1e-12, rtol=0)


def test_sizes_of_the_folder_in_low_precision(tmp_path: Path):
    published = Published(SALA, publish(tmp_path / "m", SALA), dense_below=64)
    model = load(tmp_path / "m")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    expected = published.logits(TOKENS[:40])
    assert (logits(model, TOKENS[:40]).double() - expected).std() / expected.std() < 16 * torch.finfo(
        torch.bfloat16
    ).eps


def test_mup_factors_stand_where_they_are_published(tmp_path: Path):
    """Without branches, logits are those of the normed embedding; scale_emb scales what is normed."""
    weights = publish(tmp_path / "m", SALA)
    silent = {
        name: tensor * 0 for name, tensor in weights.items() if name.endswith(("o_proj.weight", "down_proj.weight"))
    }
    rewrite(tmp_path / "m", lambda tensors: tensors.update(silent))
    embedding = weights["model.embed_tokens.weight"].double()[TOKENS]
    for scale in (12, 3):
        reconfigure(tmp_path / "m", scale_emb=scale, rms_norm_eps=0.5)
        h = embedding * scale
        normed = h / (h.pow(2).mean(-1, keepdim=True) + 0.5).sqrt() * weights["model.norm.weight"].double()
        expected = normed / 4 @ weights["lm_head.weight"].double().T
        torch.testing.assert_close(logits(load(tmp_path / "m", dtype=torch.float64), TOKENS), expected)


# --- there and back ---------------------------------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_written_back_bit_by_bit(tmp_path: Path, config: dict[str, Any], shards: int):
    tensors = publish(tmp_path / "m", config | {"a_key_of_tomorrow": {"deep": [1, None]}}, shards=shards)
    model = load(tmp_path / "m")
    save(model, tmp_path / "back", format=config["model_type"])
    same(load_file(tmp_path / "back/model.safetensors"), tensors)
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written == config | {"a_key_of_tomorrow": {"deep": [1, None]}}
    again = load(tmp_path / "back")
    assert again.config == model.config
    assert torch.equal(logits(again, TOKENS), logits(model, TOKENS))


@every_config
def test_a_folder_that_is_written_anew_is_the_same_model(tmp_path: Path, config: dict[str, Any]):
    """Through longwave's own format, which carries nothing of the published config.json."""
    tensors = publish(tmp_path / "m", config)
    model = load(tmp_path / "m")
    save(model, tmp_path / "own")
    save(load(tmp_path / "own"), tmp_path / "back", format=config["model_type"])
    same(load_file(tmp_path / "back/model.safetensors"), tensors)
    assert load(tmp_path / "back").config == model.config
    written = json.loads((tmp_path / "back/config.json").read_text())
    own = {"auto_map", "torch_dtype", "attention_bias", "attention_dropout", "mup_denominator", "pretraining_tp"}
    own |= {"shift_labels", "transformers_version", "expand_kv_proj", "lightning_rope_scaling", "mixer_types"}
    own |= set() if "minicpm4" in config["mixer_types"] else {"sparse_config"}  # which nothing heeds
    assert {name: written[name] for name in config.keys() - own} == {name: config[name] for name in config.keys() - own}


def test_a_changed_model_keeps_only_what_is_still_true(tmp_path: Path):
    publish(tmp_path / "m", SALA)
    model = load(tmp_path / "m", dtype=torch.float32)
    model.config = dataclasses.replace(model.config, context_window=4096)
    model.origin.generation |= {"eos_token_id": 5}
    save(model, tmp_path / "back", format="minicpm_sala")
    written = json.loads((tmp_path / "back/config.json").read_text())
    changed = {"dtype": "float32", "max_position_embeddings": 4096, "eos_token_id": 5}
    assert {name: written[name] for name in SALA} == SALA | changed
    assert load(tmp_path / "back").config == model.config


def test_blocks_of_the_default_shape_are_written_as_what_they_are(tmp_path: Path):
    """A config without tables for S and L blocks has the published ones."""
    model = small("S L", hidden_size=32)
    save(model, tmp_path / "m", format="minicpm_sala")
    found = load(tmp_path / "m")
    assert (found.config.infllm, found.config.lightning) == (InfllmConfig(), LightningConfig(2, 2, 16))
    assert torch.equal(logits(found, TOKENS % 29), logits(model, TOKENS % 29))


def test_norms_in_softmax_layers_are_applied_where_a_folder_has_them(tmp_path: Path):
    """No key says so: a plan from config.json alone does not count them."""
    tensors = publish(tmp_path / "m", SALA, softmax_norms=True)
    assert not load_config(tmp_path / "m").attention.qk_norm
    model = load(tmp_path / "m", dtype=torch.float64)
    assert model.config.attention.qk_norm
    torch.testing.assert_close(logits(model, TOKENS), Published(SALA, tensors, 64).logits(TOKENS), atol=1e-10, rtol=0)
    save(load(tmp_path / "m"), tmp_path / "back", format="minicpm_sala")
    same(load_file(tmp_path / "back/model.safetensors"), tensors)
    rewrite(tmp_path / "m", lambda tensors: tensors.pop("model.layers.3.self_attn.k_norm.weight"))
    with pytest.raises(UserError, match=r"missing tensor model\.layers\.3\.self_attn\.k_norm\.weight"):
        load(tmp_path / "m")


def test_buffers_of_rotation_are_passed_over(tmp_path: Path):
    tensors = publish(tmp_path / "m", SALA)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path / "m", lambda tensors: tensors.update({name: torch.ones(8)}))
    save(load(tmp_path / "m"), tmp_path / "back", format="minicpm_sala")
    same(load_file(tmp_path / "back/model.safetensors"), tensors)


@pytest.mark.parametrize("model_type", ["hypenet", "hybrid"])
def test_names_of_published_hypenets(tmp_path: Path, model_type: str):
    """The files that are published call the class otherwise than the repository does."""
    config = HYPENET | {"architectures": ["HybridForCausalLM"], "model_type": model_type}
    tensors = publish(tmp_path / "m", config)
    save(load(tmp_path / "m"), tmp_path / "back", format=model_type)
    same(load_file(tmp_path / "back/model.safetensors"), tensors)
    assert json.loads((tmp_path / "back/config.json").read_text()) == config


def test_hypenets_logit_scaling(tmp_path: Path):
    """1 at the first position and ln(262644) / ln(500) at 256K; a name alone means 362, and SALA has none."""
    found, first = list[Tensor](), list[Tensor]()
    for at, said in enumerate(("hype 500", "hype", None)):
        publish(tmp_path / str(at), HYPENET | {"attn_logits_scaling": said})
        model = load(tmp_path / str(at), dtype=torch.float64)
        hidden, stream = torch.ones(1, 48, dtype=torch.float64), Stream.of([1], starts=[1 << 18])
        attention = cast(InfllmAttention, model.blocks[1].mixer)
        found.append(attention.queries_and_keys(hidden, stream)[0])
        first.append(attention.queries_and_keys(hidden, Stream.of([1]))[0])
    torch.testing.assert_close(found[0], found[2] * 2.0079391305785204)
    torch.testing.assert_close(found[1], found[2] * math.log((1 << 18) + 362) / math.log(362))
    for one in first:
        torch.testing.assert_close(one, found[2])
    publish(tmp_path / "sala", SALA)
    infllm = load(tmp_path / "sala").config.infllm
    assert infllm is not None
    assert infllm.logit_scaling is None
