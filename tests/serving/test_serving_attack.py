"""Hostile clients beside a well-behaved one, whose tokens do not change; the server takes no harm and gives no memory.

Every try is drawn from its number alone. `make test` makes a few dozen, `make test-attack` thousands.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import client, connected, folders, running

from longwave.engine import EngineOptions
from longwave.serving.limits import Limits
from longwave.serving.server import Running

FEW, MANY, SOAK = 60, 8_000, 20_000
FOUR = EngineOptions(running=4, waiting=8)
QUICK = Limits(body=1 << 20, header_seconds=1.0, body_seconds=1.0, write_seconds=1.0, grace_seconds=5.0)
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/kept")
GOOD: dict[str, Any] = {"model": "plain", "prompt": "the user said", "max_tokens": 12, "seed": 11, "temperature": 1.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = folders(tmp_path_factory.mktemp("models"))
    options = {"limits": QUICK, "engine": FOUR, "dtype": "fp64"}  # in which no rounding can turn a token
    with running(list(made.values()), **options) as begun:
        yield begun


# --- what hostile clients do ------------------------------------------------------------------------------------------


def junk(server: Running, draw: random.Random) -> int:
    """Bytes that are no HTTP."""
    starts = (
        b"",
        b"GET / HTTP/1.1\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n",
        b"\x16\x03\x01\x02\x00",
    )
    return raw(server, draw.choice(starts) + draw.randbytes(draw.randrange(1, 3000)) + draw.choice((b"", b"\r\n\r\n")))


def heads(server: Running, draw: random.Random) -> int:
    """Heads that are huge, torn, doubled or full of odd characters."""
    name = draw.choice(("x", "content-length", "transfer-encoding", "host", "authorization", "content-type"))
    value = draw.choice(
        ("x" * 200_000, "-1", "1e9", "99999999999999999999", "chunked, gzip", "\x00", "\xff\xfe", "", "a b")
    )
    line = (
        f"{draw.choice(('GET', 'POST', 'BREW', ''))} {draw.choice(PATHS)}{draw.choice(('', '?a=%00', ' x'))} HTTP/1.1"
    )
    many = f"{name}: {value}\r\n" * draw.choice((1, 2, 500))
    return raw(server, f"{line}\r\nhost: localhost\r\n{many}\r\n{{}}".encode("latin-1"))


def torn(server: Running, draw: random.Random) -> int:
    """A body of another length than was told, or one that ends in the middle."""
    body = json.dumps(GOOD).encode()
    head = f"POST {draw.choice(PATHS)} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    told = draw.choice((0, 1, len(body) - 3, len(body) + 50, 10**12))
    return raw(server, f"{head}content-length: {told}\r\n\r\n".encode() + body[: draw.randrange(len(body))])


def raw(server: Running, content: bytes) -> int:
    """Sends bytes and reads what comes; the status, or 0 where the connection was closed without one."""
    with connected(server) as line, contextlib.suppress(OSError):
        line.settimeout(10)
        with contextlib.suppress(OSError):
            line.sendall(content)
            line.shutdown(socket.SHUT_WR)
        reply = b""
        while b"\r\n" not in reply and (more := line.recv(4096)):
            reply += more
        words = reply.split()
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    return 0


def slow(server: Running, draw: random.Random) -> int:
    """A client that sends byte by byte and stops; the connection is closed on it."""
    began = time.monotonic()
    request = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{'{' * 10}".encode()
    with connected(server) as line, contextlib.suppress(OSError):
        for place in range(draw.randrange(1, len(request))):
            line.sendall(request[place : place + 1])
        line.settimeout(10)
        while line.recv(4096):
            continue
    assert time.monotonic() - began < 8, "a slow client was waited for"
    return 0


def leaving(server: Running, draw: random.Random) -> int:
    """A client that goes in the middle of its answer."""
    kind = draw.choice((True, False))
    body = json.dumps(
        {**GOOD, "max_tokens": 400, "ignore_eos": True, "stream": kind, "n": draw.choice((1, 3))}
    ).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with connected(server) as line:
        line.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        if kind:
            line.recv(draw.choice((1, 100, 3000)))
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, draw.choice((b"\1\0\0\0\0\0\0\0", b"\0" * 8)))
    return 0


def bodies(server: Running, draw: random.Random) -> int:
    """A body of the right form with one value changed, removed or added."""
    path = draw.choice(PATHS)
    messages = [{"role": "user", "content": "hi"}]
    known: dict[str, dict[str, Any]] = {
        PATHS[0]: {"model": "chatty", "messages": messages, "max_tokens": 3},
        PATHS[1]: {**GOOD, "max_tokens": 3},
        PATHS[2]: {"model": "levels", "input": "hi", "max_output_tokens": 3},
        PATHS[3]: {"model": "plain", "prompt": "hi"},
        PATHS[4]: {"model": "levels", "tokens": [1, 2, 3]},
    }
    extra = (
        "stop",
        "n",
        "logit_bias",
        "seed",
        "stream",
        "tools",
        "response_format",
        "guided_regex",
        "top_p",
        "x",
        "\x00",
    )
    body = dict(known[path])
    body[draw.choice((*body, *extra))] = odd(draw)
    with client(server) as web:
        headers = {"content-type": "application/json"}
        return web.post(path, content=json.dumps(body).encode("utf-8", "surrogatepass"), headers=headers).status_code


def odd(draw: random.Random, depth: int = 0) -> Any:
    """A value that nobody expects."""
    plain: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        10**30,
        -0.5,
        1e308,
        float("nan"),
        "",
        "a",
        "\x00",
        "\ud800",
        "🜁" * 5,
        "x" * 9000,
    ]
    plain += ["(" * 500, "(a{1000}){1000}", "start: start", '{"a": 1}', "../../etc/passwd", "<|eos|>", "%n%s"]
    if depth > 3 or draw.random() < 0.6:
        return draw.choice(plain)
    inner = [odd(draw, depth + 1) for _ in range(draw.randrange(4))]
    return (
        inner
        if draw.random() < 0.5
        else {draw.choice(("type", "role", "1", "a", "schema", "$ref")): one for one in inner}
    )


KINDS: tuple[Callable[[Running, random.Random], int], ...] = (
    junk,
    heads,
    torn,
    bodies,
    bodies,
    bodies,
    bodies,
    leaving,
)
RIGHT = {0, 200, 400, 403, 404, 405, 408, 411, 413, 414, 415, 422, 429, 431, 501, 503}


# --- beside a well-behaved client -------------------------------------------------------------------------------------


class Behaved(threading.Thread):
    """Asks the same again and again; `texts` holds every answer, and how often it came."""

    def __init__(self, server: Running) -> None:
        super().__init__(daemon=True)
        self._server, self._done, self.texts, self.refused = server, threading.Event(), Counter[str](), 0

    def run(self) -> None:
        with client(self._server) as web:
            while not self._done.is_set():
                reply = web.post("/v1/completions", json=GOOD)
                if reply.status_code == 200:
                    self.texts[reply.json()["choices"][0]["text"]] += 1
                else:
                    assert reply.status_code in (429, 503), reply.text
                    self.refused += 1
                    time.sleep(0.05)

    def end(self) -> None:
        self._done.set()
        self.join(60)
        assert not self.is_alive()


def attacked(server: Running, count: int, kinds: Any = KINDS) -> Counter[int]:
    """Makes so many tries beside a well-behaved client; the statuses of them."""
    with client(server) as web:
        alone = web.post("/v1/completions", json=GOOD).json()["choices"][0]["text"]
    behaved, found = Behaved(server), Counter[int]()
    behaved.start()
    for number in range(count):
        draw = random.Random(f"server {number}")
        kind = kinds[number % len(kinds)]
        status = kind(server, draw)
        assert status in RIGHT, (kind.__name__, number, status)
        found[status] += 1
    behaved.end()
    assert set(behaved.texts) == {alone}, "the company changed an answer"
    settled(server)
    with client(server) as web:
        assert web.post("/v1/completions", json=GOOD).json()["choices"][0]["text"] == alone
        assert web.get("/health").json() == {"status": "ok"}
    return found


def settled(server: Running) -> None:
    """Waits until nothing runs; every request was let go of."""
    end = time.monotonic() + 30
    while not all(one.engine.idle for one in server.models):
        assert time.monotonic() < end, "requests are left over"
        time.sleep(0.05)
    assert [one.engine.metrics.running + one.engine.metrics.waiting for one in server.models] == [0, 0, 0]
    assert [one.engine.metrics.state_bytes for one in server.models] == [0, 0, 0]
    assert [one.runner.failure for one in server.models] == [None] * 3


def test_hostile_clients_change_nothing(server: Running):
    found = attacked(server, FEW)
    assert found[400] > 5
    assert found[200] > 0


def test_slow_clients_are_let_go(server: Running):
    found = list[int]()
    tries = [lambda number=number: found.append(slow(server, random.Random(number))) for number in range(8)]
    threads = [threading.Thread(target=one) for one in tries]
    for one in threads:
        one.start()
    with client(server) as web:
        assert web.post("/v1/completions", json=GOOD).status_code == 200
    for one in threads:
        one.join(20)
    assert found == [0] * 8


def test_a_client_that_reads_nothing_is_let_go(server: Running):
    """Its answer is larger than what the system holds for it."""
    body = json.dumps({**GOOD, "max_tokens": 300, "ignore_eos": True, "stream": True, "n": 4, "logprobs": 20}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with connected(server) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        settled(server)


def resident() -> int:
    """Bytes of this process's memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.attack
@pytest.mark.timeout(3000)
def test_thousands_of_hostile_clients(server: Running):
    """Memory after a first thousand grows by less than a hundredth."""
    attacked(server, 1000)
    before = resident()
    found = attacked(server, MANY)
    assert sum(found.values()) == MANY
    assert resident() < 1.01 * before + (4 << 20)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_soak_of_short_requests(server: Running):
    """No leak, a steady p99, and nothing left over."""
    body, times = {**GOOD, "max_tokens": 2}, list[float]()

    def ask(count: int) -> None:
        with client(server) as web:
            for _ in range(count):
                began = time.perf_counter()
                assert web.post("/v1/completions", json=body).status_code == 200
                times.append(time.perf_counter() - began)

    def rounds(count: int) -> None:
        threads = [threading.Thread(target=ask, args=(count // 4,)) for _ in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()

    rounds(SOAK // 10)
    before = resident()
    rounds(SOAK)
    assert len(times) == SOAK + SOAK // 10
    assert resident() < 1.01 * before + (4 << 20)
    first, last = sorted(times[SOAK // 10 : SOAK // 2]), sorted(times[-SOAK // 2 :])
    assert last[-len(last) // 100] < 2 * first[-len(first) // 100]
    settled(server)


@pytest.mark.attack
@pytest.mark.timeout(3000)
def test_a_machine_reads_the_schema_and_asks_everything(server: Running):
    """schemathesis: valid bodies and invalid ones, as `/openapi.json` describes them."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode

    asked, statuses = schemathesis.openapi.from_url(f"{server.url}/openapi.json"), Counter[int]()
    for result in asked.get_all_operations():
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            def ask(case: Any) -> None:
                reply = case.call(base_url=server.url, timeout=60)
                statuses[reply.status_code] += 1
                assert reply.status_code in RIGHT, (case, reply.status_code)

            ask()
    assert statuses[400] > 50
    settled(server)
