"""longwave: language models whose cost does not explode with context length.

    import longwave as lw
    model = lw.load("path/to/model")
    text = lw.generate(model, "prompt", max_new_tokens=64)
    for piece in lw.stream(model, "prompt"):
        print(piece, end="", flush=True)
    lw.save(model, "path/to/out")

The verbs of the command line are functions, too: `lw.plan("recipe.toml", context=65536).parameters`.
The names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from longwave.version import __version__

if TYPE_CHECKING:
    from longwave.api import generate, load, save, stream
    from longwave.config import ModelConfig
    from longwave.errors import MachineError, UserError
    from longwave.extension import extend
    from longwave.inference.text import Continuation
    from longwave.model import Decoder
    from longwave.streams import Stream
    from longwave.verbs import compare, compare_results, convert, evaluate, plan, plan_conversion, prepare, train

_HOMES = {
    "load": "api",
    "save": "api",
    "generate": "api",
    "stream": "api",
    "Continuation": "inference.text",
    "compare": "verbs",
    "compare_results": "verbs",
    "convert": "verbs",
    "evaluate": "verbs",
    "plan": "verbs",
    "plan_conversion": "verbs",
    "prepare": "verbs",
    "train": "verbs",
    "extend": "extension",
    "Decoder": "model",
    "ModelConfig": "model",
    "Stream": "streams",
    "UserError": "errors",
    "MachineError": "errors",
}

__all__ = [
    "Continuation",
    "Decoder",
    "MachineError",
    "ModelConfig",
    "Stream",
    "UserError",
    "__version__",
    "compare",
    "compare_results",
    "convert",
    "evaluate",
    "extend",
    "generate",
    "load",
    "plan",
    "plan_conversion",
    "prepare",
    "save",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longwave' has no attribute {name!r}")
    return getattr(import_module(f"longwave.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The names that can be used, those that were not loaded yet among them."""
    return sorted({*globals(), *_HOMES})
