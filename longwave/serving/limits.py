"""What one client may ask for, so that the others are served too."""

from __future__ import annotations

from dataclasses import dataclass

from longwave.config import Strict
from longwave.errors import require

MOST_CHOICES = 16  # of `n`, and of the prompts of one request times `n`
MOST_STOPS = 16
LONGEST_STOP = 256  # characters
MOST_BIASES = 1024
MOST_MESSAGES = 4096
MOST_TOOLS = 128
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Limits(Strict):
    """Limits of a server.

    body: bytes of a request. connections: open at a time. header_seconds, body_seconds: within which a client sends
    the head and the whole of a request. write_seconds: within which it takes a piece of the answer. request_seconds:
    from the submission of a request to its end; None for any time. grace_seconds: for running requests once the server
    is told to end.
    """

    body: int = 16 << 20
    connections: int = 512
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    request_seconds: float | None = None
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value is None or value > 0, f"{name} = {value}: more than 0")
