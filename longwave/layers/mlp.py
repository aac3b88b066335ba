"""The SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from longwave.config import MOST, ModelConfig, Strict
from longwave.errors import require
from longwave.layers.linear import Linear
from longwave.ops.gated import GATED, gated
from longwave.part import Part, Site
from longwave.states import State
from longwave.streams import Stream


@dataclass(frozen=True)
class MLPConfig(Strict):
    """A SwiGLU feed-forward. size: number of inner channels. bias: whether the three products add a bias."""

    size: int
    bias: bool = False

    def __post_init__(self) -> None:
        require(0 < self.size <= MOST, f"mlp.size = {self.size}: 1 or more, at most {MOST}")


class MLP(Part):
    """down(silu(gate x) * up x), for each token by itself."""

    tables: ClassVar[Mapping[str, type]] = {"mlp": MLPConfig}
    role = "mlp"
    ops = (GATED,)
    reads_trees = True

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__(config, site)
        shape: MLPConfig = config.table("mlp")
        self.gate_proj = Linear(config.hidden_size, shape.size, bias=shape.bias)
        self.up_proj = Linear(config.hidden_size, shape.size, bias=shape.bias)
        self.down_proj = Linear(shape.size, config.hidden_size, bias=shape.bias)

    def forward(
        self, hidden: Float[Tensor, "T D"], stream: Stream | None = None, state: State | None = None
    ) -> Float[Tensor, "T D"]:
        form = self.forms["gated"]
        return self.down_proj(gated(self.gate_proj(hidden), self.up_proj(hidden), act="silu", form=form))

    def prefill_flops(self, tokens: int) -> int:
        return tokens * self.decode_flops(0)

    def decode_flops(self, context: int) -> int:
        return 2 * 3 * self.gate_proj.in_features * self.gate_proj.out_features
