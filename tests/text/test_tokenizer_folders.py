"""Folders of tokenizers in every shape: the same tokenizer as `AutoTokenizer`, and again after saving, or a refusal."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from longwave.data import tokenizer_folder
from longwave.data.encoding import TextEncoder
from longwave.data.sources import Document
from longwave.data.tokenizer import BOS, EOS, StreamDecoder, Tokenizer
from longwave.errors import UserError

Files = dict[str, Any]  # by name: the content of a JSON file, or a text
WORDS = "hello world, this is 12345 a test . don't go ? def main(argv): return 0\n"
TEXTS = ["hello world", " a  test . is this ?", "1234 don't\n\n go", "café 你 \U0001f9ed", "", "x\t\n", "hello<think>a"]
PLAIN = Tokenizer.train([WORDS * 9], 300)
TAIL = 300  # the first id that PLAIN does not use
LETTERS = [chr(letter) for letter in range(33, 127)]


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE as longwave trains it, which puts bos before a text."""
    return PLAIN.twin()


def gpt2() -> tokenizers.Tokenizer:
    """Byte-level BPE in the manner of GPT 2 and SmolLM2: nothing is put before a text."""
    backend = PLAIN.twin()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def llama2() -> tokenizers.Tokenizer:
    """BPE in the manner of Llama 2, whose file says other things than the class that it names."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *LETTERS,
        "▁h",
        "▁he",
        "is",
        "▁a",
    ]
    merges = [("▁", "h"), ("▁h", "e"), ("i", "s"), ("▁", "a")]
    vocab = {word: id for id, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


def unigram() -> tokenizers.Tokenizer:
    """Unigram in the manner of T5: eos is put behind a text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁hello", -1.0), ("is", -1.5)]
    backend = tokenizers.Tokenizer(models.Unigram([*pieces, *((letter, -4.0) for letter in LETTERS)], unk_id=2))
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return backend


def word_piece() -> tokenizers.Tokenizer:
    """WordPiece in the manner of BERT."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "world", "test", *LETTERS, *(f"##{one}" for one in LETTERS)]
    backend = tokenizers.Tokenizer(models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return backend


def word_level() -> tokenizers.Tokenizer:
    words = ["<unk>", "<s>", "</s>", "hello", "world", "test", "is", "a", "."]
    backend = tokenizers.Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def with_tokens(make: Callable[[], tokenizers.Tokenizer], *names: str, special: bool = True) -> tokenizers.Tokenizer:
    backend = make()
    add = backend.add_special_tokens if special else backend.add_tokens
    add([AddedToken(name, normalized=False) for name in names])
    return backend


def padded() -> tokenizers.Tokenizer:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=3, pad_id=1, pad_token=EOS, direction="left")
    return backend


def token(content: str, **flags: bool) -> dict[str, Any]:
    """An added token as `added_tokens_decoder` and the map of special tokens write it."""
    whole = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **whole, **flags}


CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}
NAMED = {"bos_token": BOS, "eos_token": EOS}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
SEVERAL = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools"}]
IM = ("<|im_start|>", "<|im_end|>")
SMOLLM = {"bos_token": IM[0], "eos_token": IM[1], "pad_token": IM[1], "add_prefix_space": False}
PAD = with_tokens(byte_level, "<pad>")

SHAPES: dict[str, tuple[tokenizers.Tokenizer, Files]] = {
    "nothing but tokenizer.json": (byte_level(), {}),
    "no class": (byte_level(), {CONFIG: NAMED}),
    "generic": (byte_level(), {CONFIG: {**GENERIC, **NAMED}}),
    "the newer name of generic": (byte_level(), {CONFIG: {"tokenizer_class": "TokenizersBackend", **NAMED}}),
    "a class nobody knows": (byte_level(), {CONFIG: {"tokenizer_class": "MyTokenizer", **NAMED}}),
    "null names": (byte_level(), {CONFIG: {**GENERIC, **NAMED, "unk_token": None, "pad_token": None}}),
    "tokens with flags": (
        byte_level(),
        {CONFIG: {**GENERIC, "bos_token": {"__type": "AddedToken", **token(BOS)}, "eos_token": EOS}},
    ),
    "pad in the map": (PAD, {CONFIG: {**GENERIC, **NAMED}, MAP: {**NAMED, "pad_token": "<pad>"}}),
    "all in the map": (PAD, {MAP: {**NAMED, "pad_token": token("<pad>"), "unk_token": EOS}}),
    "the map differs": (PAD, {CONFIG: {**GENERIC, **NAMED}, MAP: {"eos_token": "<pad>"}}),
    "the map beside a decoder": (
        PAD,
        {CONFIG: {**GENERIC, **NAMED, "added_tokens_decoder": {"0": token(BOS)}}, MAP: {"pad_token": "<pad>"}},
    ),
    "pad that no vocabulary has": (byte_level(), {CONFIG: {**GENERIC, **NAMED, "pad_token": "[PAD]"}}),
    "added tokens of an older folder": (
        byte_level(),
        {CONFIG: {**GENERIC, **NAMED, "pad_token": "<pad>"}, ADDED: {"<pad>": TAIL, "<think>": TAIL + 1}},
    ),
    "added_tokens_decoder": (
        byte_level(),
        {CONFIG: {**GENERIC, **NAMED, "added_tokens_decoder": {str(TAIL): token("<|x|>"), "301": token("<|y|>")}}},
    ),
    "extra tokens": (PAD, {CONFIG: {**GENERIC, **NAMED, "additional_special_tokens": ["<pad>", "<|more|>"]}}),
    "extra tokens, newer": (PAD, {CONFIG: {**GENERIC, **NAMED, "extra_special_tokens": ["<pad>"]}}),
    "extra tokens by name": (PAD, {CONFIG: {**GENERIC, **NAMED, "extra_special_tokens": {"image_token": "<pad>"}}}),
    "a name of its own": (PAD, {CONFIG: {**GENERIC, **NAMED, "image_token": "<pad>"}}),
    "plain added tokens": (
        with_tokens(byte_level, "<think>", "a te", special=False),
        {CONFIG: {**GENERIC, **NAMED}},
    ),
    "named, yet not special": (
        with_tokens(gpt2, *IM, special=False),
        {CONFIG: {**GENERIC, "eos_token": IM[1], "pad_token": IM[0]}},
    ),
    "bos and eos asked for": (gpt2(), {CONFIG: {**GENERIC, **NAMED, "add_bos_token": True, "add_eos_token": True}}),
    "no bos asked for": (byte_level(), {CONFIG: {**GENERIC, **NAMED, "add_bos_token": False}}),
    "SmolLM2": (with_tokens(gpt2, *IM), {CONFIG: {"tokenizer_class": "GPT2Tokenizer", **SMOLLM}}),
    "SmolLM2 beside its model": (
        with_tokens(gpt2, *IM),
        {CONFIG: {"tokenizer_class": "GPT2Tokenizer", **SMOLLM}, "config.json": {"model_type": "llama"}},
    ),
    "GPT 2 with a blank": (gpt2(), {CONFIG: {"tokenizer_class": "GPT2Tokenizer", **NAMED, "add_prefix_space": True}}),
    "Qwen": (with_tokens(gpt2, "<|endoftext|>", *IM), {CONFIG: {"tokenizer_class": "Qwen2Tokenizer", **SMOLLM}}),
    "Qwen 2, whatever it names": (
        with_tokens(gpt2, "<|endoftext|>"),
        {CONFIG: {**GENERIC, "eos_token": "<|endoftext|>"}, "config.json": {"model_type": "qwen2"}},
    ),
    "Qwen 3 without a class": (with_tokens(gpt2, "<|endoftext|>"), {"config.json": {"model_type": "qwen3"}}),
    "Llama 2": (llama2(), {CONFIG: {"tokenizer_class": "LlamaTokenizer", **LLAMA}}),
    "Llama 2, legacy": (llama2(), {CONFIG: {"tokenizer_class": "LlamaTokenizer", **LLAMA, "legacy": True}}),
    "Llama 2, fast": (
        llama2(),
        {
            CONFIG: {"tokenizer_class": "LlamaTokenizerFast", **LLAMA, "add_bos_token": True, "legacy": False},
            "config.json": {"model_type": "llama"},
            MAP: {name: token(text) for name, text in LLAMA.items()},
        },
    ),
    "Llama 2, generic": (llama2(), {CONFIG: {**GENERIC, **LLAMA, "padding_side": "left"}}),
    "Llama 3 under Llama's class": (byte_level(), {CONFIG: {"tokenizer_class": "LlamaTokenizer", **NAMED}}),
    "Mistral": (llama2(), {CONFIG: {"tokenizer_class": "LlamaTokenizer"}, "config.json": {"model_type": "mistral"}}),
    "remote code": (
        llama2(),
        {
            CONFIG: {"tokenizer_class": "LlamaTokenizer", **LLAMA},
            "config.json": {"model_type": "minicpm", "auto_map": {"AutoConfig": "configuration_minicpm.C"}},
        },
    ),
    "Unigram": (unigram(), {CONFIG: {**GENERIC, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}}),
    "WordPiece": (
        word_piece(),
        {CONFIG: {**GENERIC, "clean_up_tokenization_spaces": True, "unk_token": "[UNK]", "pad_token": "[PAD]"}},
    ),
    "WordLevel": (word_level(), {CONFIG: {**GENERIC, **LLAMA, "clean_up_tokenization_spaces": True}}),
    "cleaning that BPE ignores": (byte_level(), {CONFIG: {**GENERIC, **NAMED, "clean_up_tokenization_spaces": True}}),
    "settings": (
        byte_level(),
        {
            CONFIG: {**GENERIC, **NAMED, "padding_side": "left", "truncation_side": "left", "model_max_length": 77}
            | {"model_input_names": ["input_ids"], "split_special_tokens": True, "unheard_of": {"a": [1]}}
        },
    ),
    "truncation and padding": (padded(), {CONFIG: {**GENERIC, **NAMED}}),
    "a template": (byte_level(), {CONFIG: {**GENERIC, **NAMED, "chat_template": TEMPLATE}}),
    "several templates": (byte_level(), {CONFIG: {**GENERIC, **NAMED, "chat_template": SEVERAL}}),
    "a template's file": (
        byte_level(),
        {CONFIG: {**GENERIC, **NAMED, "chat_template": "older"}, "chat_template.jinja": TEMPLATE},
    ),
    "templates' files": (
        byte_level(),
        {CONFIG: {**GENERIC, **NAMED}, "chat_template.jinja": TEMPLATE, "chat_templates/tool_use.jinja": "tools"},
    ),
    "templates without a default": (byte_level(), {CONFIG: NAMED, "chat_templates/rag.jinja": "documents"}),
    "a template for processors only": (byte_level(), {CONFIG: NAMED, "chat_template.json": {"chat_template": "no"}}),
    "ids that only generation names": (
        PAD,
        {
            CONFIG: {**GENERIC, "bos_token": BOS},
            "generation_config.json": {"eos_token_id": [1, 300], "pad_token_id": 1},
        },
    ),
}


def folder_of(path: Path, backend: tokenizers.Tokenizer | None, files: Files) -> Path:
    path.mkdir()
    if backend is not None:
        backend.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content if name.endswith(".jinja") else json.dumps(content))
    return path


def said(theirs: Any) -> dict[str, Any]:
    """What can be seen of a tokenizer of `transformers`."""
    settings = (
        "padding_side",
        "truncation_side",
        "model_max_length",
        "model_input_names",
        "clean_up_tokenization_spaces",
    )
    ids = [theirs(text)["input_ids"] for text in TEXTS]
    template = theirs.chat_template
    return {name: getattr(theirs, name) for name in (*settings, "special_tokens_map", "chat_template")} | {
        "ids": ids,
        "plain": [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
        "text": [theirs.decode(one, skip_special_tokens=True) for one in ids],
        "special": sorted(zip(theirs.all_special_tokens, theirs.all_special_ids, strict=True)),
        "extra": theirs.extra_special_tokens,
        "chat_template": template.get("default") if isinstance(template, dict) else template,
    }


def ours_say(ours: Tokenizer, theirs: dict[str, Any]) -> dict[str, Any]:
    """The same of ours, where it has a word for it."""
    ids = [[*ours.encode(text, add_bos=True), *ours.closing] for text in TEXTS]
    names = theirs["special_tokens_map"]
    special = {name: id for id, name in ours.special_tokens.items() if name in dict(theirs["special"])}
    return theirs | {
        "ids": ids,
        "plain": ours.encode_batch(TEXTS),
        "text": [ours.decode(one) for one in theirs["ids"]],
        "special_tokens_map": {name: ours.named_tokens.get(name) for name in names},
        "special": sorted(special.items()),
        "extra": ours.extra_tokens,
        "chat_template": ours.chat_template,
    }


@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_is_what_transformers_makes_of_it_and_stays_so(name: str, tmp_path: Path):
    folder = folder_of(tmp_path / "a", *SHAPES[name])
    theirs, ours = said(AutoTokenizer.from_pretrained(folder)), Tokenizer.load(folder)
    assert ours_say(ours, theirs) == theirs
    ours.save(tmp_path / "b")
    assert said(AutoTokenizer.from_pretrained(tmp_path / "b")) == theirs
    again = Tokenizer.load(tmp_path / "b")
    assert ours_say(again, theirs) == theirs
    assert again.fingerprint == ours.fingerprint
    assert set(again._config) == set(ours._config)


@pytest.mark.parametrize("name", SHAPES)
def test_a_continuation_is_decoded_as_the_rest_of_the_whole_text(name: str, tmp_path: Path):
    folder = folder_of(tmp_path / "a", *SHAPES[name])
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        for cut in range(len(ids)):
            whole, prompt = (theirs.decode(some, skip_special_tokens=True) for some in (ids, ids[:cut]))
            if "\ufffd" in prompt or not whole.startswith(prompt):
                continue
            decoder = StreamDecoder(ours, ids[:cut])
            assert "".join([*(decoder.push(id) for id in ids[cut:]), decoder.finish()]) == whole[len(prompt) :]


def test_what_longwave_saved_is_read_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shapes = {name: shape for name, shape in SHAPES.items() if "unheard_of" not in shape[1].get(CONFIG, {})}
    loaded = {name: Tokenizer.load(folder_of(tmp_path / name, *shape)) for name, shape in shapes.items()}
    for name, tokenizer in loaded.items():
        tokenizer.save(tmp_path / f"{name} saved")
    monkeypatch.setattr(tokenizer_folder, "_by_transformers", None)
    again = {name: Tokenizer.load(tmp_path / f"{name} saved").fingerprint for name in loaded}
    assert again == {name: tokenizer.fingerprint for name, tokenizer in loaded.items()}


def test_documents_have_what_the_tokenizer_puts_around_a_text_and_eos():
    backends = {byte_level: ([0], [1]), gpt2: ([], [1]), unigram: ([], [1]), word_piece: ([2], [3])}
    for make, (opening, closing) in backends.items():
        names = {"eos_token": "</s>" if make is unigram else EOS, "unk_token": "<unk>"}
        tokenizer = Tokenizer(make(), {} if make is word_piece else names if make is unigram else NAMED)
        [[document]] = TextEncoder(tokenizer).encode([Document("a", "hello")])
        assert document.ids == [*opening, *tokenizer.encode("hello"), *closing]


REFUSED: dict[str, tuple[tokenizers.Tokenizer | None, Files, str]] = {
    "no file": (None, {CONFIG: NAMED}, r"tokenizer\.json: no such file"),
    "a class of models": (byte_level(), {CONFIG: {"tokenizer_class": "LlamaForCausalLM"}}, "no class of a tokenizer"),
    "a class that is a number": (byte_level(), {CONFIG: {"tokenizer_class": 3}}, "tokenizer_class = 3"),
    "a class in Python": (byte_level(), {CONFIG: {"tokenizer_class": "CanineTokenizer"}}, CONFIG),
    "remote code": (byte_level(), {CONFIG: {"auto_map": {"AutoTokenizer": [None, "tokens.Mine"]}}}, CONFIG),
    "a map of nothing": (byte_level(), {MAP: []}, MAP),
    "a side": (byte_level(), {CONFIG: {"padding_side": "up"}}, f"{CONFIG}.*value: up"),
    "a token of a number": (byte_level(), {CONFIG: {**GENERIC, "eos_token": 3}}, CONFIG),
    "a letter": (byte_level(), {CONFIG: {**GENERIC, **NAMED, "pad_token": "!"}}, "'!' is a letter"),
    "a byte": (llama2(), {CONFIG: {**GENERIC, **LLAMA, "pad_token": "<0x0A>"}}, "'<0x0A>' is a letter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_the_file(name: str, tmp_path: Path):
    *shape, says = REFUSED[name]
    with pytest.raises(UserError, match=says) as caught:
        Tokenizer.load(folder_of(tmp_path / "a", *shape))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a") in str(caught.value)


def put(path: Path, change: Callable[[Path], object]) -> Path:
    """A folder of a tokenizer in which something was changed."""
    PLAIN.save(path)
    change(path)
    return path


def with_id(id: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        definition = json.loads((path / "tokenizer.json").read_text())
        definition["model"]["vocab"]["zz"] = id
        (path / "tokenizer.json").write_text(json.dumps(definition))

    return change


def sparse(path: Path, size: int) -> None:
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(size)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "an id of ten digits": (with_id(4_000_000_000), r"tokenizer\.json: id 4000000000: ids are numbers from 0"),
    "an id of twenty digits": (with_id(10**20), r"tokenizer\.json: id 1"),
    "an id below 0": (with_id(-1), r"tokenizer\.json: id -1"),
    "an id in words": (with_id("1"), r"tokenizer\.json: id '1'"),
    "a gigabyte": (lambda path: sparse(path / "tokenizer.json", 1 << 30), r"tokenizer\.json: 1,073,741,824 bytes"),
    "a large config": (lambda path: sparse(path / CONFIG, 1 << 30), rf"{CONFIG}: 1,073,741,824 bytes"),
    "a large template": (lambda path: sparse(path / "chat_template.jinja", 1 << 30), r"jinja: 1,073,741,824 bytes"),
    "a pipe": (lambda path: os.mkfifo(path / MAP), rf"{MAP} is a pipe"),
    "a pipe for a template": (lambda path: os.mkfifo(path / "chat_template.jinja"), "jinja is a pipe"),
    "a device": (lambda path: (path / ADDED).symlink_to("/dev/zero"), rf"{ADDED} is a device"),
    "latin-1": (lambda path: (path / "chat_template.jinja").write_bytes(b"\xe9"), r"chat_template\.jinja: not UTF-8"),
    "depth": (lambda path: (path / MAP).write_text("[" * 10**6), MAP),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once(name: str, tmp_path: Path):
    change, says = HOSTILE[name]
    folder, begun = put(tmp_path / "a", change), time.perf_counter()
    with pytest.raises(UserError, match=says) as caught:
        Tokenizer.load(folder)
    assert time.perf_counter() - begun < 5
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_training_takes_no_square_of_a_word_and_no_vocabulary_that_no_machine_has():
    draw, begun = random.Random(5), time.perf_counter()
    letters, marks, blanks = ("".join(draw.choices(some, k=200_000)) for some in ("abcdef", "-+*/", " \t"))
    tokenizer = Tokenizer.train([letters, marks, f"a{blanks}b"], 400)
    assert time.perf_counter() - begun < 10  # 25 and more, in whole words
    assert tokenizer.decode(tokenizer.encode(letters)) == letters
    assert Tokenizer.train([WORDS * 9], 300).fingerprint == PLAIN.fingerprint
    with pytest.raises(UserError, match=r"vocab_size = 1000000000: .* at most 4,194,304"):
        Tokenizer.train([WORDS], 10**9)


def test_a_tokenizer_is_not_saved_where_transformers_would_make_another_of_it(tmp_path: Path):
    beside = folder_of(tmp_path / "a", None, {"config.json": {"model_type": "qwen2"}})
    with pytest.raises(UserError, match="'qwen2', transformers would make another"):
        PLAIN.save(beside)
    PLAIN.save(folder_of(tmp_path / "b", None, {"config.json": {"model_type": "qwen3"}}))


def test_padding_works_on_what_longwave_trains(tmp_path: Path):
    PLAIN.save(tmp_path)
    rows = AutoTokenizer.from_pretrained(tmp_path)(["hello", "hello world this"], padding=True)
    assert len({len(row) for row in rows["input_ids"]}) == 1
    assert rows["attention_mask"][0].count(0) > 0
    assert PLAIN.pad_id == PLAIN.eos_id
