"""Sliding-window attention (Beltagy et al. 2020, as in Mistral)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from longwave.config import ModelConfig, Strict
from longwave.errors import require
from longwave.mixers.full import FullAttention
from longwave.ops.attention import Pattern
from longwave.part import Site


@dataclass(frozen=True)
class WindowConfig(Strict):
    """A sliding window of attention. size: number of newest tokens that a query sees, its own included."""

    size: int

    def __post_init__(self) -> None:
        require(self.size > 0, f"window.size = {self.size}: 1 or more tokens")


class WindowAttention(FullAttention):
    """Softmax attention in which every token sees the last `window.size` tokens, itself included.

    Inside a resampler the window counts the tokens that are kept there.
    """

    tables: ClassVar[Mapping[str, type]] = {**FullAttention.tables, "window": WindowConfig}

    def __init__(self, config: ModelConfig, site: Site) -> None:
        super().__init__(config, site)
        self.pattern = Pattern(window=config.table("window").size)
