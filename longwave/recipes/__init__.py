"""The recipes that come with the package: complete TOML files, called by name."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from longwave.errors import UserError


def recipe_path(name: str) -> Path:
    """The path of a recipe that comes with the package."""
    return Path(str(files("longwave"))) / "recipes" / f"{name}.toml"


def names() -> list[str]:
    """The names of all recipes that come with the package."""
    return sorted(path.stem for path in recipe_path("any").parent.glob("*.toml"))


def find(given: str | Path) -> Path:
    """The file of a recipe that is given by its path, or else by its name.

    UserError for what is neither, with the name that was probably meant.
    """
    if Path(given).exists():
        return Path(given)
    if str(given) in names():
        return recipe_path(str(given))
    near = get_close_matches(Path(given).stem, names(), n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"{given}: neither a file nor the name of a recipe; {meant}`longwave recipes` lists the names")


def summary(name: str) -> str:
    """The line that says what a recipe is for: the first comment of its file."""
    with recipe_path(name).open(encoding="utf8") as file:
        return file.readline().removeprefix("#").strip()
