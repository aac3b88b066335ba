"""The keys of `config.json` for models whose layers are softmax (S blocks) or linear attention (L blocks).

MiniCPM-SALA (arXiv 2602.11761) and HypeNet (arXiv 2601.22156) name the mixer of every layer in `mixer_types` and have
keys of their own for either kind. Keys that only conversion reads (`rand_init`, `expand_kv_proj`) say nothing here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longwave.checkpoints.foreign import ForeignConfig
from longwave.config import ModelConfig, build
from longwave.mixers import AttentionConfig, InfllmConfig, LightningConfig

_LINEAR = ("lightning-attn", "lightning", "lightning_attn")  # the first is written
_GEOMETRY = ("kernel_size", "kernel_stride", "init_blocks", "block_size", "window_size", "topk")
_SPARSE = "sparse_config"
_SCALING = "attn_logits_scaling"
_BASE = 362.0  # of HypeNet's logit scaling where its name stands alone
Rule = tuple[bool, str, object, str]


@dataclass(frozen=True)
class Hybrid:
    """The keys of a family whose layers are of two kinds.

    softmax: the name of an S block in `mixer_types`. qk_norm, output_norm, output_gate: the keys that say which parts
    an L block has. sparse: there is a key `sparse_config`; without it softmax attends to the whole past, and its logits
    may be scaled.
    """

    softmax: str
    qk_norm: str
    output_norm: str
    output_gate: str
    sparse: bool = False

    @property
    def mixers(self) -> dict[str, str]:
        """The letter of every name in `mixer_types`."""
        return {self.softmax: "S", **dict.fromkeys(_LINEAR, "L")}

    def read(self, theirs: ForeignConfig, letters: Sequence[str]) -> dict[str, Any]:
        """The plain values of the configs of both kinds of blocks, where there are any."""
        lightning = {"lightning": self._lightning(theirs)} if "L" in letters else {}
        return lightning | ({"infllm": self._infllm(theirs)} if "S" in letters else {})

    def write(self, config: ModelConfig, letters: Sequence[str]) -> dict[str, Any]:
        """The keys of `config.json`."""
        linear, softmax = _linear(config), _softmax(config)
        attention: AttentionConfig = config.table("attention")
        heads = linear.heads or attention.heads
        return {
            "mixer_types": [{"S": self.softmax, "L": _LINEAR[0]}[letter] for letter in letters],
            "lightning_nh": heads,
            "lightning_nkv": linear.kv_heads or heads,
            "lightning_head_dim": linear.head_size or attention.size_in(config.hidden_size),
            "lightning_scale": linear.scale,
            "lightning_use_rope": linear.rotary,
            self.qk_norm: linear.qk_norm,
            self.output_norm: linear.output_norm,
            self.output_gate: linear.output_gate,
            "attn_use_rope": softmax.rotary,
            "attn_use_output_gate": softmax.output_gate,
            **({_SPARSE: _geometry(softmax)} if self.sparse else {_SCALING: _scaling(softmax)}),
        }

    def rules(self, config: ModelConfig) -> Iterator[Rule]:
        """The rules of the family: whether the model keeps one, the field it is about, its value, and what would do."""
        linear, softmax = _linear(config), _softmax(config)
        yield linear.slopes == "alibi", "lightning.slopes", linear.slopes, "must be alibi"
        yield linear.silu == "none", "lightning.silu", linear.silu, "must be none"
        yield softmax.denominator == "coarse", "infllm.denominator", softmax.denominator, "must be coarse"
        dense, base = softmax.regime == "dense", softmax.logit_scaling
        yield self.sparse or dense, "infllm.regime", softmax.regime, "must be dense"
        yield base is None or not self.sparse, "infllm.logit_scaling", base, "must be none"

    def refuse_other_parts(self, theirs: ForeignConfig, letters: Sequence[str], stored: Container[str]) -> None:
        """UserError where a key and the stored tensors disagree about which parts the blocks have."""
        parts = {
            "S": {"o_gate": "attn_use_output_gate"},
            "L": {"z_proj": self.output_gate, "o_norm": self.output_norm, "q_norm": self.qk_norm},
        }
        for at, letter in enumerate(letters):
            for part, key in parts[letter].items():
                name, said = f"model.layers.{at}.self_attn.{part}.weight", theirs.get(key, bool, False)
                if (name in stored) != said:
                    what = f"the folder has {'no' if said else 'a'} tensor {name}"
                    raise theirs.error(key, f"{what}; say {str(not said).lower()}, or mend the weights")

    def _lightning(self, theirs: ForeignConfig) -> dict[str, Any]:
        heads = theirs.positive("num_attention_heads")
        size = theirs.positive("head_dim", theirs.positive("hidden_size") // heads)
        return {
            "heads": theirs.positive("lightning_nh", heads),
            "kv_heads": theirs.positive("lightning_nkv", theirs.positive("num_key_value_heads", heads)),
            "head_size": theirs.positive("lightning_head_dim", size),
            "scale": theirs.get("lightning_scale", str, "1/sqrt(d)"),
            "rotary": theirs.get("lightning_use_rope", bool, False),
            "qk_norm": theirs.get(self.qk_norm, bool, False),
            "output_norm": theirs.get(self.output_norm, bool, False),
            "output_gate": theirs.get(self.output_gate, bool, False),
        }

    def _infllm(self, theirs: ForeignConfig) -> dict[str, Any]:
        rotary, gate = (theirs.get(key, bool, False) for key in ("attn_use_rope", "attn_use_output_gate"))
        shape = _sparse(theirs) if self.sparse else {"regime": "dense", "logit_scaling": _base(theirs)}
        source = f"{theirs.source}: {_SPARSE}" if self.sparse else theirs.source
        return dataclasses.asdict(build(InfllmConfig, {"rotary": rotary, "output_gate": gate, **shape}, source))


def _linear(config: ModelConfig) -> LightningConfig:
    """The settings of L blocks."""
    return config.table("lightning")


def _softmax(config: ModelConfig) -> InfllmConfig:
    """The config of the S blocks; in a model without S blocks a default that every family can hold."""
    return config.infllm or InfllmConfig(regime="auto" if "S" in config.layout else "dense")


def _sparse(theirs: ForeignConfig) -> dict[str, Any]:
    """The plain values of `InfllmConfig` in `sparse_config`: null means never sparse, a dense_len of -1 always."""
    if theirs.values.get(_SPARSE) is None:
        return {"regime": "dense"}
    sparse = ForeignConfig(theirs.get(_SPARSE, dict), f"{theirs.source}: {_SPARSE}")
    sparse.only("use_nope", False)
    for unknown in sorted(sparse.values.keys() - {*_GEOMETRY, "dense_len", "use_nope"}):
        sparse.only(unknown)
    shape = {name: sparse.get(name, int) for name in _GEOMETRY if sparse.values.get(name) is not None}
    length = sparse.get("dense_len", int, InfllmConfig.dense_len)
    return shape | ({"regime": "sparse"} if length == -1 else {"dense_len": length})


def _geometry(softmax: InfllmConfig) -> dict[str, Any] | None:
    if softmax.regime == "dense":
        return None
    length = -1 if softmax.regime == "sparse" else softmax.dense_len
    return {**{name: getattr(softmax, name) for name in _GEOMETRY}, "use_nope": False, "dense_len": length}


def _base(theirs: ForeignConfig) -> float | None:
    """The base a of log_a(position + a) in "hype a"."""
    if theirs.values.get(_SCALING) is None:
        return None
    name, _, base = theirs.get(_SCALING, str).partition(" ")
    try:
        value = float(base) if base else _BASE
    except ValueError:
        value = 0.0
    if name != "hype" or not value > 1:
        raise theirs.error(_SCALING, "null, or 'hype' and a number above 1, such as 'hype 500'")
    return value


def _scaling(softmax: InfllmConfig) -> str | None:
    return None if softmax.logit_scaling is None else f"hype {softmax.logit_scaling}".removesuffix(".0")
