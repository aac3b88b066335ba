"""Folders as damage, other programs and hostile hands leave them: right, or one line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
from attacks import Attacker, Outcome, attack, series
from mutations import ODD, RAW, mutated, places
from odd_words import damaged

SPEAK = ["generate", "--prompt", "def f(", "--max-new-tokens", "3"]
VERBS = (SPEAK, SPEAK, SPEAK, [*SPEAK, "--chat"], ["plan"], ["eval"], ["inspect"])


def command(draw: random.Random, folder: Path) -> list[object]:
    """A verb that reads the model of a folder."""
    verb, *options = draw.choice(VERBS)
    more: dict[str, list[object]] = {
        "eval": [runs.prepared()],
        "inspect": ["--text", "def f(x):", "--output", "a.html"],
    }
    return [verb, folder, *more.get(verb, []), *options]


@series(800, cut=15)
def test_a_folder_with_any_change(attacker: Attacker, model: Path, llama: Path, numbers: Sequence[int]):
    def attempt(draw: random.Random, number: int) -> Outcome:
        folder = attacker.work / "folder"
        mutated(number, draw.choice([model, llama]), folder)
        return attacker.run(*command(draw, folder))

    attack("folders", numbers, attempt)


@series(500, cut=10)
def test_a_tokenizer_with_any_change(attacker: Attacker, llama: Path, numbers: Sequence[int]):
    def attempt(draw: random.Random, number: int) -> Outcome:
        folder = fresh(llama, attacker.work / "folder")
        path = folder / draw.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
        path.write_bytes(damaged(draw, path.read_bytes()) if draw.random() < 0.3 else odd_json(draw, path))
        return attacker.run(*command(draw, folder))

    attack("tokenizers", numbers, attempt)


PATTERNS = ("(a+)+$", "a*a*b", "(a|a)*b", "(?=a)", "(?=(a*))", "(.*)\\1x", "", "a", r"\s*", "(", "(a{1,99}){1,99}b")
UNICODE = ("NFKD", "NFC", "Lowercase", "StripAccents", "Nmt")


@series(200, cut=5)
def test_a_tokenizer_that_works_like_a_program(attacker: Attacker, llama: Path, numbers: Sequence[int]):
    """Replacements one after the other, patterns that backtrack, long words; over texts that they are made for."""

    def attempt(draw: random.Random, number: int) -> Outcome:
        folder = fresh(llama, attacker.work / "folder")
        content = json.loads((folder / "tokenizer.json").read_text())
        content["normalizer"] = steps(draw, a_form if draw.random() < 0.3 else a_replacement)
        content["decoder"] = steps(draw, a_replacement) if draw.random() < 0.3 else content["decoder"]
        content["pre_tokenizer"] = steps(draw, a_split) if draw.random() < 0.6 else None
        content["model"]["continuing_subword_prefix"] = draw.choice([None, None, "", "#" * 99_999])
        (folder / "tokenizer.json").write_text(json.dumps(content))
        (attacker.work / "prompt.txt").write_text(
            draw.choice(["a", "a", " ", "1", "\ufdfa"]) * draw.choice([9, 999, 99_999])
        )
        return attacker.run("generate", folder, "--prompt-file", "prompt.txt", "--max-new-tokens", "9")

    attack("programs", numbers, attempt)


def steps(draw: random.Random, one: Callable[[random.Random], dict[str, Any]]) -> dict[str, Any]:
    """A sequence of steps, which may be one step again and again."""
    made = [one(draw) for _ in range(draw.randint(1, 3))] * draw.choice([1, 1, 1, 5, 40, 9999])
    return {"type": "Sequence", "normalizers": made, "pretokenizers": made, "decoders": made}


def a_form(draw: random.Random) -> dict[str, Any]:
    return {"type": draw.choice(UNICODE)}


def a_replacement(draw: random.Random) -> dict[str, Any]:
    pattern = {draw.choice(["String", "Regex"]): draw.choice(PATTERNS)}
    return {"type": "Replace", "pattern": pattern, "content": "a" * draw.choice([0, 1, 2, 9, 9999])}


def a_split(draw: random.Random) -> dict[str, Any]:
    if draw.random() < 0.3:
        return {"type": "Digits", "individual_digits": True}
    pattern = {draw.choice(["String", "Regex", "Regex"]): draw.choice(PATTERNS)}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": draw.random() < 0.3}


def fresh(whole: Path, folder: Path) -> Path:
    """A copy of a folder, without the manifest that would tell of every change."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    for manifest in folder.glob("*manifest*"):
        manifest.unlink()
    return folder


def odd_json(draw: random.Random, path: Path) -> bytes:
    """The content of a JSON file with an odd value at some place, a key left out, or one renamed."""
    content: Any = json.loads(path.read_text())
    found = [place for place in places(content) if place and place[:2] != ("model", "merges")]
    short = [place for place in found if place[:2] != ("model", "vocab")]
    *way, key = draw.choice(short if draw.random() < 0.9 else found)
    inner = content
    for step in way:
        inner = inner[step]
    kind = draw.randrange(5)
    if kind == 0:
        del inner[key]
    elif kind == 1 and isinstance(inner, dict):
        inner[draw.choice(["", "type", "ключ", "\ud800", "x" * 3000])] = inner.pop(key)
    elif kind == 2:
        inner[key] = "@raw@"
        return json.dumps(content).replace('"@raw@"', draw.choice(RAW)).encode()
    else:
        inner[key] = draw.choice(ODD)
    return json.dumps(content).encode()


@series(500, cut=12)
def test_prepared_data_with_any_change(attacker: Attacker, model: Path, recipe: Path, numbers: Sequence[int]):
    def attempt(draw: random.Random, number: int) -> Outcome:
        folder = attacker.work / "data"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(runs.prepared(), folder)
        path = draw.choice(sorted(one for one in folder.rglob("*") if one.is_file()))
        kind = draw.randrange(4)
        if kind == 0:
            path.unlink()
        elif kind == 1 and path.suffix == ".json":
            path.write_bytes(odd_json(draw, path))
        else:
            path.write_bytes(damaged(draw, path.read_bytes()))
        if draw.random() < 0.6:
            return attacker.run("eval", model, folder)
        shutil.rmtree(attacker.work / "run", ignore_errors=True)
        return attacker.run("train", recipe, "--output", "run", f"data.folder={folder}")

    attack("data", numbers, attempt)


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_configs(attacker: Attacker, model: Path, depth: int):
    folder = fresh(model, attacker.work / "folder")
    content = json.loads((folder / "config.json").read_text())
    content["deep"] = "@raw@"
    (folder / "config.json").write_text(json.dumps(content).replace('"@raw@"', "[" * depth + "]" * depth))
    for verb in ("plan", "generate"):
        outcome = attacker.run(verb, folder, stdin=b"x")
        assert outcome.wrong == "", str(outcome)
        assert depth == 100 or outcome.code == 2
