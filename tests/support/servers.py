"""A server in this process, on a thread of its own, or in a process of its own, and the models that it serves."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import chats
import httpx
from model_folders import small

from longwave.checkpoints import save
from longwave.serving.server import Running, Setup, serve

WINDOW = 512
# As Qwen's: tools in the system's turn, calls in tags, results in turns of their own.
TOOLS = """\
{%- if tools %}{{ '<|start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}
{{- 'Call as <tool_call>{"name": .., "arguments": ..}</tool_call><|turn|>\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|start|>' + message.role + '\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function.name + call.function.arguments | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '<|turn|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""


def folders(place: Path) -> dict[str, Path]:
    """Tiny models with random weights: `plain` without a chat template, `chatty` with one, `levels` a SUBLLM."""
    made = {"plain": ("2F", None), "chatty": ("2F", TOOLS), "levels": ("F subllm(0.5: 2F) F", TOOLS)}
    for name, (layout, template) in made.items():
        tokenizer = chats.tokenizer(template)
        save(small(layout, vocab_size=tokenizer.vocab_size, context_window=WINDOW), place / name, tokenizer=tokenizer)
    return {name: place / name for name in made}


@contextmanager
def running(models: Sequence[Path], **options: Any) -> Iterator[Running]:
    """A server of these folders, which ends with the block."""
    told, begun = list[Running](), threading.Event()

    def tell(server: Running) -> None:
        told.append(server)
        begun.set()

    setup = Setup(folders=list(map(str, models)), port=0, device="cpu", **options)
    thread = threading.Thread(target=serve, args=(setup, tell), daemon=True)
    thread.start()
    try:
        assert begun.wait(60), "the server did not begin"
        yield told[0]
    finally:
        if told:
            told[0].stop()
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"


@dataclass(frozen=True)
class Apart:
    """A server in a process of its own, as a user starts it."""

    url: str
    process: subprocess.Popen[str]

    @property
    def memory(self) -> int:
        """Bytes of the process that are in memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@contextmanager
def running_apart(models: Sequence[Path], *words: object) -> Iterator[Apart]:
    """`longwave serve` of these folders, which has to end in order with the block."""
    command = [sys.executable, "-m", "longwave", "serve", *map(str, models), "--port", "0", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None, "the server did not begin"
            yield Apart(found[0], process)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


class Address(Protocol):
    """A server, wherever it runs."""

    @property
    def url(self) -> str: ...


def figures(web: httpx.Client) -> list[dict[str, int]]:
    """What the engines of a server count, in the order of its models."""
    return list(web.get("/status").json()["models"].values())


def client(server: Address, **options: Any) -> httpx.Client:
    """A plain HTTP client of a server."""
    return httpx.Client(base_url=server.url, timeout=60, trust_env=False, **options)


def connected(server: Address) -> socket.socket:
    """A bare connection to a server."""
    place = urlsplit(server.url)
    return socket.create_connection((str(place.hostname), place.port or 80), timeout=30)
