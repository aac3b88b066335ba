"""Recall tasks into a prepared folder, which is mixed with prepared text of the same tokenizer."""

from __future__ import annotations

from pathlib import Path

from longwave.data.chat import LossOn
from longwave.data.documents import Document
from longwave.data.prepared import PreparedInfo
from longwave.data.recall.documents import RecallPlan
from longwave.data.shards import prepare
from longwave.data.splitting import default_share
from longwave.data.tokenizer import Tokenizer


def prepare_recall(
    plan: RecallPlan,
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    held_out: float | None = None,
    loss_on: LossOn | None = None,
) -> PreparedInfo:
    """Makes the documents of a plan into a prepared folder, which appears whole or not at all.

    held_out: share of the documents kept from training; 0.02 by default, one document at least. loss_on: `all` for a
    loss on every token; on the answers by default.
    Raises UserError for a folder that exists, and for lengths that a task does not have with this tokenizer.
    """
    share = default_share((Document(name, "") for name in plan.names), plan.seed) if held_out is None else held_out

    def documents():
        return plan.documents(tokenizer)

    return prepare(documents, out, tokenizer=tokenizer, held_out=share, seed=plan.seed, loss_on=loss_on)
