"""Odd text, words and numbers, drawn from a generator: what hands, shells and other programs get wrong."""

from __future__ import annotations

import random
import string

NUMBERS = (
    *("0", "-0", "1", "-1", "2", "3", "7", "1.5", "-1.5", "1e3", "1e-320", "1e400", "-1e400", "nan", "inf", "-inf"),
    *(
        "0x10",
        "1_000",
        "²",
        "٣",
        "9" * 30,
        "9" * 5000,
        "-" + "9" * 400,
        "1,2",
        "1,,2",
        ",",
        "4k",
        "1M",
        "1G",
        "9G",
        "k",
    ),
    *("1T", " 5 "),
)
WORDS = (
    *("", " ", "-", "--", "---", "-x", "--json", "--json=1", "--help=1", "-h=1", "=", "==", "a=b", "a.b.c=d"),
    *(
        ".",
        "..",
        "/",
        "//",
        "~",
        "*",
        "?",
        "[",
        "[/red]",
        "{}",
        "%s",
        "{0}",
        "$HOME",
        "a\nb",
        "a\tb",
        "a\\nb",
        "\x1b[31m",
    ),
    *("None", "true", "False", "auto", "cpu", "cuda", "cuda:0", "cuda:-1", "cuda:99", "meta", "cpu:1", "fp32"),
    *("ключ", "日本", "🙂", "e\u0301", "\u202e", "\udcff", "\udc80\udcff", "x" * 300, "y" * 20_000, "org/model"),
    *(
        "/dev/null",
        "/proc/self/mem",
        "/etc/passwd",
        "/root",
        "nowhere/model",
        "stdlib",
        "<|eos|>",
        "<|bos|>",
        "model.=1",
    ),
)
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252", "shift_jis")
PUT_IN = (b"\0", b"\xff\xfe", b"[" * 5000, b"{" * 5000, b'"', b"'''", b"\n[", b"\xc3", b"1e999", b"#", b",,")
CHARACTERS = string.printable + "äß€日本語🙂\u200b\u202e\ufeff\u0000\u0301\ue000\ue001\ufffd\U0010ffff"
TOKENS = (
    "<|eos|>",
    "<|bos|>",
    "</s>",
    "<s>",
    "<0x00>",
    "[/INST]",
    "{{",
    "}}",
    "{%",
    "\n\n",
    " " * 70,
    "\r\n",
    "\ufeff",
)


def word(draw: random.Random) -> str:
    """A word of a command line."""
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(NUMBERS)
    if kind == 1:
        return text(draw, 12).replace("\0", "0")
    return draw.choice(WORDS)


def text(draw: random.Random, most: int) -> str:
    """Text of any characters, with names of tokens in it."""
    count = draw.randrange(most)
    pieces = [draw.choice(TOKENS) if draw.random() < 0.05 else draw.choice(CHARACTERS) for _ in range(count)]
    return "".join(pieces)


def raw(draw: random.Random, most: int) -> bytes:
    """Bytes of a text file, which may be in another encoding, cut in the middle, or no text at all."""
    whole = text(draw, most)
    encoding = draw.choice(
        ["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252", "shift_jis"]
    )
    content = whole.encode(encoding, "ignore")
    if draw.random() < 0.2:
        content = content[: draw.randrange(len(content) + 1)] + draw.randbytes(draw.randrange(4))
    return content


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Content with one change: a bit flipped, bytes cut, doubled, or put in."""
    at = draw.randrange(max(1, len(content)))
    kind = draw.randrange(5)
    if kind == 0 and content:
        changed = bytearray(content)
        changed[at] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + content[at + draw.randrange(1, 40) :]
    if kind == 3:
        return content[:at] + content[at : at + 40] * draw.randrange(2, 50) + content[at:]
    return content[:at] + draw.choice(PUT_IN) + content[at:]
