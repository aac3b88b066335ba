"""`longwave prepare`: text, conversations or recall tasks in, a folder of tokenised shards out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from longwave.cli.options import Options, argument, option
from longwave.cli.parser import Verb
from longwave.units import counted

if TYPE_CHECKING:
    from longwave.data.prepared import PreparedInfo


_SHOWN = 20  # sources


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
    questions: int | None = option("that a recall task asks in turn, every answer learned (1)", metavar="N")
    for_recall: bool = option("the tokenizer to train gets an entry for every word of recall tasks", default=False)
    tokens: str | None = option("of recall tasks, or of training with each source's share, in all: 2.5M", metavar="N")
    keep: str | None = option("documents by tokens, with a probability: 0-4k:0.1,4k- (all)", metavar="RANGE,...")
    seed: int = option("of the draws of what is held out and kept, and of recall tasks", default=0)


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
    _show_shares(info)
    for one in info.not_read:
        print(f"left out: {one}")


def _show_shares(info: PreparedInfo) -> None:
    """Prints what was taken of each source, the largest first, and which run out."""
    before = sum(one.of_tokens for one in info.shares)
    for one in sorted(info.shares, key=lambda one: -one.of_tokens)[:_SHOWN]:
        now = (
            f"{one.tokens:,} of {one.of_tokens:,} tokens, {one.documents:,} of {counted(one.of_documents, 'document')}"
        )
        print(f"{one.name}: {now}; {one.tokens / info.train.tokens:.1%} of all, {one.of_tokens / before:.1%} before")
    for one in info.shares:
        if one.missing:
            print(f"{one.name}: {one.missing:,} tokens fewer than its share of {one.wanted:,}; it has no more to keep")


VERB = Verb("prepare", "turn text, conversations or recall tasks into tokenised shards", Prepare, run)
