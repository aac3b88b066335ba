"""Chat templates in the manner of the published ones, and tokenizers that have their tokens."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from longwave.data.tokenizer import BOS, EOS, Tokenizer

TEXT = "the user said hello; the assistant said: print(x)\n\n\nsystem, think, answer </think> \n \n done.\n" * 30
PLAIN = Tokenizer.train([TEXT], 330)

LLAMA = (
    "{% for message in messages %}"
    "{% set text = '<|start|>' + message['role'] + '<|stop|>\n\n' + message['content'] | trim + '<|turn|>' %}"
    "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|start|>system\nBe brief.<|turn|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start|>' + message.role + '\n' + message.content + '<|turn|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\n' }}
{%- endif %}"""
# Only the last answer shows its reasoning, or the place where there would be some, as in Qwen3.
REASONING = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = content.split('</think>')[0].strip('\n') if '</think>' in content else '' %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- if loop.last %}{% set content = '<think>\n' + reasoning + '\n</think>\n\n' + content %}{% endif %}
    {%- endif %}
    {{- '<|start|>' + message.role + '\n' + content + '<|turn|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
ENCLOSED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|start|>assistant\n{% generation %}{{ message['content'] }}<|turn|>{% endgeneration %}\n"
    "{% else %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|turn|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEMPLATES = {"llama": LLAMA, "chatml": CHATML, "reasoning": REASONING, "instruct": INSTRUCT, "enclosed": ENCLOSED}


def tokenizer(template: str | None, eos: str | None = "<|turn|>", backend: Backend | None = None) -> Tokenizer:
    """A tokenizer with `<|start|>`, `<|stop|>` and `<|turn|>` as special tokens, and `<think>` as an ordinary one."""
    backend = backend or tokenizers.Tokenizer.from_str(PLAIN._definition)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ("<|start|>", "<|stop|>", "<|turn|>")])
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": eos}
    made = Tokenizer(backend, {name: value for name, value in config.items() if value})
    return made if template is None else made.with_chat_template(template)


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation in which user and assistant take turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]


__all__ = ["BOS", "EOS", "PLAIN", "TEMPLATES", "talk", "tokenizer"]
