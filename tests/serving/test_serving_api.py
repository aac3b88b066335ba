"""The endpoints, asked by OpenAI's own client, whose types read every reply."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from servers import WINDOW, client, folders, running

import longwave as lw
from longwave.data.chat import Chat
from longwave.serving.server import Running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(list(folders(tmp_path_factory.mktemp("models")).values())) as begun:
        yield begun


@pytest.fixture(scope="module")
def ai(server: Running) -> openai.OpenAI:
    plain = httpx.Client(trust_env=False)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=plain)


@pytest.fixture(scope="module")
def web(server: Running) -> Iterator[httpx.Client]:
    with client(server) as opened:
        yield opened


def counted(usage: Any) -> tuple[int, int, int]:
    """Tokens in, out and in all."""
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def test_a_text_is_continued_as_in_python(ai: openai.OpenAI, server: Running):
    made = ai.completions.create(model="plain", prompt="the user said", max_tokens=20, temperature=0)
    expected = lw.generate(server.models[0].model, "the user said", max_new_tokens=20)
    assert made.choices[0].text == expected
    assert made.choices[0].finish_reason == ("length" if expected.ended == "max_new_tokens" else "stop")
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens


def test_a_stream_joined_is_the_whole(ai: openai.OpenAI):
    asked: dict[str, Any] = {"model": "plain", "prompt": "the user", "max_tokens": 16, "seed": 5, "temperature": 0.9}
    whole = ai.completions.create(**asked)
    options: Any = {"include_usage": True}
    chunks = list(ai.completions.create(**asked, stream=True, stream_options=options))
    assert "".join(one.choices[0].text for one in chunks if one.choices) == whole.choices[0].text
    assert [one.usage for one in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert counted(chunks[-1].usage) == counted(whole.usage)
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_usage_tells_what_was_not_run_again(ai: openai.OpenAI):
    """Of each prompt, however many texts continue it; in all endpoints, whole and streamed."""
    text = "what was said before is here once more"
    asked: dict[str, Any] = {"model": "plain", "prompt": [text], "max_tokens": 2, "n": 2}
    read = [ai.completions.create(**asked).usage for _ in range(2)]
    cached = [one.prompt_tokens_details.cached_tokens for one in read]
    assert cached[0] < 3  # what any two texts here have in common
    assert cached[1] == read[0].prompt_tokens - 1
    chat: dict[str, Any] = {"model": "chatty", "messages": [{"role": "user", "content": text}], "max_tokens": 2}
    first = ai.chat.completions.create(**chat).usage
    *_, last = ai.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
    assert last.usage.prompt_tokens == first.prompt_tokens > first.prompt_tokens_details.cached_tokens + 20
    assert last.usage.prompt_tokens_details.cached_tokens == first.prompt_tokens - 1
    told = ai.responses.create(model="chatty", input=text, max_output_tokens=2).usage
    assert told.input_tokens_details.cached_tokens == first.prompt_tokens - 1


def test_several_prompts_and_choices(ai: openai.OpenAI):
    prompts = ["the user", "hello", "system"]
    asked: dict[str, Any] = {"model": "plain", "max_tokens": 8, "seed": 3, "temperature": 1.0}
    together = ai.completions.create(prompt=prompts, n=2, **asked)
    assert [one.index for one in together.choices] == list(range(6))
    alone = [choice.text for prompt in prompts for choice in ai.completions.create(prompt=prompt, n=2, **asked).choices]
    assert [one.text for one in together.choices] == alone
    assert len(set(alone)) > 3


def test_token_ids_in_and_out(web: httpx.Client, ai: openai.OpenAI, server: Running):
    ids = web.post("/tokenize", json={"model": "plain", "prompt": "hello", "return_token_strs": True}).json()
    assert ids["tokens"] == server.models[0].tokenizer.encode("hello", add_bos=True)
    assert (ids["count"], ids["max_model_len"], len(ids["token_strs"])) == (len(ids["tokens"]), WINDOW, ids["count"])
    asked: dict[str, Any] = {
        "model": "plain",
        "max_tokens": 6,
        "temperature": 0,
        "extra_body": {"return_token_ids": True},
    }
    by_text = ai.completions.create(prompt="hello", **asked)
    by_ids = ai.completions.create(prompt=ids["tokens"], **asked)
    assert by_text.choices == by_ids.choices
    assert by_text.model_extra == {"prompt_token_ids": ids["tokens"]}
    assert len(by_text.choices[0].model_extra["token_ids"]) == 6


def test_echo_repeats_the_prompt(ai: openai.OpenAI):
    asked: dict[str, Any] = {"model": "plain", "prompt": ["hello", "the user"], "max_tokens": 5, "temperature": 0}
    plain, echoed = ai.completions.create(**asked), ai.completions.create(**asked, echo=True)
    assert [one.text for one in echoed.choices] == [
        before + one.text for before, one in zip(asked["prompt"], plain.choices, strict=True)
    ]


def test_logprobs_of_completions(ai: openai.OpenAI):
    made = ai.completions.create(model="plain", prompt="hello", max_tokens=7, temperature=0, logprobs=3)
    told = made.choices[0].logprobs
    assert told is not None
    assert [len(one or ()) for one in (told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset)] == [
        7
    ] * 4
    for chosen, likeliest in zip(told.token_logprobs or (), told.top_logprobs or (), strict=True):
        assert chosen == pytest.approx(max(likeliest.values()))  # greedy takes the likeliest
        assert chosen <= 0
    assert told.text_offset == [len("".join((told.tokens or [])[:place])) for place in range(7)]


def test_a_stop_string_ends_a_text_before_it(ai: openai.OpenAI):
    asked: dict[str, Any] = {"model": "plain", "prompt": "the user said", "max_tokens": 16, "temperature": 0}
    whole = ai.completions.create(**asked).choices[0].text
    stop = whole[6:9]
    for stream in (False, True):
        made: Any = ai.completions.create(**asked, stop=[stop, "never said"], stream=stream)
        choices = [one.choices[0] for one in made] if stream else made.choices
        assert "".join(one.text for one in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_bias_and_penalties_reach_the_engine(ai: openai.OpenAI, server: Running):
    token = server.models[0].tokenizer.encode("x")[0]
    asked: dict[str, Any] = {"model": "plain", "prompt": "hello", "max_tokens": 6, "temperature": 0}
    made = ai.completions.create(**asked, logit_bias={str(token): 100}, extra_body={"return_token_ids": True})
    assert made.choices[0].model_extra["token_ids"] == [token] * 6


def test_min_tokens_and_ignore_eos(ai: openai.OpenAI, server: Running):
    end = next(iter(server.models[0].ends))
    asked: dict[str, Any] = {"model": "plain", "prompt": "hello", "max_tokens": 9, "temperature": 0}
    bias = {str(end): 100}
    assert ai.completions.create(**asked, logit_bias=bias).usage.completion_tokens == 1
    assert ai.completions.create(**asked, logit_bias=bias, extra_body={"min_tokens": 4}).usage.completion_tokens == 5
    ignoring = ai.completions.create(**asked, logit_bias=bias, extra_body={"ignore_eos": True})
    assert (ignoring.usage.completion_tokens, ignoring.choices[0].finish_reason) == (9, "length")


# --- conversations ----------------------------------------------------------------------------------------------------


def test_a_conversation_is_answered_as_its_template_says(ai: openai.OpenAI, server: Running):
    served = server.models[1]
    messages: list[Any] = [{"role": "developer", "content": "Be brief."}, *HELLO]
    made = ai.chat.completions.create(model="chatty", messages=messages, max_tokens=12, temperature=0)
    ids = Chat(served.tokenizer).prompt([{"role": "system", "content": "Be brief."}, *HELLO])
    raw: dict[str, Any] = {"model": "chatty", "prompt": ids, "max_tokens": 12, "temperature": 0}
    assert made.choices[0].message.content == ai.completions.create(**raw).choices[0].text
    assert made.usage.prompt_tokens == len(ids)


def test_a_chat_stream_joined_is_the_whole(ai: openai.OpenAI):
    asked: dict[str, Any] = {"model": "levels", "messages": HELLO, "max_tokens": 10, "seed": 1, "n": 2}
    whole = ai.chat.completions.create(**asked)
    chunks = list(ai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for place, choice in enumerate(whole.choices):
        pieces = [one.choices[0] for one in chunks if one.choices and one.choices[0].index == place]
        assert pieces[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in pieces) == choice.message.content
        assert [one.finish_reason for one in pieces if one.finish_reason] == [choice.finish_reason]
    assert counted(chunks[-1].usage) == counted(whole.usage)


def test_logprobs_of_chats(ai: openai.OpenAI):
    asked: dict[str, Any] = {"model": "chatty", "messages": HELLO, "max_tokens": 6, "temperature": 0}
    whole = ai.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert whole is not None
    assert [len(one.top_logprobs) for one in whole.content or ()] == [2] * 6
    chunks = list(ai.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True))
    streamed = [entry for one in chunks if one.choices[0].logprobs for entry in one.choices[0].logprobs.content or ()]
    assert [one.token for one in streamed] == [one.token for one in whole.content or ()]
    for one, other in zip(streamed, whole.content or (), strict=True):  # the prompt was read in other pieces
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object"},
        {
            "type": "json_schema",
            "json_schema": {
                "name": "answer",
                "schema": {
                    "type": "object",
                    "properties": {"yes": {"type": "boolean"}, "n": {"enum": [1, 2, 30]}},
                    "required": ["yes", "n"],
                    "additionalProperties": False,
                },
            },
        },
    ],
    ids=lambda one: one["type"],
)
@pytest.mark.parametrize("seed", range(2))
def test_output_is_held_to_a_format(ai: openai.OpenAI, form: Any, seed: int):
    asked: dict[str, Any] = {"model": "chatty", "messages": HELLO, "max_tokens": 90, "seed": seed}
    choice = ai.chat.completions.create(**asked, response_format=form).choices[0]
    if choice.finish_reason == "stop":
        found = json.loads(choice.message.content or "")
        assert isinstance(found, dict)
        if form["type"] == "json_schema":
            assert found.keys() == {"yes", "n"}
    else:  # random weights may write a string without end
        assert form["type"] == "json_object"
        assert (choice.message.content or "").startswith("{")


@pytest.mark.parametrize(
    ("guide", "right"),
    [
        ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"guided_regex": "[ab]{3}-[0-9]{2}"}, lambda text: len(text) == 6 and text[3] == "-" and text[4:].isdigit()),
        ({"guided_grammar": 'start: "x" number\nnumber: /[0-9]{4}/'}, lambda text: text[0] == "x" and len(text) == 5),
        ({"guided_json": {"const": "that"}}, lambda text: json.loads(text) == "that"),
    ],
    ids=["choice", "regex", "grammar", "json"],
)
def test_output_is_held_to_a_guide(ai: openai.OpenAI, guide: dict[str, Any], right: Any):
    asked: dict[str, Any] = {"model": "plain", "prompt": "hello", "max_tokens": 60, "n": 3, "seed": 2}
    for choice in ai.completions.create(**asked, extra_body=guide).choices:
        assert right(choice.text), choice.text
        assert choice.finish_reason == "stop"


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Rome", "Oslo"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_is_called(ai: openai.OpenAI, stream: bool, choice: Any):
    asked: dict[str, Any] = {"model": "chatty", "messages": HELLO, "max_tokens": 80, "tools": [WEATHER], "seed": 4}
    made: Any = ai.chat.completions.create(**asked, tool_choice=choice, stream=stream)
    if stream:
        pieces = [one.choices[0] for one in made]
        calls = [call for one in pieces for call in one.delta.tool_calls or ()]
        assert [one.finish_reason for one in pieces if one.finish_reason] == ["tool_calls"]
        assert not "".join(one.delta.content or "" for one in pieces)
    else:
        calls = made.choices[0].message.tool_calls
        assert (made.choices[0].finish_reason, made.choices[0].message.content) == ("tool_calls", None)
    assert [one.function.name for one in calls] == ["weather"]
    assert json.loads(calls[0].function.arguments)["town"] in ("Rome", "Oslo")


def test_results_of_tools_are_read_by_the_template(web: httpx.Client, server: Running):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    ids = web.post("/tokenize", json={"model": "chatty", "messages": messages}).json()["tokens"]
    assert 'weather{"town": "Rome"}' in server.models[1].tokenizer.decode(ids)


# --- responses --------------------------------------------------------------------------------------------------------


def test_responses_answer_text(ai: openai.OpenAI):
    asked: dict[str, Any] = {"model": "chatty", "max_output_tokens": 12, "temperature": 0}
    made = ai.responses.create(input="hello", instructions="Be brief.", **asked)
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, *HELLO]
    chat = ai.chat.completions.create(model="chatty", messages=messages, max_tokens=12, temperature=0)
    assert made.output_text == chat.choices[0].message.content
    assert made.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    again = ai.responses.create(
        input=[*HELLO, made.output[0].model_dump(exclude_none=True), *HELLO], **asked
    )  # as given
    assert again.usage.input_tokens > made.usage.input_tokens


def test_responses_stream_named_events(ai: openai.OpenAI):
    asked: dict[str, Any] = {"model": "chatty", "input": "hello", "max_output_tokens": 12, "temperature": 0}
    whole, events = ai.responses.create(**asked), list(ai.responses.create(**asked, stream=True))
    assert [one.sequence_number for one in events] == list(range(len(events)))
    kinds = [one.type.removeprefix("response.") for one in events]
    before = ["created", "in_progress", "output_item.added", "content_part.added"]
    after = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds[:4] + kinds[-4:] == before + after
    assert set(kinds[4:-4]) == {"output_text.delta"}
    last: Any = events[-1]
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == whole.output_text
    assert last.response.output_text == whole.output_text
    assert last.response.usage.total_tokens == whole.usage.total_tokens
    form: Any = {"format": {"type": "json_schema", "name": "one", "schema": {"const": "so"}}}
    with ai.responses.stream(model="chatty", input="hello", text=form) as stream:
        assert stream.get_final_response().output_text == '"so"'


# --- about the server -------------------------------------------------------------------------------------------------


def test_models_health_metrics_and_what_levels_keep(ai: openai.OpenAI, web: httpx.Client):
    assert [one.id for one in ai.models.list()] == ["plain", "chatty", "levels"]
    assert ai.models.retrieve("levels").model_extra["levels"] == 1
    assert web.get("/health").json() == {"status": "ok"}
    text = web.get("/metrics").text
    for name in ("requests_waiting", "generation_tokens_total", "time_to_first_token_seconds_count", "requests_total"):
        assert f"longwave_{name}{{" in text, name
    assert web.get("/status").json()["models"].keys() == {"plain", "chatty", "levels"}
    tokens = web.post("/tokenize", json={"model": "levels", "prompt": "the user said hello"}).json()["tokens"]
    kept = web.post("/kept", json={"model": "levels", "tokens": tokens}).json()
    assert (len(kept["tokens"]), kept["levels"]) == (len(tokens), 1)
    assert {level for one in kept["tokens"] for level in one["kept"]} <= {0}


def test_replies_are_what_openai_says_they_are(web: httpx.Client):
    """Read strictly, so that no field is missing that a client may look for."""
    asked: dict[str, Any] = {"model": "chatty", "max_tokens": 4, "temperature": 0}
    Completion.model_validate(web.post("/v1/completions", json={**asked, "prompt": "a", "logprobs": 1}).json())
    body = {**asked, "messages": HELLO}
    ChatCompletion.model_validate(web.post("/v1/chat/completions", json=body).json())
    Response.model_validate(
        web.post("/v1/responses", json={"model": "chatty", "input": "a", "max_output_tokens": 4}).json()
    )
    Model.model_validate(web.get("/v1/models").json()["data"][0])
    lines = web.post("/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    for line in lines[:-2]:
        ChatCompletionChunk.model_validate_json(line.removeprefix("data: "))


def test_curl_works(server: Running):
    words = ["curl", "-sS", "-N", f"{server.url}/v1/completions", "-H", "content-type: application/json", "-d"]
    body = {"model": "plain", "prompt": "hello", "max_tokens": 3, "stream": True}
    done = subprocess.run([*words, json.dumps(body)], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.endswith("data: [DONE]\n\n")
