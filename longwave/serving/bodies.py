"""The bodies of requests: every field that is taken, its type and its range. Any other field is refused by its name.

Fields and meanings are OpenAI's. Beyond them, as in vLLM: `top_k`, `min_p`, `repetition_penalty`, `min_tokens`,
`ignore_eos`, `return_token_ids`, and `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, JsonValue, Tag

from longwave.engine.sampling import LEAST_REPETITION
from longwave.serving.limits import (
    LONGEST_STOP,
    MOST_BIASES,
    MOST_CHOICES,
    MOST_LOGPROBS,
    MOST_MESSAGES,
    MOST_STOPS,
    MOST_TOOLS,
)


class Body(BaseModel):
    """Base of every object in a request: no unknown key, no conversion between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _refused(value: object) -> None:
    """Refuses what OpenAI knows and this server does not do; null says nothing."""
    if value is not None:
        raise ValueError("not supported here; leave it out")


def _whole(value: object) -> object:
    """A number such as 2.0 is whole in JSON, which knows one kind of numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _boolean(value: object) -> object:
    """Refuses 0, which Python takes for False."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("input should be a valid boolean")
    return value


Unsupported = Annotated[None, BeforeValidator(_refused)]
No = Annotated[Literal[False], BeforeValidator(_boolean)]
Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1, le=1 << 31)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=256)]
Label = Annotated[str, Field(max_length=1024)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Schema = dict[str, JsonValue]


class StreamOptions(Body):
    """How an answer is streamed. include_usage: whether a last piece tells how many tokens it took."""

    include_usage: bool | None = None
    include_obfuscation: No | None = None


class Sampled(Body):
    """What all bodies have that ask for new tokens."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_REPETITION, le=10)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MOST_BIASES),
        ]
        | None
    ) = None
    min_tokens: Annotated[Whole, Field(ge=0, le=1 << 31)] | None = None
    ignore_eos: bool | None = None
    guided_json: Schema | None = None
    guided_regex: Annotated[str, Field(min_length=1)] | None = None
    guided_choice: Texts | None = None
    guided_grammar: Annotated[str, Field(min_length=1)] | None = None
    user: Label | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None


class Choices(Sampled):
    """What the bodies of `/v1/chat/completions` and `/v1/completions` share."""

    n: Annotated[Whole, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None


Prompt = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
    | Annotated[list[int], Field(min_length=1)]
    | Annotated[list[list[int]], Field(min_length=1, max_length=MOST_CHOICES)]
)


class CompletionBody(Choices):
    """The body of `/v1/completions`. prompt: a text, a list of texts, token ids, or a list of them."""

    prompt: Prompt
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Count | None = None
    suffix: Unsupported = None


class TextPart(Body):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    logprobs: Annotated[list[JsonValue], Field(max_length=0)] | None = None


class CalledFunction(Body):
    """A call that an earlier answer made. arguments: JSON."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class ToolCall(Body):
    """A call of a tool in an earlier answer."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    refusal: Unsupported = None
    audio: Unsupported = None
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    function_call: Unsupported = None


class Function(Body):
    """A function that the model may call. parameters: a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class AnyFormat(Body):
    """Text of any kind."""

    type: Literal["text"]


class ObjectFormat(Body):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema with a name."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class SchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class FlatSchemaFormat(NamedSchema):
    """JSON of a schema, as `/v1/responses` writes it."""

    type: Literal["json_schema"]


def _kind(value: Any) -> str | None:
    """The `type` of an object, by which the members of a union are told apart."""
    found = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return found if isinstance(found, str) else None


Format = Annotated[
    Annotated[AnyFormat, Tag("text")]
    | Annotated[ObjectFormat, Tag("json_object")]
    | Annotated[SchemaFormat, Tag("json_schema")],
    Discriminator(_kind),
]
FlatFormat = Annotated[
    Annotated[AnyFormat, Tag("text")]
    | Annotated[ObjectFormat, Tag("json_object")]
    | Annotated[FlatSchemaFormat, Tag("json_schema")],
    Discriminator(_kind),
]


class ChatBody(Choices):
    """The body of `/v1/chat/completions`. chat_template_kwargs: variables that the chat template reads."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    store: No | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None


class InputMessage(Body):
    """A message of the input of `/v1/responses`; what the server answered may be given back as it is."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class TextOptions(Body):
    """How the text of `/v1/responses` is formed."""

    format: FlatFormat | None = None
    verbosity: Unsupported = None


class ResponseBody(Sampled):
    """The body of `/v1/responses`: text in, text out; nothing is stored."""

    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    store: No | None = None
    background: No | None = None
    truncation: Literal["disabled"] | None = None
    parallel_tool_calls: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None
    top_logprobs: Unsupported = None
    conversation: Unsupported = None
    max_tool_calls: Unsupported = None
    moderation: Unsupported = None
    previous_response_id: Unsupported = None
    prompt: Unsupported = None
    reasoning: Unsupported = None


class TokenizeBody(Body):
    """The body of `/tokenize`: a text, or a conversation; whether tokens are named, too."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class KeptBody(Body):
    """The body of `/kept`: the tokens of a text."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    tokens: Annotated[list[int], Field(min_length=1, max_length=2048)]
