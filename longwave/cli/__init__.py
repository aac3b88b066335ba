"""The command line: one file per verb. Heavy imports wait until their verb is called."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from longwave import trial
from longwave.cli import (
    bench,
    chat,
    compare,
    convert,
    doctor,
    evaluate,
    generate,
    init,
    inspect,
    plan,
    prepare,
    quickstart,
    recipes,
    serve,
    train,
)
from longwave.cli.console import standard_streams
from longwave.cli.output import json_line
from longwave.cli.parser import Parser, add_verbs
from longwave.data.patience import ending_the_process
from longwave.errors import MachineError, UserError, one_line
from longwave.version import __version__

VERBS = (
    quickstart.VERB,
    doctor.VERB,
    prepare.VERB,
    train.VERB,
    compare.VERB,
    convert.VERB,
    evaluate.VERB,
    generate.VERB,
    chat.VERB,
    serve.VERB,
    plan.VERB,
    recipes.VERB,
    init.VERB,
    inspect.VERB,
    bench.VERBS,
)

_DESCRIPTION = "Builds, converts, trains and evaluates language models whose cost does not explode with context length."
_FIRST = """first steps:
  longwave quickstart                       trains two small models on text of this machine, and compares them
  longwave VERB --help                      what a verb takes; most take --json, too
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; 0, or 2 for the user's mistake, 1 for the machine's fault, 130 when interrupted."""
    with standard_streams(), ending_the_process():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        verb, options = command_line().read(arguments)
        if trial.is_on():
            print(trial.NOTE, file=sys.stderr)
        result = verb.run(options)
        if options.json and result is not None:
            print(json_line(result))
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _fail(error, 2)
    except MachineError as error:
        return _fail(error, 1)
    except KeyboardInterrupt as error:
        return _fail(error if error.args else "interrupted", 130)
    except BrokenPipeError:
        return 1  # whoever read our output has gone
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail("not enough memory; `longwave plan` tells what a model takes at each context", 1)
    except OSError as error:
        return _fail(
            f"{error.filename or 'the system'}: {error.strerror or error}", 2 if error.errno == errno.ELOOP else 1
        )


def command_line() -> Parser:
    """The parser of every verb."""
    parser = Parser(prog="longwave", description=_DESCRIPTION, epilog=_FIRST)
    parser.add_argument("--version", action="version", version=f"longwave {__version__}")
    add_verbs(parser, VERBS)
    return parser


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python or PyTorch, whose allocator on a CPU raises a plain RuntimeError, found no memory."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _fail(problem: object, code: int) -> int:
    print(f"longwave: {one_line(problem)}", file=sys.stderr)
    return code
