"""`longwave serve`: models answer requests over HTTP, as OpenAI's clients ask them."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from longwave.cli.options import DRAFT, OnDevice, argument, option
from longwave.cli.parser import Verb
from longwave.errors import UserError, require

if TYPE_CHECKING:
    from longwave.serving.server import Running

KEY = "LONGWAVE_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Serve(OnDevice):
    """Options of `longwave serve`."""

    models: tuple[str, ...] = argument("model folders", default=(), metavar="DIR")
    name: tuple[str, ...] = option("of the first model, the second, ... (the folder's, or that of its run)", default=())
    host: str = option("address to listen on; 0.0.0.0 for all", default="127.0.0.1")
    port: int = option("to listen on; 0 for any that is free", default=8000)
    api_key: str | None = option(f"that clients must send; better in the environment, as {KEY}", metavar="KEY")
    cors: tuple[str, ...] = option("a web origin whose pages may ask, or * for all", default=(), metavar="ORIGIN")
    running: int = option("requests that a model advances together", default=16)
    waiting: int = option("requests of a model that wait; more are refused", default=256)
    step_tokens: int = option("tokens of one step of a model", default=512)
    memory: str | None = option("for what requests remember, such as 8G (half of what is free)", metavar="BYTES")
    draft: str | None = option(DRAFT, metavar="DRAFT")
    drafts: int = option("tokens drafted for a text at a time", default=4)
    no_prefixes: bool = option("run every prompt whole, even if an earlier one began alike", default=False)
    invariant: bool = option("forms in which company changes no bit of an answer", default=False)
    timeout: float | None = option("of a request", metavar="SECONDS")
    grace: float = option("for running requests when the server ends", default=30.0, metavar="SECONDS")
    max_body: str = option("of a request", default="16M", metavar="BYTES")
    dtype: Literal["fp32", "bf16", "fp16", "fp64", "int8"] | None = option("of the weights; as saved by default")


def run(options: Serve) -> dict[str, Any]:
    """Serves until the process is told to end; returns the address and the names."""
    try:
        import llguidance  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import prometheus_client  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import starlette  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import uvicorn  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'longwave[serve]'") from None
    from longwave.data.patience import sparing_the_process
    from longwave.serving.server import serve

    found = dict[str, Any]()

    def told(running: Running) -> None:
        found.update(url=running.url, models=[one.name for one in running.models])
        _announce(running, options)

    _take_memory_from_one_place()
    with sparing_the_process():
        serve(_setup(options), told)
    return found


def _take_memory_from_one_place() -> None:
    """Has the C library's allocator (glibc's) serve all threads from one arena.

    By default every thread keeps what it has freed for itself, and a server that reads bodies and grammars in several
    of them takes the memory of the largest several times over.
    """
    arena_max = -8  # M_ARENA_MAX of malloc.h
    with suppress(AttributeError, OSError, TypeError):  # where there is another C library
        ctypes.CDLL(None).mallopt(arena_max, 1)


def _setup(options: Serve) -> Any:
    from longwave.config import build
    from longwave.engine import EngineOptions
    from longwave.serving.limits import Limits
    from longwave.serving.server import Setup
    from longwave.units import parse_bytes

    key = options.api_key if options.api_key is not None else os.environ.get(KEY)
    require(key is None or bool(key.strip()), f"{KEY}: empty; give a key, or unset it")
    engine = {name: getattr(options, name) for name in ("running", "waiting", "step_tokens", "drafts", "invariant")}
    engine |= {"memory": None if options.memory is None else parse_bytes(options.memory)}
    engine |= {"prefixes": not options.no_prefixes}
    limits = {"request_seconds": options.timeout, "grace_seconds": options.grace, "body": parse_bytes(options.max_body)}
    return Setup(
        folders=options.models,
        names=options.name,
        host=options.host,
        port=options.port,
        key=key,
        origins=options.cors,
        draft=options.draft,
        dtype=options.dtype,
        device=options.device,
        engine=build(EngineOptions, engine, "serve"),
        limits=build(Limits, limits, "serve"),
    )


def _announce(running: Running, options: Serve) -> None:
    from longwave.progress import say

    for served in running.models:
        say(f"{served.name}: {served.model.config.layout}, context window {served.window:,}")
        for line in served.model.describe():
            say(line)
        if served.chat is None:
            say(f"{served.name}: no conversations ({served.no_chat}); /v1/completions continues text")
    if options.host not in ("127.0.0.1", "localhost", "::1") and options.api_key is None and KEY not in os.environ:
        say(f"anyone who reaches this machine can ask; set {KEY} to ask for a key")
    print(f"serving at {running.url} (API: {running.url}/v1, page: {running.url}/)", flush=True)


VERB = Verb("serve", "answer requests over HTTP, as OpenAI's clients ask them", Serve, run)
