"""The page at `/`: try a model, watch tokens a second, the batch, and for a SUBLLM which tokens are kept.

One HTML file in the style of the other pages, with its style and script inside it; it asks its own server and nobody
else, which a content security policy holds it to.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources


def page() -> str:
    """The page as HTML."""
    style = _text("longwave.reports", "page.css") + _text("longwave.serving", "page.css")
    values = {"style": style, "script": _text("longwave.serving", "page.js")}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], _text("longwave.serving", "page.html"))


def headers() -> dict[str, str]:
    """The headers that the page is sent with."""
    digest = base64.b64encode(hashlib.sha256(_text("longwave.serving", "page.js").encode()).digest()).decode()
    rules = {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    policy = "; ".join(f"{name} {value}" for name, value in rules.items())
    return {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def _text(room: str, name: str) -> str:
    return (resources.files(room) / name).read_text("utf-8")
