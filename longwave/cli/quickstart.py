"""`longwave quickstart`: the main job, on the user's own text or the Python standard library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longwave.cli.options import Options, argument, option
from longwave.cli.parser import Verb
from longwave.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Quickstart(Options):
    """Options of `longwave quickstart`."""

    text: str | None = argument("a text file or folder; the Python standard library by default", default=None)
    overrides: tuple[str, ...] = argument("recipe values for all, training.steps=50", default=(), metavar="key=value")
    output: str = option("folder of models, metrics.jsonl and report.html", default="quickstart")
    measure_again: bool = option("time the trained models anew, as after a busy hour", default=False)


def run(options: Quickstart) -> dict[str, Any]:
    """Trains and compares; a word without `=`, or the name of a file, is the text wherever it stands."""
    from longwave.quickstart import quickstart

    given = [*([] if options.text is None else [options.text]), *options.overrides]
    texts = [word for word in given if "=" not in word or Path(word).exists()]
    if len(texts) > 1:
        raise UserError(f"{texts[1]!r}: one text has been given ({texts[0]}); an override reads key.path=value")
    overrides = [word for word in given if word not in texts]
    return quickstart(texts[0] if texts else None, Path(options.output), overrides, options.measure_again)


VERB = Verb("quickstart", "train a Llama, a SUBLLM and a SALA on real text and compare them", Quickstart, run)
