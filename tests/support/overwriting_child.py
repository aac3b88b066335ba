"""Saves two models by turns over one folder: `overwriting_child.py FOLDER TIMES exchange|rename|merge`.

exchange: folders are exchanged in one step. rename: by two renames, where the file system cannot do that. merge: files
are moved one by one into a folder in which others stay, as `save_pretrained` does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from model_folders import small

from longwave.checkpoints import save
from longwave.data.tokenizer import Tokenizer
from longwave.files import storage
from longwave.model import Decoder


def models() -> list[tuple[Decoder, Tokenizer]]:
    """Two models that differ in all that a folder holds: config, weights, settings, tokenizer and template."""
    made = []
    for at, layout in enumerate(("2F", "3F")):
        model = small(layout, vocab_size=270 + at, context_window=32)
        model.origin.generation = {"eos_token_id": [1, 2 + at]}
        tokenizer = Tokenizer.train([f"a text of words {at}" * 3, "b" * at], 270)
        made.append((model, tokenizer.with_chat_template(f"template {at}")))
    return made


class Slow(storage.Disk):
    """A disk that cannot exchange two folders."""

    def exchange(self, one: Path, other: Path) -> bool:
        return False


def main(folder: str, times: str, way: str) -> None:
    torch.set_num_threads(1)
    if way == "rename":
        storage.disk = Slow()
    both = models()
    classes = []
    if way == "merge":
        from longwave.hf import LongwaveForCausalLM

        for at, (model, tokenizer) in enumerate(both):
            save(model, f"{folder}-{at}", tokenizer=tokenizer)
            classes.append(LongwaveForCausalLM.from_pretrained(f"{folder}-{at}"))
    for turn in range(int(times)):
        if way == "merge":
            classes[turn % 2].save_pretrained(folder, max_shard_size="8KB" if turn % 3 else "1GB")
        else:
            model, tokenizer = both[turn % 2]
            save(model, folder, tokenizer=tokenizer)


if __name__ == "__main__":
    main(*sys.argv[1:])
