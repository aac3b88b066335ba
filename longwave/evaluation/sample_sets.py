"""Sets of recall tasks, made once and kept in the user's cache folder: long ones take minutes to make.

A set is known by what it is made from: tokenizer, family, length, depths, number, seed, and the version of the
generators. One that was damaged is made anew. Tasks from a file of the user's are never kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from longwave import files
from longwave.data.encoding import around
from longwave.data.recall import FAMILIES, Family, Sample, sample
from longwave.data.tokenizer import Tokenizer
from longwave.errors import MachineError, UserError
from longwave.ops.compiled import cache

VERSION = 2  # of what the generators make and how it is kept: a change to any sample is a new one
_EVALUATION = 0  # the first part of the keys of samples; training has another
_SAMPLES = TypeAdapter(list[Sample])


def sample_set(
    family: Family, tokenizer: Tokenizer, length: int, depths: Sequence[float], count: int, seed: int
) -> list[Sample]:
    """So many samples of a length, at the depths in turn; from the cache where they have been made before.

    Raises UserError for a length that the task does not have with this tokenizer.
    """
    path = _path(family, tokenizer, length, depths, count, seed)
    kept = None if path is None else _read(path, count)
    if kept is not None:
        return kept
    turns: Sequence[float | None] = depths if family.has_depth else [None]
    key = (_EVALUATION, seed)
    made = [sample(family, tokenizer, length, turns[n % len(turns)], *key, n) for n in range(count)]
    if path is not None:
        _keep(path, made)
    return made


def _path(family: Family, tokenizer: Tokenizer, *asked: object) -> Path | None:
    """Where a set is kept; None for one that is not, and where there is no private cache folder."""
    if family.name not in FAMILIES:
        return None
    made_from = json.dumps([VERSION, tokenizer.fingerprint, around(tokenizer), family.name, *asked])
    name, kept_in = f"recall-{hashlib.sha256(made_from.encode()).hexdigest()[:32]}.json", folder()
    return None if kept_in is None else kept_in / name


def folder() -> Path | None:
    """The user's cache folder, if it is private."""
    try:
        return cache.folder()
    except cache.Unavailable:
        return None


def _read(path: Path, count: int) -> list[Sample] | None:
    """The set in a file, if it is whole."""
    try:
        digest, content = path.read_bytes().split(b"\n", 1)
        whole = digest == _digest(content)
        found = _SAMPLES.validate_json(content) if whole else []
    except (OSError, ValueError, ValidationError):
        return None
    return found if len(found) == count else None


def _keep(path: Path, made: list[Sample]) -> None:
    content = _SAMPLES.dump_json(made)
    try:
        files.write_file(path, _digest(content) + b"\n" + content)
    except (MachineError, UserError, OSError):
        return  # such as a full disk: the set is there, and will be made again


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
