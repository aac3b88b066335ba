"""Rows as people publish them: every key is used, reaches the template, is a label, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chats
import pytest
from chats import TEMPLATES, talk

from longwave.data.chat import Chat, ChatEncoder
from longwave.data.documents import Conversation
from longwave.data.prepared import SplitTokens
from longwave.data.shards import prepare
from longwave.data.sources import documents
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError

USER, GOOD, BAD = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}, "a bad answer"
PAIR = [USER, GOOD]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = [{"type": "function", "function": {"name": "look", "arguments": {"what": None}}}]
THINK = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
# Reads tools, a setting, reasoning, names, and calls; a macro with a parameter of a variable's name comes first.
RICH = (
    "{% macro listed(tools) %}{% for tool in tools %}[{{ tool | tojson }}]{% endfor %}{% endmacro %}"
    "{% if tools %}{% set system_message = listed(tools) %}{{ system_message }}{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }}"
    "{% if message.name %} {{ message['name'] }}{% endif %}{{ '\n' }}"
    "{% if message.role == 'assistant' %}" + THINK + "{% endif %}"
    "{% if message.get('reasoning_content') %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{% if 'tool_calls' in message %}"
    "{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}{% endif %}"
    "{{ message.content }}<|turn|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{{ '\n' }}" + THINK + "{% endif %}"
)
PLAIN = chats.tokenizer(TEMPLATES["chatml"])
TOOLS = chats.tokenizer(RICH)


def user(**more: Any) -> dict[str, Any]:
    return {**USER, **more}


def reply(**more: Any) -> dict[str, Any]:
    return {**GOOD, **more}


def chat(*messages: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"messages": list(messages) or PAIR, **keys}


def read(folder: Path, row: Any, tokenizer: Tokenizer, *ignore: str) -> tuple[str, str]:
    """The text that is stored of a row, special tokens as the tokenizer names them, and the text that is learned."""
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    [found] = documents(folder / "rows.jsonl", ignore=ignore)
    assert isinstance(found, Conversation)
    parts = ChatEncoder(tokenizer, "assistant").encode([found])[0]
    learned = [one.ids[start:stop] for one in parts for start, stop in one.learned or []]
    decode = tokenizer.twin().decode
    stored = decode([id for one in parts for id in one.ids], skip_special_tokens=False)
    return stored, "|".join(map(tokenizer.decode, learned))


NO_THOUGHT = {"enable_thinking": False}
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "good"}]
CALLING = {"role": "assistant", "tool_calls": CALL}
RESULT = {"role": "tool", "content": "7", "tool_call_id": "a"}
USED = {  # a row, what is stored of it, what is learned of it
    "OpenAI": (chat(tools=[TOOL]), '{"type": "function"', "good"),
    "tools as a string": (chat(tools=json.dumps([TOOL])), '{"type": "function"', "good"),
    "no tools": (chat(tools=[], system="", documents=None), "<|start|>user\nhi", "good"),
    "TRL": ({"prompt": [USER], "completion": [GOOD], "tools": [TOOL]}, '{"type": "function"', "good"),
    "TRL's settings": (chat(chat_template_kwargs=NO_THOUGHT), "<think></think>good", "good"),
    "a setting of a row": (chat(**NO_THOUGHT), "<think></think>good", "good"),
    "a name": (chat(user(name="Ann"), GOOD), "<|start|>user Ann\n", "good"),
    "reasoning": (chat(USER, reply(reasoning_content="so")), "<think>so</think>good", "so</think>good"),
    "a call": (chat(USER, CALLING), '"what": null', '"look"'),
    "a null content": (chat(USER, {**CALLING, "content": None}), "look", "look"),
    "a result": (chat(USER, reply(tool_calls=CALL), RESULT, GOOD), "<|start|>tool\n7", "good"),
    "axolotl's system": ({"conversations": SHAREGPT, "system": "be"}, "<|start|>system\nbe", "good"),
    "a system beside messages": (chat(system="be kind"), "<|start|>system\nbe kind<|turn|>", "good"),
    "Alpaca": ({"instruction": "add", "input": "1 2", "output": "3"}, "<|start|>user\nadd\n1 2<|turn|>", "3"),
    "Alpaca without input": ({"instruction": "add", "input": "", "output": "3"}, "user\nadd<|turn|>", "3"),
    "labels": (chat(id=1, source="x", prompt_id="y", Language="en", metadata={"a": 1}), "hi", "good"),
    "labels of a message": (chat(user(id="a"), reply(timestamp=1, model="m")), "hi", "good"),
    "a row that counts as 1": (chat(weight=1, train=True), "hi", "good"),
}


@pytest.mark.parametrize("name", USED)
def test_what_a_row_carries_reaches_the_template_or_is_a_label(name: str, tmp_path: Path):
    row, stored, learned = USED[name]
    text, answers = read(tmp_path, row, TOOLS)
    assert stored in text
    assert learned in answers


UNLEARNED = {
    "OpenAI and Mistral": [USER, reply(content=BAD, weight=0), USER, reply(weight=1)],
    "axolotl": [user(train=False), reply(content=BAD, train=False), USER, reply(train=True)],
    "ms-swift": [USER, reply(content=BAD, loss=False), USER, GOOD],
    "two that disagree": [USER, reply(content=BAD, weight=1, train=False), USER, GOOD],
    "the last": [USER, GOOD, USER, reply(content=BAD, weight=0)],
    "0.0": [USER, reply(content=BAD, weight=0.0), USER, reply(weight=1.0)],
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", UNLEARNED)
@pytest.mark.parametrize("system", [None, "be kind"])
def test_a_message_of_weight_0_is_seen_and_not_learned(name: str, template: str, system: str | None, tmp_path: Path):
    row = {"messages": UNLEARNED[name], "system": system if template != "instruct" else None}
    text, answers = read(tmp_path, row, chats.tokenizer(TEMPLATES[template]))
    assert "good" in answers
    assert BAD not in answers
    assert BAD in text or name == "the last"  # nothing is learned from what follows the last answer that is


def test_a_weight_changes_nothing_but_the_mask(tmp_path: Path):
    turns = talk("a", "b", "c", "d")
    plain, _ = read(tmp_path, {"messages": turns}, PLAIN)
    for first, second in ([1, 1], [1, 0], [0, 1]):
        weighed = [turns[0], {**turns[1], "weight": first}, turns[2], {**turns[3], "weight": second}]
        text, answers = read(tmp_path, {"messages": weighed}, PLAIN)
        assert answers == "|".join(["b"] * first + ["d"] * second)
        assert plain.startswith(text)


UNREAD = "not read by the chat template; leave it out, or pass it over"
SPANS = [{"begin_offset": 0, "end_offset": 1, "train": False}]
REFUSED: dict[str, tuple[Any, str]] = {
    "half a weight": (chat(USER, reply(weight=0.5)), r"messages\[1\].weight = 0.5: use 0, not learned, or 1"),
    "a weight in words": (chat(USER, reply(train="no")), r"messages\[1\].train = 'no': use 0"),
    "a list as weight": (chat(USER, reply(weight=[0])), r"messages\[1\].weight = \[0\]: use 0"),
    "a user to learn": (chat(user(train=True), GOOD), r"messages\[0\].train = True: only the assistant's"),
    "a row that counts less": (chat(weight=0), "weight = 0: a row counts as 1"),
    "axolotl's spans": (chat(USER, reply(train_detail=SPANS)), rf"messages\[1\]: train_detail: {UNREAD}"),
    "tools without a form": (chat(tools=[TOOL]), f"tools: {UNREAD}"),
    "functions": (chat(functions=[TOOL]), f"functions: {UNREAD}"),
    "a setting of the API": (chat(parallel_tool_calls=False), f"parallel_tool_calls: {UNREAD}"),
    "a setting without effect": (chat(chat_template_kwargs=NO_THOUGHT), f"enable_thinking: {UNREAD}"),
    "a setting twice": (chat(a=1, chat_template_kwargs={"a": 2}), "a: given in chat_template_kwargs too"),
    "settings that are none": (chat(chat_template_kwargs=["a"]), "chat_template_kwargs is a list"),
    "images": (chat(images=["a.png"]), f"images: {UNREAD}"),
    "a preference": (chat(chosen=PAIR, rejected=PAIR), f"chosen, rejected: {UNREAD}"),
    "a verdict": ({"prompt": "a", "completion": "b", "label": False}, f"label: {UNREAD}"),
    "another form beside": (chat(prompt="hi"), f"prompt: {UNREAD}"),
    "a text beside": (chat(text="hi good"), f"text: {UNREAD}"),
    "Alpaca's text": ({"instruction": "a", "input": "", "output": "b", "text": "a b"}, f"text: {UNREAD}"),
    "a history": ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, f"history: {UNREAD}"),
    "a score": (chat(quality=0.1), f"quality: {UNREAD}"),
    "names of the template": (chat(bos_token="x", add_generation_prompt=True), "bos_token, add_generation_prompt: not"),
    "a local name of it": (chat(message="x"), f"message: {UNREAD}"),
    "functions of it": (chat(raise_exception=1, range=2), f"raise_exception, range: {UNREAD}"),
    "a name": (chat(user(name="Ann"), GOOD), rf"messages\[0\]: name: {UNREAD}"),
    "reasoning": (chat(USER, reply(reasoning_content="so")), rf"messages\[1\]: reasoning_content: {UNREAD}"),
    "OpenAI's refusal": (chat(USER, reply(refusal="no")), rf"messages\[1\]: refusal: {UNREAD}"),
    "an old call": (chat(USER, reply(function_call={"name": "f"})), rf"messages\[1\]: function_call: {UNREAD}"),
    "Mistral's prefix": (chat(USER, reply(prefix=True)), rf"messages\[1\]: prefix: {UNREAD}"),
    "two systems": (chat({"role": "system", "content": "a"}, *PAIR, system="b"), "system: the messages begin with"),
    "a system that is none": (chat(system={"a": 1}), "system is a dict"),
    "tools that are not JSON": (chat(tools="look()"), "tools: a string that is not JSON"),
    "parts": (chat(user(content=[{"type": "text", "text": "a"}]), GOOD), r"messages\[0\].content is a list"),
    "a text with a weight": ({"text": "a", "weight": 0}, "weight = 0: a row counts as 1"),
    "a text with labels": ({"text": "a", "label": 1}, "label beside text: which of them is meant"),
    "a text with tokens": ({"text": "a", "input_ids": [1], "labels": [1]}, "input_ids, labels beside text"),
    "a text with half a form": ({"text": "a", "prompt": "b"}, "prompt beside text"),
    "a preference alone": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "no string field 'text', nor messages"),
    "axolotl's segments": ({"segments": [{"label": True, "text": "a"}]}, "no string field 'text'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_effect_is_refused_by_name_and_place(name: str, tmp_path: Path):
    row, says = REFUSED[name]
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: {says}") as caught:
        read(tmp_path, row, PLAIN)
    assert "\n" not in str(caught.value)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path):
    for line in ('{"text": "a", "text": "b"}', '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'):
        (tmp_path / "a.jsonl").write_text(line)
        with pytest.raises(UserError, match=r"a\.jsonl:1: not a row of JSON in UTF-8 \(a key stands there twice\)"):
            list(documents(tmp_path / "a.jsonl"))


def test_a_key_can_be_passed_over_by_name(tmp_path: Path):
    row = {"messages": [{**USER, "name": "Ann"}, GOOD], "tools": [TOOL], "name": "row"}
    assert read(tmp_path, row, PLAIN, "name", "tools") == read(tmp_path, {"messages": PAIR}, PLAIN)
    with pytest.raises(UserError, match="tools: not read"):
        read(tmp_path, row, PLAIN, "name")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a", "label": 1, "url": "b", "anything": 3}))
    assert [one.text for one in documents(tmp_path / "text.jsonl", ignore=("label",))] == ["a"]
    assert [one.text for one in documents(tmp_path / "text.jsonl", "text")] == ["a"]


def test_a_loss_on_all_has_no_place_for_weights(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": UNLEARNED["the last"]}))
    with pytest.raises(UserError, match=r"a\.jsonl:1: a message with weight 0 cannot be left out of a loss on all"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=PLAIN, held_out=0, loss_on="all")


def test_a_weight_is_refused_where_the_template_leaves_open_whose_an_answer_is(tmp_path: Path):
    template = TEMPLATES["enclosed"].replace("{% generation %}", "{% generation %}{% endgeneration %}{% generation %}")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: weight 0: the chat template encloses 4 answers of 2"):
        read(tmp_path, {"messages": UNLEARNED["the last"]}, chats.tokenizer(template))


def test_a_prompt_is_read_whole_too():
    with pytest.raises(UserError, match=r"prompt: messages\[0\]: name: not read"):
        Chat(PLAIN).prompt([{**USER, "name": "Ann"}])
    assert Chat(TOOLS).prompt([{**USER, "name": "Ann"}]) != Chat(TOOLS).prompt([USER])


def test_a_template_that_writes_whole_messages_reads_all_of_them(tmp_path: Path):
    for whole in ("message | tojson", "message.items() | list", "dict(message)", "message.values() | list"):
        template = "{% for message in messages %}{{ " + whole + " }}<|turn|>{% endfor %}"
        text, _ = read(tmp_path, {"messages": [{**USER, "mood": "glad"}, GOOD]}, chats.tokenizer(template))
        assert "glad" in text


def test_conversations_whose_answers_are_all_excluded_are_left_out(tmp_path: Path):
    rows = [{"messages": [USER, {**GOOD, "weight": 0}]}, *({"messages": talk(f"{n}?", "yes")} for n in range(3))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=PLAIN)
    assert (info.left_out, info.held_out.documents, info.train.documents) == (1, 1, 2)
    split = SplitTokens(tmp_path / "out", "train")
    assert split.learned(0, len(split)).sum() == info.train.learned
