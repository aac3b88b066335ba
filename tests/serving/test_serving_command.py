"""`longwave serve` as a command: what it refuses in one line, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from servers import folders

from longwave.cli import serve as verb
from longwave.serving.served import names_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders(tmp_path_factory.mktemp("models"))


def test_what_cannot_be_served_is_one_line(refuses, made: dict[str, Path], tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refuses("serve", made["plain"], "--port", taken.getsockname()[1], says=["another program listens there"])
    refuses("serve", says=["give a model folder"])
    refuses("serve", tmp_path, "--port", "0", says=[str(tmp_path)])
    refuses("serve", made["plain"], made["plain"], "--port", "0", says=["two models have the name plain"])
    refuses("serve", made["plain"], "--name", "a b", says=["letters, digits"])
    refuses("serve", made["plain"], "--name", "a", "--name", "b", says=["2 names for 1 models"])
    refuses("serve", made["plain"], "--port", "65536", says=["port = 65536"])
    refuses("serve", made["plain"], "--host", "no.such.host.example", says=["no.such.host.example"])
    refuses("serve", made["plain"], "--running", "0", says=["running = 0"])
    refuses("serve", made["plain"], "--grace", "-1", says=["grace_seconds = -1"])
    refuses("serve", made["plain"], "--max-body", "lots", says=["lots"])
    refuses("serve", made["plain"], "--api-key", "", says=[verb.KEY])
    refuses("serve", made["plain"], "--port", "0", "--draft", tmp_path, says=[str(tmp_path)])


def test_a_missing_extra_is_one_line(refuses, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refuses("serve", made["plain"], says=["uvicorn is not installed; pip install 'longwave[serve]'"])


def test_names_are_those_of_folders_and_runs(tmp_path: Path):
    (tmp_path / "run/model").mkdir(parents=True)
    assert names_of([str(tmp_path / "run/model"), "other/", "org/hub"]) == ["run", "other", "hub"]
    assert names_of(["a", "b"], ["first"]) == ["first", "b"]


def test_a_server_ends_in_order(made: dict[str, Path]):
    """SIGTERM: no new request, the running one is answered to its end, the process ends with 0."""
    words = [sys.executable, "-m", "longwave", "serve", str(made["plain"]), "--port", "0", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        body = {"model": "plain", "prompt": "hello", "max_tokens": 30, "ignore_eos": True, "stream": True}
        with (
            httpx.Client(base_url=found[0], trust_env=False, timeout=60) as web,
            web.stream("POST", "/v1/completions", json=body) as stream,
        ):
            lines = stream.iter_lines()
            assert next(lines).startswith("data: {")
            threading.Timer(0.0, process.send_signal, (signal.SIGTERM,)).start()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) > 10
        began = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - began < 10
        assert '"models": ["plain"]' in process.stdout.read()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{found[0]}/health", trust_env=False)
    finally:
        process.kill()
        process.communicate()
