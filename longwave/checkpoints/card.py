"""The model card of a saved folder, `README.md`: what the model is, how it was trained as far as known, and its use.

The manifest does not list it, so that a card may be edited; one that was made somebody's own, by taking out its last
line, is kept when the folder is saved over.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longwave.checkpoints.families import FAMILIES
from longwave.errors import UserError, shown
from longwave.files import CARD
from longwave.layout import Blocks
from longwave.model import Decoder
from longwave.version import __version__

Facts = Mapping[str, str | int | float]
_MARK = "<!-- written by longwave, and written anew with the model unless this line is taken out -->"
_LARGEST = 1 << 20  # bytes of a card that is looked into
_IN_TRANSFORMERS = {family.model_type for family in FAMILIES if family.in_transformers}


def write_card(model: Decoder, staging: Path, target: Path, format: str = "longwave") -> None:
    """Writes the card of a model into a folder that is being saved.

    target: where the folder will stand; a card of somebody's own that lies there is copied.
    """
    own = target / CARD
    if own.is_file() and not own.is_symlink() and not _is_ours(own):
        shutil.copyfile(own, staging / CARD)
    else:
        # names of files, which may be no UTF-8, stand in it as escapes
        (staging / CARD).write_text(card(model, format), encoding="utf-8", errors="backslashreplace")


def card(model: Decoder, format: str = "longwave") -> str:
    """The text of the card: front matter that the Hugging Face hub reads, then Markdown."""
    library = "transformers" if format in _IN_TRANSFORMERS else "longwave"
    head = f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- longwave\n---\n"
    training = _table(model.origin.training) or "Nothing about its training is known to this folder.\n"
    parts = (head, f"# {_title(model)}\n", _table(_model(model, format)), "## Training\n", training, _USE, _MARK)
    return "\n".join(parts) + "\n"


def training_facts(values: dict[str, Any], source: str) -> Facts:
    """The facts of a training in a parsed `config.json`; UserError for anything but names with texts or numbers."""
    facts = values.get("training", {})
    if not isinstance(facts, dict) or not all(type(fact) in (str, int, float) for fact in facts.values()):
        raise UserError(f"{source}: training = {shown(facts)}: a table of texts and numbers")
    return facts


def source_in(values: dict[str, Any], source: str) -> str | None:
    """The model of the hub that the weights came from, in a parsed `config.json`; UserError for anything but a text."""
    found = values.get("source")
    if not isinstance(found, str | None):
        raise UserError(f"{source}: source = {shown(found)}: a model of the hub, as org/name@commit")
    return found


_USE = """## Use

```sh
longwave generate . --prompt "Once upon a time"
```

```python
import longwave as lw

model = lw.load(".")  # this folder
print(lw.generate(model, "Once upon a time"))
```
"""


def _title(model: Decoder) -> str:
    kind = "language model" if _is_plain(model) else "long-context language model"
    return f"A {kind} of {sum(weight.numel() for weight in model.parameters()):,} parameters"


def _is_plain(model: Decoder) -> bool:
    return all(isinstance(item, Blocks) and item.letter == "F" for item in model.layout.walk())


def _model(model: Decoder, format: str) -> Facts:
    config = model.config
    return {
        "layout": f"`{config.layout}`",
        "blocks": model.layout.depth,
        "hidden size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context window": config.context_window,
        "weights": str(model.embed.weight.dtype).removeprefix("torch."),
        "format": f"{format}, written by longwave {__version__}",
        **({"weights of": model.origin.source} if model.origin.source else {}),
    }


def _table(facts: Facts) -> str:
    """A Markdown table of names and values; empty without any."""
    lines = [f"| {_cell(name)} | {_cell(_told(value))} |\n" for name, value in facts.items()]
    return "| | |\n|---|---|\n" + "".join(lines) if lines else ""


def _told(value: str | int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _is_ours(path: Path) -> bool:
    return path.stat().st_size <= _LARGEST and _MARK in path.read_text(encoding="utf-8", errors="replace")
