"""A model in a process of its own: its memory is measured alone, and if the process is killed the others go on."""

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
from longwave.benchmarks.measure.profile import Spent
from longwave.benchmarks.results.results import Model
from longwave.config import ModelConfig
from longwave.costs import count
from longwave.errors import MachineError, UserError
from longwave.machine import device_of, dtype_of
from longwave.model import Decoder


@dataclass(frozen=True)
class Job:
    """The task of a process. source: a folder or hub id, or a config that is given random weights.

    limit: seconds after which the model is stopped.
    """

    name: str
    source: str | ModelConfig
    ids: NDArray[np.int32]
    options: ContextOptions
    threads: int
    limit: float


class Worker:
    """Runs a job in a process of its own; every call waits for the answer. Stopped where the process has ended.

    report: called with the number of tokens read, after every chunk.
    """

    def __init__(self, job: Job, report: Callable[[int], object]) -> None:
        self.name, self._job, self._report, self._seen = job.name, job, report, 0
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        # Ctrl-C is for this process, which shows results. The job is sent later: it fills the pipe until the new
        # process has imported torch, seconds in which Ctrl-C would be ignored here too.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()

    def load(self) -> Model:
        """Sends the job, loads the model, checks its logits, and returns its layout and size."""
        with self._alive():
            self._pipe.send(self._job)
        return self._ask("load")

    def grow(self, context: int) -> Reading:
        """Reads on up to a context and returns the figures there."""
        return self._ask("grow", context)

    def profile(self, path: Path) -> dict[str, dict[str, Spent]]:
        """Writes a trace of what comes after the tokens read; returns its time by kind of part."""
        return self._ask("profile", path)

    def close(self) -> None:
        """Ends the process at once."""
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
        """Raises Stopped where the process has ended."""
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


def _serve(pipe: Connection) -> None:
    """Runs in the process: takes a job, and answers calls until the pipe is closed."""
    with suppress(EOFError, BrokenPipeError):
        job = pipe.recv()
        torch.set_num_threads(job.threads)
        served = Served(job, pipe.send)
        while True:
            name, *arguments = pipe.recv()
            pipe.send(answer(getattr(served, name), arguments))


def answer(ask: Callable[..., object], arguments: list[Any]) -> object:
    """The result of a call, or the error for errors of the user, the machine or its memory."""
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
    """The model inside the process, with the calls of `Worker`."""

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
