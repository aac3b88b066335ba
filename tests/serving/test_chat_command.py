"""`longwave chat`, on a pipe and in a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import folders

import longwave as lw
from longwave.data.chat import Chat


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders(tmp_path_factory.mktemp("models"))


def talk(longwave, monkeypatch: pytest.MonkeyPatch, folder: Path, *lines: str, **options: object):
    """A conversation on a pipe."""
    reader, writer = os.pipe()
    os.write(writer, "".join(f"{line}\n" for line in lines).encode())
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}={value}",)]
        return longwave("chat", folder, "--max-new-tokens", "6", "--json", *words)


def test_turns_are_those_of_the_template(longwave, monkeypatch: pytest.MonkeyPatch, made: dict[str, Path]):
    result = talk(longwave, monkeypatch, made["chatty"], "hello", "", "and now?", system="Be brief.")
    model = lw.load(made["chatty"])
    assert model.tokenizer is not None
    chat, messages = Chat(model.tokenizer), [{"role": "system", "content": "Be brief."}]
    for turn in result.json["turns"]:
        messages.append({"role": "user", "content": turn["said"]})
        ids = chat.prompt(messages)
        assert len(ids) > 10
        messages.append({"role": "assistant", "content": turn["answered"]})
    assert [turn["said"] for turn in result.json["turns"]] == ["hello", "and now?"]
    first = lw.generate(model, "hello", chat=True, max_new_tokens=6)
    alone = talk(longwave, monkeypatch, made["chatty"], "hello").json["turns"]
    assert [turn["answered"] for turn in alone] == [first]


def test_commands(longwave, monkeypatch: pytest.MonkeyPatch, made: dict[str, Path]):
    lines = ["hello", "/retry", "/undo", "hello", "/reset", "hello", "/exit", "never said"]
    turns = talk(longwave, monkeypatch, made["chatty"], *lines).json["turns"]
    assert [turn["said"] for turn in turns] == ["hello"] * 4
    assert len({turn["answered"] for turn in turns}) == 1  # each of them began the conversation
    drawn = talk(longwave, monkeypatch, made["chatty"], "hello", "/set temperature 1.5", "/set seed 7", "/retry")
    first, second = drawn.json["turns"]
    assert first["answered"] != second["answered"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/wish", "no command /wish"),
        ("/undo", "nothing was said yet"),
        ("/set", "/set : one of temperature"),
        ("/set temperature hot", "a number is expected"),
        ("/set temperature -1", "temperature = -1.0"),
        ("/set top_k 3", "no effect at temperature = 0"),
        ("/set max_new_tokens 0", "1 or more"),
        ("word " * 3000, "context_window"),
        ("/help", "/retry"),
    ],
)
def test_a_mistake_does_not_end_a_conversation(
    longwave, monkeypatch: pytest.MonkeyPatch, made: dict[str, Path], line: str, says: str
):
    result = talk(longwave, monkeypatch, made["chatty"], line, "hello")
    assert says in result.err
    assert [turn["said"] for turn in result.json["turns"]] == ["hello"]


def test_a_model_without_a_template_is_told_and_continues_lines(
    longwave, refuses, monkeypatch: pytest.MonkeyPatch, made: dict[str, Path]
):
    refuses("chat", made["plain"], says=["no chat template; --plain"])
    refuses("chat", made["plain"], "--top-p", "2", says=["top_p = 2"])
    refuses("chat", made["plain"], "--plain", "--max-new-tokens", "0", says=["max_new_tokens = 0"])
    monkeypatch.setattr(sys, "argv", [])
    reader, writer = os.pipe()
    os.write(writer, b"the user\nsaid\n")
    os.close(writer)
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        turns = longwave("chat", made["plain"], "--plain", "--max-new-tokens", "5", "--json").json["turns"]
    model = lw.load(made["plain"])
    first = lw.generate(model, "the user", max_new_tokens=5)
    assert [turn["answered"] for turn in turns] == [
        first,
        lw.generate(model, f"the user{first}\nsaid", max_new_tokens=5),
    ]


def test_an_interrupt_ends_the_answer_and_not_the_program(made: dict[str, Path]):
    """In a terminal of its own."""
    words = [sys.executable, "-m", "longwave", "chat", str(made["chatty"]), "--max-new-tokens", "400"]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    process = subprocess.Popen(
        words,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=environment,
        preexec_fn=heeds_interrupts,
    )
    os.close(theirs)
    try:
        until(ours, "> ")
        os.write(ours, b"hello\n")
        until(ours, "hello")
        time.sleep(0.3)  # within an answer of seconds
        process.send_signal(signal.SIGINT)
        until(ours, "\r\n> ")
        until(ours, "Ctrl-D ends", lambda: process.send_signal(signal.SIGINT))  # at the prompt
        os.write(ours, b"/exit\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def heeds_interrupts() -> None:
    """As a shell starts a program that it waits for; tests that run in the background inherit that none are heeded."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until(terminal: int, says: str, doing: Callable[[], None] = lambda: None) -> None:
    """Reads what a terminal shows until it shows this. doing: what is done now and then meanwhile.

    A signal that comes between a prompt and the reading of a line waits for the next one.
    """
    shown, end = b"", time.monotonic() + 60
    while says.encode() not in shown:
        doing()
        while not (ready := select.select([terminal], [], [], 1)[0]):
            assert time.monotonic() < end, shown
            doing()
        assert ready
        shown += os.read(terminal, 1 << 16)
