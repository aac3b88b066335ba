"""Sliding-window attention (Beltagy et al. 2020, as in Mistral)."""

from __future__ import annotations

from longwave.config import ModelConfig
from longwave.errors import require
from longwave.mixers.base import Site
from longwave.mixers.full import FullAttention


class WindowAttention(FullAttention):
    """Every token sees the last `attention.window` tokens of its level, itself included."""

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__(config, site)
        require(config.attention.window is not None, "attention.window is missing; W blocks in the layout need it")
        self.window = config.attention.window
