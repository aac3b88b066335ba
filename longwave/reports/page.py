"""What every page is made of: one template, one style, and data that no text can break out of.

- The data travel in one JSON block, escaped so that no text in them can end it or start markup; the page's script makes
  text nodes of them, so that what a corpus or a model says is never read as HTML.
- A content security policy in the page forbids every network access and every script but the one hashed here.
- Styles and scripts are files beside this one: `page` and `chart` for all, others for the pages that name them.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, NamedTuple


class Fact(NamedTuple):
    """A line of the machine's or the run's description."""

    label: str
    value: str


class Headline(NamedTuple):
    """A figure at the head of a page, and what it means in words."""

    label: str
    value: str
    sentence: str
    verdict: Literal["better", "worse", "same", "unknown"] = "unknown"


class PassageToken(NamedTuple):
    """A token's text, the levels that kept it, and its score at each level, None at one that it did not reach.

    label: what stands for a token that shows no text.
    """

    text: str
    kept: Sequence[int]
    scores: Sequence[float | None] | None = None
    label: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of page: `name`.html holds its sections, `name`.css and `name`.js what only it needs.

    parts: scripts that it shares with others.
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
        """The page as text; what its script finds in `data` is the payload."""
        script = self.script
        values = {
            "title": html.escape(title).encode("ascii", "xmlcharrefreplace").decode(),
            "policy": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            "style": self.style,
            "sections": self._text(f"{self.name}.html"),
            "data": _embed(payload),
            "script": script,
        }
        # One pass, so that a placeholder inside the data stays text.
        return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], self._text("page.html"))


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: a loss that diverged becomes null, which the charts draw as a gap."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _embed(payload: dict[str, Any]) -> str:
    """JSON that is safe inside a script element: ASCII only, and no character that HTML gives a meaning to."""
    text = json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
