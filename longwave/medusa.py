"""Medusa: small heads on a model that guess the tokens after the next one, from the same hidden state.

Source: Cai et al. 2024, arXiv 2401.10774. The model's own head says the token after a text; head k (from 1) guesses the
one k places further on, without running the model. What it guesses are drafts, which the model checks
(`longwave.engine.medusa`).

Legend: `T` tokens, `N` rows, `D` hidden size, `V` vocabulary, `K` heads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from longwave import files
from longwave.checkpoints.located import WEIGHTS
from longwave.checkpoints.weights import WeightFiles, check, write
from longwave.config import Strict, build
from longwave.errors import UserError, require, shown
from longwave.files import OpenFolder
from longwave.layers.head import Head
from longwave.layers.linear import Linear
from longwave.model import Decoder
from longwave.ops.cross_entropy import cross_entropy
from longwave.version import __version__

KIND = "longwave-medusa"  # the `model_type` of a folder of heads, by which it is told from a model
CONFIG = "config.json"
MOST_HEADS = 16
Shares: TypeAlias = "tuple[tuple[float, ...], ...]"


@dataclass(frozen=True)
class MedusaConfig(Strict):
    """Heads that guess tokens beyond the next one.

    heads: how many, each guessing one place further on. projection: whether each has an output matrix of its `own`,
    which begins as that of the model, as published, or all use the model's (`shared`), so that a head is one square
    matrix. weight: the loss of head k counts this to the power of k.
    """

    heads: int = 4
    projection: Literal["own", "shared"] = "own"
    weight: float = 0.8

    def __post_init__(self) -> None:
        require(0 < self.heads <= MOST_HEADS, f"medusa.heads = {self.heads}: 1 to {MOST_HEADS}")
        require(0 < self.weight <= 1, f"medusa.weight = {self.weight}: more than 0, at most 1")


class MedusaHead(nn.Module):
    """x + SiLU(W x), W being 0 at first, and then an output matrix, unless the model's is used."""

    def __init__(self, width: int, vocabulary: int | None) -> None:
        super().__init__()
        self.residual = Linear(width, width, bias=False)
        nn.init.zeros_(self.residual.weight)
        self.projection = None if vocabulary is None else Head(width, vocabulary)

    def forward(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return hidden + F.silu(self.residual(hidden))


class Medusa(nn.Module):
    """The heads of a model, which stays as it is and is not among their weights.

    accuracies: for each head, how often the token that it ranks first, second, ... was right on held-out text; empty as
    long as that was not measured.
    """

    def __init__(self, base: Decoder, config: MedusaConfig | None = None) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple, so that its weights are not registered as the heads' own
        self.config = config or MedusaConfig()
        self.accuracies: Shares = ()
        own = base.config.vocab_size if self.config.projection == "own" else None
        self.heads = nn.ModuleList(MedusaHead(base.config.hidden_size, own) for _ in range(self.config.heads))
        self.to(base.head_weight)
        self._begin()

    @property
    def base(self) -> Decoder:
        """The model whose hidden states they read."""
        return self._base[0]

    def forward(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "K N V"]:
        """The logits of every head. hidden: the normalised hidden states that the model's own head reads."""
        return torch.stack([self.logits_of(number, hidden) for number in range(len(self.heads))])

    def logits_of(self, number: int, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """The logits of one head, counted from 0."""
        head = self._each()[number]
        if head.projection is None:
            return self.base.logits(head(hidden))
        return head.projection(head(hidden)) * self.base.config.scales.logits

    def loss(self, number: int, hidden: Float[Tensor, "T D"], targets: Int64[Tensor, " T"]) -> Float[Tensor, ""]:
        """Sum of the cross-entropies in nats of one head, counted from 0; rows of target -100 do not count."""
        head = self._each()[number]
        return cross_entropy(head(hidden), self._matrix(head), targets, self.base.config.scales.logits)

    @property
    def row_flops(self) -> int:
        """FLOPs of the logits of all heads for one row."""
        width = self.base.config.hidden_size
        return len(self.heads) * (2 * width * width + self.base.head_flops())

    def _each(self) -> Sequence[MedusaHead]:
        return [head for head in self.heads if isinstance(head, MedusaHead)]

    def _matrix(self, head: MedusaHead) -> Tensor:
        return self.base.head_weight if head.projection is None else head.projection.weight

    @torch.no_grad()
    def _begin(self) -> None:
        for head in self._each():
            if head.projection is not None:
                head.projection.weight.copy_(self.base.head_weight)


def shifted(following: Int64[Tensor, " T"], runs: Sequence[int], places: int) -> Int64[Tensor, " T"]:
    """The targets of tokens so many places further on than the next; -100 where their document has none.

    following: the next token of each, -100 for none. runs: tokens of each document piece.
    """
    pieces = following.split(list(runs))
    return torch.cat([F.pad(piece[places:], (0, min(places, len(piece))), value=-100) for piece in pieces])


def write_medusa(medusa: Medusa, folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Writes the heads into an existing folder. facts: what else the folder tells, such as the base's name."""
    base = medusa.base
    tokenizer = {} if base.tokenizer is None else {"tokenizer": base.tokenizer.fingerprint}
    values = {
        "model_type": KIND,
        "longwave_version": __version__,
        "medusa": asdict(medusa.config),
        "hidden_size": base.config.hidden_size,
        "vocab_size": base.config.vocab_size,
        "layout": base.config.layout,
        **tokenizer,
        **({"accuracies": medusa.accuracies} if medusa.accuracies else {}),
        **(facts or {}),
    }
    write(medusa.state_dict(), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def is_medusa(path: str | Path) -> bool:
    """Whether a folder holds heads rather than a model; False for what is no folder."""
    if not (Path(path) / CONFIG).is_file():
        return False
    return files.read_whole(path, lambda folder: folder.object(CONFIG).get("model_type")) == KIND


def load_medusa(path: str | Path, base: Decoder) -> Medusa:
    """The heads in a folder, for a model, in the type and on the device of its head.

    UserError for a folder of something else, and for heads that were made for another hidden size, vocabulary or
    tokenizer.
    """
    return files.read_whole(path, lambda folder: _read(folder, base)).to(base.head_weight).eval()


def _read(folder: OpenFolder, base: Decoder) -> Medusa:
    files.refuse_other(folder, unread=".safetensors")
    source = str(folder / CONFIG)
    require(CONFIG in folder, f"{folder.path}: no {CONFIG}; give a folder of Medusa heads")
    values = folder.object(CONFIG)
    kind = values.get("model_type")
    require(kind == KIND, f"{source}: model_type = {shown(kind)}; give a folder of Medusa heads ({KIND})")
    _require_base(values, base, source)
    config = build(MedusaConfig, _table(values, source), source)
    with torch.device(base.head_weight.device):
        medusa = Medusa(base, config)
    stored = WeightFiles(folder)
    check({name: one.shape for name, one in medusa.state_dict().items()}, stored.found, stored.source)
    tensors = stored.load(stored.names())
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    require(finite, f"{stored.source}: a weight is NaN or infinite; give another folder")
    medusa.load_state_dict(tensors)
    medusa.accuracies = _accuracies(values.get("accuracies", ()), config, source)
    return medusa


def _table(values: dict[str, Any], source: str) -> dict[str, Any]:
    found = values.get("medusa")
    if not isinstance(found, dict):
        raise UserError(f"{source}: medusa = {shown(found)}: expected the table that describes the heads")
    return found


def _require_base(values: dict[str, Any], base: Decoder, source: str) -> None:
    for name in ("hidden_size", "vocab_size"):
        ours = getattr(base.config, name)
        other = f"{source}: {name} = {shown(values.get(name))}: the model has {ours}"
        require(values.get(name) == ours, f"{other}; give heads that were trained on it")
    if base.tokenizer is not None and "tokenizer" in values:
        alike = values["tokenizer"] == base.tokenizer.fingerprint
        require(alike, f"{source}: heads of a model of another tokenizer; give heads that were trained on this one")


def _accuracies(found: Any, config: MedusaConfig, source: str) -> Shares:
    """The measured accuracies of every head; UserError for anything but a row of shares for each."""
    rows: list[Any] = list(found) if isinstance(found, list | tuple) else [None]
    sound = all(isinstance(row, list) and row and all(map(_is_share, row)) for row in rows)
    told = f"{source}: accuracies = {shown(found)}: a row of shares from 0 to 1 for each of {config.heads} heads"
    require(sound and len(rows) in (0, config.heads), told)
    return tuple(tuple(float(share) for share in row) for row in rows)


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1
