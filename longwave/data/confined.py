"""The process in which chat templates are rendered: one for all of them, begun anew when it had to be ended."""

from __future__ import annotations

import atexit
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, cast

from longwave.data import rendering
from longwave.errors import MachineError

_SCRIPT = Path(rendering.__file__)
_PATIENCE = 60.0  # seconds that a request may wait for a processor on a busy machine
_LARGEST = 8 * rendering.CHARACTERS  # bytes of a reply


class Exceeded(Exception):
    """A template took more time or memory than it may: a clause for an error message."""


class Renderer:
    """One template in the process. definition: the request that opens it (`rendering.py`)."""

    def __init__(self, definition: dict[str, Any]) -> None:
        self._key = str(id(self)) + os.urandom(8).hex()
        self._definition = definition

    def open(self) -> dict[str, Any]:
        """The reply to the definition: what the template names, or its error. Raises Exceeded."""
        return _PROCESS.ask({"template": self._key, **self._definition})

    def render(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a conversation: its text, or the error that the template raises. Raises Exceeded."""
        with _PROCESS.lock:
            reply = _PROCESS.ask({"template": self._key, **request})
            if "unknown" in reply:
                self.open()
                reply = _PROCESS.ask({"template": self._key, **request})
        return reply


class _Process:
    """The process, begun when it is first asked, and anew in a process that was forked."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._running: subprocess.Popen[bytes] | None = None
        self._of = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request. Raises Exceeded where the process had to be ended, or ended itself."""
        message = rendering.packed(request)
        with self.lock:
            process = self._begun()
            try:
                stdin = cast(IO[bytes], process.stdin)
                stdin.write(message)
                stdin.flush()
                return self._reply(process)
            except (BrokenPipeError, EOFError):
                raise self._ended(process) from None
            except BaseException:  # such as Ctrl-C, which leaves a reply that nobody waits for
                self._end(process)
                raise

    def _begun(self) -> subprocess.Popen[bytes]:
        running = self._running
        if running is None or self._of != os.getpid() or running.poll() is not None:
            running = self._running = _begin()
            self._of = os.getpid()
        return running

    def _reply(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        deadline, found = time.monotonic() + _PATIENCE, bytearray()
        size = 4
        while len(found) < size:
            found += self._some(process, size - len(found), deadline)
            if size == 4 == len(found):
                size += int.from_bytes(found, "big")
                if size > _LARGEST:
                    raise EOFError
        return rendering.unpacked(bytes(found[4:]))

    def _some(self, process: subprocess.Popen[bytes], most: int, deadline: float) -> bytes:
        """Some of what the process says. Raises EOFError if it says nothing more, or nothing in time."""
        stdout = cast(IO[bytes], process.stdout).fileno()
        ready, _, _ = select.select([stdout], [], [], max(deadline - time.monotonic(), 0.0))
        some = os.read(stdout, min(most, 1 << 20)) if ready else b""
        if not some:
            raise EOFError
        return some

    def _ended(self, process: subprocess.Popen[bytes]) -> Exceeded:
        self._end(process)
        if process.returncode == rendering.OUT_OF_MEMORY:
            return Exceeded(f"takes more than {rendering.MEMORY >> 20} MiB of memory")
        if process.returncode in (-rendering.TOO_LONG, -9):
            return Exceeded(f"takes more than {rendering.SECONDS:g} second of a processor")
        return Exceeded(f"ended the process that renders it (status {process.returncode})")

    def close(self) -> None:
        """Ends the process, if it is this one's."""
        if self._running is not None and self._of == os.getpid():
            self._end(self._running)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            time.sleep(0.01)  # one that ends by itself says why
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                cast(IO[bytes], pipe).close()
            except OSError:  # what was not written yet cannot be any more
                continue
        self._running = None


def _begin() -> subprocess.Popen[bytes]:
    command, pipe = [sys.executable, "-P", str(_SCRIPT)], subprocess.PIPE
    try:  # in a session of its own, so that Ctrl-C is told to this process alone
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        raise MachineError(f"the process that renders chat templates did not begin: {error}") from None


_PROCESS = _Process()
atexit.register(_PROCESS.close)
