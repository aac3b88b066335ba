"""The page at `/`."""

from __future__ import annotations


def page() -> str:
    """HTML."""
    return "<!doctype html><title>longwave</title>"
