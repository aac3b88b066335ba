"""What `--json` prints: the result of a verb as one line of JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, cast


def json_line(result: object) -> str:
    """A result, a dataclass or a mapping, as one JSON object; NaN and infinity, which JSON lacks, are null."""
    from longwave.files.jsonfile import to_json

    return to_json(plain(result))


def plain(value: Any) -> Any:
    """A value with mappings in place of dataclasses, names as text, and paths as strings."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in cast("list[Any]", value)]
    return str(value) if isinstance(value, PurePath) else value
