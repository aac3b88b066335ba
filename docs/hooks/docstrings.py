"""How docstrings and annotations are shown: what they say of an argument or a field becomes an item of a list.

The docstrings are prose in which a name and a colon begin what is said about it ("dtype: of the weights; ..."), at the
start of a line or of a sentence. Only names that the signature, the class or a `*` in place of their beginning or end
explain are taken for such.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import griffe

_NAMES = re.compile(r"(?:^|(?<=[.;:] )|(?<=\n))([\w*]+(?:, [\w*]+)*): ")
_END = re.compile(r"(?<=\.) (?=Raises |UserError |ValueError )|\n(?=Raises |UserError |ValueError )")


class Docstrings(griffe.Extension):
    """Runs over every function, class and attribute that griffe has read from the sources."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        _itemise(func, [parameter.name for parameter in func.parameters])
        annotations = [func.returns, *(parameter.annotation for parameter in func.parameters)]
        _trim(annotations)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        init = cls.members.get("__init__")
        parameters = [one.name for one in init.parameters] if isinstance(init, griffe.Function) else []
        _itemise(cls, [*cls.members, *parameters])

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        _trim([attr.annotation])


def _itemise(thing: griffe.Object, names: list[str]) -> None:
    if thing.docstring is not None:
        paragraphs = thing.docstring.value.split("\n\n")
        thing.docstring.value = "\n\n".join(itemised(one, names) for one in paragraphs)


def itemised(paragraph: str, names: Iterable[str]) -> str:
    """A paragraph in which every part that begins with one of the names is an item of a list."""
    known = list(names)
    starts = [match for match in _NAMES.finditer(paragraph) if _is_known(match[1], known)]
    if not starts:
        return paragraph
    ends = [*(match.start() for match in starts[1:]), len(paragraph)]
    items: list[str] = []
    after = ""
    for match, end in zip(starts, ends, strict=True):
        said, *rest = _END.split(paragraph[match.end() : end], maxsplit=1)
        after = " ".join([after, *rest]).strip()
        label = ", ".join(f"`{name}`" for name in match[1].split(", "))
        items.append(f"- {label}: {_one_line(said)}")
    before = paragraph[: starts[0].start()].strip()
    return "\n\n".join(part for part in (before, "\n".join(items), after) if part)


def _is_known(label: str, names: list[str]) -> bool:
    return all(any(fnmatchcase(name, part) for name in names) for part in label.split(", "))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _trim(annotations: Iterable[Any]) -> None:
    """jaxtyping writes one axis as " T", so that linters do not take it for a name; people read "T"."""
    for annotation in annotations:
        for expression in _parts(annotation):
            if isinstance(expression, griffe.ExprSubscript) and isinstance(expression.slice, griffe.ExprTuple):
                axes = expression.slice.elements
                axes[:] = [one.replace("' ", "'").replace('" ', '"') if isinstance(one, str) else one for one in axes]


def _parts(annotation: Any) -> Iterator[griffe.Expr]:
    """An expression and all that it is made of."""
    if isinstance(annotation, griffe.Expr):
        yield annotation
        for part in annotation.iterate(flat=False):
            if part is not annotation:  # a bare name consists of itself
                yield from _parts(part)
