"""What pages get when the site is built: the command line from its parser, and drawings that follow the theme."""

from __future__ import annotations

import argparse
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longwave.cli import command_line

_OPTION = re.compile(r"\[-[^]]*\] ?")
_DRAWING = re.compile(r'<img alt="(?P<alt>[^"]*)" src="(?P<source>[^"]*drawings/[^"]*\.svg)" ?/?>')


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Puts the commands in place of the mark on their page."""
    return markdown.replace("<!-- commands -->", "\n".join(commands(command_line())))


def on_page_content(html: str, page: Any, **kwargs: Any) -> str:
    """Puts drawings into the page itself, where they take the theme's colours; elsewhere they are plain pictures."""
    folder = Path(page.file.abs_src_path).parent
    return _DRAWING.sub(lambda match: _inlined(folder / match["source"], match["alt"]), html)


def _inlined(path: Path, words: str) -> str:
    drawing = re.sub(r"<!--.*?-->|\n\s*", " ", path.read_text(encoding="utf8"), flags=re.DOTALL)
    svg = drawing.replace("<svg ", f'<svg role="img" aria-label="{words}" ', 1)
    return f'<div class="drawing-frame">{svg}</div>'


def commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The markdown of every command below a parser, verbs within verbs included."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                if any(isinstance(one, argparse._SubParsersAction) for one in verb._actions):
                    yield from commands(verb)
                else:
                    yield from _command(verb)


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    yield f"## {parser.prog}\n"
    yield f"{_sentence(parser.description or '')}\n"
    yield f"```text\n{_OPTION.sub('', usage)}\n```\n"
    everywhere = {"help", "json"}  # the page says it once for all
    rows = [f"| `{_name(one)}` | {_meaning(one)} |" for one in parser._actions if one.dest not in everywhere]
    if rows:
        yield "\n".join(["| argument | meaning |", "|---|---|", *rows, ""])


def _name(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings)
    if action.nargs == 0:
        return names
    value = action.metavar if isinstance(action.metavar, str) else {int: "N", float: "X"}.get(action.type, "…")
    return f"{names} {value}" if names else str(action.metavar or action.dest)


def _meaning(action: argparse.Action) -> str:
    said = html.escape(action.help or "", quote=False).replace("|", "&#124;")
    return f"{said}; one of {', '.join(map(str, action.choices))}" if action.choices else said


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
