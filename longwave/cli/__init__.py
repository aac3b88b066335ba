"""The command line: one file per verb. Heavy imports wait until their verb is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from longwave.cli import bench, doctor, evaluate, generate, init, inspect, plan, prepare, quickstart, recipes, train
from longwave.cli.output import json_line
from longwave.cli.parser import Parser, add_verbs
from longwave.errors import MachineError, UserError, cut
from longwave.version import __version__

VERBS = (
    quickstart.VERB,
    doctor.VERB,
    prepare.VERB,
    train.VERB,
    evaluate.VERB,
    generate.VERB,
    plan.VERB,
    recipes.VERB,
    init.VERB,
    inspect.VERB,
    bench.VERBS,
)

_DESCRIPTION = "Builds, trains and evaluates language models whose cost does not explode with context length."
_FIRST = """first steps:
  longwave quickstart                       trains two small models on text of this machine, and compares them
  longwave VERB --help                      what a verb takes; most take --json, too
"""
_LONGEST = 1000  # characters of a line about an error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; 0, or 2 for the user's mistake, 1 for the machine's fault, 130 when interrupted."""
    try:
        verb, options = command_line().read(arguments)
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has gone
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail("not enough memory; `longwave plan` tells what a model takes at each context", 1)
    except OSError as error:
        return _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)


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
    """Prints a problem as one line that people can read, whatever words of a hostile file it repeats."""
    print(f"longwave: {cut(' '.join(str(problem).split()), _LONGEST)}", file=sys.stderr)
    return code
