"""Hostile clients beside a well-behaved one, whose tokens do not change; the server takes no harm and gives no memory.

Every try is drawn from its number alone. `make test` makes a few dozen, `make test-attack` thousands.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode
from servers import Address, Apart, client, connected, figures, folders, running, running_apart

from longwave.engine import EngineOptions
from longwave.serving.limits import Limits
from longwave.serving.schema import openapi
from longwave.serving.server import Running

FEW, WARM, MANY, SOAK = 60, 2_000, 10_000, 20_000
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


def junk(server: Address, draw: random.Random) -> int:
    """Bytes that are no HTTP."""
    starts = (
        b"",
        b"GET / HTTP/1.1\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n",
        b"\x16\x03\x01\x02\x00",
    )
    return raw(server, draw.choice(starts) + draw.randbytes(draw.randrange(1, 3000)) + draw.choice((b"", b"\r\n\r\n")))


def heads(server: Address, draw: random.Random) -> int:
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


def torn(server: Address, draw: random.Random) -> int:
    """A body of another length than was told, or one that ends in the middle."""
    body = json.dumps(GOOD).encode()
    head = f"POST {draw.choice(PATHS)} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    told = draw.choice((0, 1, len(body) - 3, len(body) + 50, 10**12))
    return raw(server, f"{head}content-length: {told}\r\n\r\n".encode() + body[: draw.randrange(len(body))])


def raw(server: Address, content: bytes) -> int:
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


def slow(server: Address, draw: random.Random, patience: float = 8) -> int:
    """A client that sends byte by byte and stops; the connection is closed on it."""
    began = time.monotonic()
    request = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{'{' * 10}".encode()
    with connected(server) as line, contextlib.suppress(OSError):
        for place in range(draw.randrange(1, len(request))):
            line.sendall(request[place : place + 1])
        line.settimeout(2 * patience)
        while line.recv(4096):
            continue
    assert time.monotonic() - began < patience, "a slow client was waited for"
    return 0


def leaving(server: Address, draw: random.Random) -> int:
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


def bodies(server: Address, draw: random.Random) -> int:
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


KINDS: tuple[Callable[[Address, random.Random], int], ...] = (
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

    def __init__(self, server: Address) -> None:
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


def attacked(server: Address, count: int, kinds: Any = KINDS) -> Counter[int]:
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
    return found


def settled(server: Address) -> None:
    """Waits until nothing runs, waits or is remembered for a request; every one was let go of."""
    end, kinds = time.monotonic() + 30, ("running", "waiting", "state_bytes")
    with client(server) as web:
        while any(one[kind] for one in figures(web) for kind in kinds):
            assert time.monotonic() < end, "requests are left over"
            time.sleep(0.05)
        assert web.get("/health").json() == {"status": "ok"}


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


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Apart]:
    """A server as a user starts it: in a process of its own, whose memory is measured."""
    made = folders(tmp_path)
    with running_apart(list(made.values()), "--dtype", "fp64", "--running", 4, "--waiting", 8, "--memory", "2M") as one:
        yield one


def warmed(server: Apart, tries: int) -> int:
    """Bytes of a server's memory once it has met everything: pages, prefixes and threads, and the worst grammars."""
    attacked(server, tries)
    with client(server) as web:
        for number, guide in enumerate(2 * WORST):
            web.post("/v1/completions", json={**GOOD, "prompt": f"the {number}", **guide})
    settled(server)
    return server.memory


WORST: list[dict[str, Any]] = [
    {"guided_regex": "(a{1000}){1000}"},
    {"guided_grammar": "start: a a a a a\na: b b b b b b\nb: /(x{100}){100}/"},
    {"guided_json": {"properties": {f"f{n}": {"type": "string", "format": "date-time"} for n in range(300)}}},
]


@pytest.mark.attack
@pytest.mark.timeout(3000)
def test_thousands_of_hostile_clients(apart: Apart):
    """The resident memory of the server's process after 10,000 tries is at most a hundredth above that before them.

    Before them it was warmed up, by 2,000 tries and the grammars that take most. The page pool is small (2 MB), as a
    page of it takes memory when it is first written. Slow clients sit beside the others all the while.
    """
    with slow_ones(apart, 8):
        before = warmed(apart, WARM)
        found = attacked(apart, MANY)
        settled(apart)
        after = apart.memory
    print(f"{MANY:,} tries: memory {before / 1e6:.1f} MB, then {after / 1e6:.1f} MB; {dict(found)}")
    assert sum(found.values()) == MANY
    assert after < 1.01 * before


@contextlib.contextmanager
def slow_ones(server: Address, count: int) -> Iterator[None]:
    """Slow clients beside what runs in the block, one after the other in so many threads."""
    done = threading.Event()

    def again(number: int) -> None:
        draw = random.Random(number)
        while not done.is_set():
            slow(server, draw, patience=15)

    with ThreadPoolExecutor(count) as pool:
        threads = [pool.submit(again, number) for number in range(count)]
        try:
            yield
        finally:
            done.set()
    for one in threads:
        one.result()


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("words", "count"), [((), SOAK), (("--no-prefixes",), SOAK // 4)], ids=["prefixes", "none"])
def test_a_soak_of_short_requests(tmp_path: Path, words: tuple[str, ...], count: int):
    """No leak, a steady p99, and every page, row and slot free at the end: kept prefixes alone have any."""
    made, body = folders(tmp_path)["plain"], {**GOOD, "max_tokens": 2}
    with running_apart([made], "--memory", "2M", *words) as server:
        asked(server, body, count // 10)
        before, times = server.memory, asked(server, body, count)
        print(f"{count:,} requests: memory {before / 1e6:.1f} MB, then {server.memory / 1e6:.1f} MB;", told(times))
        assert server.memory < 1.01 * before
        first, last = times[: count // 2], times[count // 2 :]
        assert percentile(last, 99) < 2 * percentile(first, 99)
        settled(server)
        with client(server) as web:
            [found] = figures(web)
        assert found["prefixes"] or found["free_pages"] == found["pages"]


def asked(server: Address, body: dict[str, Any], count: int) -> list[float]:
    """Asks so often, four at a time, with prompts that differ; the seconds of each, as they ended."""
    times = list[float]()

    def ask(begin: int) -> None:
        with client(server) as web:
            for number in range(begin, count, 4):
                began = time.perf_counter()
                reply = web.post("/v1/completions", json={**body, "prompt": f"{number} the user said", "seed": number})
                assert reply.status_code == 200, reply.text
                times.append(time.perf_counter() - began)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert len(times) == count
    return times


def told(times: list[float]) -> str:
    """p50 and p99 of the first and the last thousand, in ms."""
    parts = {"first": times[:1000], "last": times[-1000:]}
    return "; ".join(
        f"{name} thousand p50 {1e3 * percentile(part, 50):.1f} ms, p99 {1e3 * percentile(part, 99):.1f} ms"
        for name, part in parts.items()
    )


def percentile(values: list[float], percent: int) -> float:
    return sorted(values)[len(values) * percent // 100]


# --- a machine that reads the description ----------------------------------------------------------------------------


EVERY = [f"{method} {path}" for path, kinds in openapi(["plain"])["paths"].items() for method in kinds]
REFUSED = RIGHT - {0, 200, 501}


@pytest.mark.parametrize("operation", EVERY)
def test_a_machine_asks_a_little(server: Running, operation: str):
    asked_by_machine(server, operation, 8)


@pytest.mark.attack
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("operation", EVERY)
def test_a_machine_asks_everything(server: Running, operation: str):
    asked_by_machine(server, operation, 200)


def asked_by_machine(server: Running, operation: str, tries: int) -> None:
    """schemathesis, from `/openapi.json`: what fits it is answered, or says why not; what does not fit is refused."""
    method, path = operation.split()
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path][method]
    fitting = statuses(server, described.as_strategy(generation_mode=GenerationMode.POSITIVE), tries)
    assert fitting.keys() <= REFUSED | {200}, fitting
    assert fitting[200] or tries < 50
    if described.body or described.path_parameters:  # in another nothing can be wrong
        wrong = statuses(server, described.as_strategy(generation_mode=GenerationMode.NEGATIVE), tries)
        assert wrong.keys() <= REFUSED, wrong
    settled(server)


def statuses(server: Running, cases: Any, tries: int) -> Counter[int]:
    """The statuses of so many requests; every one that is refused says why in OpenAI's form."""
    found = Counter[int]()

    @seed(0)
    @given(case=cases)
    @settings(max_examples=tries, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def ask(case: Any) -> None:
        reply = case.call(base_url=server.url, timeout=60)
        found[reply.status_code] += 1
        assert reply.status_code < 500, (case.body, reply.text)
        assert reply.status_code == 200 or reply.json()["error"].keys() == {"message", "type", "param", "code"}

    ask()
    return found
