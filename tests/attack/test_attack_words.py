"""Command lines, prompts and recipes of any kind: right, or one line."""

from __future__ import annotations

import json
import random
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import runs
from attacks import Attacker, Outcome, attack, series
from mutations import ODD, places
from odd_words import NUMBERS, damaged, raw, text, word

from longwave.cli import VERBS
from longwave.cli.parser import Group, Verb

FLAT = [([verb.name], verb) for verb in VERBS if isinstance(verb, Verb)] + [
    ([group.name, verb.name], verb) for group in VERBS if isinstance(group, Group) for verb in group.verbs
]
SHORT = [f"training.{one}" for one in ("steps=3", "window=16", "batch_windows=1", "evaluate_windows=1")]
HEAVY = {"quickstart", "train", "inference", "training", "ops", "context"}  # do what they are asked for, for minutes


def names_of(verb: Verb) -> list[str]:
    """The options of a verb as they are written."""
    named = [field for field in fields(verb.options) if not field.metadata["positional"]]
    return [field.metadata["name"] or f"--{field.name.replace('_', '-')}" for field in named]


@series(1400, cut=25)
def test_any_words(attacker: Attacker, model: Path, recipe: Path, numbers: Sequence[int]):
    given = [str(model), str(recipe), str(runs.prepared()), str(runs.corpus()), str(runs.corpus() / "shlex.py")]

    def attempt(draw: random.Random, number: int) -> Outcome:
        way, verb = draw.choice(FLAT)
        light = way[-1] not in HEAVY
        words = [*way]
        for _ in range(draw.randrange(5)):
            kind = draw.random()
            if kind < 0.3:
                words.append(draw.choice(given) if light else word(draw))
            elif kind < 0.6:
                words += [draw.choice(names_of(verb)), word(draw)]
            elif kind < 0.8:
                words.append(f"{draw.choice(names_of(verb))}={word(draw)}")
            else:
                words.append(word(draw))
        return attacker.run(*words, *([] if light else ["--unknown"]), stdin=raw(draw, 60))

    attack("words", numbers, attempt)


@series(900, cut=15)
def test_any_prompt(attacker: Attacker, model: Path, llama: Path, numbers: Sequence[int]):
    def attempt(draw: random.Random, number: int) -> Outcome:
        words: list[object] = ["generate", draw.choice([model, llama]), "--max-new-tokens", draw.choice([1, 3, 80])]
        kind = draw.randrange(3)
        (attacker.work / "prompt.txt").write_bytes(raw(draw, draw.choice([5, 60, 3000])))
        if kind == 0:
            words += [f"--prompt={text(draw, 60).replace(chr(0), '')}" for _ in range(draw.randint(1, 3))]
        elif kind == 1:
            words += ["--prompt-file", "prompt.txt"]
        for name in draw.sample(["temperature", "top-k", "top-p", "seed", "stop"], draw.randrange(3)):
            words.append(f"--{name}={draw.choice(NUMBERS)}")
        words += ["--chat"] * (draw.random() < 0.2) + ["--json"] * (draw.random() < 0.5)
        return attacker.run(*words, stdin=raw(draw, 60))

    attack("prompts", numbers, attempt)


@series(100, cut=5)
def test_any_text_inspected(attacker: Attacker, model: Path, llama: Path, numbers: Sequence[int]):
    def attempt(draw: random.Random, number: int) -> Outcome:
        (attacker.work / "text.txt").write_bytes(raw(draw, draw.choice([5, 60])))
        words: list[object] = ["inspect", draw.choice([model, llama]), draw.choice(["text.txt", "-"])]
        for name in draw.sample(["against", "layers", "heads", "first", "output"], draw.randrange(3)):
            words.append(f"--{name}={draw.choice([word(draw), '0', '0,1', str(model)])}")
        return attacker.run(*words, stdin=raw(draw, 60))

    attack("inspected", numbers, attempt)


@series(1000, cut=15)
def test_any_recipe(attacker: Attacker, recipe: Path, numbers: Sequence[int]):
    whole = recipe.read_bytes()

    def attempt(draw: random.Random, number: int) -> Outcome:
        path = attacker.work / "recipe.toml"
        path.write_bytes(damaged(draw, whole) if draw.random() < 0.4 else mutated_toml(draw, whole.decode()))
        shutil.rmtree(attacker.work / "run", ignore_errors=True)
        return attacker.run(*(["plan", path] if draw.random() < 0.7 else ["train", path, "--output", "run", *SHORT]))

    attack("recipes", numbers, attempt)


def mutated_toml(draw: random.Random, whole: str) -> bytes:
    """A recipe with an odd value, a key too many, or one too few, at some place."""
    values = tomllib.loads(whole)
    *way, key = draw.choice([place for place in places(values) if place])
    inner: Any = values
    for step in way:
        inner = inner[step]
    kind = draw.randrange(4)
    if kind == 0:
        del inner[key]
    elif kind == 1 and isinstance(inner, dict):
        inner[draw.choice(["", "ключ", "x" * 3000, f"{key}_", "a.b", 'a"b'])] = inner.pop(key)
    else:
        inner[key] = draw.choice([*(one for one in ODD if one is not None), *NUMBERS, [[[[]]]], 10**4, -(10**4)])
    return toml(values).encode("utf-8", "surrogatepass")


def toml(values: dict[str, Any], name: str = "") -> str:
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    lines = [f"[{name}]"] if name else []
    lines += [f"{json.dumps(key)} = {inline(value)}" for key, value in plain.items()]
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    below = [toml(value, f"{name}.{json.dumps(key)}" if name else json.dumps(key)) for key, value in tables.items()]
    return "\n".join([*lines, *below])


def inline(value: Any) -> str:
    """A value as TOML writes it; a table within a list in braces."""
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{json.dumps(key)} = {inline(one)}" for key, one in value.items() if one is not None) + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(inline(one) for one in value if one is not None) + "]"
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("depth", [10, 100, 1000, 100_000])
@pytest.mark.parametrize("form", ["[", "{a=", "a."])
def test_deep_recipes(attacker: Attacker, form: str, depth: int):
    path = attacker.work / "deep.toml"
    path.write_text(f"x = {form * depth}" if form != "a." else f"{form * depth}b = 1")
    assert attacker.run("plan", path).wrong == ""
    assert attacker.run("train", path).wrong == ""
