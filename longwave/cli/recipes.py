"""`longwave recipes`: the recipes that come with the package, one line each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longwave.cli.options import Options
from longwave.cli.parser import Verb


@dataclass(frozen=True, kw_only=True)
class Recipes(Options):
    """Options of `longwave recipes`."""


def run(options: Recipes) -> dict[str, Any]:
    """Prints every name with what the recipe is for."""
    from longwave import recipes

    found = {name: recipes.summary(name) for name in recipes.names()}
    width = max(map(len, found))
    for name, line in found.items():
        print(f"{name:<{width}}  {line}")
    return {"recipes": found}


VERB = Verb("recipes", "the recipes that come with longwave, to be used by name", Recipes, run)
