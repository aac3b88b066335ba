"""Numbers as people write and read them: sizes such as 64k, and short forms of large numbers."""

from __future__ import annotations

import math

from longwave.errors import UserError, require, shown

LAST_PLACE = (1 << 31) - 1  # of a token in a sequence: places are 32-bit integers in states and in lists of blocks
_DIGITS = 15  # of a size: more than any machine holds
_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_THOUSANDS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}


def parse_sizes(text: str) -> list[int]:
    """Token counts such as `4096,64k,1M` (k, M and G are powers of 1024)."""
    return [_tokens(part) for part in text.split(",")]


def _tokens(text: str) -> int:
    size = _size(text, f"{shown(text)} is no number of tokens; write 4096,64k,1M")
    require(size <= LAST_PLACE + 1, f"{shown(text)}: {size:,} tokens; places are counted up to {LAST_PLACE:,}")
    return size


def parse_bytes(text: str) -> int:
    """A number of bytes such as `512M` or `8G`."""
    return _size(text, f"{shown(text)} is no number of bytes; write 512M or 8G")


def _size(text: str, problem: str) -> int:
    number, unit = (text[:-1], _UNITS[text[-1].lower()]) if text[-1:].lower() in _UNITS else (text, 1)
    digits = number.strip()
    if not (digits.isascii() and digits.isdecimal()) or not digits.strip("0"):
        raise UserError(problem)
    require(len(digits) <= _DIGITS, f"{shown(text)}: {len(digits):,} digits; at most {_DIGITS}")
    return int(digits) * unit


def parse_amount(text: str) -> float:
    """An amount such as `2.5M`, `3e13` or `20` (k, M, G, T and P are powers of 1000)."""
    number, unit = (text[:-1], _THOUSANDS[text[-1].lower()]) if text[-1:].lower() in _THOUSANDS else (text, 1)
    try:
        amount = float(number) * unit
    except ValueError:
        amount = math.nan
    require(0 < amount < math.inf, f"{shown(text)} is no amount above 0; write 2.5M, 3e13 or 20")
    return amount


def short(number: float) -> str:
    """1.23 T for large numbers."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    return f"{number:.3g} E"


def short_bytes(number: float) -> str:
    """1.2 GiB for large numbers."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"


def counted(number: int, noun: str) -> str:
    """A number of things in words: `1 document`, `1,200 documents`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
