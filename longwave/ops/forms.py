"""Which form of an op runs here, and why."""

from __future__ import annotations

from collections.abc import Collection

from longwave.errors import UserError
from longwave.ops import compiled


def pick(op: str, forms: Collection[str], form: str | None, *, kernels: str = "", torch: str) -> tuple[str, str]:
    """The form that is asked for, or by default the compiled one where there is one, and torch's elsewhere; and why.

    kernels, torch: what these two forms do. UserError for a form that does not exist, or is not to be had here.
    """
    if form is not None and form not in forms:
        raise UserError(f"{op} form {form!r} does not exist; use one of {', '.join(forms)}")
    missing = compiled.why_not() if "compiled" in forms and form in (None, "compiled") else None
    if form is None and "compiled" in forms:
        return ("torch", f"{torch}; no compiled kernels: {missing}") if missing else ("compiled", kernels)
    if missing:
        raise UserError(f"{op} form 'compiled' is not to be had here: {missing}; use torch")
    return (form, "asked for") if form else ("torch", torch)
