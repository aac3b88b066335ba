"""An op and its forms: which of them runs a call, and why.

A form is resolved once, when a model has been placed on its device, and never inside a loop. `reference` is the plain
twin in high precision, which only runs where it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from longwave.errors import UserError
from longwave.ops import compiled

R = TypeVar("R")  # of what runs
REFERENCE = "reference"


@dataclass(frozen=True)
class Call:
    """What an op is to be run on. head_size: channels of a head, or 0 where an op has none or they are not known."""

    device: torch.device
    dtype: torch.dtype
    head_size: int = 0


def takes_all(call: Call) -> str | None:
    """Nothing speaks against a form of plain torch."""
    return None


@dataclass(frozen=True)
class Form(Generic[R]):
    """One way to run an op. does: what it is, in a few words.

    takes: why it cannot run a call, or None if it can. A call that it takes may hold pieces that it leaves to torch.
    """

    run: R
    does: str
    takes: Callable[[Call], str | None] = takes_all


@dataclass
class Op(Generic[R]):
    """A piece of the hot maths. forms: the preferred ones first; among them is `reference`."""

    name: str
    forms: dict[str, Form[R]] = field(default_factory=dict)

    def register(self, name: str, form: Form[R]) -> None:
        """Adds a form, which is preferred to the present ones wherever it takes a call."""
        self.forms = {name: form, **self.forms}

    def resolve(self, call: Call, asked: str | None = None) -> tuple[str, str]:
        """The name of the form that runs a call, and why; `asked` names one that has to.

        UserError for a form that does not exist, or does not take the call.
        """
        if asked is not None:
            return self._asked(asked, call), "asked for"
        against: list[str] = []
        for name, form in self.forms.items():
            if name == REFERENCE:
                continue
            if (reason := form.takes(call)) is None:
                return name, "; ".join([form.does, *against])
            against.append(f"{name}: {reason}")
        raise AssertionError(f"{self.name} has no form for {call}")

    def forms_on(self, device: torch.device, dtype: torch.dtype = torch.float32, head_size: int = 0) -> list[str]:
        """The forms that take calls on a device, its reference included."""
        call = Call(device, dtype, head_size)
        return [name for name, form in self.forms.items() if form.takes(call) is None]

    def _asked(self, name: str, call: Call) -> str:
        if name not in self.forms:
            raise UserError(f"{self.name} form = {name!r}: use one of {', '.join(self.forms)}")
        if (reason := self.forms[name].takes(call)) is not None:
            raise UserError(f"{self.name} form = {name!r}: {reason}; leave it out, or use torch")
        return name


def on_cpu(*dtypes: torch.dtype, multiple: int = 1, largest: int = 1 << 30) -> Callable[[Call], str | None]:
    """When a compiled kernel takes a call: on a CPU that has a compiler, in its types and head sizes."""

    def takes(call: Call) -> str | None:
        if call.device.type != "cpu":
            return f"not on {call.device.type}"
        if call.dtype not in dtypes:
            return f"not in {str(call.dtype).removeprefix('torch.')}"
        if call.head_size % multiple or call.head_size > largest:
            return f"not for heads of {call.head_size}"
        missing = compiled.why_not()
        return None if missing is None else f"no compiled kernels: {missing}"

    return takes
