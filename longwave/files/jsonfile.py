"""JSON without NaN: files that somebody else wrote, read strictly (one object, no key twice), and values to write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from longwave.errors import UserError, shown


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError naming the file if it cannot be read or holds anything else."""
    try:
        return object_in(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: not readable as JSON: {brief(error)}") from None


def object_in(content: bytes, path: Path) -> dict[str, Any]:
    """The object in the content of a JSON file. UserError naming the file if it holds anything else."""
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_object)
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON: {brief(error)}") from None
    except RecursionError:
        raise UserError(f"{path}: not readable as JSON: nested too deeply") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object, such as {{...}}")
    return found


def to_json(value: Any, indent: int | None = None) -> str:
    """Plain values as JSON, in ASCII."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """Plain values with None in place of NaN and infinity, which JSON lacks; charts draw a diverged loss as a gap."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(name: str) -> str:
    """A name as it is, or quoted and cut if it is none that anybody would give."""
    return name if name.isprintable() and len(name) < 120 else shown(name)


def brief(error: Exception) -> str:
    """What somebody else's error says, in one line that people read."""
    return " ".join(str(error).split())[:300]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict[str, Any]()
    for name, value in pairs:
        if name in content:
            raise ValueError(f"the key {shown(name)} stands there twice")
        content[name] = value
    return content
