"""The fenced blocks of the documentation, and how each language is held to what it says.

| language | what happens to it |
|---|---|
| `python` | run; the blocks of a page share their names, in order; a title like `longwave/x.py` makes it a module |
| `sh` | every command is run exactly as it is typed, in this process (`test_docs.py` makes it a trial run) |
| `toml` | a whole recipe: read strictly, and written under its title so that commands after it find it |
| `console` | a record of what was run once, with its date and machine; left alone |
| `text` | no code: output, trees, usage; left alone |

A block without a language, or with another one, is an error: nothing in the documentation goes unseen by accident.

A block that cannot run here says so in a comment on the line before it, `<!-- test: network -->`, with one of the words
of `NEEDS`. Its commands are parsed instead: options that do not exist, and files, targets and extras that are missing,
are found. Pages below `docs/performance/` are dated records, and parsed as a whole.
"""

from __future__ import annotations

import contextlib
import io
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
from longwave.conversion.recipe import read_conversion
from longwave.training.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECORDS = ROOT / "docs/performance"
LANGUAGES = {"python", "sh", "toml", "console", "text"}
NEEDS = {
    "network": "downloads packages or a model",
    "gpu": "needs a CUDA device",
    "machines": "needs several machines",
    "tests": "runs tests, over code of the page; test_docs.py has a test that does",
    "proof": "a part of the conversion proof beyond its cut, which reads what only whole runs leave: parsed",
    "long": "takes a minute even as a trial run: parsed in `make test`, run in `make test-slow`",
}
# A command that answers by its exit code, and the line of the answer 1, which a busy machine may give; a fault is none.
ANSWERS = {"longwave bench compare": re.compile(r"longwave: slower in \S+: \d+ of \d+ rows?\n")}
_FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
_TITLE = re.compile(r'title="([^"]*)"')
_NEED = re.compile(r"^ *<!-- test: (\w+) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block: where its first line stands, its language, title and text, and the word of `NEEDS` before it."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str
    needs: str | None = None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def runs(self, long: bool) -> bool:
        """Whether it is run, and not parsed alone. long: whether blocks that take a minute are."""
        return RECORDS not in self.page.parents and (self.needs is None or (long and self.needs == "long"))


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page, indented ones included; an open fence or an unknown need is an error."""
    opened: tuple[int, str, str, str] | None = None
    body: list[str] = []
    before = ""
    for number, line in enumerate(page.read_text(encoding="utf8").splitlines(), start=1):
        match = _FENCE.match(line)
        if opened is None and match:
            opened, body, need = (number + 1, *match.groups()), [], _NEED.match(before)
            assert need is None or need[1] in NEEDS, f"{page}:{number}: {before}: use one of {', '.join(NEEDS)}"
        elif opened is not None and match and match[2].startswith(opened[2]) and not match[3].strip():
            first, _, _, info = opened
            title = _TITLE.search(info)
            language = info.split()[0] if info.split() else ""
            yield Block(page, first, language, title and title[1], "\n".join(body) + "\n", need and need[1])
            opened = None
        elif opened is not None:
            body.append(line.removeprefix(opened[1]))
        before = line
    assert opened is None, f"{page}:{opened and opened[0]}: a fence without its end"


def run(block: Block, names: dict[str, Any], long: bool = False) -> None:
    """Does what the block's language asks for, in the current folder; only parses what cannot be run here."""
    if block.language == "python":
        code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec", dont_inherit=True)
        if block.runs(long):
            exec(code, _module(block.title).__dict__ if block.title else names)
    elif block.language == "toml":
        _read(block)
    elif block.language == "sh":
        for words in commands(block):
            (command if block.runs(long) else parse)(words, block.place)


def commands(block: Block) -> Iterator[list[str]]:
    """The words of every command of a block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def _module(path: str) -> ModuleType:
    """A new module that imports find where the file of this path would be; no file is written."""
    name = path.removesuffix(".py").replace("/", ".")
    sys.modules[name] = module = ModuleType(name)
    return module


def _read(block: Block) -> None:
    path = Path(block.title or "block.toml")
    path.write_text(block.text, encoding="utf8")
    if "student" in (values := tomllib.loads(block.text)) or "stages" in values:
        read_conversion(path)
    else:
        read_recipe(path)


def command(words: list[str], place: str) -> None:
    """Runs one command, as it is typed."""
    assert words[0] == "longwave", f"{place}: {shlex.join(words)}: no way to run this; see {__name__}.NEEDS"
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = cli.main(words[1:])
    said, answer = errors.getvalue(), ANSWERS.get(" ".join(words[:3]))
    right = code == 0 or (code == 1 and answer is not None and answer.search(said) is not None)
    assert right, f"{place}: {shlex.join(words)}: exit code {code}: {said[-500:]}"


def parse(words: list[str], place: str) -> None:
    """Looks at a command that is not run."""
    for start, check in PARSED.items():
        if words[: len(start.split())] == start.split():
            return check(words, place)
    raise AssertionError(f"{place}: {shlex.join(words)}: no way to parse this; see {__name__}.PARSED")


def _target_exists(words: list[str], place: str) -> None:
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = [word for word in words[1:] if "=" not in word]
    assert targets, place
    assert set(targets) <= set(rules), f"{place}: no such target in the Makefile"


def _extras_exist(words: list[str], place: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [extra for word in words for extra in re.findall(r"\[([\w,]+)\]", word)]
    assert set(",".join(named).split(",")) <= {"", *project["optional-dependencies"]}, place


def _options_exist(words: list[str], place: str) -> None:
    cli.command_line().read(words[1:])
    _recipes_exist(words, place)


def _recipes_exist(words: list[str], place: str) -> None:
    files = [word for word in words if word.startswith("longwave/recipes/")]
    assert [word for word in files if not (ROOT / word).exists()] == [], place


def _tests_exist(words: list[str], place: str) -> None:
    files = [word for word in words if word.endswith(".py")]
    assert [word for word in files if not (ROOT / word).exists()] == [], place


PARSED: dict[str, Callable[[list[str], str], None]] = {
    "make": _target_exists,
    "pip install": _extras_exist,
    "python -m pytest": _tests_exist,
    "longwave": _options_exist,
}
