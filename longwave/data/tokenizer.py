"""Text to token ids and back: a thin layer over the `tokenizers` library.

The layer adds training with fixed choices, folders that `transformers.AutoTokenizer` reads and writes too
(`tokenizer_folder.py`), and encoding in which text never becomes a special token (`hiding.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Encoding, Regex, decoders, models, pre_tokenizers, processors, trainers

from longwave import files
from longwave.data import patience, tokenizer_folder
from longwave.data.bounds import require_bounded
from longwave.data.hiding import hidden, size_of, unk_of
from longwave.data.tokenizer_folder import LARGEST_VOCABULARY
from longwave.errors import UserError, require, shown, within
from longwave.files import OpenFolder
from longwave.files.jsonfile import brief, plain

BOS, EOS = "<|bos|>", "<|eos|>"
REPLACEMENT = "\ufffd"
_PUNCTUATION = {f" {mark}": mark for mark in ".?!,"}
_CLEANED = {**_PUNCTUATION, " ' ": "'", **{f" {end}": end for end in ("n't", "'m", "'s", "'ve", "'re")}}
"""What decoding with `clean_up_tokenization_spaces` replaces, in this order."""
SMALLEST_VOCABULARY = 256 + 2  # every byte, bos and eos
_LONG = 1000  # letters of a word
_LETTERS_OF_WORDS = 2000  # of text, for each time that words which get entries are counted
_BLANKS = re.compile(rf"\s{{{_LONG}}}")
_RUNS = re.compile(rf"\w{{{_LONG}}}|[^\w\s]{{{_LONG}}}|\s{{{_LONG}}}")
_PROBE, _PROBES = "a 1 一", 100  # texts that show what is put around a text

# Llama 3's split of text before BPE: words with at most one leading character, up to three digits, runs of punctuation,
# line ends, blanks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to ids and back.

    bos_id, eos_id, pad_id: the ids of the tokens that the config names so, or None where it names none.
    opening, closing: the ids that the tokenizer's post-processor puts before and after a text; bos and nothing as a
        rule. A tokenizer may name a bos and yet put none before a text.
    special_ids: the ids of all special tokens, those that the config names among them. Text never becomes one of them
        (but for the model's own token for what it does not know), and `decode` leaves them out.
    vocab_size: the largest id plus one: the number of rows that an embedding needs.
    fingerprint: SHA-256 of the whole definition; equal for equal tokenizers.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]):
        """Wraps a `tokenizers` object and the content of its `tokenizer_config.json`, which names bos and eos.

        UserError for a token that the config names and the vocabulary lacks, for a special token that ordinary text is
        made of, and for a definition that would make much of a short text (`bounds.py`).
        """
        backend.no_truncation()
        backend.no_padding()
        self._definition = backend.to_str(pretty=True)
        definition = json.loads(self._definition)
        require_bounded(definition)
        self._config = config
        self._special = _special_tokens(backend, self.named_tokens, self.extra_tokens)
        self.special_ids = frozenset(self._special.values())
        self.bos_id, self.eos_id, self.pad_id = (
            self._special.get(self.named_tokens.get(name, "")) for name in ("bos_token", "eos_token", "pad_token")
        )
        with patience.watching(0):
            self.opening, self.closing = _around(backend)
        self.vocab_size = size_of(definition)
        self.cleans = _cleans_blanks(config, definition["model"]["type"])
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(hidden(definition, self._special)))
        self._forbidden = self._never_said(unk_of(definition["model"]))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, words: str = "") -> Tokenizer:
        """A byte-level BPE with `<|bos|>` as id 0 and `<|eos|>` as id 1; the same texts always give the same tokenizer.

        Padding is `<|eos|>`. vocab_size: the largest number of entries, special tokens included; a short text gives
        fewer. words: a text of which every word gets an entry, as it is written there.
        Raises UserError for a vocab_size that cannot hold every byte or these words, or that no machine could train.
        """
        size = f"vocab_size = {vocab_size}: a byte-level vocabulary has"
        require(vocab_size >= SMALLEST_VOCABULARY, f"{size} at least {SMALLEST_VOCABULARY} entries")
        require(vocab_size <= LARGEST_VOCABULARY, f"{size} at most {LARGEST_VOCABULARY:,} entries here")
        backend = _untrained()
        backend.train_from_iterator(chain.from_iterable(map(_in_words, _with(words, texts))), _trainer(vocab_size))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
        )
        named = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
        made = cls(backend, {"tokenizer_class": tokenizer_folder.OWN_CLASS, **named})
        parts = [part for part in re.findall(r" ?\w+", words) if len(made.encode(part)) > 1]
        require(not parts, f"vocab_size = {vocab_size}: too few for all the words that get entries; give more")
        return made

    @classmethod
    def load(cls, folder: str | Path | OpenFolder) -> Tokenizer:
        """The tokenizer in a folder, as `transformers.AutoTokenizer` reads it.

        Raises UserError naming the file that is missing, cannot be read or cannot be used.
        """
        if not isinstance(folder, OpenFolder):
            return files.read_whole(folder, cls.load)
        with patience.without_panic(f"{folder / tokenizer_folder.VOCABULARY_FILE}: "):
            backend, config = tokenizer_folder.read(folder)
            with within(folder.path):
                return cls(backend, config)

    @classmethod
    def find(cls, folder: str | Path | OpenFolder) -> Tokenizer | None:
        """The tokenizer in a folder as by `load`; None where no file of a tokenizer lies."""
        if not isinstance(folder, OpenFolder):
            return files.read_whole(folder, cls.find)
        return cls.load(folder) if tokenizer_folder.holds_one(folder) else None

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, of which `AutoTokenizer` makes the same tokenizer."""
        tokenizer_folder.write(Path(folder), self._definition, self._config)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """The ids of a text. Names of special tokens in it are ordinary text.

        add_bos: whether `opening` comes first: what the tokenizer puts before a text, bos as a rule.
        Raises UserError for a text that is not valid Unicode, or that this tokenizer cannot write.
        """
        [ids] = self.encode_batch([text])
        return [*self.opening, *ids] if add_bos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens, on all cores. Raises UserError like `encode`."""
        return [encoding.ids for encoding in self.encode_marked(texts, places=False)]

    def encode_marked(self, texts: Sequence[str], places: bool = True) -> list[Encoding]:
        """Texts in which the marks of special tokens (`mark`) become these tokens, and nothing else does.

        places: whether the encodings say which characters each token stands for.
        """
        encode = self._backend.encode_batch if places else self._backend.encode_batch_fast
        try:
            with patience.watching(sum(map(len, texts))):
                encodings = encode(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise UserError(
                "text: not valid Unicode (a lone surrogate); give text that can be written as UTF-8"
            ) from error
        except Exception as error:  # the library raises bare Exceptions, as for a word that a vocabulary lacks
            raise UserError(f"text: this tokenizer cannot write it ({brief(error)})") from error
        if self._forbidden is not None and any(self._forbidden in encoding.ids for encoding in encodings):
            name = shown(self.special_tokens[self._forbidden])
            raise UserError(f"text: this tokenizer writes what it does not know as {name}, which has another meaning")
        return encodings

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out; bytes that are not valid UTF-8 become U+FFFD.

        Raises UserError for ids that are none, and where the tokenizer's decoder fails.
        """
        try:
            with patience.without_panic():
                text = self._backend.decode(list(ids), skip_special_tokens=True)
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"ids: this tokenizer cannot decode them ({brief(error)})") from error
        return _without_blanks(text) if self.cleans else text

    def twin(self) -> tokenizers.Tokenizer:
        """A new `tokenizers` object with the same definition, which does recognise special tokens in text."""
        backend = tokenizers.Tokenizer.from_str(self._definition)
        known = backend.get_added_tokens_decoder()
        for name, id in self._special.items():
            token = known.get(id, AddedToken(name, normalized=False))
            token.special = True
            backend.add_special_tokens([token])
        return backend

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """The names of all special tokens in text, by their ids."""
        return {id: name for name, id in self._special.items()}

    @property
    def plain_added_tokens(self) -> list[str]:
        """The tokens that are looked for in text and are not special."""
        added = self._backend.get_added_tokens_decoder().values()
        return [token.content for token in added if not token.special]

    @property
    def named_tokens(self) -> dict[str, str]:
        """The special tokens that the config names, as text by their name, such as `bos_token`."""
        named = {name: _content(token) for name, token in self._config.items() if name.endswith("_token")}
        return {name: token for name, token in named.items() if isinstance(token, str)}

    @property
    def extra_tokens(self) -> list[str]:
        """The special tokens that the config lists without a name for each."""
        given = self._config.get("additional_special_tokens") or []
        return [_content(token) for token in given]

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template; of several, the template named `default`. None where there is none."""
        given = self._config.get("chat_template")
        if isinstance(given, list):  # transformers keeps several as [{"name": ..., "template": ...}]
            given = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}.get("default")
        if given is None or isinstance(given, str):
            return given
        raise UserError(f"chat_template: a {type(given).__name__}; give the source of a template, a string")

    def with_chat_template(self, source: str) -> Tokenizer:
        """The same tokenizer with another chat template, which `save` writes too."""
        return Tokenizer(self.twin(), {**self._config, "chat_template": source})

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._definition.encode()).hexdigest()

    def _never_said(self, unknown: str | None) -> int | None:
        """The id of the model's token for what it does not know, if it is a special token of another meaning too."""
        meanings = {name for name, token in self.named_tokens.items() if token == unknown}
        if unknown not in self._special or {"unk_token"} <= meanings <= {"unk_token", "pad_token"}:
            return None
        return self._special[unknown]


class StreamDecoder:
    """Decodes ids one by one; the pieces joined equal the decoding of all ids at once, without that of `after`.

    after: the ids that the others continue, such as a prompt's. They matter, since decoders treat the beginning of a
        text specially: SentencePiece's drop the blank before its first word.
    One exception: with SentencePiece's byte fallback, bytes that are not valid UTF-8 may give a different number of
    U+FFFD than decoding at once does.
    """

    _FEW = 16  # tokens; only broken text has more of them between two whole characters

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # The ids whose text last ended with a whole character, and all after them. The former are kept since decoders
        # treat the start of a text specially.
        self._ids = [id for id in after if id not in tokenizer.special_ids][-self._FEW :]
        self._fresh = 0  # how many of the ids came after the text last ended with a whole character
        self._given = len(tokenizer.decode(self._ids))  # how many characters of the text of the ids were returned

    def push(self, id: int) -> str:
        """The text that `id` completes; bytes that may yet become a character are held back."""
        if id in self._tokenizer.special_ids:
            return ""
        self._ids.append(id)
        self._fresh += 1
        text = self._tokenizer.decode(self._ids)
        piece = text[self._given : self._sure(text)]
        self._given += len(piece)
        if self._sure(text) == len(text):
            self._forget(self._fresh)
            self._fresh = 0
        elif self._fresh > 2 * self._FEW:
            self._forget(self._FEW)
            self._fresh = self._FEW
        return piece

    @property
    def rest(self) -> str:
        """The text still held back, half characters as U+FFFD."""
        return self._tokenizer.decode(self._ids)[self._given :]

    def finish(self) -> str:
        """The text still held back; afterwards the decoder begins a new text."""
        piece = self.rest
        self._ids, self._fresh, self._given = [], 0, 0
        return piece

    def _sure(self, text: str) -> int:
        """The number of leading characters that no later token can change.

        A half character shows as one to three U+FFFD at the end, so these are held back, but not broken text without
        end: of a long run of U+FFFD only the last three may still become a character.
        """
        if self._fresh > self._FEW and text.endswith(REPLACEMENT * 4):
            return len(text) - 3
        return len(text.rstrip(REPLACEMENT)) - self._blanks(text)

    def _blanks(self, text: str) -> int:
        """The number of characters at the end that a later token may show to begin with a blank to be taken out."""
        if not self._tokenizer.cleans:
            return 0
        beginnings = (spaced[:count] for spaced in _CLEANED for count in range(1, len(spaced)))
        return max((len(one) for one in beginnings if text.endswith(one)), default=0)

    def _forget(self, keep: int) -> None:
        """Drops all but the last `keep` ids, which hold the text held back, so that the cost of a push never grows."""
        held_back = len(self._tokenizer.decode(self._ids)) - self._given
        self._ids = self._ids[-keep:]
        self._given = len(self._tokenizer.decode(self._ids)) - held_back


def _in_words(text: str) -> Iterator[str]:
    """The text, cut within words of thousands of letters, since training takes the square of a word's length."""
    if max(map(len, text.split()), default=0) < _LONG and _BLANKS.search(text) is None:
        yield text
        return
    begin = 0
    for found in _RUNS.finditer(text):
        yield text[begin : found.end()]
        begin = found.end()
    yield text[begin:]


def _with(words: str, texts: Iterable[str]) -> Iterator[str]:
    """The texts, and the words more often than the rarest pair of letters that becomes an entry."""
    letters = 0
    for text in texts:
        letters += len(text)
        yield text
    yield from repeat(words, 1 + letters // _LETTERS_OF_WORDS if words else 0)


def _untrained() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _trainer(vocab_size: int) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            AddedToken(BOS, special=True, normalized=False),
            AddedToken(EOS, special=True, normalized=False),
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _special_tokens(backend: tokenizers.Tokenizer, named: Mapping[str, str], extra: Iterable[str]) -> dict[str, int]:
    """The ids of the special tokens, those that the config names among them, even where the vocabulary does not say so.

    UserError for a token that the vocabulary lacks.
    """
    added = backend.get_added_tokens_decoder().items()
    special = {token.content: id for id, token in added if token.special}
    for name, token in [*named.items(), *(("additional_special_tokens", token) for token in extra)]:
        id = backend.token_to_id(token)
        if id is None:
            raise UserError(f"{plain(name)} = {shown(token)}: the vocabulary has no such token")
        special[token] = id
    return special


def _around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text."""
    for text in _probes(backend):
        try:
            with patience.without_panic():
                encoding = backend.encode(text)
        except Exception:  # a text that the vocabulary lacks words for; the library raises bare Exceptions
            continue
        own = [place for place, added in enumerate(encoding.special_tokens_mask) if not added]
        if own:
            return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]
    raise UserError(f"the tokenizer gives no ids for {_PROBE!r}, nor for words of its vocabulary")


def _probes(backend: tokenizers.Tokenizer) -> Iterator[str]:
    yield _PROBE
    yield from islice(backend.get_vocab(with_added_tokens=False), _PROBES)


def _content(token: Any) -> Any:
    """The text of a token in a config; `transformers` writes a token that has flags as {"content": ...}."""
    return token.get("content") if isinstance(token, dict) else token


def _cleans_blanks(config: dict[str, Any], model: str) -> bool:
    """Whether decoding takes out blanks before punctuation, which `transformers` does not do for BPE unless forced."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return bool(config.get("clean_up_tokenization_spaces")) and (model != "BPE" or bool(config.get(forced)))


def _without_blanks(text: str) -> str:
    """The text without the blanks that `transformers` takes out on request."""
    for spaced, clean in _CLEANED.items():
        text = text.replace(spaced, clean)
    return text
