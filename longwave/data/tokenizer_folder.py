"""The files of a tokenizer: what a folder says in all of them together.

A folder that `transformers` wrote, or tools like it, says what its tokenizer is in several files, and which of them
counts depends on the class that `tokenizer_config.json` and `config.json` name: some classes take the vocabulary of
`tokenizer.json` and nothing else of it. So `transformers` itself is asked what it makes of such a folder. The answer is
kept as one `tokenizer.json` that says everything, beside a `tokenizer_config.json` that names the special tokens: the
form in which longwave saves tokenizers, which it reads without `transformers`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tokenizers

from longwave.data.bounds import PIECE, longest_piece
from longwave.errors import UserError, require, shown
from longwave.files import OpenFolder
from longwave.files.jsonfile import brief, object_in

VOCABULARY_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
TEMPLATES = "chat_templates"
OTHER_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", TEMPLATES)
VOCABULARIES = (VOCABULARY_FILE, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
LARGEST_VOCABULARY = 1 << 22  # entries and ids; the largest published have some 2^20
LARGEST_FILES = {VOCABULARY_FILE: 64 << 20}  # bytes; the largest published have 35 MB
LARGEST_FILE = 16 << 20  # bytes of any other
OWN_CLASS = "PreTrainedTokenizerFast"

Config = dict[str, Any]
"""The content of a `tokenizer_config.json`."""

_OWN_MODEL = "longwave"
_SETTINGS = {
    "clean_up_tokenization_spaces": False,
    "padding_side": "right",
    "truncation_side": "right",
    "split_special_tokens": False,
    "model_input_names": ["input_ids", "attention_mask"],
}
"""What `transformers` assumes where a config is silent, and its class says nothing else."""
_READ_AS_IS = {"tokenizer_class", "model_max_length", "chat_template", "additional_special_tokens", *_SETTINGS}
_USED_UP = {
    *("tokenizer_class", "auto_map", "fast_tokenizer_files", "tokenizer_file", "vocab_file", "merges_file"),
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"),
    *("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "from_slow", "fix_mistral_regex"),
    *("chat_template", "backend", "is_local", "local_files_only", "name_or_path", "files_loaded"),
}
"""Keys that say how to make a tokenizer, of which nothing is left to say once it is made."""
_PARTS = re.compile(
    r"(tokeniz|special_tokens|added_tokens|vocab|merges|spiece|sentencepiece|tekken|chat_template|config)"
    r"[\w./-]*\.(json|jinja|model|txt|tiktoken)"
)
"""The names of files that a tokenizer may be made of."""
_CLASS = re.compile(r"\w*(Tokenizer|TokenizerFast|TokenizersBackend)")


def holds_one(folder: OpenFolder) -> bool:
    """Whether a folder holds the vocabulary of a tokenizer."""
    return any(name in folder for name in VOCABULARIES)


def read(folder: OpenFolder) -> tuple[tokenizers.Tokenizer, Config]:
    """The tokenizer in a folder, and the config that names its special tokens, as `AutoTokenizer` reads them.

    Raises UserError naming the file that is missing, cannot be read or cannot be used.
    """
    path = folder / VOCABULARY_FILE
    if not holds_one(folder):
        raise UserError(f"{path}: no such file; a tokenizer is read from a folder that holds {VOCABULARY_FILE}")
    config = _read_json(folder, CONFIG_FILE)
    _check_others(folder)
    if VOCABULARY_FILE not in folder:
        return _by_transformers(folder, config)
    content = _read(folder, VOCABULARY_FILE)
    definition = object_in(content, path)
    _check_vocabulary(definition, path)
    backend = _backend(content, path)
    return (backend, config) if _is_own(folder, definition, config) else _by_transformers(folder, config)


def write(folder: Path, definition: str, config: Config) -> None:
    """Writes a tokenizer of which `AutoTokenizer` makes the same again.

    UserError beside the `config.json` of a kind of model to which `transformers` gives a tokenizer of its own making.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / VOCABULARY_FILE).write_text(definition, encoding="utf-8")
    content = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    # half a surrogate pair becomes the escape that JSON has for it
    (folder / CONFIG_FILE).write_text(content, encoding="utf-8", errors="backslashreplace")
    with OpenFolder(folder) as written:
        model = _model_type(written)
        if model == _OWN_MODEL:
            return
        said = _by_transformers(written, config)[0].to_str(pretty=True)
        other = f"beside a model of the kind {shown(model)}, transformers would make another tokenizer of this one"
        require(said == definition, f"{folder / CONFIG_FILE}: {other}; save in longwave's own format")


def _model_type(folder: OpenFolder) -> Any:
    """The kind of the model in a folder; longwave's where there is none."""
    return _read_json(folder, "config.json").get("model_type", _OWN_MODEL)


def _backend(content: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path}: not a readable tokenizer ({brief(error)})") from error


def _is_own(folder: OpenFolder, definition: dict[str, Any], config: Config) -> bool:
    """Whether `transformers` would take the tokenizer as `tokenizer.json` says it: the form in which longwave saves.

    Nothing lies in other files, no class or kind of model has ways of its own, nothing is set that changes the
    tokenizer, and every special token is one already.
    """
    special = {token.get("content") for token in definition.get("added_tokens", ()) if token.get("special")}
    extra = config.get("additional_special_tokens", [])
    named = [token for name, token in config.items() if name.endswith("_token")]
    return (
        folder.names.isdisjoint(OTHER_FILES)
        and _model_type(folder) == _OWN_MODEL
        and config.get("tokenizer_class") == OWN_CLASS
        and all(name in _READ_AS_IS or name.endswith("_token") for name in config)
        and definition.get("truncation") is None
        and definition.get("padding") is None
        and isinstance(extra, list)
        and all(isinstance(token, str) and token in special for token in [*named, *extra])
    )


def _by_transformers(folder: OpenFolder, config: Config) -> tuple[tokenizers.Tokenizer, Config]:
    """What `AutoTokenizer` makes of a folder. It runs no code of the folder's, and reads nothing else.

    It reads a copy of the tokenizer's files, as they were when the folder was opened.
    """
    where = folder / CONFIG_FILE
    name = config.get("tokenizer_class")
    known = name is None or (isinstance(name, str) and _CLASS.fullmatch(name) is not None)
    require(known, f"{where}: tokenizer_class = {shown(name)}: no class of a tokenizer")
    from transformers import AutoTokenizer

    with _quiet(), TemporaryDirectory() as copy:
        _copy(folder, Path(copy))
        try:
            theirs = AutoTokenizer.from_pretrained(copy, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever one of some hundred classes raises
            said = brief(error).replace(copy, str(folder.path))
            raise UserError(f"{where}: transformers makes no tokenizer of this folder ({said})") from error
    backend = getattr(theirs, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise UserError(f"{where}: tokenizer_class = {shown(name)}: has no form for the tokenizers library")
    return backend, _config_of(theirs, config)


def _copy(folder: OpenFolder, target: Path) -> None:
    """Writes what a tokenizer may be made of into another folder."""
    for name in _parts(folder):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(_read(folder, name))


def _config_of(theirs: Any, config: Config) -> Config:
    """The config of a tokenizer of `transformers`: what it was given, with what its class and other files added."""
    kept = {key: value for key, value in config.items() if key not in _USED_UP and not key.endswith("_token")}
    settings = {key: getattr(theirs, key) for key in _SETTINGS}
    changed = {key: value for key, value in settings.items() if key in config or value != _SETTINGS[key]}
    made = {"tokenizer_class": OWN_CLASS, **theirs.special_tokens_map, **kept, **changed}
    template = theirs.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": source} for name, source in template.items()]
    more = {"additional_special_tokens": list(theirs.extra_special_tokens), "chat_template": template}
    return made | {key: value for key, value in more.items() if value}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that `transformers` gives to its own users."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_json(folder: OpenFolder, name: str) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    return object_in(_read(folder, name), folder / name) if name in folder else {}


def _read(folder: OpenFolder, name: str) -> bytes:
    return folder.read(name, LARGEST_FILES.get(name, LARGEST_FILE))


def _check_others(folder: OpenFolder) -> None:
    """UserError naming a file beside the vocabulary that cannot be read, before another library tries."""
    for name in OTHER_FILES[:2]:
        _read_json(folder, name)
    for name in folder.names & {*VOCABULARIES}:
        content = _read(folder, name)
        if name.endswith(".model"):
            _check_piece(longest_piece(content) // 4, folder / name)  # a letter has up to four bytes
    for name in (name for name in _parts(folder) if name.endswith(".jinja")):
        _require_utf8(_read(folder, name), folder / name)


def _parts(folder: OpenFolder) -> list[str]:
    """The files that a tokenizer may be made of."""
    templates = folder.names_in(TEMPLATES) if TEMPLATES in folder else []
    return [name for name in (*sorted(folder.names), *templates) if _PARTS.fullmatch(name)]


def _require_utf8(content: bytes, path: Path) -> None:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


def _check_piece(letters: int, path: Path) -> None:
    require(letters <= PIECE, f"{path}: a piece of {letters:,} letters; at most {PIECE:,} are looked up")


def _check_vocabulary(definition: dict[str, Any], path: Path) -> None:
    """UserError for what the library does not bear.

    It fills the gap before an id far beyond all others, with gigabytes if it is wide, and goes down a call for each
    letter of Unigram's pieces, which ends the process at some ten thousand.
    """
    model = definition.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    pieces = (one[0] for one in vocabulary if isinstance(one, list) and one) if isinstance(vocabulary, list) else ()
    _check_piece(max((len(piece) for piece in pieces if isinstance(piece, str)), default=0), path)
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    wrong = next((id for id in ids if not (type(id) is int and 0 <= id < LARGEST_VOCABULARY)), None)
    require(wrong is None, f"{path}: id {shown(wrong)}: ids are numbers from 0 to {LARGEST_VOCABULARY - 1:,}")
