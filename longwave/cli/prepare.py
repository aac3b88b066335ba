"""`longwave prepare`: text, conversations or recall tasks in, a folder of tokenised shards out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from longwave.cli.options import Options, argument, option
from longwave.cli.parser import Verb
from longwave.units import counted

if TYPE_CHECKING:
    from longwave.data.prepared import PreparedInfo


@dataclass(frozen=True, kw_only=True)
class Prepare(Options):
    """Options of `longwave prepare`."""

    source: str = argument(
        "text, or rows of texts or chats (.jsonl, .json, .csv, .parquet; also .gz, .zst), or a folder of them; "
        "'stdlib' for Python's own sources, 'recall' for recall tasks that are made"
    )
    output: str = argument("a new folder")
    vocab_size: int | None = option("entries of the tokenizer to train (8192)")
    tokenizer: str | None = option("a folder with tokenizer.json to use instead of training one")
    held_out: float | None = option("share of documents kept from training (0.02, one document at least)")
    text_field: str | None = option("field of the text in rows, whatever else they hold (text)")
    ignore: tuple[str, ...] = option("a key of rows and messages to pass over; repeat for more", default=())
    loss_on: Literal["assistant", "all"] | None = option("what is learned of chats and recall tasks (assistant)")
    families: str | None = option("of recall tasks (key-value,multi-key,copy,variables)", metavar="NAME,...")
    lengths: str | None = option("of the documents of recall tasks, in tokens: 256,1k", metavar="N,...")
    tokens: str | None = option("of recall tasks in all: 2.5M", metavar="N")
    questions: int | None = option("that a recall task asks in turn, every answer learned (1)", metavar="N")
    for_recall: bool = option("the tokenizer to train gets an entry for every word of recall tasks", default=False)
    seed: int = option("of the draw of what is held out, and of recall tasks", default=0)


def run(options: Prepare) -> PreparedInfo:
    """Prepares, and prints how much there is of it."""
    from longwave.verbs import prepare

    info = prepare(**options.keywords())
    _show(info, options.output)
    return info


def _show(info: PreparedInfo, output: str) -> None:
    print(f"{output}: {info.train.tokens:,} training tokens and {info.held_out.tokens:,} held out, ", end="")
    print(f"{counted(info.documents, 'document')}, vocabulary of {info.vocab_size:,}")
    if info.kind == "chat":
        learned = f"{info.train.targets / info.train.tokens:.0%} of the training tokens are learned"
        print(f"conversations: {learned}; left out, for want of an answer: {info.left_out:,}")
    if info.kind == "recall" and info.train.learned is not None:
        print(f"recall tasks: {info.train.targets / info.train.tokens:.1%} of the training tokens are learned: answers")
    for one in info.not_read:
        print(f"left out: {one}")


VERB = Verb("prepare", "turn text, conversations or recall tasks into tokenised shards", Prepare, run)
