"""Options of `longwave bench context`, and the dense model that a model is compared with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from longwave.benchmarks.results.results import Options
from longwave.blocks import DENSE, tables_of
from longwave.config import ModelConfig
from longwave.errors import require


@dataclass(frozen=True)
class ContextOptions(Options):
    """How a growing sequence is measured.

    contexts: tokens at which figures are taken, ascending. chunk: tokens that are run at a time. decode_steps: tokens
    decoded at each context, and forgotten again. limit: seconds after which a model is stopped. memory: bytes beyond
    its weights that a model may take; by default what is free. text: a file or folder, or None for the Python standard
    library. repeats: passes over the whole sequence.
    """

    contexts: tuple[int, ...] = (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
    repeats: int = 1
    chunk: int = 4096
    decode_steps: int = 16
    limit: float = 600.0
    memory: int | None = None
    retention: Literal["forced", "real"] = "real"
    text: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending = all(before < after for before, after in pairwise(self.contexts))
        require(ascending, f"contexts = {list(self.contexts)}: ascending, since one sequence grows through them")
        require(self.batches == (1,), f"batches = {list(self.batches)}: one sequence grows, so (1,)")
        for name in ("chunk", "decode_steps"):
            require(getattr(self, name) > 0, f"{name} = {getattr(self, name)}: 1 or more tokens")
        require(self.limit > 0, f"limit = {self.limit:g}: more than 0 seconds")
        require(self.memory is None or self.memory > 0, f"memory = {self.memory}: 1 or more bytes, such as 8G")

    @property
    def tokens(self) -> int:
        """Tokens of text that a run needs: beyond the longest context, one more chunk or the decoded tokens."""
        return self.contexts[-1] + max(self.chunk, self.decode_steps + 1)


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The config of the same shape with full attention in every block and no brackets.

    Tables of other parts are left out, since one that no part reads is an error.
    """
    read = tables_of(DENSE)
    tables = {name: table for name, table in config.completed(read).tables.items() if name in read}
    return dataclasses.replace(config, layout=f"{config.parsed.depth}{DENSE}", blocks={}, tables=tables)
