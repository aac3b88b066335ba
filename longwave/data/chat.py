"""Conversations to ids through a tokenizer's chat template, and which of the ids are the assistant's.

- Only the template writes special tokens; `<|eos|>` in a message is text (`marks.py`).
- Of a turn of the assistant, the model learns the ids between the prompt that it will be given at inference and the
  token that ends the turn, that token included.
- Some templates write an earlier turn differently once others follow it (Qwen3's drops the reasoning). Such a turn
  becomes a separate document that ends with it, as the model would have written it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

from longwave.data.conversations import ASSISTANT, is_label
from longwave.data.documents import Conversation, Message
from longwave.data.encoding import Encoded, Kind
from longwave.data.marks import Marked, Marks, Span
from longwave.data.template import Rendered, Template
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError, require
from longwave.files.jsonfile import plain

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['tool_calls'] %}{{ raise_exception('it has no form for tool calls') }}{% endif %}"
    "{{ bos_token }}{{ message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}{{ 'assistant\\n' }}{% endif %}"
)
"""The template for a tokenizer without one: ChatML, with bos and eos around every turn, which no message can write."""

LossOn = Literal["assistant", "all"]

# The most of one conversation: a text is tokenised whole, in up to 190 bytes of memory per byte, and where each answer
# is rendered on its own, the time grows with the square of the messages.
LONGEST_CHARACTERS = 2 << 20
_MOST_RENDERED = 1 << 20  # renderings times messages
_LEAVE_OUT = "leave it out"


class Chat:
    """The chat template of a tokenizer.

    Raises UserError for a tokenizer that has no eos, or whose template is missing or broken.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_id is None:
            raise UserError("tokenizer: it names no eos_token, so that no turn could end; give one that does")
        self.tokenizer, self._eos_id, self._marks = tokenizer, tokenizer.eos_id, Marks(tokenizer)
        self._template = Template(tokenizer, self._marks)

    @property
    def variables(self) -> frozenset[str]:
        """The names of the variables that the template reads, such as `tools`."""
        return self._template.variables

    def prompt(self, messages: Sequence[Message], where: str = "prompt") -> list[int]:
        """The ids of a conversation and of the beginning of the assistant's next turn.

        Raises UserError for a conversation that the template refuses, or does not read all fields of.
        """
        return self.ids(self.written(messages, where))

    def written(
        self,
        messages: Sequence[Message],
        where: str = "prompt",
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The same as text with marks for special tokens, which `ids` reads.

        variables: for the template to read. Raises UserError like `prompt`, and for variables that it does not read.
        """
        unread = [plain(name) for name in variables if name not in self.variables]
        require(not unread, f"{', '.join(unread[:5])}: not read by the chat template; leave it out")
        rendered = self._template.render(messages, where, prompt=True, variables=variables)
        _require_asked(messages, rendered.asked, where, remedy=_LEAVE_OUT)
        return rendered.text

    def ids(self, written: str) -> list[int]:
        """The ids of a text with marks for special tokens."""
        [encoded] = self._marks.encode([written])
        return encoded.ids

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a turn of the assistant: eos, and the special tokens that the template writes after it."""
        probe = [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "a"}]
        text = self._template.render(probe, "chat_template").text
        closing = {start for start, _ in self._marks.closing(text, 0)}
        [marked] = self._marks.encode([text])
        ids = {id for id, start in zip(marked.ids, marked.starts, strict=True) if start in closing}
        return frozenset({self._eos_id, *ids})

    def texts(self, conversation: Conversation, loss_on: LossOn = "assistant") -> list[Rendered]:
        """The marked texts that a model learns a conversation from, each with the spans to learn; [] without an answer.

        Raises UserError for a conversation that the template refuses or does not read all of, and for a template that
        leaves open which part of its text is the assistant's.
        """
        where, messages = conversation.name, conversation.messages
        skipped = f"{where}: a message with weight 0 cannot be left out of a loss on all; use --loss-on assistant"
        require(loss_on == "assistant" or not conversation.unlearned, skipped)
        _require_size(conversation, 1 if loss_on == "all" or self._template.names_answers else len(messages))
        if loss_on == "all" or self._template.names_answers:
            whole = self._template.render(messages, where, variables=self._variables(conversation))
            _require_asked(messages, whole.asked, where)
            answers = [(0, len(whole.text))] if loss_on == "all" else _learned(conversation, whole.answers)
            return [Rendered(whole.text, answers)] if answers else []
        turns = [self._turn(conversation, place) for place, one in enumerate(messages) if one["role"] == ASSISTANT]
        seen = messages[: turns[-1].place + 1] if turns else ()
        _require_asked(seen, frozenset().union(*(turn.asked for turn in turns)), where)
        return _shared([turn for turn in turns if turn.place not in conversation.unlearned])

    def encode(self, texts: Sequence[Rendered]) -> list[Encoded]:
        """The ids of texts, and the spans of ids that are learned: ids whose text begins within an answer."""
        pairs = zip(texts, self._marks.encode([one.text for one in texts]), strict=True)
        return [self._encoded(rendered, marked) for rendered, marked in pairs]

    def _variables(self, conversation: Conversation) -> dict[str, Any]:
        """What the data gives the template to read. Raises UserError for what it neither reads nor may pass over."""
        given, known = conversation.variables, self._template.variables
        unread = [name for name in given if name not in known and not is_label(name)]
        require(not unread, _unread(conversation.name, unread))
        return {name: value for name, value in given.items() if name in known}

    def _turn(self, conversation: Conversation, place: int) -> _Turn:
        """The answer at `place` by comparing two renderings: the prompt for it, and the conversation up to its end."""
        where, messages, variables = conversation.name, conversation.messages, self._variables(conversation)
        prompt = self._template.render(messages[:place], where, prompt=True, variables=variables)
        whole = self._template.render(messages[: place + 1], where, variables=variables)
        remedy = "enclose what is learned in {% generation %} and {% endgeneration %} in the template"
        begins = whole.text.startswith(prompt.text)
        require(begins, f"{where}: the chat template does not begin an answer as it prompts for one; {remedy}")
        ends = [end for _, end in self._marks.closing(whole.text, len(prompt.text))]
        require(bool(ends), f"{where}: the chat template ends an answer with no token of its own; {remedy}")
        return _Turn(place, whole.text, len(prompt.text), ends, whole.asked)

    def _encoded(self, rendered: Rendered, marked: Marked) -> Encoded:
        text, answers = rendered.text, rendered.answers
        spans = [(bisect_left(marked.starts, start), bisect_left(marked.starts, end)) for start, end in answers]
        said = self._marks.unmark("".join(text[start:end] for start, end in answers))
        return Encoded(marked.ids, [span for span in spans if span[0] < span[1]], len(said.encode()))


class _Turn(NamedTuple):
    """A conversation up to the end of one answer.

    place: of the answer among the messages. start: the character where it begins. ends: the characters behind each
    special token that closes it, of which a template may drop the last ones once another turn follows.
    asked: the fields of messages that the template looked for.
    """

    place: int
    text: str
    start: int
    ends: list[int]
    asked: frozenset[tuple[str, str]]

    def within(self, text: str) -> Span | None:
        """The span of the answer in a longer rendering of the conversation; None where that shows it differently."""
        ends = (end for end in reversed(self.ends) if text.startswith(self.text[:end]))
        return next(((self.start, end) for end in ends), None)


def _shared(turns: list[_Turn]) -> list[Rendered]:
    """The fewest texts in which every answer stands as the model gave it.

    The longest text comes first and takes all answers that it shows unchanged; the others need an earlier text.
    """
    texts = list[Rendered]()
    while turns:
        text = turns[-1].text
        spans = [turn.within(text) for turn in turns]
        texts.append(Rendered(text, [span for span in spans if span]))
        turns = [turn for turn, span in zip(turns, spans, strict=True) if not span]
    return texts


def _learned(conversation: Conversation, answers: list[Span]) -> list[Span]:
    """Of the answers that a template encloses, those that the data does not exclude from the loss."""
    if not conversation.unlearned:
        return answers
    places = [place for place, one in enumerate(conversation.messages) if one["role"] == ASSISTANT]
    apart = f"{conversation.name}: weight 0: the chat template encloses {len(answers)} answers of {len(places)}"
    require(len(answers) == len(places), f"{apart}, which leaves open whose they are; leave the conversation out")
    return [span for place, span in zip(places, answers, strict=True) if place not in conversation.unlearned]


def _require_asked(
    messages: Sequence[Message], asked: frozenset[tuple[str, str]], where: str, remedy: str | None = None
) -> None:
    """Raises UserError for fields of messages that the template did not look for, unless they are labels.

    remedy: what to do about them; by default the ways of `longwave prepare`.
    """
    for place, message in enumerate(messages):
        others = (key for key in message if key not in ("role", "content") and not is_label(key))
        unread = [key for key in others if (message["role"], key) not in asked]
        require(not unread, _unread(f"{where}: messages[{place}]", unread, remedy))


def _require_size(conversation: Conversation, renderings: int) -> None:
    """Raises UserError for a conversation that would take more memory or time than any machine should give it."""
    where, size, count = conversation.name, len(conversation.text), len(conversation.messages)
    longest = f"{where}: a conversation of {size:,} characters; cut it, {LONGEST_CHARACTERS:,} is the most"
    require(size <= LONGEST_CHARACTERS, longest)
    most = f"{where}: a conversation of {count:,} messages, each answer of which would be rendered on its own; cut it"
    require(count * renderings <= _MOST_RENDERED, f"{most}, or enclose answers in {{% generation %}} in the template")


def _together(texts: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    """Texts in groups that are small enough for memory, and large enough to keep every core busy."""
    group, size = list[Rendered](), 0
    for text in texts:
        if group and size + len(text.text) > LONGEST_CHARACTERS:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text.text)
    if group:
        yield group


def _unread(where: str, names: Sequence[str], remedy: str | None = None) -> str:
    some = [plain(name) for name in names[:5]]
    ways = " ".join(f"--ignore {name}" for name in some)
    remedy = remedy or f"{_LEAVE_OUT}, or pass it over ({ways})"
    return f"{where}: {', '.join(some)}: not read by the chat template; {remedy}"


class ChatEncoder:
    """Encodes conversations. A conversation without an answer is left out, unless the loss is on all tokens.

    A tokenizer without a chat template is given `DEFAULT_TEMPLATE`, which is saved with it. Raises UserError like
    `Chat`.
    """

    kind: ClassVar[Kind] = "chat"

    def __init__(self, tokenizer: Tokenizer, loss_on: LossOn) -> None:
        given = tokenizer.chat_template is not None
        self._chat = Chat(tokenizer if given else tokenizer.with_chat_template(DEFAULT_TEMPLATE))
        self._loss_on: LossOn = loss_on

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which has a chat template even if the given one had none."""
        return self._chat.tokenizer

    @property
    def by_answer(self) -> bool:
        """Whether only the assistant's turns are learned."""
        return self._loss_on == "assistant"

    def encode(self, documents: Sequence[Conversation]) -> list[list[Encoded]]:
        """The documents of each conversation: one as a rule, none without an answer.

        Several, where the template shows an earlier answer differently once others follow.
        """
        texts = [self._chat.texts(one, self._loss_on) for one in documents]
        encoded = chain.from_iterable(map(self._chat.encode, _together(chain.from_iterable(texts))))
        return [[self._learned(next(encoded)) for _ in some] for some in texts]

    def _learned(self, encoded: Encoded) -> Encoded:
        return encoded if self.by_answer else replace(encoded, learned=None)
