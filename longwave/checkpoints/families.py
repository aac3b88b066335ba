"""The families of Hugging Face folders that longwave reads and writes, each described by what sets it apart.

They are one model: embed, blocks of norm, attention, norm and SwiGLU, norm, head, under the same tensor names. What
differs is which parts have biases, whether queries and keys are normed, where windows slide, which layers are linear,
and which keys of `config.json` say so. A new family of this kind is a description in `FAMILIES`.

MiniCPM (github OpenBMB/MiniCPM; MiniCPM4 is arXiv 2506.07900) has no class in `transformers`; folders bring their own
code. Its muP factors: the embedding times scale_emb, every residual branch times scale_depth / sqrt(layers), the logits
times dim_model_base / hidden_size. MiniCPM-SALA (arXiv 2602.11761; hub id openbmb/MiniCPM-SALA) has them, too; HypeNet
(arXiv 2601.22156; github thunlp/hybrid-linear-attention) is Qwen3's model with most layers made linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from longwave.checkpoints.foreign import Row
from longwave.checkpoints.hybrid import Hybrid
from longwave.config import ModelConfig, RotaryScaling, ScalesConfig
from longwave.layout import Blocks
from longwave.mixers import AttentionConfig

TABLE = (
    Row("model.embed_tokens.weight", "embed.weight"),
    Row("model.layers.{i}.input_layernorm.weight", "blocks.{i}.mixer_norm.weight"),
    Row("model.layers.{i}.self_attn.q_proj.{leaf}", "blocks.{i}.mixer.q_proj.{leaf}"),
    Row("model.layers.{i}.self_attn.k_proj.{leaf}", "blocks.{i}.mixer.k_proj.{leaf}"),
    Row("model.layers.{i}.self_attn.v_proj.{leaf}", "blocks.{i}.mixer.v_proj.{leaf}"),
    Row("model.layers.{i}.self_attn.o_proj.{leaf}", "blocks.{i}.mixer.o_proj.{leaf}"),
    Row("model.layers.{i}.self_attn.q_norm.weight", "blocks.{i}.mixer.q_norm.weight"),
    Row("model.layers.{i}.self_attn.k_norm.weight", "blocks.{i}.mixer.k_norm.weight"),
    Row("model.layers.{i}.self_attn.o_norm.weight", "blocks.{i}.mixer.o_norm.weight"),
    Row("model.layers.{i}.self_attn.o_gate.weight", "blocks.{i}.mixer.o_gate.weight"),
    Row("model.layers.{i}.self_attn.z_proj.weight", "blocks.{i}.mixer.z_proj.weight"),
    Row("model.layers.{i}.post_attention_layernorm.weight", "blocks.{i}.mlp_norm.weight"),
    Row("model.layers.{i}.mlp.gate_proj.{leaf}", "blocks.{i}.mlp.gate_proj.{leaf}"),
    Row("model.layers.{i}.mlp.up_proj.{leaf}", "blocks.{i}.mlp.up_proj.{leaf}"),
    Row("model.layers.{i}.mlp.down_proj.{leaf}", "blocks.{i}.mlp.down_proj.{leaf}"),
    Row("model.norm.weight", "norm.weight"),
    Row("lm_head.weight", "head.weight"),
)
EMBEDDING, HEAD = TABLE[0].theirs, TABLE[-1].theirs
# Keys that `transformers` heeds in every family: attention to the future, layers with settings of their own, layers
# that share their keys and values, and tables of a model within the model.
IN_TRANSFORMERS: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "per_layer_config": (),
    "kv_sharing_modes": (),
    "text_config": (),
    "decoder": (),
    "generator": (),
}
BUFFERS = "rotary_emb.inv_freq"  # older folders keep it beside the weights


@dataclass(frozen=True)
class Family:
    """The traits that set a family apart; the class of `transformers` (or the folder's own code) is the authority.

    bias: on all four attention projections if the key `attention_bias` says so ("key"), on query, key and value always
        ("qkv"), or nowhere. mlp_bias: there is a key of that name; without it there are none.
    windows: "none"; "all" blocks where `sliding_window` is not null; or those that `layer_types`, or
        `use_sliding_window` and `max_window_layers`, say ("some").
    head_size: of softmax attention: "free" where `head_dim` says any; "whole" where the heads must divide the width,
        too; "shared" where it is the width over the heads.
    hybrid: layers are softmax or linear attention, as `mixer_types` says.
    mup: it has scale_emb, scale_depth and dim_model_base.
    scalings: the kinds of rotary scaling that its code knows and that depend on the position alone.
    in_transformers: `transformers` has the class; its rotary scaling then takes an `attention_factor`.
    also: other names that folders give the class.
    fixed: keys that may be there with these values (or null) only, since any other would make another model; those of
        every family of `transformers` are in `IN_TRANSFORMERS`.
    defaults: the values of keys that are left out, where those are not the same for all families.
    """

    model_type: str
    architecture: str
    bias: Literal["key", "qkv", "none"] = "key"
    mlp_bias: bool = False
    qk_norm: bool | None = False
    windows: Literal["none", "all", "some"] = "none"
    head_size: Literal["free", "whole", "shared"] = "free"
    hybrid: Hybrid | None = None
    mup: bool = False
    scalings: tuple[str, ...] = ("linear", "llama3", "yarn", "longrope")
    in_transformers: bool = True
    also: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def problem(self, config: ModelConfig) -> tuple[str, object, str] | None:
        """Why a model is none of this family: the field of its config, its value, and what would do."""
        return next(((name, value, legal) for kept, name, value, legal in self._rules(config) if not kept), None)

    def _rules(self, config: ModelConfig) -> Iterator[tuple[bool, str, object, str]]:
        """The rules: whether the model keeps one, the field of its config, its value, and what would do."""
        width, letters = config.hidden_size, _letters(config)
        scaling, kinds = config.rotary.scaling, ", ".join(self.scalings)
        kinds_of_block = "hybrid" if self.hybrid else self.windows
        alike = kinds_of_block in ("some", "hybrid") or len(letters) == 1
        yield letters <= _LETTERS[kinds_of_block] and alike, "layout", config.layout, _BLOCKS[kinds_of_block]
        attention: AttentionConfig = config.table("attention")
        size = attention.size_in(width)
        normed = self.qk_norm in (None, attention.qk_norm)
        yield normed, "attention.qk_norm", attention.qk_norm, f"must be {self.qk_norm}"
        yield attention.qkv_bias in _QKV_BIAS[self.bias], "attention.qkv_bias", attention.qkv_bias, _BIASES[self.bias]
        same = attention.output_bias == (attention.qkv_bias and self.bias == "key")
        yield same, "attention.output_bias", attention.output_bias, _BIASES[self.bias]
        yield self.mlp_bias or not config.mlp.bias, "mlp.bias", config.mlp.bias, "must be False"
        whole = self.head_size != "whole" or width % attention.heads == 0
        yield whole, "hidden_size", width, f"a multiple of the {attention.heads} heads"
        shared = self.head_size != "shared" or letters == {"L"} or size * attention.heads == width
        yield shared, "attention.head_size", size, "hidden_size / heads"
        yield self.mup or config.scales == ScalesConfig(), "scales", config.scales, "all must be 1"
        yield scaling is None or scaling.kind in self.scalings, "rotary.scaling.kind", _kind(scaling), kinds
        yield from self.hybrid.rules(config) if self.hybrid else ()


_LETTERS = {"none": {"F"}, "all": {"F", "W"}, "some": {"F", "W"}, "hybrid": {"S", "L"}}
_BLOCKS = {
    "none": "F blocks only",
    "all": "F blocks only, or W blocks only",
    "some": "F and W blocks only",
    "hybrid": "S and L blocks only",
}
_QKV_BIAS = {"key": (False, True), "qkv": (True,), "none": (False,)}
_BIASES = {
    "key": "output_bias must be the same as qkv_bias",
    "qkv": "qkv_bias must be True and output_bias False",
    "none": "must be False",
}


def _letters(config: ModelConfig) -> set[str]:
    """The letters of a layout, and the names of its brackets."""
    return {item.letter if isinstance(item, Blocks) else item.name for item in config.parsed.walk()}


def _kind(scaling: RotaryScaling | None) -> str | None:
    return None if scaling is None else scaling.kind


_HYPENET = Family(
    "hypenet",
    "HypeNetForCausalLM",
    bias="none",
    qk_norm=True,
    hybrid=Hybrid("attn", "lightning_use_qk_norm", "lightning_use_output_norm", "lightning_use_output_gate"),
    scalings=("linear", "llama3", "longrope"),
    in_transformers=False,
    also=("HybridForCausalLM",),
    fixed={
        "attention_bias": (False,),
        "lightning_rope_scaling": (False,),
        "lightning_use_short_conv": (False,),
        "use_sliding_window": (False,),
    },
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "attn_use_rope": True,
        "lightning_use_rope": True,
    },
)
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        mlp_bias=True,
        head_size="whole",
        fixed={"sliding_window": ()},
        defaults={"max_position_embeddings": 2048},
    ),
    Family("qwen2", "Qwen2ForCausalLM", bias="qkv", windows="some", defaults=_QWEN),
    Family("qwen3", "Qwen3ForCausalLM", qk_norm=True, windows="some", defaults=_QWEN | {"head_dim": 128}),
    Family(
        "mistral",
        "MistralForCausalLM",
        bias="none",
        windows="all",
        fixed={"layer_types": ()},
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    Family(
        "minicpm",
        "MiniCPMForCausalLM",
        head_size="shared",
        mup=True,
        scalings=("linear", "longrope"),
        in_transformers=False,
        fixed={"sparse_config": (), "num_experts": (0,), "sliding_window": (), "use_mup": (True,)},
        defaults={"max_position_embeddings": 2048, "tie_word_embeddings": True},
    ),
    Family(
        "minicpm_sala",
        "MiniCPMSALAForCausalLM",
        bias="none",
        qk_norm=None,
        head_size="shared",
        hybrid=Hybrid("minicpm4", "qk_norm", "use_output_norm", "use_output_gate", sparse=True),
        mup=True,
        scalings=("linear", "longrope"),
        in_transformers=False,
        fixed={"attention_bias": (False,), "lightning_layerwise_decay": (False,)},
        defaults={
            "max_position_embeddings": 524288,
            "initializer_range": 0.1,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 256,
            "attn_use_output_gate": True,
            "lightning_use_rope": True,
            "qk_norm": True,
            "use_output_norm": True,
            "use_output_gate": True,
        },
    ),
    _HYPENET,
    replace(_HYPENET, model_type="hybrid", architecture="HybridForCausalLM", also=("HypeNetForCausalLM",)),
)


def family_of(config: ModelConfig) -> Family | None:
    """The first family that can hold a model of this config."""
    return next((family for family in FAMILIES if family.problem(config) is None), None)
