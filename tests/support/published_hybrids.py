"""Folders as MiniCPM-SALA and HypeNet publish them, made by hand, and their maths written from the formulas alone.

The maths runs in double precision over one whole sequence, query by query; only the angles of rotation are products in
single precision, and so are their cosines and sines, as in the published code.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from model_folders import filled
from safetensors.torch import save_file
from torch import Tensor

SPARSE_CONFIG = {
    "kernel_size": 4,
    "kernel_stride": 2,
    "init_blocks": 1,
    "block_size": 8,
    "window_size": 16,
    "topk": 4,
    "use_nope": False,
    "dense_len": 64,
}
SALA: dict[str, Any] = {
    "architectures": ["MiniCPMSALAForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_use_output_gate": True,
    "attn_use_rope": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_minicpm_sala.MiniCPMSALAForCausalLM"},
    "bos_token_id": 1,
    "dim_model_base": 16,
    "dtype": "bfloat16",
    "eos_token_id": [2, 90],
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.1,
    "intermediate_size": 128,
    "lightning_head_dim": 16,
    "lightning_nh": 4,
    "lightning_nkv": 4,
    "lightning_scale": "1/sqrt(d)",
    "lightning_use_rope": True,
    "max_position_embeddings": 524288,
    "mixer_types": ["minicpm4", "lightning-attn", "lightning-attn", "minicpm4"],
    "model_type": "minicpm_sala",
    "mup_denominator": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "qk_norm": True,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "scale_depth": 1.4,
    "scale_emb": 12,
    "shift_labels": True,
    "sparse_config": SPARSE_CONFIG,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.1",
    "use_cache": True,
    "use_output_gate": True,
    "use_output_norm": True,
    "vocab_size": 97,
}
_NINE = {0, 9, 16, 17, 22, 29, 30, 31}
SALA_9B: dict[str, Any] = {
    **SALA,
    "vocab_size": 73448,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": 128,
    "lightning_nh": 32,
    "lightning_nkv": 32,
    "lightning_head_dim": 128,
    "dim_model_base": 256,
    "eos_token_id": [2, 73440],
    "mixer_types": ["minicpm4" if layer in _NINE else "lightning-attn" for layer in range(32)],
    "sparse_config": {
        "kernel_size": 32,
        "kernel_stride": 16,
        "init_blocks": 1,
        "block_size": 64,
        "window_size": 2048,
        "topk": 64,
        "use_nope": False,
        "dense_len": 8192,
    },
}
HYPENET: dict[str, Any] = {
    "architectures": ["HypeNetForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logits_scaling": "hype 20",
    "attn_use_rope": False,
    "attn_use_output_gate": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "expand_kv_proj": True,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "lightning_use_rope": True,
    "lightning_rope_scaling": None,
    "lightning_nh": 4,
    "lightning_nkv": 4,
    "lightning_head_dim": 16,
    "lightning_scale": "1/sqrt(d)",
    "lightning_use_qk_norm": True,
    "lightning_use_output_norm": True,
    "lightning_use_output_gate": True,
    "max_position_embeddings": 1048576,
    "mixer_types": ["lightning-attn", "attn", "lightning-attn", "attn"],
    "model_type": "hypenet",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.6",
    "use_cache": True,
    "vocab_size": 97,
}


def with_keys(published: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A published config with other values; ... leaves a key out."""
    return {name: value for name, value in (published | keys).items() if value is not ...}


def shapes(config: dict[str, Any], softmax_norms: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published folder; with `softmax_norms` in SALA's softmax layers too."""
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    hype = config["model_type"] != "minicpm_sala"
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocabulary, width)
    for at, mixer in enumerate(config["mixer_types"]):
        layer = f"model.layers.{at}"
        found |= {f"{layer}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{layer}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        found[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        linear = mixer.startswith("lightning")
        heads, groups, size = (
            config["lightning_nh" if linear else "num_attention_heads"],
            config["lightning_nkv" if linear else "num_key_value_heads"],
            config["lightning_head_dim" if linear else "head_dim"],
        )
        parts: dict[str, tuple[int, ...]] = {"q_proj": (heads * size, width), "o_proj": (width, heads * size)}
        parts |= dict.fromkeys(("k_proj", "v_proj"), (groups * size, width))
        if linear and config["lightning_use_output_gate" if hype else "use_output_gate"]:
            parts["z_proj"] = (heads * size, width)
        if linear and config["lightning_use_output_norm" if hype else "use_output_norm"]:
            parts["o_norm"] = (heads * size,)
        if not linear and config.get("attn_use_output_gate", True):
            parts["o_gate"] = (heads * size, width)
        if config["lightning_use_qk_norm" if hype else "qk_norm"] if linear else hype or softmax_norms:
            parts |= dict.fromkeys(("q_norm", "k_norm"), (size,))
        found |= {f"{layer}.self_attn.{part}.weight": shape for part, shape in parts.items()}
    return found


def publish(
    folder: Path,
    config: dict[str, Any],
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    softmax_norms: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A folder with random weights in the published format; its tensors."""
    tensors = {name: torch.empty(shape) for name, shape in shapes(config, softmax_norms).items()}
    filled(tensors, seed)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    files = {f"model-{at + 1:05d}-of-{shards:05d}.safetensors": names[at::shards] for at in range(shards)}
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, inside in files.items() for name in inside}
    size = sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text)
    return tensors


class Published:
    """The published model over a folder's config and tensors.

    dense_below: a query whose context, itself included, is shorter than that attends to all of it. None for what one
    call over the whole sequence does: dense for all queries or for none, by the length of the sequence.
    """

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor], dense_below: int | None = None) -> None:
        self.config, self.dense_below = config, dense_below
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.mup = config["model_type"] == "minicpm_sala"
        self.key = (lambda name: name) if self.mup else (lambda name: f"lightning_use_{name.removeprefix('use_')}")

    def logits(self, tokens: Tensor) -> Tensor:
        config, layers = self.config, self.config["num_hidden_layers"]
        factor = config["scale_depth"] / math.sqrt(layers) if self.mup else 1.0
        h = self.weights["model.embed_tokens.weight"][tokens] * (config["scale_emb"] if self.mup else 1)
        for at in range(layers):
            layer = f"model.layers.{at}"
            h = h + factor * self.mixer(self.norm(h, f"{layer}.input_layernorm"), at)
            h = h + factor * self.mlp(self.norm(h, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
        h = self.norm(h, "model.norm")
        if self.mup:
            h = h / (config["hidden_size"] / config["dim_model_base"])
        head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
        return h @ self.weights[head].T

    def mixer(self, x: Tensor, at: int) -> Tensor:
        name = f"model.layers.{at}.self_attn"
        if self.config["mixer_types"][at].startswith("lightning"):
            return self.linear(name, self.lightning(x, name), "o_proj")
        return self.linear(name, self.softmax(x, name), "o_proj")

    def lightning(self, x: Tensor, name: str) -> Tensor:
        heads, groups = self.config["lightning_nh"], self.config["lightning_nkv"]
        size = self.config["lightning_head_dim"]
        q, k, v = (self.heads(x, name, part, size) for part in "qkv")
        if self.config[self.key("qk_norm")]:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        if self.config["lightning_use_rope"]:
            q, k = self.turned(q), self.turned(k)
        outputs = torch.zeros(len(x), heads, size, dtype=torch.float64)
        for head in range(heads):
            fading = math.exp(-(2 ** (-8 * (head + 1) / heads)))
            group, memory = head // (heads // groups), torch.zeros(size, size, dtype=torch.float64)
            for t in range(len(x)):
                memory = fading * memory + torch.outer(k[t, group], v[t, group])
                outputs[t, head] = (q[t, head] / math.sqrt(size)) @ memory
        o = outputs.flatten(1)
        if self.config[self.key("use_output_norm")]:
            o = self.norm(o, f"{name}.o_norm")
        return o * torch.sigmoid(self.linear(name, x, "z_proj")) if self.config[self.key("use_output_gate")] else o

    def softmax(self, x: Tensor, name: str) -> Tensor:
        size, heads = self.config["head_dim"], self.config["num_attention_heads"]
        q, k, v = (self.heads(x, name, part, size) for part in "qkv")
        if f"{name}.q_norm.weight" in self.weights:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        if self.config["attn_use_rope"]:
            q, k = self.turned(q), self.turned(k)
        if self.config.get("attn_logits_scaling"):
            base = float(self.config["attn_logits_scaling"].split()[1])
            grown = torch.log(torch.arange(len(x)).double() + base) / math.log(base)
            q = q * grown.view(-1, 1, 1)
        per_group = heads // self.config["num_key_value_heads"]
        o = torch.zeros(len(x), heads, size, dtype=torch.float64)
        for t in range(len(x)):
            for group in range(self.config["num_key_value_heads"]):
                mine = slice(group * per_group, (group + 1) * per_group)
                seen = self.seen(q[t, mine], k[:, group], t)
                shares = (q[t, mine] @ k[seen, group].T / math.sqrt(size)).softmax(-1)
                o[t, mine] = shares @ v[seen, group]
        o = o.flatten(1)
        return o * torch.sigmoid(self.linear(name, x, "o_gate")) if self.config.get("attn_use_output_gate", True) else o

    def seen(self, q: Tensor, k: Tensor, t: int) -> list[int]:
        """The places that the queries (heads of one group) at place t attend to, among the keys (N, size)."""
        sparse = self.config.get("sparse_config")
        if sparse is None or self.is_dense(t, len(k)):
            return list(range(t + 1))
        block, chosen = sparse["block_size"], self.blocks(q, k, t)
        return [u for u in range(t + 1) if u // block in chosen]

    def is_dense(self, t: int, total: int) -> bool:
        if self.dense_below is not None:
            return t + 1 < self.dense_below
        return total < self.config["sparse_config"]["dense_len"]

    def blocks(self, q: Tensor, k: Tensor, t: int) -> set[int]:
        """The blocks of the steps 1 to 7 of InfLLM-V2: compress, score, sum, pool, force, choose."""
        sparse = self.config["sparse_config"]
        stride, block, root = sparse["kernel_stride"], sparse["block_size"], math.sqrt(q.shape[1])
        local = sparse["window_size"] // block
        count, own = sparse["topk"] + local, t // block
        fine, coarse = (self.means(k, step, t) for step in (stride, 4 * stride))
        scores = torch.zeros(0, dtype=torch.float64)
        if len(coarse):
            against = q @ coarse.T / root
            most = against.amax(-1, keepdim=True)
            whole = torch.exp(against - most).sum(-1, keepdim=True)
            scores = (torch.exp(q @ fine.T / root - most) / whole).sum(0)

        def rank(b: int) -> tuple[float, int]:
            if b < sparse["init_blocks"] or own - local <= b:
                return -math.inf, b
            per = block // stride
            windows = [j for j in range(per * b - 1, per * b + per) if 0 <= j < len(scores)]
            return -max((float(scores[j]) for j in windows), default=-math.inf), b

        return set(sorted(range(own + 1), key=rank)[:count])

    def means(self, k: Tensor, step: int, t: int) -> Tensor:
        """Mean keys of windows of twice `step` that end at place t or before."""
        count = max(0, (t + 1) // step - 1)
        return torch.stack([k[j * step : (j + 2) * step].mean(0) for j in range(count)]) if count else k[:0]

    def turned(self, heads: Tensor) -> Tensor:
        """Pairs i and i + half, turned by place * theta ** (-2 i / size), in single precision."""
        half = heads.shape[-1] // 2
        frequencies = 1 / self.config["rope_theta"] ** (torch.arange(half).float() / half)
        angles = torch.outer(torch.arange(len(heads)).float(), frequencies).unsqueeze(1)
        cos, sin, first, second = angles.cos(), angles.sin(), heads[..., :half], heads[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def heads(self, x: Tensor, name: str, part: str, size: int) -> Tensor:
        return self.linear(name, x, f"{part}_proj").unflatten(1, (-1, size))

    def linear(self, name: str, x: Tensor, part: str) -> Tensor:
        return x @ self.weights[f"{name}.{part}.weight"].T

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate = self.linear(name, x, "gate_proj")
        return self.linear(name, gate * torch.sigmoid(gate) * self.linear(name, x, "up_proj"), "down_proj")

    def norm(self, x: Tensor, name: str) -> Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return scaled * self.weights[f"{name}.weight"]
