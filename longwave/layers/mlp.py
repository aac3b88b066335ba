"""SwiGLU feed-forward (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from longwave.config import ModelConfig
from longwave.layers.linear import Linear


class MLP(nn.Module):
    """down(silu(gate x) * up x), each token by itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, bias = config.mlp.size, config.mlp.bias
        self.gate_proj = Linear(config.hidden_size, size, bias=bias)
        self.up_proj = Linear(config.hidden_size, size, bias=bias)
        self.down_proj = Linear(size, config.hidden_size, bias=bias)

    def forward(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))

    def flops(self) -> int:
        """Matrix-product FLOPs per token."""
        return 2 * 3 * self.gate_proj.in_features * self.gate_proj.out_features
