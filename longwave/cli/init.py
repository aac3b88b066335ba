"""`longwave init`: a recipe of one's own, begun as a copy of one that comes with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longwave.cli.options import Options, argument, option
from longwave.cli.parser import Verb
from longwave.errors import require

DEFAULT = "quickstart-subllm"


@dataclass(frozen=True, kw_only=True)
class Init(Options):
    """Options of `longwave init`."""

    output: str = argument("a new TOML file", metavar="RECIPE.toml")
    start: str = option("the name or the path of the recipe to copy", default=DEFAULT, name="--from", metavar="RECIPE")


def run(options: Init) -> dict[str, Any]:
    """Copies the recipe, comments included, into a file that did not exist."""
    from longwave import files, recipes

    output = Path(options.output)
    require(not output.exists(), f"{output}: exists already; give the name of a new file")
    require(output.parent.is_dir(), f"{output}: there is no folder {output.parent}")
    start = recipes.find(options.start)
    require(not start.is_dir(), f"--from {start}: a folder; give a recipe, by its name or path")
    files.write_file(output, start.read_bytes())
    print(f"{output}: a copy of {options.start}; edit it, then look at its cost: longwave plan {output}")
    return {"recipe": str(output)}


VERB = Verb("init", "begin a recipe of one's own as a copy of another", Init, run)
