"""Calls of tools: read from what models write, in whatever pieces it comes, and forced, in each form of a template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chats
import httpx
import pytest
from model_folders import small
from servers import TOOLS, WINDOW, client, running

from longwave.checkpoints import save
from longwave.data.tokenizer import Tokenizer
from longwave.serving.tools import CallReader, Form

# As Llama 3.1 (one call, as JSON with `parameters`) and Mistral (a list behind a mark) show calls, cut short.
LLAMA = """\
{%- if tools %}{{ '<|start|>system\nAnswer with {"name": function name, "parameters": its arguments}.\n' }}
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|turn|>' }}{% endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception("one call at a time") }}{% endif %}
        {%- set call, end = message.tool_calls[0].function, '}<|turn|>' %}
        {{- '<|start|>assistant\n{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + end }}
    {%- else %}{{ '<|start|>' + message.role + '\n' + message.content + '<|turn|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
MISTRAL = """\
{%- if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson }}{% endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}{{ '[TOOL_CALLS]' + message.tool_calls | tojson }}
    {%- else %}{{ '<|start|>' + message.role + '\n' + message.content + '<|turn|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
TEMPLATES = {"qwen": TOOLS, "llama": LLAMA, "mistral": MISTRAL}
FORMS = {"qwen": Form(True), "llama": Form(False, "parameters"), "mistral": Form(False, listed=True)}

ROME, OSLO = '{"name": "weather", "arguments": {"town": "Rome"}}', '{"name": "weather", "arguments": {"town": "Oslo"}}'
NESTED = '{"name": "f", "arguments": {"a": {"</b>": ["<tool", 1]}, "é": null}}'


def tagged(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


READ: list[tuple[Form, str, str, list[dict[str, Any]]]] = [
    # form, what is written, the text of it, the arguments of the calls
    (FORMS["qwen"], "It is sunny.", "It is sunny.", []),
    (FORMS["qwen"], tagged(ROME), "", [{"town": "Rome"}]),
    (FORMS["qwen"], "I look. " + tagged(ROME, OSLO), "I look. ", [{"town": "Rome"}, {"town": "Oslo"}]),
    (FORMS["qwen"], tagged(ROME) + "\n\nSo.", "So.", [{"town": "Rome"}]),
    (FORMS["qwen"], tagged(ROME) + " and " + tagged(OSLO), "and ", [{"town": "Rome"}, {"town": "Oslo"}]),
    (FORMS["qwen"], tagged(NESTED), "", [{"a": {"</b>": ["<tool", 1]}, "é": None}]),
    (FORMS["qwen"], tagged(ROME).removesuffix("\n</tool_call>"), "", [{"town": "Rome"}]),  # ended by its end token
    (FORMS["qwen"], "<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
    (FORMS["qwen"], "<tool_call>" + ROME[:20], "<tool_call>" + ROME[:20], []),  # broken off
    (FORMS["qwen"], "a < b <tool <tool_", "a < b <tool <tool_", []),
    (FORMS["qwen"], tagged('{"name": "f", "arguments": "{\\"a\\": 1}"}'), "", [{"a": 1}]),
    (FORMS["qwen"], tagged('{"name": "f", "arguments": "none"}'), tagged('{"name": "f", "arguments": "none"}'), []),
    (FORMS["llama"], "It is sunny.", "It is sunny.", []),
    (FORMS["llama"], ROME.replace("arguments", "parameters"), "", [{"town": "Rome"}]),
    (FORMS["llama"], f"{ROME}; {OSLO}\n", "", [{"town": "Rome"}, {"town": "Oslo"}]),
    (FORMS["llama"], '{"town": "Rome"}', '{"town": "Rome"}', []),
    (FORMS["llama"], ROME + " and so on", ROME + " and so on", []),
    (FORMS["llama"], "See " + ROME, "See " + ROME, []),
    (FORMS["llama"], " ", " ", []),
    (FORMS["llama"], "[" * 5000, "[" * 5000, []),
    (FORMS["mistral"], f"[{ROME}, {OSLO}]", "", [{"town": "Rome"}, {"town": "Oslo"}]),
    (FORMS["mistral"], f"[TOOL_CALLS][{ROME}]", "", [{"town": "Rome"}]),
    (FORMS["mistral"], "[1, 2]", "[1, 2]", []),
]


@pytest.mark.parametrize(("form", "written", "text", "arguments"), READ, ids=range(len(READ)))
def test_calls_are_told_from_text_in_any_pieces(form: Form, written: str, text: str, arguments: list[dict[str, Any]]):
    cuts = range(0, len(written), max(1, len(written) // 200))
    splits = [[written], [*written[:500], written[500:]], *([written[:cut], written[cut:]] for cut in cuts)]
    for pieces in splits:
        reader, said = CallReader(form), ""
        for piece in pieces:
            said += reader.push(piece)
        said += reader.finish()
        assert said == text
        assert [json.loads(call.arguments) for call in reader.calls] == arguments
        one = CallReader(form, 1)
        one.push(written)
        one.finish()
        assert len(one.calls) == min(1, len(arguments))


def test_a_call_in_tags_is_there_before_the_next_one():
    reader = CallReader(FORMS["qwen"])
    assert (reader.push(tagged(ROME) + "\n<tool_call>"), len(reader.calls)) == ("", 1)
    assert (reader.push(OSLO + "</tool_call>"), len(reader.calls)) == ("", 2)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_form_is_that_of_the_template(name: str):
    assert Form.of(tokenizer(name)) == FORMS[name]


def tokenizer(name: str) -> Tokenizer:
    return chats.tokenizer(TEMPLATES[name])


# --- served -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    place = tmp_path_factory.mktemp("tools")
    for name in TEMPLATES:
        made = tokenizer(name)
        save(small("F", vocab_size=made.vocab_size, context_window=2 * WINDOW), place / name, tokenizer=made)
    with running([Path(place / name) for name in TEMPLATES]) as server, client(server) as opened:
        yield opened


def tool(name: str, *choices: str) -> dict[str, Any]:
    """A tool with one argument, which is one of these."""
    shape = {"type": "object", "properties": {"x": {"enum": list(choices)}}, "required": ["x"]}
    shape["additionalProperties"] = False
    return {"type": "function", "function": {"name": name, "parameters": shape}}


FIRST, SECOND = tool("first", "a", "b"), tool("second", "c")
ASKED = {"messages": [{"role": "user", "content": "go"}], "tools": [FIRST, SECOND], "max_tokens": 120}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tool_is_called_when_it_has_to_be(web: httpx.Client, name: str, stream: bool):
    """`required`: one of them, with arguments of its schema. A name: that one."""
    for choice in ("required", {"type": "function", "function": {"name": "second"}}):
        body = {**ASKED, "model": name, "tool_choice": choice, "seed": 1, "stream": stream, "n": 3}
        reply = web.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        for calls, content, reason in answers(reply.text if stream else reply.json()):
            assert (content or "", reason, len(calls)) == ("", "tool_calls", 1)
            called, given = calls[0]["function"]["name"], json.loads(calls[0]["function"]["arguments"])
            assert called in (("first", "second") if choice == "required" else ("second",))
            assert given["x"] in ("ab" if called == "first" else "c")


def answers(reply: Any) -> list[tuple[list[Any], str | None, str]]:
    """The calls, the content and the reason of every choice, of an answer or of a stream's text."""
    if not isinstance(reply, str):
        found = [(one["message"], one["finish_reason"]) for one in reply["choices"]]
        return [(message["tool_calls"], message["content"], reason) for message, reason in found]
    lines = [line.removeprefix("data: ") for line in reply.splitlines() if line.startswith("data: {")]
    pieces = [json.loads(line)["choices"][0] for line in lines]
    made = list[tuple[list[Any], str | None, str]]()
    for index in sorted({one["index"] for one in pieces}):
        mine = [one for one in pieces if one["index"] == index]
        calls = [call for one in mine for call in one["delta"].get("tool_calls", ())]
        assert [call["index"] for call in calls] == list(range(len(calls)))
        [reason] = [one["finish_reason"] for one in mine if one["finish_reason"]]
        made.append((calls, "".join(one["delta"].get("content") or "" for one in mine), reason))
    return made


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_and_their_results_are_read(web: httpx.Client, name: str):
    """An earlier call reaches the template as an object; two at once too, or one line says why not."""
    call = {"id": "call_0", "type": "function", "function": {"name": "first", "arguments": '{"x": "a"}'}}
    result = {"role": "tool", "tool_call_id": "call_0", "content": "done"}
    for calls in ([call], [call, {**call, "id": "call_1"}]):
        messages = [*ASKED["messages"], {"role": "assistant", "tool_calls": calls}, result]
        reply = web.post("/v1/chat/completions", json={**ASKED, "model": name, "messages": messages, "max_tokens": 1})
        if name == "llama" and len(calls) > 1:
            assert (reply.status_code, "one call at a time" in reply.json()["error"]["message"]) == (400, True)
        else:
            assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_that_may_be_called_need_not_be(web: httpx.Client, name: str):
    for choice in (None, "auto", "none"):
        reply = web.post("/v1/chat/completions", json={**ASKED, "model": name, "tool_choice": choice, "max_tokens": 4})
        assert (reply.status_code, "tool_calls" in reply.json()["choices"][0]["message"]) == (200, False)
