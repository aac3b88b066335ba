"""Chat templates: the ids of `transformers`, no token out of a message, and the tokens that are the assistant's."""

from __future__ import annotations

import functools
import json
import tempfile
from typing import Any

import chats
import pytest
import tokenizers
from chats import BOS, EOS, TEMPLATES, talk
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from longwave.data.chat import DEFAULT_TEMPLATE, Chat, ChatEncoder
from longwave.data.encoding import Encoded
from longwave.data.sources import Conversation
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError

ALL = {**TEMPLATES, "default": DEFAULT_TEMPLATE}
every_template = pytest.mark.parametrize("name", ALL)
MESSAGE = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.text("a \n.\t", max_size=8)
SPECIAL = (BOS, EOS, "<|start|>", "<|stop|>", "<|turn|>")
HOSTILE = st.lists(st.sampled_from([*SPECIAL, "a", " ", "\n", "<|", "eos|>", "<|e<|eos|>os|>"]), max_size=5).map(
    "".join
)


def spiece() -> Tokenizer:
    """In the manner of Llama 2 as newer tools save it: a blank is put before the very first word only."""
    letters = [chr(letter) for letter in range(33, 127)]
    vocab = {word: id for id, word in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", *letters, "▁a", "ab"])}
    model = models.BPE(vocab=vocab, merges=[("▁", "a"), ("a", "b")], unk_token="<unk>", fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Tokenizer(backend, {"tokenizer_class": "PreTrainedTokenizerFast", **config})


def stripping() -> Tokenizer:
    """In the manner of Phi 3: the token that ends a turn swallows the blanks beside it."""
    definition = json.loads(chats.tokenizer(None)._definition)
    [end] = [token for token in definition["added_tokens"] if token["content"] == "<|turn|>"]
    end |= {"lstrip": True, "rstrip": True}
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    return Tokenizer(backend, chats.tokenizer(TEMPLATES["chatml"])._config)


@functools.cache
def made(name: str) -> Tokenizer:
    if name == "spiece":
        return spiece().with_chat_template(TEMPLATES["instruct"])
    if name == "stripping":
        return stripping()
    return chats.tokenizer(ALL[name], eos=EOS if name in ("instruct", "default") else "<|turn|>")


@functools.cache
def chat(name: str) -> Chat:
    return Chat(made(name))


@functools.cache
def theirs(name: str) -> Any:
    """The tokenizer of `transformers` out of the folder that ours saves."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        made(name).save(folder)
        return AutoTokenizer.from_pretrained(folder)


def encoded(messages: list[dict[str, str]], name: str, loss_on: Any = "assistant") -> list[Encoded]:
    encoder = ChatEncoder(made(name), loss_on)
    return encoder.encode([Conversation("here", "", tuple(messages))])[0]


def answers(document: Encoded, name: str) -> list[str]:
    """What is learned of a document, with its special tokens."""
    backend = made(name).twin()
    return [backend.decode(document.ids[start:end], skip_special_tokens=False) for start, end in document.learned or []]


# --- the same ids as transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ALL, "spiece", "stripping"])
@settings(max_examples=15)
@given(contents=st.lists(MESSAGE, min_size=2, max_size=6).filter(lambda them: len(them) % 2 == 0))
def test_whole_conversations_and_prompts_have_the_ids_of_transformers(name: str, contents: list[str]):
    messages = talk(*contents)
    [whole] = encoded(messages, name, "all")
    assert whole.ids == theirs(name).apply_chat_template(messages)["input_ids"]
    prompt = theirs(name).apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert chat(name).prompt(messages[:-1]) == prompt


@settings(max_examples=15)
@given(contents=st.lists(MESSAGE, min_size=2, max_size=6).filter(lambda them: len(them) % 2 == 0))
def test_enclosed_answers_are_those_of_transformers(contents: list[str]):
    """But for tokens that begin before an answer, which no model that is given the prompt can write."""
    messages = talk(*contents)
    [document] = encoded(messages, "enclosed")
    found = theirs("enclosed").apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    mask = [any(a <= place < b for a, b in document.learned or []) for place in range(len(document.ids))]
    assert document.ids == found["input_ids"]
    straddling = [
        place for place, (our, its) in enumerate(zip(mask, found["assistant_masks"], strict=True)) if our != its
    ]
    words = theirs("enclosed").convert_ids_to_tokens(found["input_ids"])
    assert all(words[place].startswith("Ċ") and not mask[place] for place in straddling)


def test_helpers_that_templates_expect():
    source = (
        "{% for message in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{{ message | tojson }}"
        "{{ {'b': '<é>', 'a': [1]} | tojson(indent=1) }}{{ strftime_now('%Y')[:2] }}"
        "{% set n = namespace(x=1) %}{{ n.x }}{{ tools is none }}{{ unknown_token }}<|turn|>{% endfor %}"
    )
    tokenizer = chats.tokenizer(source)
    with tempfile.TemporaryDirectory() as folder:
        from transformers import AutoTokenizer

        tokenizer.save(folder)
        hugging_face = AutoTokenizer.from_pretrained(folder)
    messages = talk("a", "ü", "'\"&")
    assert Chat(tokenizer).prompt(messages) == hugging_face.apply_chat_template(messages)["input_ids"]


def test_of_several_templates_the_default_one_counts():
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "<|turn|>"}]
    tokenizer = chats.tokenizer(None)
    named = Tokenizer(tokenizer.twin(), {**tokenizer._config, "chat_template": several})
    assert Chat(named).prompt(talk("a")) == [named.eos_id]
    assert named.fingerprint == tokenizer.fingerprint


# --- no token out of a message ----------------------------------------------------------------------------------------


@every_template
@given(st.lists(HOSTILE, min_size=2, max_size=4).filter(lambda them: len(them) % 2 == 0))
def test_a_message_holds_no_special_token_whatever_it_says(name: str, contents: list[str]):
    """As many special tokens as with harmless messages, and the text is what it was."""
    tokenizer = made(name)
    special = tokenizer.special_ids
    [harmless], [document] = encoded(talk(*["x"] * len(contents)), name, "all"), encoded(talk(*contents), name, "all")
    assert [id for id in document.ids if id in special] == [id for id in harmless.ids if id in special]
    said = [content.strip() if name == "llama" else content.lstrip("\n") for content in contents]
    text = tokenizer.decode(document.ids)
    assert all(one in text for one in said)


def test_marks_are_what_keeps_tokens_out_of_messages():
    """The control of the test above: the same text as one string is full of tokens."""
    tokenizer = made("default")
    text = theirs("default").apply_chat_template(talk(EOS, EOS), tokenize=False)
    assert tokenizer.twin().encode(text, add_special_tokens=False).ids.count(tokenizer.eos_id) == 4
    [document] = encoded(talk(EOS, EOS), "default")
    assert document.ids.count(tokenizer.eos_id) == 2


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content | replace('_', '') }}{{ eos_token }}{% endfor %}",
        "{% for m in messages %}{{ m.content | lower }}{{ eos_token }}{% endfor %}",
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}{{ eos_token }}{% endfor %}",
    ],
)
def test_a_template_that_puts_tokens_together_is_refused(source: str):
    tokenizer = chats.tokenizer(source)
    messages = [{"role": "user", "content": "<|TURN|>" if "lower" in source else "<|tu_rn|>"}]
    if "role" in source:
        backend = tokenizer.twin()
        backend.add_special_tokens(["<|user|>"])
        tokenizer = Tokenizer(backend, tokenizer._config)
    with pytest.raises(UserError, match=r"here: the chat template puts <\|\w+\|> together out of parts"):
        Chat(tokenizer).texts(Conversation("here", "", tuple(messages)), "all")


def test_other_fields_of_a_message_reach_the_template_as_text():
    tokenizer = chats.tokenizer("{% for m in messages %}{{ m.content }}{{ m.tool.name }}{{ eos_token }}{% endfor %}")
    ids = Chat(tokenizer).prompt([{"role": "user", "content": "a", "tool": {"name": EOS}}])
    assert ids == [*tokenizer.encode(f"a{EOS}"), tokenizer.eos_id]


def test_what_the_config_names_is_special_though_the_vocabulary_does_not_say_so():
    definition = json.loads(chats.PLAIN._definition)
    definition["added_tokens"][1]["special"] = False
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    tokenizer = Tokenizer(backend, {"eos_token": EOS, "chat_template": DEFAULT_TEMPLATE})
    assert tokenizer.encode(EOS).count(1) == 0
    assert tokenizer.decode([1]) == ""
    assert Chat(tokenizer).prompt(talk(EOS)).count(1) == 1


# --- what is learned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "chatml", "default", "enclosed", "stripping"])
def test_answers_and_their_end_are_learned_and_nothing_else(name: str):
    end = EOS if name == "default" else "<|turn|>"
    [document] = encoded(talk("one?", "It is one.", "two?", "", "three?", "3", "thanks", system="Count."), name)
    empty = "" if name == "stripping" else end  # its end lies before the answer, with the line end of the prompt
    assert answers(document, name) == [one for one in (f"It is one.{end}", empty, f"3{end}") if one]
    assert document.bytes == len("It is one.3")


def test_answers_in_the_manner_of_llama_2():
    [document] = encoded(talk("ab", "ba", "a", "b"), "spiece")
    words = [[made("spiece").twin().id_to_token(id) for id in document.ids[a:b]] for a, b in document.learned or []]
    assert words == [["▁", "b", "a", "</s>"], ["▁", "b", "</s>"]]


@pytest.mark.parametrize("name", [*ALL, "spiece"])
@given(st.lists(MESSAGE, min_size=2, max_size=6).filter(lambda them: len(them) % 2 == 0))
def test_every_answer_follows_the_prompt_that_the_model_will_be_given(name: str, contents: list[str]):
    """And is there once; a token that would join the prompt's end and the answer's beginning is not learned."""
    messages = talk(*contents)
    documents = encoded(messages, name)
    befores = [document.ids[:start] for document in documents for start, _ in document.learned or []]
    prompts = [chat(name).prompt(messages[:place]) for place in range(1, len(messages), 2)]
    assert len(befores) == len(prompts)
    for before, prompt in zip(sorted(befores, key=len), prompts, strict=True):
        assert before == prompt or before[: len(prompt) - 1] == prompt[:-1]


def test_an_answer_that_the_template_shows_otherwise_later_is_a_document_of_its_own():
    first, second = "why</think>\n\nOne.", "how</think>\n\nTwo."
    documents = encoded(talk("one?", first, "two?", second, "three?", "Three."), "reasoning")
    assert [answers(document, "reasoning") for document in documents] == [
        ["<think>\n\n</think>\n\nThree.<|turn|>"],
        ["<think>\nhow\n</think>\n\nTwo.<|turn|>"],
        ["<think>\nwhy\n</think>\n\nOne.<|turn|>"],
    ]
    assert "why" not in made("reasoning").decode(documents[0].ids)


def test_a_conversation_without_answer_gives_nothing_unless_the_loss_is_on_all():
    for name in ("default", "enclosed"):
        assert encoded(talk("a"), name) == []
        [document] = encoded(talk("a"), name, "all")
        assert (document.learned, document.bytes) == (None, len("user\na\n"))


def test_what_ends_an_answer_stops_a_generation():
    for name, ends in {"default": [EOS], "llama": ["<|turn|>"], "instruct": [EOS], "enclosed": ["<|turn|>"]}.items():
        assert chat(name).stop_ids == {made(name).twin().token_to_id(end) for end in ends}
    base = chats.tokenizer(TEMPLATES["chatml"], eos=EOS)
    assert Chat(base).stop_ids == {base.eos_id, base.twin().token_to_id("<|turn|>")}


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for m in messages %}", "chat_template, line 1: "),
        ("a\n{{ x | nothing }}", "chat_template, line 2: .*nothing"),
        (None, "chat_template: this tokenizer has none"),
    ],
)
def test_a_broken_template_is_refused(source: str | None, says: str):
    with pytest.raises(UserError, match=says):
        Chat(chats.tokenizer(source))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('only cats') }}", "refuses the conversation: only cats"),
        ("{{ messages[7].content }}", "refuses the conversation: .*no element 7"),
        ("{{ 1 + 'a' }}", "refuses the conversation: unsupported operand"),
        ("{{ messages.append(1) }}", "refuses the conversation: .*append.* unsafe"),
        ("{{ messages.__class__.__mro__ }}", "refuses the conversation: .*__class__.* unsafe"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "ends an answer with no token of its own; enclose"),
        ("{% if add_generation_prompt %}b{% endif %}{{ eos_token }}", "does not begin an answer as it prompts for one"),
    ],
)
def test_a_template_that_cannot_render_or_be_learned_from_is_refused(source: str, says: str):
    with pytest.raises(UserError, match=f"here: the chat template {says}"):
        Chat(chats.tokenizer(source)).texts(Conversation("here", "", tuple(talk("a", "b"))))


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(UserError, match="names no eos_token"):
        Chat(chats.tokenizer(TEMPLATES["chatml"], eos=None))


def test_the_default_template_has_no_form_for_tool_calls():
    with pytest.raises(UserError, match="no form for tool calls"):
        chat("default").prompt([{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}])
