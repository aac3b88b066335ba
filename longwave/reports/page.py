"""Self-contained HTML pages: a common template and style, and data that cannot break out of their place.

- The data stand in one JSON block, escaped so that no text in them can end the block or start markup. The page's script
  turns them into text nodes, so that the words of a corpus or a model are never read as HTML.
- A content security policy in the page forbids all network access, and every script but the page's own, by its hash.
- Styles and scripts are files beside this one: `page` and `chart` for all pages, the others for pages that name them.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, NamedTuple

Verdict = Literal["better", "worse", "same", "unknown"]


class Fact(NamedTuple):
    """A line of the description of the machine or the run."""

    label: str
    value: str


class Headline(NamedTuple):
    """A figure at the head of a page, with a sentence that says what it means.

    about: the model that it is about, where there are several; figures of one label share a card then.
    """

    label: str
    value: str
    sentence: str
    verdict: Verdict = "unknown"
    about: str = ""

    @property
    def title(self) -> str:
        """The label, with the model that it is about."""
        return f"{self.label}, {self.about}" if self.about else self.label


class PassageToken(NamedTuple):
    """A token of a passage.

    kept: the levels that kept it. scores: its score at each level; None at a level that it did not reach. label: shown
    in place of a token without visible text.
    """

    text: str
    kept: Sequence[int]
    scores: Sequence[float | None] | None = None
    label: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of page. name: of its files: sections in `name`.html, its own style in `name`.css and script in `name`.js.

    parts: the names of further scripts, shared with other kinds.
    """

    name: str
    parts: Sequence[str] = ()

    def _text(self, name: str) -> str:
        return (resources.files("longwave.reports") / name).read_text("utf-8")

    @property
    def style(self) -> str:
        return self._text("page.css") + self._text(f"{self.name}.css")

    @property
    def script(self) -> str:
        return "\n".join(self._text(f"{part}.js") for part in ("chart", "page", *self.parts, self.name))

    def render(self, title: str, payload: dict[str, Any]) -> str:
        """The page as HTML, whose script finds the payload in the element `data`."""
        script = self.script
        values = {
            "title": html.escape(title).encode("ascii", "xmlcharrefreplace").decode(),
            "policy": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            "style": self.style,
            "sections": self._text(f"{self.name}.html"),
            "data": _embed(payload),
            "script": script,
        }
        # All placeholders are replaced in one pass, so that a placeholder's name inside the data stays as it is.
        return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], self._text("page.html"))


def _embed(payload: dict[str, Any]) -> str:
    """JSON that is safe inside a script element: ASCII only, without the characters that have a meaning in HTML."""
    text = json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
