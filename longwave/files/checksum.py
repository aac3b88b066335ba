"""CRC-32 of pieces, joined: several threads can sum one file."""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # IEEE 802.3, bits reflected: the highest bit of a word is the coefficient of x^0
_ONE, _X = 1 << 31, 1 << 30


def joined(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two pieces of data, one after the other, from the CRC-32 of each (`zlib.crc32`)."""
    return _product(_power(8 * second_bytes), first) ^ second


def _product(one: int, other: int) -> int:
    """The product of two polynomials over GF(2), modulo CRC-32's."""
    product = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            product ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product


@lru_cache(maxsize=1024)  # a model has few sizes of tensors
def _power(exponent: int) -> int:
    """x^exponent, modulo CRC-32's polynomial."""
    power, square = _ONE, _X
    while exponent:
        if exponent & 1:
            power = _product(power, square)
        square, exponent = _product(square, square), exponent >> 1
    return power
