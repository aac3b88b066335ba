"""Timing of two trees of longwave in turn: A B A B ..., so that a drift of the machine meets both alike.

    python tests/support/pairs.py TREE_A TREE_B [--only NAME] [--rounds N] [--threads 2] [--cpu] [--calls]

Each tree has a child process that builds its models with random weights and, when told, runs one unit: a prefill, a few
steps of decoding or a training step. Only one child computes at a time. A row shows both medians and the median of the
ratios B / A, round by round, with the least and the largest. On a machine that others use as well, the ratio of the
best times is steadier, and `--cpu --threads 1`, which counts the time on a processor, more so. With `--calls` it counts
instead the Python calls of one step of decoding, with one sequence and with 64. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

Model = Any  # a `Decoder`, of whichever tree is timed
Task = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A unit to time: `batch` sequences after `context` tokens, `steps` times; in training, windows of that size."""

    recipe: str
    kind: str
    context: int
    batch: int = 1
    steps: int = 1

    @property
    def name(self) -> str:
        return f"{self.recipe.removeprefix('bench-')} {self.kind} {self.context} x {self.batch}"


LLAMA, SUBLLM = "bench-llama", "bench-subllm-24"
DECODING = ((2048, 1, 16), (2048, 8, 8), (512, 64, 4))  # context, sequences and steps
ROWS = [
    Row(LLAMA, "prefill", 2048),
    Row(LLAMA, "prefill", 8192),
    Row(SUBLLM, "prefill", 2048),
    *(Row(recipe, "decoding", *sizes) for recipe in (LLAMA, SUBLLM) for sizes in DECODING),
    Row(LLAMA, "training", 1024, 2),
    Row(SUBLLM, "training", 1024, 2),
]
FEWEST, SECONDS = 3, 60.0  # a row ends after so many seconds, but not before the fewest rounds
COUNTED = [Row(recipe, "decoding", 512, batch) for recipe in (LLAMA, SUBLLM) for batch in (1, 64)]

# --- between versions -------------------------------------------------------------------------------------------------


def model_of(recipe: str, dtype: torch.dtype) -> Model:
    """The model of a recipe of the tree, with random weights."""
    import longwave
    from longwave.config import ModelConfig, build
    from longwave.model import Decoder

    path = Path(longwave.__file__ or "").parent / "recipes" / f"{recipe}.toml"
    config = build(ModelConfig, tomllib.loads(path.read_text(encoding="utf8"))["model"], str(path))
    return Decoder(config, seed=0).to(dtype).eval()


def training_stream(windows: int, size: int) -> Any:
    """The stream of training windows of one document each."""
    from longwave.streams import Stream, Windows

    return Stream.of([size] * windows, windows=Windows((size,) * windows, tuple(range(windows))))


def optimizer_of(model: Model) -> Any:
    """AdamW as the recipes with a training table have it."""
    from longwave.training.optimizers import AdamWConfig

    return AdamWConfig(lr=1.5e-3).build(model)


@torch.no_grad()
def force_retention(model: Model, tokens: Tensor) -> None:
    """Moves every level's threshold so that it keeps its nominal share of these tokens; outer levels come first."""
    for level in [module for module in model.modules() if hasattr(module, "threshold") and hasattr(module, "score")]:
        seen: list[Tensor] = []
        hook = level.score.register_forward_hook(lambda module, given, scores, seen=seen: seen.append(scores))
        _run(model, model.state(1), tokens)
        hook.remove()
        ordered = seen[0].double().sort(descending=True).values
        kept = round(len(ordered) * float(level.retention))
        level.threshold.low.copy_(ordered[kept - 1 : kept + 1].mean())


# --- units: a task to time, and a task that puts things back afterwards ----------------------------------------------


def unit_of(row: Row) -> tuple[Task, Task]:
    """The task of a row, on a model of its own."""
    return {"prefill": prefill, "decoding": decoding, "training": training}[row.kind](row)


def inference_model(row: Row, tokens: Tensor) -> Model:
    """The model in bf16, which keeps its nominal share of the given tokens at every level."""
    model = model_of(row.recipe, torch.bfloat16)
    force_retention(model, tokens)
    return model


def prefill(row: Row) -> tuple[Task, Task]:
    """Fills an empty state, and gives the logits of the last token."""
    tokens = tokens_of(row.context)
    model = inference_model(row, tokens)
    return lambda: _run(model, model.state(1), tokens), lambda: None


def decoding(row: Row) -> tuple[Task, Task]:
    """Steps of one token for every sequence, after a context that all share; then the state is cut back to that."""
    context, following = tokens_of(row.context), tokens_of(row.batch * row.steps).view(row.steps, row.batch)
    model = inference_model(row, context)
    state = model.state(1)
    _run(model, state, context)
    state.reorder([0] * row.batch)
    state.reserve(row.context + row.steps)

    def advance() -> None:
        for step in range(row.steps):
            _run(model, state, following[step])

    def forget() -> None:
        for slot in range(row.batch):
            state.truncate(slot, row.context)

    return advance, forget


def training(row: Row) -> tuple[Task, Task]:
    """Forward in bf16 over fp32 weights, backward, and an update."""
    model, steps = model_of(row.recipe, torch.float32).train(), iter(range(1 << 30))
    optimizer, stream = optimizer_of(model), training_stream(row.batch, row.context)
    tokens = tokens_of(row.batch * row.context)
    targets = tokens.roll(-1)

    def advance() -> None:
        model.set_step(next(steps))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(tokens, targets, stream) / len(tokens)
        loss.backward()
        optimizer.step(1.0)
        optimizer.zero_grad()

    return advance, lambda: None


@torch.no_grad()
def _run(model: Model, state: Any, tokens: Tensor) -> Tensor:
    """Logits after the same number of new tokens for every slot."""
    return model(tokens, state.stream([len(tokens) // state.slots] * state.slots).last_rows(), state)


def tokens_of(count: int) -> Tensor:
    """Random tokens of the recipes' vocabulary."""
    return torch.randint(0, 32000, (count,), generator=torch.Generator().manual_seed(count))


# --- the child --------------------------------------------------------------------------------------------------------


class Child:
    """Answers requests, one JSON object a line: to prepare a row, to run it once, or to count the calls of a run."""

    def prepare(self, row: dict[str, Any]) -> None:
        """Builds the unit of a row in place of the last one, and runs it once to warm up."""
        self.task = self.after = None
        gc.unfreeze()
        gc.collect()
        self.task, self.after = unit_of(Row(**row))
        self.task()
        self.after()
        gc.collect()
        gc.freeze()  # of what lives now, no collection during a run need look at anything

    def run(self, clock: str) -> float:
        """Seconds of one run by a clock of module `time`."""
        assert self.task is not None
        assert self.after is not None
        gc.collect()
        now = getattr(time, clock)
        start = now()
        self.task()
        taken = now() - start
        self.after()
        return taken

    def calls(self) -> dict[str, int]:
        """Calls of Python functions, and from Python of functions in C, during one run."""
        assert self.task is not None
        assert self.after is not None
        found: Counter[str] = Counter()
        sys.setprofile(lambda frame, event, argument: found.update([event]))
        self.task()
        sys.setprofile(None)
        self.after()
        return {"call": found["call"], "c_call": found["c_call"]}


def serve(tree: Path, threads: int) -> None:
    """The child's loop, until its input ends; what the library prints goes to stderr."""
    import longwave

    found = Path(longwave.__file__ or "").resolve()
    assert found.is_relative_to(tree.resolve()), f"longwave was found at {found}, not in {tree}"
    torch.set_num_threads(threads)
    child, answers, sys.stdout = Child(), sys.stdout, sys.stderr
    for line in sys.stdin:
        command, arguments = json.loads(line)
        print(json.dumps(getattr(child, command)(*arguments)), file=answers, flush=True)


# --- the parent -------------------------------------------------------------------------------------------------------


class Tree:
    """A tree's child process, as the parent sees it."""

    def __init__(self, path: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(path.resolve()), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, str(path), str(path), "--threads", str(threads), "--child"]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, command: str, *arguments: Any) -> Any:
        """The child's answer; the parent waits for it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([command, arguments]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the child of {self.process.args} has died")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the child."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def time_row(row: Row, trees: list[Tree], rounds: int, clock: str) -> dict[str, float]:
    """Milliseconds of a step, as medians of both trees, and their ratio in each round."""
    for tree in trees:
        tree.ask("prepare", vars(row))
    taken, start = [], time.perf_counter()
    while len(taken) < rounds and (len(taken) < FEWEST or time.perf_counter() - start < SECONDS):
        taken.append([tree.ask("run", clock) / row.steps for tree in trees])
    ratios = [b / a for a, b in taken]
    (a, best_a), (b, best_b) = ((1000 * median(times), min(times)) for times in zip(*taken, strict=True))
    spread = {"low": min(ratios), "high": max(ratios), "rounds": len(taken)}
    return {"a_ms": a, "b_ms": b, "ratio": median(ratios), **spread, "ratio_of_best": best_b / best_a}


def time_rows(trees: list[Tree], rows: list[Row], rounds: int, clock: str) -> dict[str, Any]:
    """Times and prints every row."""
    print(f"{'ms per step':32} {'A':>10} {'B':>10} {'B / A':>8} {'(least - most)':17} {'of best':>8} {'rounds':>6}")
    found = {}
    for row in rows:
        found[row.name] = one = time_row(row, trees, rounds, clock)
        spread = f"({one['low']:.3f} - {one['high']:.3f})"
        figures = f"{one['a_ms']:10.2f} {one['b_ms']:10.2f} {one['ratio']:8.3f} {spread:17}"
        print(f"{row.name:32} {figures} {one['ratio_of_best']:8.3f} {one['rounds']:6}", flush=True)
    return found


def count_calls(trees: list[Tree], only: str) -> dict[str, Any]:
    """Counts and prints the calls of one step of decoding of each tree."""
    print(f"{'calls in one step':32} {'A':>8} {'B':>8}")
    found: dict[str, Any] = {}
    for row in [row for row in COUNTED if only in row.name]:
        answers = [tree.ask("prepare", vars(row)) or tree.ask("calls") for tree in trees]
        for kind in ("call", "c_call"):
            found[f"{row.name}, {kind}"] = counts = [answer[kind] for answer in answers]
            print(f"{f'{row.name}, {kind}':32} {counts[0]:8,} {counts[1]:8,}", flush=True)
    for name in [name for name in found if " x 64, " in name]:
        few = found.get(name.replace(" x 64, ", " x 1, "))
        if few:
            found[f"{name}, over x 1"] = ratios = [many / one for many, one in zip(found[name], few, strict=True)]
            print(f"{f'{name}, over x 1':42} {ratios[0]:8.2f} {ratios[1]:8.2f}")
    return found


def main() -> None:
    """Times two trees, or counts their calls."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("a", type=Path, help="a working tree")
    parser.add_argument("b", type=Path, help="another")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu", action="store_true", help="seconds on a processor, of all threads, instead of a clock's"
    )
    parser.add_argument("--calls", action="store_true", help="count Python calls instead")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return serve(options.a, options.threads)
    trees = [Tree(path, options.threads) for path in (options.a, options.b)]
    rows = [row for row in ROWS if options.only in row.name]
    clock = "process_time" if options.cpu else "perf_counter"
    found = count_calls(trees, options.only) if options.calls else time_rows(trees, rows, options.rounds, clock)
    for tree in trees:
        tree.close()
    print(json.dumps({"a": str(options.a), "b": str(options.b), "calls" if options.calls else "rows": found}))


if __name__ == "__main__":
    main()
