"""The process that asks: one thread for each request in flight, and nothing of longwave that takes long to import.

It reads a job as JSON from stdin and writes a line of JSON for each request: when it was sent, when each piece of its
answer came, and what went wrong.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit


def connect(url: str, timeout: float) -> http.client.HTTPConnection:
    """A connection to a server."""
    place = urlsplit(url)
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    return kind(place.hostname or "localhost", place.port, timeout=timeout)


def asked(
    url: str, key: str | None, path: str, body: dict[str, Any] | None, timeout: float
) -> http.client.HTTPResponse:
    """The reply of a server. OSError and HTTPException where there is none."""
    headers = {"content-type": "application/json", "connection": "close"} | (
        {"authorization": f"Bearer {key}"} if key else {}
    )
    connection = connect(url, timeout)
    content = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", urlsplit(url).path.rstrip("/") + path, content, headers)
    return connection.getresponse()


def events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The data of server-sent events."""
    for line in reply:
        if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
            yield json.loads(data)


def measure(job: dict[str, Any], request: dict[str, Any], began: float) -> dict[str, Any]:
    """Sends one request at its time, and notes when what comes: seconds from the beginning of the load."""
    time.sleep(max(0.0, began + request["at"] - time.perf_counter()))
    found: dict[str, Any] = {"at": request["at"], "sent": time.perf_counter() - began, "pieces": [], "usage": None}
    try:
        with closing(asked(job["url"], job["key"], "/completions", request["body"], job["timeout"])) as reply:
            if reply.status != 200:
                return found | {"status": reply.status, "error": reply.read(2000).decode("utf-8", "replace")}
            _note(reply, found, began)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return found | {"status": 0, "error": f"{type(error).__name__}: {error}"}
    return found | {"status": 200, "ended": time.perf_counter() - began}


def _note(reply: http.client.HTTPResponse, found: dict[str, Any], began: float) -> None:
    for event in events(reply):
        if "error" in event:
            raise ValueError(str(event["error"])[:300])
        if event.get("choices"):
            found["pieces"].append(time.perf_counter() - began)
        found["usage"] = event.get("usage") or found["usage"]


def main() -> None:
    """Runs a job to its end."""
    job, lock, began = json.load(sys.stdin), threading.Lock(), time.perf_counter() + 0.2

    def run(request: dict[str, Any]) -> None:
        found = measure(job, request, began)
        with lock:
            print(json.dumps(found), flush=True)

    threads = [threading.Thread(target=run, args=(request,)) for request in job["requests"]]
    for thread, request in zip(threads, job["requests"], strict=True):
        time.sleep(max(0.0, began + request["at"] - 0.1 - time.perf_counter()))  # a thread waits for a moment only
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
