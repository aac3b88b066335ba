"""A model in a process of its own, so that its memory is nobody else's, and so that losing it loses nothing else."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longwave import checkpoints
from longwave.benchmarks.context.options import ContextOptions
from longwave.benchmarks.context.sequence import Growing, Reading, Stopped
from longwave.benchmarks.profile import Spent
from longwave.benchmarks.results import Model
from longwave.config import ModelConfig
from longwave.costs import count
from longwave.device import device_of, dtype_of
from longwave.errors import MachineError, UserError
from longwave.model import Decoder


@dataclass(frozen=True)
class Job:
    """What a process is to run. source: a folder or hub id, or a config that is given random weights.

    limit: seconds after which the model is stopped.
    """

    name: str
    source: str | ModelConfig
    ids: NDArray[np.int32]
    options: ContextOptions
    threads: int
    limit: float


class Worker:
    """The other end of a process. Every question waits for its answer; Stopped says why there is none.

    report: is told the tokens read, after every chunk.
    """

    def __init__(self, job: Job, report: Callable[[int], object]) -> None:
        self.name, self._report, self._seen = job.name, report, 0
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, job), daemon=True)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for us, who still have results to show
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()

    def load(self) -> Model:
        """Which model it is, once it has been loaded and found right."""
        return self._ask("load")

    def grow(self, context: int) -> Reading:
        """What is found at a context."""
        return self._ask("grow", context)

    def profile(self, path: Path) -> dict[str, dict[str, Spent]]:
        """Writes a trace of what comes next; where the time of each part of it went."""
        return self._ask("profile", path)

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def _ask(self, *question: object) -> Any:
        with self._alive():
            self._pipe.send(question)
        while isinstance(answer := self._received(), int):
            self._seen = answer
            self._report(answer)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _received(self) -> object:
        with self._alive():
            return self._pipe.recv()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Stopped where the other end of the pipe is gone."""
        try:
            yield
        except (EOFError, OSError):
            raise Stopped(self._death()) from None

    def _death(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        guess = ", as a system out of memory does" if code == -signal.SIGKILL else ""
        return f"its process {how} after {self._seen:,} tokens{guess}"


def _serve(pipe: Connection, job: Job) -> None:
    """Answers questions until the other end closes."""
    torch.set_num_threads(job.threads)
    served = Served(job, pipe.send)
    with suppress(EOFError, BrokenPipeError):
        while True:
            name, *arguments = pipe.recv()
            pipe.send(answer(getattr(served, name), arguments))


def answer(ask: Callable[..., object], arguments: list[Any]) -> object:
    """What is found, or what went wrong where that is no fault of ours."""
    try:
        return ask(*arguments)
    except (UserError, MachineError, Stopped) as error:
        return error
    except (MemoryError, torch.OutOfMemoryError) as error:
        return Stopped(f"out of memory: {error}")
    except RuntimeError as error:
        if "not enough memory" in str(error):  # what torch's CPU allocator says, for want of a class of its own
            return Stopped(f"out of memory: {error}")
        raise


class Served:
    """The model behind the questions of `Worker`."""

    def __init__(self, job: Job, report: Callable[[int], object]) -> None:
        self._job, self._report = job, report

    def load(self) -> Model:
        job, device, dtype = self._job, device_of(self._job.options.device), dtype_of(self._job.options.dtype)
        if isinstance(job.source, ModelConfig):
            model = Decoder(job.source, job.options.seed).to(device, dtype)
        else:
            model = checkpoints.load(checkpoints.find(job.source), dtype=dtype, device=device)
        self._growing = Growing(model, torch.from_numpy(job.ids), job.options, job.limit, self._report)
        self._growing.check()
        return Model(model.config.layout, count(model))

    def grow(self, context: int) -> Reading:
        return self._growing.grow(context)

    def profile(self, path: Path) -> dict[str, dict[str, Spent]]:
        return self._growing.profile(path, self._job.name)
