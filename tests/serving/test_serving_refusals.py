"""What the server refuses, how, and how fast; nobody else's request is touched by it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers import WINDOW, client, connected, folders, running

from longwave.engine import EngineOptions
from longwave.serving.limits import Limits
from longwave.serving.server import Running

KEY = "a key of tests"
CHAT, TEXT, REPLY = "/v1/chat/completions", "/v1/completions", "/v1/responses"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = folders(tmp_path_factory.mktemp("models"))
    with running([made["plain"], made["chatty"]], limits=Limits(body=1 << 20, body_seconds=1.0)) as begun:
        yield begun


@pytest.fixture(scope="module")
def web(server: Running) -> Iterator[httpx.Client]:
    with client(server) as opened:
        yield opened


def refusal(reply: httpx.Response) -> dict[str, Any]:
    """The error object of a reply, which is in OpenAI's form."""
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 1200
    return error


P, M = {"model": "plain", "prompt": "hello"}, {"model": "chatty", "messages": [{"role": "user", "content": "hi"}]}
OBFUSCATION = "stream_options.include_obfuscation"
TOOL = {"type": "function", "function": {"name": "f"}}
BODIES: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    # endpoint, body, status, param, a part of the message
    (TEXT, {**P, "model": "gpt-9"}, 404, "model", "no model 'gpt-9'"),
    (CHAT, {**M, "model": "chaty"}, 404, "model", "chatty"),
    (REPLY, {"model": "", "input": "a"}, 400, "model", "at least 1 character"),
    (TEXT, {"model": "plain"}, 400, "prompt", "prompt is missing"),
    (CHAT, {"model": "chatty"}, 400, "messages", "messages is missing"),
    (CHAT, {**M, "model": "plain"}, 400, None, "/v1/completions"),
    (REPLY, {"model": "plain", "input": "a"}, 400, None, "takes no conversations"),
    (TEXT, {**P, "prompt": ""}, 200, None, ""),
    (TEXT, {**P, "prompt": []}, 400, "prompt", "at least 1 item"),
    (TEXT, {**P, "prompt": [[]]}, 400, None, "prompt is empty"),
    (TEXT, {**P, "prompt": [1, "a"]}, 400, "prompt[1]", "integer"),
    (TEXT, {**P, "prompt": [10**6]}, 400, None, "outside the model's vocabulary"),
    (TEXT, {**P, "prompt": [-1]}, 400, None, "outside the model's vocabulary"),
    (TEXT, {**P, "prompt": ["a"] * 17}, 400, "prompt", "at most 16"),
    (TEXT, {**P, "prompt": ["a"] * 9, "n": 2}, 400, "n", "16 at most"),
    (TEXT, {**P, "prompt": [1] * (WINDOW + 1)}, 400, None, f"context_window is {WINDOW}"),
    (TEXT, {**P, "prompt": "word " * 5000}, 400, None, "too long"),
    (CHAT, {**M, "messages": [{"role": "user", "content": "word " * 5000}]}, 400, None, "too long"),
    (TEXT, {**P, "temprature": 1}, 400, "temprature", "did you mean temperature?"),
    (CHAT, {**M, "wishes": 1}, 400, "wishes", "no parameter"),
    (TEXT, {**P, "temperature": -0.1}, 400, "temperature", "greater than or equal to 0"),
    (TEXT, {**P, "temperature": 2.1}, 400, "temperature", "less than or equal to 2"),
    (TEXT, {**P, "temperature": "1"}, 400, "temperature", "number"),
    (TEXT, {**P, "temperature": True}, 400, "temperature", "number"),
    (TEXT, {**P, "top_p": 1.5}, 400, "top_p", "less than or equal to 1"),
    (TEXT, {**P, "top_k": 2.5}, 400, "top_k", "integer"),
    (TEXT, {**P, "top_k": -2}, 400, "top_k", "greater than"),
    (TEXT, {**P, "min_p": -1}, 400, "min_p", "greater than"),
    (TEXT, {**P, "n": 0}, 400, "n", "greater than"),
    (TEXT, {**P, "n": 17}, 400, "n", "less than"),
    (TEXT, {**P, "max_tokens": 0}, 400, "max_tokens", "greater than"),
    (TEXT, {**P, "max_tokens": 1 << 40}, 400, "max_tokens", "less than"),
    (TEXT, {**P, "seed": 1 << 70}, 400, "seed", "seed"),
    (TEXT, {**P, "seed": 1.5}, 400, "seed", "integer"),
    (TEXT, {**P, "presence_penalty": 3}, 400, "presence_penalty", "less than"),
    (TEXT, {**P, "repetition_penalty": 0}, 400, "repetition_penalty", "greater than or equal to 0.01"),
    (TEXT, {**P, "repetition_penalty": 5e-324}, 400, "repetition_penalty", "greater than or equal to 0.01"),
    (TEXT, {**P, "repetition_penalty": 0.01, "frequency_penalty": -2, "temperature": 5e-324}, 200, None, ""),
    (TEXT, {**P, "top_p": 5e-324, "min_p": 1, "repetition_penalty": 10}, 200, None, ""),
    (TEXT, {**P, "logit_bias": {"1": 101}}, 400, "logit_bias.1", "less than"),
    (TEXT, {**P, "logit_bias": {"a": 1}}, 400, "logit_bias.a", "pattern"),
    (TEXT, {**P, "logit_bias": {"999999": 1}}, 400, "logit_bias", "vocabulary"),
    (TEXT, {**P, "stop": ""}, 400, "stop", "at least 1"),
    (TEXT, {**P, "stop": ["a"] * 17}, 400, "stop", "at most 16"),
    (TEXT, {**P, "stop": ["a" * 300]}, 400, "stop[0]", "at most 256"),
    (TEXT, {**P, "stop": 3}, 400, "stop", "string"),
    (TEXT, {**P, "stream": "yes"}, 400, "stream", "boolean"),
    (TEXT, {**P, "stream_options": {"include_usage": True}}, 400, "stream_options", "without stream"),
    (TEXT, {**P, "suffix": "end"}, 400, "suffix", "not supported"),
    (TEXT, {**P, "best_of": 3}, 400, "best_of", "not supported"),
    (TEXT, {**P, "echo": True, "logprobs": 1}, 400, "echo", "leave one of them out"),
    (TEXT, {**P, "logprobs": 21}, 400, "logprobs", "less than"),
    (TEXT, {**P, "min_tokens": 9, "max_tokens": 3}, 400, None, "min_new_tokens = 9"),
    (TEXT, {**P, "min_tokens": 2, "guided_choice": ["a"]}, 400, "min_tokens", "ends where that does"),
    (TEXT, {**P, "guided_regex": "(("}, 400, None, "regular expression"),
    (TEXT, {**P, "guided_json": {"type": "wish"}}, 400, None, "JSON schema"),
    (TEXT, {**P, "guided_grammar": "start: x"}, 400, None, "grammar"),
    (TEXT, {**P, "guided_regex": "a", "guided_choice": ["a"]}, 400, None, "one thing"),
    (TEXT, {**P, "guided_regex": "a" * 70_000}, 400, None, "at most"),
    (TEXT, {**P, "guided_regex": "(a{1000}){1000}", "max_tokens": 40}, 400, None, "cannot be held to this"),
    (TEXT, {**P, "guided_grammar": f"start: {'b ' * 60}\nb: /(x{{150}}){{150}}/"}, 400, None, "ms a token"),
    (TEXT, {**P, "max_tokens": 2.0}, 200, None, ""),
    (CHAT, {**M, "messages": []}, 400, "messages", "at least 1"),
    (CHAT, {**M, "messages": [{"role": "king", "content": "a"}]}, 400, "messages[0].role", "'system'"),
    (CHAT, {**M, "messages": [{"role": "user"}]}, 400, None, "messages[0].content is missing"),
    (CHAT, {**M, "messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "string"),
    (CHAT, {**M, "messages": [{"role": "user", "content": "a", "x": 1}]}, 400, "messages[0].x", "no parameter"),
    (CHAT, {**M, "messages": [{"role": "user", "content": "a", "name": "b"}]}, 400, None, "leave it out"),
    (
        CHAT,
        {**M, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0].content[0].image_url",
        "no parameter",
    ),
    (CHAT, {**M, "top_logprobs": 2}, 400, "top_logprobs", "without logprobs"),
    (CHAT, {**M, "max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "leave one out"),
    (CHAT, {**M, "response_format": {"type": "xml"}}, 400, "response_format", "xml"),
    (CHAT, {**M, "tool_choice": "required"}, 400, "tool_choice", "no tools"),
    (
        CHAT,
        {**M, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        400,
        "tool_choice",
        "g",
    ),
    (
        CHAT,
        {**M, "tools": [{"type": "function", "function": {"name": "a b"}}]},
        400,
        "tools[0].function.name",
        "pattern",
    ),
    (CHAT, {**M, "functions": []}, 400, "functions", "not supported"),
    (CHAT, {**M, "store": True}, 400, "store", "False"),
    (CHAT, {**M, "store": 0}, 400, "store", "boolean"),
    (CHAT, {**M, "store": False, "max_tokens": 1}, 200, None, ""),
    (TEXT, {**P, "stream": True, "stream_options": {"include_obfuscation": 0.0}}, 400, OBFUSCATION, "boolean"),
    (CHAT, {**M, "chat_template_kwargs": {"thinking": True}}, 400, None, "not read by the chat template"),
    (REPLY, {"model": "chatty", "input": []}, 400, "input", "at least 1"),
    (
        REPLY,
        {"model": "chatty", "input": "a", "previous_response_id": "x"},
        400,
        "previous_response_id",
        "not supported",
    ),
    (REPLY, {"model": "chatty", "input": "a", "tools": [TOOL]}, 400, "tools", "at most 0"),
    ("/tokenize", {"model": "plain"}, 400, "prompt", "one of them"),
    ("/kept", {"model": "plain", "tokens": [1]}, 400, "model", "no levels"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "says"), BODIES)
def test_a_body_is_refused(
    web: httpx.Client, path: str, body: dict[str, Any], status: int, param: str | None, says: str
):
    reply = web.post(path, json=body)
    assert reply.status_code == status, reply.text
    if status != 200:
        error = refusal(reply)
        assert says in error["message"]
        assert error["param"] == param
        assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


MANY_DIGITS = [  # more than Python writes, in every kind of field
    b"%b%b%b" % (before, b"9" * digits, after)
    for digits in (25, 5_000, 100_000)
    for before, after in (
        (b'"seed": ', b""),
        (b'"temperature": ', b""),
        (b'"stop": [', b"]"),
        (b'"logit_bias": {"1": ', b"}"),
        (b'"logit_bias": {"', b'": 1}'),
        (b'"wishes": ', b""),
        (b'"guided_json": {"type": ', b"}"),
        (b'"metadata": {"a": ', b"}"),
    )
]
RAW: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"null", 400),
    (b"\xff\xfe", 400),
    (b'{"model": "plain", "prompt": "\xff"}', 400),
    (b'{"model": "plain", "prompt": "\\ud800"}', 400),
    (b'{"model": "plain", "prompt": "a", "temperature": NaN}', 400),
    (b'{"model": "plain", "prompt": "a", "temperature": Infinity}', 400),
    (b'{"model": "plain", "prompt": "a", "temperature": 1e999}', 400),
    (b"[" * 100_000, 400),
    (b'{"a":' * 100_000, 400),
    (b'{"model": "plain", "prompt": "\\u0000\x7f", "max_tokens": 2}', 200),
    (b'{"model": "plain", "prompt": "a\x00b"}', 400),
    (b'{"model": "plain", "prompt": "' + b"x" * (1 << 20) + b'"}', 413),
    *((b'{"model": "plain", "prompt": "a", ' + one + b"}", 400) for one in MANY_DIGITS),
    (b'{"model": "' + b"x" * 5000 + b'", "prompt": "a"}', 400),
]


@pytest.mark.parametrize(("content", "status"), RAW, ids=range(len(RAW)))
def test_bytes_that_are_no_body(web: httpx.Client, content: bytes, status: int):
    reply = web.post(TEXT, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text
    if status != 200:
        refusal(reply)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v1/embeddings", {}, 404),
        ("POST", "/v1/audio/speech", {}, 404),
        ("GET", CHAT, {}, 405),
        ("DELETE", "/v1/models", {}, 405),
        ("GET", "/v1/models/none", {}, 404),
        ("GET", "/v1/models/", {}, 404),
        ("GET", "/../../etc/passwd", {}, 404),
        ("GET", "/%00", {}, 404),
        ("POST", TEXT, {"content-type": "text/plain"}, 415),
        ("POST", TEXT, {}, 415),
        ("GET", "/v1/models", {"host": "evil.example"}, 403),
        ("GET", "/v1/models", {"origin": "https://evil.example"}, 403),
        ("GET", "/v1/models", {"host": "localhost:1"}, 200),
        ("GET", "/v1/models", {"host": "[::1]:80"}, 200),
    ],
)
def test_requests_that_are_not_for_this_server(
    web: httpx.Client, method: str, path: str, headers: dict[str, str], status: int
):
    reply = web.request(method, path, headers=headers)
    assert reply.status_code == status, reply.text
    if status != 200:
        refusal(reply)


@pytest.mark.parametrize("size", [20_000, 900_000])
def test_a_long_prompt_is_refused_at_once(web: httpx.Client, size: int):
    """In far less than 100 ms on a free machine; three tries, since a busy one only ever adds to it."""
    content = json.dumps({"model": "plain", "prompt": "some words " * (size // 11)}).encode()
    times = list[float]()
    for _ in range(3):
        began = time.perf_counter()
        reply = web.post(TEXT, content=content, headers={"content-type": "application/json"})
        times.append(time.perf_counter() - began)
        assert refusal(reply)["code"] == "context_length_exceeded"
    assert min(times) < 0.1


def test_a_body_of_any_size_is_refused_before_it_is_there(web: httpx.Client, server: Running):
    """And a client that goes on to send it gets to read why."""
    with connected(server) as line:
        head = f"POST {TEXT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        began = time.perf_counter()
        line.sendall(f"{head}content-length: {10**11}\r\n\r\n{{".encode())
        assert line.recv(100).startswith(b"HTTP/1.1 413 ")
        assert time.perf_counter() - began < 1  # far less where nobody else computes
    reply = web.post(TEXT, content=b"x" * (8 << 20), headers={"content-type": "application/json"})
    assert (reply.status_code, refusal(reply)["code"]) == (413, "body_too_large")


def test_a_key_is_asked_for_and_nothing_without_it(tmp_path_factory: pytest.TempPathFactory):
    """Also: requests beyond the queue, and pages of another origin where they may ask."""
    folder = folders(tmp_path_factory.mktemp("models"))["plain"]
    few = EngineOptions(running=1, waiting=1)
    origin = {"origin": "https://there.example"}
    with running([folder], key=KEY, engine=few, origins=(origin["origin"],)) as server, client(server) as web:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": KEY},
            {"authorization": "Bearer ä".encode()},
        ):
            for path in ("/v1/models", "/metrics", "/status", "/nowhere"):
                reply = web.get(path, headers=headers)
                assert (reply.status_code, refusal(reply)["code"]) == (401, "invalid_api_key")
        assert [web.get(path).status_code for path in ("/health", "/")] == [200, 200]
        web.headers["authorization"] = f"Bearer {KEY}"
        assert web.get("/v1/models", headers={"host": "a.name"}).status_code == 200
        assert web.get("/v1/models", headers=origin).headers["access-control-allow-origin"] == origin["origin"]
        asks = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        del web.headers["authorization"]
        assert web.options(TEXT, headers=asks).status_code == 200
        web.headers["authorization"] = f"Bearer {KEY}"
        reply = web.post(TEXT, json={"model": "plain", "prompt": "a", "n": 3})  # one runs at most, and one waits
        assert (reply.status_code, refusal(reply)["code"]) == (429, "queue_full")
        assert reply.headers["retry-after"] == "1"
        assert web.post(TEXT, json={"model": "plain", "prompt": "a"}).status_code == 200
        assert server.models[0].engine.idle
