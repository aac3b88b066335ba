"""Recipes by name: every one is found, listed in a line, and copied; what is no file either is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from longwave import recipes
from longwave.errors import UserError
from longwave.training.recipe import read_values

READ = {name: read_values(name) for name in recipes.names()}
TRAINED = [name for name, values in READ.items() if "training" in values and "stages" not in values]


def test_names_are_those_of_the_files():
    files = Path(recipes.__file__).parent.glob("*.toml")
    assert recipes.names() == sorted(path.stem for path in files)
    assert {"quickstart-llama", "quickstart-subllm", "sala-9b"} <= set(recipes.names())


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_says_in_one_line_what_it_is_for(name: str):
    line = recipes.summary(name)
    assert 20 < len(line) <= 100
    assert line.endswith("."), "one sentence, and all of it"


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_read_by_its_name_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert read_values(name) == read_values(recipes.recipe_path(name))


def test_the_list_has_every_name(longwave):
    result = longwave("recipes", "--json")
    assert [line.split()[0] for line in result.out.splitlines()[:-1]] == recipes.names()
    assert result.json == {"recipes": {name: recipes.summary(name) for name in recipes.names()}}


def test_plan_takes_a_name(longwave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert "S 8L S 6L 2S 4L S 6L 3S" in longwave("plan", "sala-9b").out


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("sala-9b").write_text("[model]\nhidden_size = 8\n")
    assert read_values("sala-9b") == {"model": {"hidden_size": 8}}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("sala9b", "did you mean sala-9b?"),
        ("quickstart-sublm", "did you mean quickstart-subllm?"),
        ("longwave/recipes/sala-9b.toml", "did you mean sala-9b?"),  # which is where a clone has it
        ("sala-9b.toml", "did you mean sala-9b?"),
        ("zzz", "`longwave recipes` lists the names"),
        ("../recipes/sala-9b", "did you mean sala-9b?"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "train"])
def test_what_is_neither_file_nor_name_is_refused(given: str, says: str, verb: str, refuses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses(verb, given, says=[says, "neither a file nor the name of a recipe"])


@pytest.mark.parametrize("name", TRAINED)
def test_init_copies_a_recipe_with_its_comments(name: str, longwave, tmp_path: Path):
    path = tmp_path / "my.toml"
    assert longwave("init", path, "--from", name).code == 0
    assert path.read_text() == recipes.recipe_path(name).read_text()


def test_init_copies_a_file_too(longwave, tmp_path: Path):
    (tmp_path / "one.toml").write_text("[model]\n")
    assert longwave("init", tmp_path / "two.toml", "--from", tmp_path / "one.toml").code == 0
    assert (tmp_path / "two.toml").read_text() == "[model]\n"


def test_init_overwrites_nothing(refuses, tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text("mine")
    refuses("init", path, says=[str(path), "exists already"])
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["no/folder/a.toml"], "there is no folder no/folder"),
        (["a.toml", "--from", "zzz"], "neither a file nor the name of a recipe"),
        (["a.toml", "--from", "."], "a folder"),
    ],
)
def test_init_refuses_in_one_line(words: list[str], says: str, refuses, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses("init", *words, says=[says])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_recipe_is_a_user_error():
    with pytest.raises(UserError):
        recipes.find("nothing")
