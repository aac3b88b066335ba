"""The fenced blocks of the documentation, and how each language is held to what it says.

| language | what happens to it |
|---|---|
| `python` | run; the blocks of a page share their names, in order; a title like `longwave/x.py` makes it a module |
| `sh` | every command is run, `longwave` in this process and small (`SMALL`); `CHECKED` are looked at, not run |
| `toml` | a whole recipe: read strictly, and written under its title so that commands after it find it |
| `console` | a record of what was run once, with its date and machine; left alone |
| `text` | no code: output, trees, usage; left alone |

A block without a language, or with another one, is an error: nothing in the documentation goes unseen by accident.
"""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from longwave import cli
from longwave.training.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "sh", "toml", "console", "text"}
SMALL = {  # what makes a command of the documentation a matter of seconds; added to its end, where it counts
    "prepare": ["--vocab-size", "300", "--held-out", "0.3", "--seed", "1"],
    "inspect": ["--first", "64"],
    "train": [
        *("training.steps=2", "training.window=32", "training.batch_windows=2", "training.evaluate_windows=2"),
        *("model.hidden_size=48", "model.mlp.size=64", "schedule.warmup_steps=1"),
    ],
}
_FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
_TITLE = re.compile(r'title="([^"]*)"')


@dataclass(frozen=True)
class Block:
    """A fenced block: where its first line stands, its language, its title and its text."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page, indented ones included; an open fence is an error."""
    opened: tuple[int, str, str, str] | None = None
    body: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf8").splitlines(), start=1):
        match = _FENCE.match(line)
        if opened is None and match:
            opened, body = (number + 1, *match.groups()), []
        elif opened is not None and match and match[2].startswith(opened[2]) and not match[3].strip():
            first, _, _, info = opened
            title = _TITLE.search(info)
            language = info.split()[0] if info.split() else ""
            yield Block(page, first, language, title and title[1], "\n".join(body) + "\n")
            opened = None
        elif opened is not None:
            body.append(line.removeprefix(opened[1]))
    assert opened is None, f"{page}:{opened and opened[0]}: a fence without its end"


def run(block: Block, names: dict[str, Any]) -> None:
    """Does what the block's language asks for, in the current folder."""
    if block.language == "python":
        code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec", dont_inherit=True)
        exec(code, _module(block.title).__dict__ if block.title else names)
    elif block.language == "toml":
        _read(block)
    elif block.language == "sh":
        for line in block.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                command(words, block.place)


def _module(path: str) -> ModuleType:
    """A new module that imports find where the file of this path would be; no file is written."""
    name = path.removesuffix(".py").replace("/", ".")
    sys.modules[name] = module = ModuleType(name)
    return module


def _read(block: Block) -> None:
    path = Path(block.title or "block.toml")
    path.write_text(block.text, encoding="utf8")
    read_recipe(path)


def command(words: list[str], place: str) -> None:
    """Runs one command, or checks it as `CHECKED` says."""
    for start, check in CHECKED.items():
        if words[: len(start.split())] == start.split():
            return check(words, place)
    assert words[0] == "longwave", f"{place}: {shlex.join(words)}: no way to run this; see {__name__}.CHECKED"
    code = cli.main([*words[1:], *SMALL.get(words[1], [])])
    assert code == 0, f"{place}: {shlex.join(words)}: exit code {code}"
    return None


def _target_exists(words: list[str], place: str) -> None:
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = [word for word in words[1:] if "=" not in word]
    assert targets, place
    assert set(targets) <= set(rules), f"{place}: no such target in the Makefile"


def _extras_exist(words: list[str], place: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [extra for word in words for extra in re.findall(r"\[([\w,]+)\]", word)]
    assert set(",".join(named).split(",")) <= {"", *project["optional-dependencies"]}, place


def _parses(words: list[str], place: str) -> None:
    cli.command_line().read(words[1:])
    _files_exist(words, place)


def _files_exist(words: list[str], place: str) -> None:
    files = [word for word in words if word.endswith((".py", ".toml"))]
    assert [word for word in files if not (ROOT / word).exists()] == [], place


CHECKED: dict[str, Callable[[list[str], str], None]] = {
    "make": _target_exists,  # sets up an environment of its own, and takes minutes
    "pip install": _extras_exist,  # would change the environment that the tests run in
    "longwave quickstart": _parses,  # minutes; tests/command/test_cli.py runs it, small
    "longwave bench": _parses,  # minutes at the sizes that make its figures mean something
    "python -m pytest": _files_exist,  # these very tests; what the page adds to them has a test of its own
    "python -m http.server": _files_exist,  # runs until it is stopped
}
