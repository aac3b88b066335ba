"""What is refused of MiniCPM-SALA's and HypeNet's folders: one line that names the key, its value and what would do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from model_folders import reconfigure, rewrite, small
from published_hybrids import HYPENET, SALA, SPARSE_CONFIG, publish, with_keys
from safetensors.torch import load_file

from longwave import cli
from longwave.checkpoints import load, save
from longwave.errors import UserError

S, L = "minicpm4", "lightning-attn"
BAD_CONFIGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        SALA,
        {"mixer_types": [S, L]},
        "mixer_types = ['minicpm4', 'lightning-attn']: 2 of them, yet num_hidden_layers = 4",
    ),
    (
        SALA,
        {"mixer_types": [S, L, "gdn", S]},
        "one is 'gdn'; supported: 'minicpm4', 'lightning-attn', 'lightning', 'li",
    ),
    (SALA, {"mixer_types": [S, L, "attn", S]}, "one is 'attn'; supported: 'minicpm4', "),
    (SALA, {"mixer_types": [S, L, ["x"], S]}, "one is ['x']; supported"),
    (SALA, {"mixer_types": ...}, "mixer_types is missing"),
    (SALA, {"sparse_config": SPARSE_CONFIG | {"kernel_size": 5}}, "infllm.kernel_size = 5: twice kernel_stride, 4"),
    (
        SALA,
        {"sparse_config": SPARSE_CONFIG | {"block_size": 7}},
        "infllm.block_size = 7: a multiple of kernel_stride = 2",
    ),
    (
        SALA,
        {"sparse_config": SPARSE_CONFIG | {"window_size": 12}},
        "infllm.window_size = 12: a multiple of block_size = 8",
    ),
    (
        SALA,
        {"sparse_config": SPARSE_CONFIG | {"topk": 1}},
        "infllm.topk = 1: with window_size / block_size it makes 3 blocks, fewer than the 4 forced ones; 2 or more",
    ),
    (SALA, {"sparse_config": SPARSE_CONFIG | {"dense_len": -2}}, "sparse_config: infllm.dense_len = -2: 0 or more"),
    (SALA, {"sparse_config": SPARSE_CONFIG | {"use_nope": True}}, "sparse_config: use_nope = True: supported: False"),
    (SALA, {"sparse_config": SPARSE_CONFIG | {"heads": 3}}, "sparse_config: heads = 3: supported: none"),
    (SALA, {"sparse_config": SPARSE_CONFIG | {"topk": "4"}}, "sparse_config: topk = '4': expected int"),
    (SALA, {"sparse_config": [4]}, "sparse_config = [4]: expected dict"),
    (SALA, {"head_dim": 32}, "head_dim = 32: supported: 16"),
    (SALA, {"num_attention_heads": 6, "head_dim": 10}, "num_attention_heads = 6: hidden_size = 64 must be an even mul"),
    (SALA, {"attention_bias": True}, "attention_bias = True: supported: False"),
    (SALA, {"lightning_layerwise_decay": True}, "lightning_layerwise_decay = True: supported: False"),
    (SALA, {"lightning_scale": "d"}, "lightning.scale = 'd': input should be '1/sqrt(d)', '1/d' or '1'"),
    (
        SALA,
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type = 'dynamic': supported: 'default', 'lin",
    ),
    (SALA, {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: quantised folders are not read"),
    (HYPENET, {"mixer_types": [S, L, L, S]}, "one is 'minicpm4'; supported: 'attn', 'lightning-attn'"),
    (HYPENET, {"lightning_use_short_conv": True}, "lightning_use_short_conv = True: supported: False"),
    (HYPENET, {"lightning_rope_scaling": True}, "lightning_rope_scaling = True: supported: False"),
    (HYPENET, {"use_sliding_window": True}, "use_sliding_window = True: supported: False"),
    (HYPENET, {"attn_logits_scaling": 1.5}, "attn_logits_scaling = 1.5: expected str"),
    (HYPENET, {"attn_logits_scaling": "hype much"}, "attn_logits_scaling = 'hype much': null, or 'hype' and a number"),
    (
        HYPENET,
        {"attn_logits_scaling": "hype 1"},
        "attn_logits_scaling = 'hype 1': null, or 'hype' and a number above 1",
    ),
    (HYPENET, {"attn_logits_scaling": "logn 256"}, "attn_logits_scaling = 'logn 256': null, or 'hype' and a number"),
    (
        HYPENET | {"lightning_head_dim": 8},
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [1.0] * 8,
                "original_max_position_embeddings": 64,
            }
        },
        "rotary.scaling.short_factors has 8 factors; heads of 8 need 4",
    ),
]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line says of the user's mistake: one line."""
    assert cli.main(list(arguments)) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    return error


@pytest.mark.parametrize(("published", "keys", "named"), BAD_CONFIGS)
def test_a_config_that_cannot_be_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], published: dict[str, Any], keys: dict[str, Any], named: str
):
    (tmp_path / "config.json").write_text(json.dumps(with_keys(published, **keys)))
    said = refused(capsys, "plan", str(tmp_path), "--context", "64")
    assert named in said


@pytest.mark.parametrize(
    ("published", "keys", "gone", "named"),
    [
        (
            SALA,
            {},
            "o_gate",
            "attn_use_output_gate = True: the folder has no tensor model.layers.0.self_attn.o_gate.we",
        ),
        (SALA, {"attn_use_output_gate": ...}, "o_gate", "attn_use_output_gate = True: the folder has no tensor model"),
        (
            SALA,
            {"attn_use_output_gate": False},
            "",
            "attn_use_output_gate = False: the folder has a tensor model.layers",
        ),
        (
            SALA,
            {},
            "z_proj",
            "use_output_gate = True: the folder has no tensor model.layers.1.self_attn.z_proj.weight; say",
        ),
        (
            SALA,
            {"use_output_norm": False},
            "",
            "use_output_norm = False: the folder has a tensor model.layers.1.self_attn",
        ),
        (
            SALA,
            {"qk_norm": False},
            "",
            "qk_norm = False: the folder has a tensor model.layers.1.self_attn.q_norm.weight",
        ),
        (SALA, {"lightning_nkv": 3}, "", "config.json: lightning.kv_heads = 3: a divisor of lightning.heads = 4"),
        (
            SALA,
            {"num_hidden_layers": 3, "mixer_types": [S, L, L]},
            "",
            "unexpected tensor model.layers.3.input_",
        ),
        (SALA, {}, "v_proj", "missing tensor model.layers.0.self_attn.v_proj.weight"),
        (
            HYPENET,
            {},
            "o_norm",
            "lightning_use_output_norm = True: the folder has no tensor model.layers.0.self_attn.o",
        ),
        (
            HYPENET,
            {"lightning_use_qk_norm": ...},
            "",
            "lightning_use_qk_norm = None: the folder has a tensor model.layers",
        ),
        (
            HYPENET,
            {"lightning_nkv": 2},
            "",
            "model.layers.0.self_attn.k_proj.weight has shape [64, 48], the config says [32",
        ),
    ],
)
def test_a_folder_that_its_config_denies_is_named_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    published: dict[str, Any],
    keys: dict[str, Any],
    gone: str,
    named: str,
):
    publish(tmp_path / "m", published)
    reconfigure(tmp_path / "m", **keys)
    if gone:
        unwanted = [name for name in load_file(tmp_path / "m/model.safetensors") if f".{gone}." in name]
        rewrite(tmp_path / "m", lambda tensors: [tensors.pop(name) for name in unwanted])
    assert named in refused(capsys, "generate", str(tmp_path / "m"), "--prompt", "x", "--device", "cpu")


def test_recurrent_state_in_bf16_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    publish(tmp_path / "m", SALA)
    save(load(tmp_path / "m"), tmp_path / "own")
    values = json.loads((tmp_path / "own/config.json").read_text())
    values["model"]["lightning"]["state_dtype"] = "bfloat16"
    (tmp_path / "own/config.json").write_text(json.dumps(values))
    said = refused(capsys, "plan", str(tmp_path / "own"), "--context", "64")
    assert "lightning.state_dtype = 'bfloat16': input should be 'float32' or 'float64'" in said


HYBRID = {"hidden_size": 32, "attention": {"heads": 2, "qk_norm": True}}


@pytest.mark.parametrize(
    ("format", "keys", "named"),
    [
        ("minicpm_sala", {"layout": "F L"}, "layout = 'F L'; S and L blocks only"),
        ("minicpm_sala", {"layout": "L subllm(0.5: L)"}, "layout = 'L subllm(0.5: L)'; S and L blocks only"),
        (
            "minicpm_sala",
            {"layout": "L", "lightning": {"slopes": "minimax"}},
            "lightning.slopes = 'minimax'; must be alibi",
        ),
        ("minicpm_sala", {"layout": "L", "lightning": {"silu": "qk"}}, "lightning.silu = 'qk'; must be none"),
        (
            "minicpm_sala",
            {"layout": "S", "infllm": {"denominator": "exact"}},
            "infllm.denominator = 'exact'; must be coarse",
        ),
        ("minicpm_sala", {"layout": "S", "infllm": {"logit_scaling": 9.0}}, "infllm.logit_scaling = 9.0; must be none"),
        (
            "minicpm_sala",
            {"layout": "S", "attention": {"heads": 2, "head_size": 4}},
            "attention.head_size = 4; hidden_siz",
        ),
        ("hypenet", {"layout": "S"}, "infllm.regime = 'auto'; must be dense"),
        ("hypenet", {"layout": "S", "infllm": {"regime": "sparse"}}, "infllm.regime = 'sparse'; must be dense"),
        ("hypenet", {"layout": "L", "scales": {"residual": 0.5}}, "scales = ScalesConfig("),
        ("hypenet", {"layout": "S", "attention": {"heads": 2}}, "attention.qk_norm = False; must be True"),
    ],
)
def test_a_model_that_the_format_cannot_hold_is_not_written(
    tmp_path: Path, format: str, keys: dict[str, Any], named: str
):
    with pytest.raises(UserError, match=re.escape(f"format = '{format}' cannot hold this model: {named}")):
        save(small(**(HYBRID | keys)), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
