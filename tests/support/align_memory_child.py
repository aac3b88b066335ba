"""The most memory that an alignment holds, in a process of its own: `align_memory_child.py SOURCE RECIPE run|plan`.

Prints the bytes, the source's weights among them: of a whole run to its last checkpoint, or what the plan of it says.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from longwave.benchmarks.measure.memory import Meter
from longwave.conversion.align import Alignment
from longwave.conversion.convert import Conversion
from longwave.conversion.plan import plan_of_conversion
from longwave.conversion.recipe import read_conversion, stage_recipe
from longwave.training.loop import Run


def held(conversion: Conversion, folder: Path) -> int:
    """The peak of the run of the alignment."""
    teacher = conversion.teacher
    weights = sum(weight.numel() * weight.element_size() for weight in teacher.parameters())
    meter = Meter(torch.device("cpu"))
    recipe = stage_recipe(conversion.recipe, "align", conversion.aligned_config("align"))
    Run(recipe, folder / "run", partial(Alignment, teacher=teacher, error="relative")).complete()
    return weights + meter.peak()


def main(source: str, recipe: str, what: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        conversion = Conversion(source, Path(folder) / "out", read_conversion(recipe))
        return plan_of_conversion(conversion).stages[0].bytes if what == "plan" else held(conversion, Path(folder))


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
