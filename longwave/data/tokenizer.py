"""Text to token ids and back: a thin layer over the `tokenizers` library.

The layer adds training with fixed choices, folders that `transformers.AutoTokenizer` reads and writes too, encoding in
which text never becomes a special token, and decoding token by token without half characters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from longwave.errors import UserError
from longwave.files.jsonfile import read_object

BOS, EOS = "<|bos|>", "<|eos|>"
REPLACEMENT = "\ufffd"
SMALLEST_VOCABULARY = 256 + 2  # every byte, bos and eos
VOCABULARY_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"

# Llama 3's split of text before BPE: words with at most one leading character, up to three digits, runs of punctuation,
# line ends, blanks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to ids and back.

    bos_id, eos_id: the ids that open and close a document, or None where the vocabulary has no such token.
    vocab_size: the largest id plus one: the number of rows that an embedding needs.
    fingerprint: SHA-256 of the whole definition; equal for equal tokenizers.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]):
        """Wraps a `tokenizers` object and the content of its `tokenizer_config.json`, which names bos and eos."""
        backend.no_truncation()
        backend.no_padding()
        self._definition = backend.to_str(pretty=True)
        self._config = config
        _make_special(backend, self.named_tokens.values())
        backend.encode_special_tokens = True
        self._plain = backend
        self.bos_id = _special_id(backend, config, "bos_token")
        self.eos_id = _special_id(backend, config, "eos_token")
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A byte-level BPE with `<|bos|>` as id 0 and `<|eos|>` as id 1; the same texts always give the same tokenizer.

        vocab_size: the largest number of entries, special tokens included; a short text gives fewer.
        Raises UserError for a vocab_size that cannot hold every byte.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise UserError(
                f"vocab_size = {vocab_size}: a byte-level vocabulary has at least {SMALLEST_VOCABULARY} entries"
            )
        backend = _untrained()
        backend.train_from_iterator(texts, _trainer(vocab_size))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
        )
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
        return cls(backend, config | {"clean_up_tokenization_spaces": False})

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer in a folder, whether longwave or `transformers` wrote it.

        Raises UserError naming the file that is missing or cannot be read.
        """
        folder = Path(folder)
        path = folder / VOCABULARY_FILE
        if not path.is_file():
            raise UserError(f"{path}: no such file; a tokenizer is read from a folder that holds {VOCABULARY_FILE}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{path}: not a readable tokenizer ({error})") from error
        try:
            return cls(backend, _read_config(folder))
        except KeyError as error:
            raise UserError(
                f"{folder / CONFIG_FILE}: names the token {error}, which {VOCABULARY_FILE} lacks"
            ) from error

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` loads as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VOCABULARY_FILE).write_text(self._definition, encoding="utf-8")
        config = json.dumps(self._config, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG_FILE).write_text(config, encoding="utf-8")

    def encode(self, text: str, add_bos: bool = False, *, parse_special: bool = False) -> list[int]:
        """The ids of a text, without special tokens unless asked for.

        parse_special: whether the names of special tokens in the text, such as `<|eos|>`, become these tokens; for
            rendered chat templates only. By default they are ordinary text, so that no document or prompt can end a
            document.
        Raises UserError for a text that is not valid Unicode, and for `add_bos` where the vocabulary has no bos.
        """
        if add_bos and self.bos_id is None:
            raise UserError("add_bos = True: this vocabulary has no bos token; encode without it")
        backend = self._parsing if parse_special else self._plain
        try:
            ids = backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise not_unicode() from error
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens, on all cores. Raises UserError like `encode`."""
        try:
            encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise not_unicode() from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out; bytes that are not valid UTF-8 become U+FFFD."""
        return self._plain.decode(list(ids), skip_special_tokens=True)

    def twin(self) -> tokenizers.Tokenizer:
        """A new `tokenizers` object with the same definition, which does recognise special tokens in text."""
        backend = tokenizers.Tokenizer.from_str(self._definition)
        _make_special(backend, self.named_tokens.values())
        return backend

    @property
    def named_tokens(self) -> dict[str, str]:
        """The special tokens that the config names, as text by their name, such as `bos_token`."""
        named = {name: _content(token) for name, token in self._config.items() if name.endswith("_token")}
        return {name: token for name, token in named.items() if isinstance(token, str)}

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
    def _parsing(self) -> tokenizers.Tokenizer:
        """A second `tokenizers` object that recognises special tokens in text.

        Switching the first one over and back would change what other threads encode with it meanwhile.
        """
        return self.twin()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of all special tokens, which `decode` leaves out."""
        return frozenset(id for id, token in self._plain.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._definition.encode()).hexdigest()


class StreamDecoder:
    """Decodes ids one by one; the pieces joined equal the decoding of all ids at once.

    One exception: with SentencePiece's byte fallback, bytes that are not valid UTF-8 may give a different number of
    U+FFFD than decoding at once does.
    """

    _FEW = 16  # tokens; only broken text has more of them between two whole characters

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # The ids whose text last ended with a whole character, and all after them. The former are kept since decoders
        # treat the start of a text specially (by dropping a blank, say).
        self._ids: list[int] = []
        self._fresh = 0  # how many of the ids came after the text last ended with a whole character
        self._given = 0  # how many characters of the text of the ids were returned

    def push(self, id: int) -> str:
        """The text that `id` completes; bytes that may yet become a character are held back."""
        if id in self._tokenizer.special_ids:
            return ""
        self._ids.append(id)
        self._fresh += 1
        text = self._tokenizer.decode(self._ids)
        piece = text[self._given : self._sure(text)]
        self._given += len(piece)
        if not text.endswith(REPLACEMENT):
            self._forget(self._fresh)
            self._fresh = 0
        elif self._fresh > 2 * self._FEW:
            self._forget(self._FEW)
            self._fresh = self._FEW
        return piece

    def finish(self) -> str:
        """The text still held back, half characters as U+FFFD; afterwards the decoder is as new."""
        piece = self._tokenizer.decode(self._ids)[self._given :]
        self._ids, self._fresh, self._given = [], 0, 0
        return piece

    def _sure(self, text: str) -> int:
        """The number of leading characters that no later token can change.

        A half character shows as one to three U+FFFD at the end, so these are held back, but not broken text without
        end: of a long run of U+FFFD only the last three may still become a character.
        """
        if self._fresh > self._FEW and text.endswith(REPLACEMENT * 4):
            return len(text) - 3
        return len(text.rstrip(REPLACEMENT))

    def _forget(self, keep: int) -> None:
        """Drops all but the last `keep` ids, which hold the text held back, so that the cost of a push never grows."""
        held_back = len(self._tokenizer.decode(self._ids)) - self._given
        self._ids = self._ids[-keep:]
        self._given = len(self._tokenizer.decode(self._ids)) - held_back


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


def _special_id(backend: tokenizers.Tokenizer, config: dict[str, Any], name: str) -> int | None:
    """The id of the token that the config calls `name`; None where the config names none.

    Raises KeyError for a token that the vocabulary lacks.
    """
    token = _content(config.get(name))
    if token is None:
        return None
    id = backend.token_to_id(token) if isinstance(token, str) else None
    if id is None:
        raise KeyError(token)
    return id


def _make_special(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Makes the tokens that the config names special, as `transformers` does, even where the vocabulary does not."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for name in tokens:
        token = added.get(name, AddedToken(name, normalized=False))
        if backend.token_to_id(name) is not None and not (name in added and token.special):
            token.special = True
            backend.add_special_tokens([token])


def _content(token: Any) -> Any:
    """The text of a token in a config; `transformers` writes a token that has flags as {"content": ...}."""
    return token.get("content") if isinstance(token, dict) else token


def _read_config(folder: Path) -> dict[str, Any]:
    """The folder's `tokenizer_config.json`, completed by the files in which older models keep parts of it."""
    named = _read_json(folder / "special_tokens_map.json")
    config = {name: named[name] for name in ("bos_token", "eos_token") if name in named}
    config |= _read_json(folder / CONFIG_FILE)
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    return read_object(path) if path.is_file() else {}


def not_unicode() -> UserError:
    """The error for a text that holds half of a surrogate pair."""
    return UserError("text: not valid Unicode (a lone surrogate); give text that can be written as UTF-8")
