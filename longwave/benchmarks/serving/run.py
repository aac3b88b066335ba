"""A load, asked of one server after the other, and what each of them made of it."""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlsplit

from longwave.benchmarks.serving import client
from longwave.benchmarks.serving.load import Arrival, Load, schedule, words
from longwave.errors import MachineError, UserError, one_line

_PROBE = 30  # words of the request that tells how many tokens a word has
_RANKS = (50, 95, 99)


@dataclass(frozen=True)
class Target:
    """A server and one of its models. tokens_per_word: of the text that it is asked about. ignores_ends: whether it can
    be told to write on beyond an end token, so that answers have their length.
    """

    url: str
    model: str
    tokens_per_word: float
    ignores_ends: bool


@dataclass(frozen=True)
class Measured:
    """What a server made of a load. Times in seconds; percentiles by their rank.

    tokens_per_second: new tokens, from the first arrival to the last end. first_token: from a request's time to the
    first piece of its answer. per_token: of each answer, the mean time between two of its tokens. failures: requests
    by status, 0 where no answer came.
    """

    url: str
    model: str
    requests: int
    answered: int
    failures: dict[str, int]
    seconds: float
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    requests_per_second: float
    first_token: dict[str, float]
    per_token: dict[str, float]
    whole: dict[str, float]
    error: str = ""


def target_of(url: str, key: str | None, timeout: float = 60.0) -> Target:
    """Looks at a server: `http://host:port/v1`, or with `#MODEL` behind it one of its models.

    Raises UserError for an address at which nothing answers as OpenAI's does.
    """
    base, model = urldefrag(url if "://" in url else f"http://{url}")
    if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).hostname:
        raise UserError(f"url = {url!r}: give http://HOST:PORT/v1, with #MODEL behind it for one of several models")
    base = base.rstrip("/") if urlsplit(base).path.strip("/") else f"{base.rstrip('/')}/v1"
    if not model:
        listed = _plain(base, key, "/models", None, timeout)
        model = str(next(iter(listed.get("data") or [{}])).get("id", ""))
    body = {"model": model, "prompt": words(_PROBE, 0), "max_tokens": 1, "stream": False}
    try:
        reply, ignores = _plain(base, key, "/completions", {**body, "ignore_eos": True}, timeout), True
    except UserError:
        reply, ignores = _plain(base, key, "/completions", body, timeout), False
    read = (reply.get("usage") or {}).get("prompt_tokens") or _PROBE
    return Target(base, model, read / _PROBE, ignores)


def _plain(base: str, key: str | None, path: str, body: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
    """The JSON that a server answers with."""
    try:
        with closing(client.asked(base, key, path, body, timeout)) as reply:
            content = reply.read(1 << 24)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{base}{path}: no answer ({one_line(error)})") from None
    if reply.status != 200:
        raise UserError(f"{base}{path}: status {reply.status}, {one_line(content[:300].decode('utf-8', 'replace'))}")
    try:
        found = json.loads(content)
    except ValueError:
        raise UserError(f"{base}{path}: the answer is not JSON; give the address of an API, .../v1") from None
    return found if isinstance(found, dict) else {}


def run_load(target: Target, load: Load, key: str | None, timeout: float, told: Callable[[int], None]) -> Measured:
    """Asks a server, from a process of its own. told: called with the number of requests that have ended."""
    requests = [{"at": one.at, "body": _body(target, one)} for one in schedule(load)]
    job = {"url": target.url, "key": key, "timeout": timeout, "requests": requests}
    words = [sys.executable, "-P", str(Path(client.__file__))]
    found = list[dict[str, Any]]()
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        for line in process.stdout:
            found.append(json.loads(line))
            told(len(found))
    if process.returncode or len(found) != len(requests):
        raise MachineError(f"the process that asks ended with status {process.returncode}")
    return summary(target, found)


def _body(target: Target, arrival: Arrival) -> dict[str, Any]:
    prompt = words(max(1, round(arrival.prompt_tokens / target.tokens_per_word)), arrival.key)
    body: dict[str, Any] = {"model": target.model, "prompt": prompt, "max_tokens": arrival.answer_tokens}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    return body | ({"ignore_eos": True} if target.ignores_ends else {})


def summary(target: Target, found: Sequence[dict[str, Any]]) -> Measured:
    """The figures of all requests."""
    good = [one for one in found if one["status"] == 200 and one["pieces"]]
    bad = [one for one in found if one not in good]
    seconds = max((one["ended"] for one in good), default=0.0) - min((one["at"] for one in found), default=0.0)
    new = [(one["usage"] or {}).get("completion_tokens") or len(one["pieces"]) for one in good]
    spans = [
        (one["pieces"][-1] - one["pieces"][0]) / (count - 1) for one, count in zip(good, new, strict=True) if count > 1
    ]
    return Measured(
        url=target.url,
        model=target.model,
        requests=len(found),
        answered=len(good),
        failures=dict(Counter(str(one["status"]) for one in bad)),
        seconds=seconds,
        prompt_tokens=sum((one["usage"] or {}).get("prompt_tokens") or 0 for one in good),
        new_tokens=sum(new),
        tokens_per_second=sum(new) / seconds if seconds > 0 else 0.0,
        requests_per_second=len(good) / seconds if seconds > 0 else 0.0,
        first_token=percentiles([one["pieces"][0] - one["at"] for one in good]),
        per_token=percentiles(spans),
        whole=percentiles([one["ended"] - one["at"] for one in good]),
        error=one_line(bad[0].get("error", "no piece of an answer came")) if bad else "",
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 95th and 99th percentile, by linear interpolation; nothing of no values."""
    if not values:
        return {}
    ranks = statistics.quantiles([*values, *values[:1]] if len(values) == 1 else values, n=100, method="inclusive")
    return {f"p{rank}": ranks[rank - 1] for rank in _RANKS}
