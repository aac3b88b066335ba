"""Conversations out of files, into shards and windows: what is read, what is refused, what is learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import chats
import numpy as np
import pytest
from chats import talk
from hypothesis import given
from hypothesis import strategies as st

from longwave.data import shards
from longwave.data.chat import DEFAULT_TEMPLATE, ChatEncoder, LossOn
from longwave.data.documents import Conversation
from longwave.data.packed import NO_TARGET, PackedTokens, WindowSampler
from longwave.data.prepared import PreparedInfo, SplitTokens, iter_documents
from longwave.data.shards import prepare
from longwave.data.sources import documents
from longwave.data.splitting import split_held_out
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError

TOKENIZER = chats.tokenizer(chats.TEMPLATES["reasoning"])
SIZES = [3, 1, 20, 0, 7, 2, 31, 5, 4, 11, 90, 1, 8]


def corpus() -> Iterator[Conversation]:
    """Conversations of one to three turns; the fifth has no answer."""
    for number, size in enumerate(SIZES):
        contents = [f"{number}?", "word " * size, "and", "more " * size, "then", "less " * (size // 2)]
        messages = talk(*contents[: 1 if number == 4 else 2 * (number % 3) + 2])
        yield Conversation(f"c:{number}", " ".join(message["content"] for message in messages), tuple(messages))


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, text_field: str | None = None) -> list[Any]:
    return [getattr(one, "messages", one.text) for one in documents(path, text_field)]


# --- files ------------------------------------------------------------------------------------------------------------


def test_every_form_of_a_row_holds_the_same_conversation(tmp_path: Path):
    turns = talk("hi", "hello", "more", "no", system="be kind")
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    path = write(
        tmp_path / "chat.jsonl",
        {"messages": turns, "id": 7},
        {"conversations": [{"from": names[one["role"]], "value": one["content"]} for one in turns]},
        {"conversations": turns},
        {"prompt": turns[:-1], "completion": turns[-1:]},
    )
    assert read(path) == [tuple(turns)] * 4
    assert read(write(tmp_path / "pair.jsonl", {"prompt": "hi", "completion": "hello"})) == [tuple(talk("hi", "hello"))]


def test_fields_that_are_null_are_left_out_and_others_kept(tmp_path: Path):
    message = {"role": "user", "content": "a", "tool_calls": None, "name": "me"}
    [[found]] = read(write(tmp_path / "a.jsonl", {"messages": [message]}))
    assert found == {"role": "user", "content": "a", "name": "me"}


def test_a_folder_of_conversations(tmp_path: Path):
    write(tmp_path / "b.jsonl", {"messages": talk("1", "2")}, {"prompt": "3", "completion": "4"})
    write(tmp_path / "sub" / "a.jsonl", {"messages": talk("5")})
    found = list(documents(tmp_path))
    assert [one.name for one in found] == ["b.jsonl:1", "b.jsonl:2", "sub/a.jsonl:1"]
    assert [one.text for one in found] == ["1\n2", "3\n4", "5"]


def test_a_text_field_that_is_asked_for_wins(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", {"text": "as text", "messages": talk("a", "b")})
    assert read(path) == [tuple(talk("a", "b"))]
    assert read(path, "text") == ["as text"]


@pytest.mark.parametrize("first", ["chat", "text"])
def test_texts_and_conversations_are_not_mixed(tmp_path: Path, first: str):
    rows = [{"messages": talk("a", "b")}, {"text": "a"}]
    write(tmp_path / "one" / "a.jsonl", *(rows if first == "chat" else rows[::-1]))
    write(tmp_path / "two" / ("a.jsonl" if first == "chat" else "b.jsonl"), rows[0])
    (tmp_path / "two" / ("b.md" if first == "chat" else "a.md")).write_text("a text")
    kinds = ("a text, yet .* is a conversation", "a conversation, yet .* is a text")
    for folder, name in (("one", "a.jsonl:2"), ("two", "b.md" if first == "chat" else "b.jsonl:1")):
        with pytest.raises(UserError, match=f"{name}: {kinds[first == 'text']}; prepare the two apart"):
            list(documents(tmp_path / folder))


BAD = {
    '{"messages": []}': "messages: a list of one message or more",
    '{"messages": "hi"}': "messages: a list of one message or more",
    '{"messages": ["hi"]}': r"messages\[0\] is a str, not an object",
    '{"messages": [{"role": "bot", "content": "a"}]}': r"messages\[0\].role = 'bot': use one of system, devel",
    '{"messages": [{"content": "a"}]}': r"messages\[0\].role = None",
    '{"messages": [{"role": ["user"], "content": "a"}]}': r"messages\[0\].role = \['user'\]",
    '{"messages": [{"role": "user", "content": ["a"]}]}': r"messages\[0\].content is a list; a string is expected",
    '{"messages": [{"role": "user"}]}': r"messages\[0\].content is a NoneType",
    '{"messages": [{"role": "user", "content": "\\ud83d"}]}': "not a row of JSON in UTF-8",
    '{"messages": [{"role": "user", "content": "a", "name": "\\ud83d"}]}': "not a row of JSON in UTF-8",
    '{"conversations": [{"from": "alien", "value": "a"}]}': r"conversations\[0\].role = 'alien'",
    '{"conversations": {"from": "human"}}': "conversations: a list of one message or more",
    '{"conversations": [3]}': r"conversations\[0\] is a int",
    '{"prompt": "a", "completion": 3}': r"prompt and completion\[1\].content is a int",
    '{"prompt": "a"}': "no string field 'text', nor messages, conversations, prompt and completion, or instr",
    '["messages"]': "a list; each row must be a JSON object",
    '{"messages": [': "not a row of JSON",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str):
    path = write(tmp_path / "chat.jsonl", {"messages": talk("a", "b")})
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(UserError, match=rf"chat\.jsonl:3: {BAD[line]}") as caught:
        list(documents(path))
    assert "\n" not in str(caught.value)


def test_a_lone_conversation_is_not_cut_in_two():
    lone = next(corpus())
    assert list(split_held_out([lone], 0.0)) == [(lone, False)]
    with pytest.raises(UserError, match="c:0 is the only conversation"):
        list(split_held_out([lone], 0.1))


# --- shards -----------------------------------------------------------------------------------------------------------


def stored(held_out: bool, loss_on: LossOn = "assistant") -> list[tuple[list[int], list[bool]]]:
    """The documents of one split as they should be stored, and which of their ids are learned."""
    encoder = ChatEncoder(TOKENIZER, loss_on)
    found = []
    for conversation, out in split_held_out(corpus(), 0.3):
        for one in encoder.encode([conversation])[0] if out == held_out else []:  # type: ignore[list-item]
            spans = [(0, len(one.ids))] if one.learned is None else one.learned
            found.append((one.ids, [any(a <= at < b for a, b in spans) for at in range(len(one.ids))]))
    return found


@pytest.fixture(scope="module", params=[(7, "assistant"), (64, "assistant"), (1 << 28, "assistant"), (64, "all")])
def prepared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, LossOn]:
    """The corpus in shards that documents and answers cross, or in one; read only."""
    size, loss_on = request.param
    folder = tmp_path_factory.mktemp("chat") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", size)
        patch.setattr(shards, "_CHUNK_DOCUMENTS", 3)
        prepare(corpus, folder, tokenizer=TOKENIZER, held_out=0.3, loss_on=loss_on)
    return folder, loss_on


def test_every_conversation_is_stored_with_its_answers(prepared: tuple[Path, LossOn]):
    folder, loss_on = prepared
    info = PreparedInfo.read(folder)
    for split, held_out in (("train", False), ("held_out", True)):
        expected = stored(held_out, loss_on)
        assert [tokens.tolist() for tokens in iter_documents(folder, split)] == [ids for ids, _ in expected]
        tokens = SplitTokens(folder, split)
        learned = list(chain(*(mask for _, mask in expected)))
        assert tokens.learned(0, len(tokens)).tolist() == learned
        assert tokens.learned(5, 31).tolist() == learned[5:31]
        assert info.split(split).documents == len(expected)
        assert info.split(split).targets == sum(learned)
    assert (info.kind, info.left_out) == ("chat", 1 if loss_on == "assistant" else 0)
    assert Tokenizer.load(folder).chat_template == TOKENIZER.chat_template


def test_bytes_are_those_of_the_answers(prepared: tuple[Path, LossOn]):
    folder, loss_on = prepared
    said = 0
    for split, held_out in (("train", False), ("held_out", True)):
        for ids, mask in stored(held_out, loss_on):
            said += len(TOKENIZER.decode([id for id, learned in zip(ids, mask, strict=True) if learned]).encode())
        assert PreparedInfo.read(folder).split(split).bytes == said
        said = 0


def test_a_tokenizer_and_a_template_come_with_the_data(tmp_path: Path):
    info = prepare(corpus, tmp_path / "data", vocab_size=270, held_out=0.3)
    kept = Tokenizer.load(tmp_path / "data")
    assert (info.vocab_size, kept.chat_template, kept.fingerprint) == (270, DEFAULT_TEMPLATE, info.tokenizer)
    bare = prepare(corpus, tmp_path / "bare", tokenizer=chats.tokenizer(None, eos=chats.EOS), held_out=0.3)
    assert Tokenizer.load(tmp_path / "bare").chat_template == DEFAULT_TEMPLATE
    assert bare.tokenizer == TOKENIZER.fingerprint


def test_the_same_conversations_give_the_same_bytes(tmp_path: Path):
    for name in "ab":
        prepare(corpus, tmp_path / name, vocab_size=270, held_out=0.3)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert [str(file) for file in files if file.name == "learned.bin"] == ["held_out/learned.bin", "train/learned.bin"]


def test_what_cannot_be_prepared_is_refused_and_leaves_nothing(tmp_path: Path):
    unanswered = lambda: iter([Conversation(f"c:{n}", "a", tuple(talk("a"))) for n in range(3)])  # noqa: E731
    with pytest.raises(UserError, match="nothing to learn: 3 of the conversations have no answer"):
        prepare(unanswered, tmp_path / "data", tokenizer=TOKENIZER, held_out=0.0)
    with pytest.raises(UserError, match="loss_on = all: has no effect on texts"):
        prepare(lambda: iter([]) if False else documents(Path(__file__)), tmp_path / "data", loss_on="all")
    with pytest.raises(UserError, match="names no eos_token"):
        prepare(corpus, tmp_path / "data", tokenizer=chats.tokenizer(DEFAULT_TEMPLATE, eos=None), held_out=0.3)
    picky = "{% if messages | length > 3 %}{{ raise_exception('no') }}{% endif %}" + chats.TEMPLATES["chatml"]
    with pytest.raises(UserError, match="c:1: the chat template refuses the conversation: no"):
        prepare(corpus, tmp_path / "data", tokenizer=chats.tokenizer(picky), held_out=0.3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [0, 8])
def test_a_missing_or_cut_list_of_answers_is_refused(tmp_path: Path, cut: int):
    prepare(corpus, tmp_path / "data", tokenizer=TOKENIZER, held_out=0.3)
    path = tmp_path / "data" / "train" / "learned.bin"
    content = path.read_bytes()
    path.unlink()
    if cut:
        path.write_bytes(content[:-cut])
    with pytest.raises(UserError, match=r"learned\.bin"):
        PackedTokens(tmp_path / "data", "train", 64)


# --- windows ----------------------------------------------------------------------------------------------------------

Row = tuple[int, int, int]


def brute_force(stored: list[tuple[list[int], list[bool]]], window: int) -> list[list[Row]]:
    """Windows of (token, target, number of the document), a document whole, or its first `window` rows."""
    windows: list[list[Row]] = []
    for number, (ids, mask) in enumerate(stored):
        ahead = zip([*ids[1:], 0], [*mask[1:], False], strict=True)
        rows = [
            (id, target if learned else NO_TARGET, number) for id, (target, learned) in zip(ids, ahead, strict=True)
        ]
        if not windows or len(windows[-1]) + len(rows) > window:
            windows.append([])
        windows[-1] += rows[:window]
    return windows


@pytest.mark.parametrize("window", [20, 64, 150, 100_000])
def test_windows_hold_whole_conversations(prepared: tuple[Path, LossOn], window: int):
    folder, loss_on = prepared
    for split, held_out in (("train", False), ("held_out", True)):
        expected = brute_force(stored(held_out, loss_on), window)
        packed = PackedTokens(folder, split, window)
        assert len(packed) == len(expected)
        order = [*reversed(range(len(packed))), 0]
        batch, rows = packed.batch(order), list(chain(*(expected[number] for number in order)))
        assert batch.tokens.tolist() == [token for token, _, _ in rows]
        assert batch.targets.tolist() == [target for _, target, _ in rows]
        assert batch.windows == tuple(len(expected[number]) for number in order)
        assert batch.runs == tuple(chain(*(runs(expected[number]) for number in order)))
        long = sum(len(ids) > window for ids, _ in stored(held_out, loss_on))
        assert [note.split(": ")[1].split()[0] for note in packed.notes()] == ([str(long)] if long else [])


def runs(window: list[Row]) -> list[int]:
    owners = [owner for _, _, owner in window]
    borders = [0, *(row for row in range(1, len(owners)) if owners[row] != owners[row - 1]), len(owners)]
    return [end - start for start, end in pairwise(borders)]


@given(st.integers(1, 200), st.integers(0, 3))
def test_an_epoch_has_every_conversation_once(prepared_once: Path, window: int, seed: int):
    packed = PackedTokens(prepared_once, "train", window + 12)
    sampler = WindowSampler(len(packed), seed)
    batch = packed.batch(range(len(packed)), sampler)
    expected = [ids[: window + 12] for ids, _ in stored(held_out=False)]
    pieces = np.split(batch.tokens.numpy(), np.cumsum(batch.runs)[:-1])
    assert sorted(piece.tolist() for piece in pieces) == sorted(expected)


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "data"
    prepare(corpus, folder, tokenizer=TOKENIZER, held_out=0.3)
    return folder


def test_a_window_without_anything_to_learn_is_refused(prepared_once: Path):
    for window, says in {
        0: "1 token or more",
        -3: "1 token or more",
        3: "every answer in .*train begins beyond it",
    }.items():
        with pytest.raises(UserError, match=f"window = {window}: {says}"):
            PackedTokens(prepared_once, "train", window)


def test_conversations_too_large_for_any_machine_are_refused_by_name(tmp_path: Path):
    long = write(tmp_path / "long.jsonl", {"messages": talk("a", "b" * (2 << 20))})
    many = write(tmp_path / "many.jsonl", {"messages": talk(*"ab" * 600)})
    for path, says in (
        (long, "1: a conversation of 2,097,154 characters"),
        (many, "1: a conversation of 1,200 messages"),
    ):
        with pytest.raises(UserError, match=rf"{path.name}:{says}"):
            prepare(path, tmp_path / "data", tokenizer=TOKENIZER, held_out=0.0)
    enclosed = chats.tokenizer(chats.TEMPLATES["enclosed"])
    assert prepare(many, tmp_path / "data", tokenizer=enclosed, held_out=0.0).documents == 1
