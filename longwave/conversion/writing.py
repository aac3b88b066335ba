"""Text that a model writes itself, as training text for a conversion of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

from longwave import draws, files
from longwave.conversion.recipe import WrittenConfig
from longwave.data.shards import prepare
from longwave.engine.sampling import Sampling
from longwave.errors import require
from longwave.inference.text import generate_text, joined
from longwave.model import Decoder

TEXTS, DATA = "written", "data"
_TOGETHER = 32  # texts that are written at a time


def written_data(model: Decoder, asked: WrittenConfig, output: Path, say: Callable[[str], None]) -> Path:
    """The prepared folder of texts that a model writes, in the output folder of a conversion; what is there is kept.

    Raises UserError for a model without a tokenizer, and for prompts or a length that its window does not hold.
    """
    if (output / DATA).is_dir():
        return output / DATA
    require(model.tokenizer is not None, "written: the source has no tokenizer; give [data] in its place")
    texts = output / TEXTS
    count = math.ceil(asked.tokens / (_TOGETHER * asked.length))
    for number in range(count):
        path = texts / f"{number:06}.jsonl"
        if not path.exists():
            say(f"the source writes text: {number + 1} of {count}")
            rows = (json.dumps({"text": text}) for text in _texts(model, asked, number))
            files.write_file(path, ("\n".join(rows) + "\n").encode())
    prepare(texts, output / DATA, tokenizer=model.tokenizer, held_out=asked.held_out, seed=asked.seed)
    return output / DATA


def _texts(model: Decoder, asked: WrittenConfig, number: int) -> list[str]:
    """A group of texts, each with its prompt."""
    assert model.tokenizer is not None
    prompts = list(islice(cycle(asked.prompts), number * _TOGETHER, (number + 1) * _TOGETHER))
    draw = Sampling(temperature=asked.temperature, top_p=asked.top_p, seed=draws.key(asked.seed, number))
    pieces = generate_text(model, model.tokenizer, prompts, sampling=draw, max_new_tokens=asked.length)
    return [prompt + str(text) for prompt, text in zip(prompts, joined(pieces), strict=True)]
