"""Work that runs side by side: each task in a process of its own, with some threads, which ends with this one."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from longwave.errors import MachineError, UserError

T = TypeVar("T")
Task = Callable[[Callable[..., None]], T]  # given a function to which it tells how far it is
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl


class _Worker:
    """A process that takes one task after the other."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, os.getpid(), threads), daemon=True)
        self.number = -1  # of its task
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the process inherits, until it trains
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()

    def give(self, number: int, task: Task[Any]) -> None:
        """Has it work on a task."""
        self.number = number
        self.pipe.send(task)

    def stop(self) -> None:
        """Asks it to end, which takes a step and a checkpoint where it trains, and waits for it."""
        self.process.terminate()
        with suppress(EOFError, OSError):
            while True:  # or it would wait for its pipe to be read
                self.pipe.recv()
        self.process.join()

    def death(self) -> str:
        """How it ended, for people."""
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"its process ended with exit code {code}"
        guess = ", as a system out of memory does" if code == -signal.SIGKILL else ""
        return f"its process was killed ({signal.Signals(-code).name}){guess}"


def run_all(
    tasks: Sequence[Task[T]], names: Sequence[str], jobs: int, threads: int, watch: Callable[..., None]
) -> list[T]:
    """The results of all tasks, of which `jobs` run at a time, with `threads` threads each; a single job runs here.

    names: of the tasks, for people. watch: called with the number of a task and what it tells. Raises what a task
    raises, and KeyboardInterrupt, once all processes have ended: they are asked to, and save what they have.
    """
    if jobs == 1:
        with _threads(threads):
            return [task(partial(watch, number)) for number, task in enumerate(tasks)]
    found: dict[int, T] = {}
    waiting, working = list(range(len(tasks))), list[_Worker]()
    try:
        for number in waiting[:jobs]:
            working.append(_Worker(threads))
            working[-1].give(number, tasks[number])
        waiting = waiting[jobs:]
        while len(found) < len(tasks):
            for worker in _ready(working):
                answer = _answer(worker, names[worker.number], watch)
                if answer is None:
                    continue
                found[worker.number] = answer[0]
                if waiting:
                    number = waiting.pop(0)
                    worker.give(number, tasks[number])
    finally:
        for worker in working:
            worker.stop()
    return [found[number] for number in range(len(tasks))]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many threads of the processor for what runs within."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ready(working: Sequence[_Worker]) -> list[_Worker]:
    pipes = wait([one.pipe for one in working])
    return [one for one in working if one.pipe in pipes]


def _answer(worker: _Worker, name: str, watch: Callable[..., None]) -> tuple[Any] | None:
    """The result of a task in a tuple; None if it has told something else. Raises what the task raised."""
    try:
        kind, content = worker.pipe.recv()
    except (EOFError, OSError):
        raise MachineError(f"{name}: {worker.death()}; the same command continues") from None
    if kind == "error":
        raise content
    if kind == "result":
        return (content,)
    watch(worker.number, *content)
    return None


def _serve(pipe: Connection, parent: int, threads: int) -> None:
    """Runs in the process."""
    _end_with(parent)
    torch.set_num_threads(threads)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            task: Task[Any] = pipe.recv()
            try:
                _tell(pipe, "result", task(lambda *content: _tell(pipe, "step", content)))
            except (UserError, MachineError) as error:
                kind = UserError if isinstance(error, UserError) else MachineError  # a class of its own may not be sent
                _tell(pipe, "error", kind(str(error)))


def _tell(pipe: Connection, kind: str, content: Any) -> None:
    """Sends to the parent; without one, the process is over at once, as if it had been killed, too."""
    try:
        pipe.send((kind, content))
    except OSError:
        os._exit(1)


def _end_with(parent: int) -> None:
    """Has the system kill this process as soon as its parent dies (Linux); elsewhere it ends at its next step."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
