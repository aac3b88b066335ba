"""An op, its forms (implementations), and the choice of the form that runs a call.

The choice is made once, when a model has been placed on its device, and never inside a loop. Two forms run only where
they are asked for by name: `reference` is the formula in high precision, `invariant` pays some speed for results that
company and chunks do not change in any bit.
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
INVARIANT = "invariant"
"""The form whose results for a token are the same bits whatever else is in the call, and however a sequence is cut."""


@dataclass(frozen=True)
class Call:
    """The properties of a call by which its form is chosen.

    head_size: channels of a head; 0 where an op has no heads, or their size is not known.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int = 0


def takes_all(call: Call) -> str | None:
    """`Form.takes` of a form in plain torch, which can run every call."""
    return None


@dataclass(frozen=True)
class Form(Generic[R]):
    """One implementation of an op.

    run: the function. does: a description in a few words. takes: for a call, the reason why this form cannot run it, or
    None if it can. A form may still leave parts of a call that it takes to torch.
    """

    run: R
    does: str
    takes: Callable[[Call], str | None] = takes_all


@dataclass
class Op(Generic[R]):
    """An operation with several forms. forms: by name, in order of preference; one of them is `reference`."""

    name: str
    forms: dict[str, Form[R]] = field(default_factory=dict)

    def register(self, name: str, form: Form[R]) -> None:
        """Adds a form, which from now on is preferred wherever it takes a call."""
        self.forms = {name: form, **self.forms}

    def resolve(self, call: Call, asked: str | None = None) -> tuple[str, str]:
        """The name of the form that runs a call, and why: the first in order of preference that takes it.

        asked: the name of the form that has to run. UserError if there is no such form, or it does not take the call.
        """
        if asked is not None:
            return self._asked(asked, call), "asked for"
        against: list[str] = []
        for name, form in self.forms.items():
            if name in (REFERENCE, INVARIANT):
                continue
            if (reason := form.takes(call)) is None:
                return name, "; ".join([form.does, *against])
            against.append(f"{name}: {reason}")
        raise AssertionError(f"{self.name} has no form for {call}")

    def forms_on(self, device: torch.device, dtype: torch.dtype = torch.float32, head_size: int = 0) -> list[str]:
        """The names of all forms that take calls on a device, `reference` among them."""
        call = Call(device, dtype, head_size)
        return [name for name, form in self.forms.items() if form.takes(call) is None]

    def _asked(self, name: str, call: Call) -> str:
        if name not in self.forms:
            raise UserError(f"{self.name} form = {name!r}: use one of {', '.join(self.forms)}")
        if (reason := self.forms[name].takes(call)) is not None:
            raise UserError(f"{self.name} form = {name!r}: {reason}; leave it out, or use torch")
        return name


def on_cpu(*dtypes: torch.dtype, multiple: int = 1, largest: int = 1 << 30) -> Callable[[Call], str | None]:
    """`Form.takes` of a compiled kernel: on a CPU with a compiler, in the given dtypes.

    multiple, largest: the head sizes that the kernel knows: multiples of the one, up to the other.
    """

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
