"""The two kinds of failure a person meets: their own mistake, and the machine's."""


class UserError(ValueError):
    """A mistake the user can mend: one line that names the field, its value and what would do (exit code 2)."""


class MachineError(RuntimeError):
    """A fault of the machine, such as a full disk: one line (exit code 1)."""
