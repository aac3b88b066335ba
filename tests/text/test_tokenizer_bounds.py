"""Tokenizers that would make much of a short text are refused, or ended; those that people publish are not."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from model_folders import small
from tokenizers import models, normalizers

from longwave.checkpoints import save
from longwave.data.bounds import longest_piece, require_bounded
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz ▁\n"


def definition(**parts: Any) -> dict[str, Any]:
    """A `tokenizer.json` that knows single letters, with other parts."""
    vocabulary = {"<unk>": 0, **{letter: id for id, letter in enumerate(LETTERS, 1)}}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    return {**json.loads(made.to_str()), **parts}


def replacing(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def normalizing(*steps: dict[str, Any]) -> dict[str, Any]:
    return definition(normalizer={"type": "Sequence", "normalizers": list(steps)})


def charsmap(word: bytes) -> dict[str, Any]:
    """SentencePiece's table with an empty tree and one word."""
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\0\0\0\0" + word + b"\0").decode()}


def word_piece(letters: int, prefix: str = "##") -> dict[str, Any]:
    model = {"type": "WordPiece", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    return definition(model={**model, "continuing_subword_prefix": prefix, "max_input_chars_per_word": letters})


def unigram(letters: int) -> dict[str, Any]:
    vocabulary = [["<unk>", 0.0], ["a", -1.0], ["a" * letters, -2.0]]
    return definition(model={"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": False})


DOUBLED = replacing("aa", String="a")
HOSTILE = {
    "doubled thirty times": (normalizing(*[DOUBLED] * 30), "normalizer: may make a text 1,073,741,824 times as long"),
    "one for ten thousand": (normalizing(replacing("b" * 10_000, String="a")), "normalizer: .* 10,000 times"),
    "by a pattern of nothing": (normalizing(replacing("b" * 999, Regex="(?=.)")), "normalizer: .* 1,000 times"),
    "by a text of nothing": (normalizing(replacing("b" * 999, String="")), "normalizer: .* 1,000 times"),
    "a megabyte in front": (normalizing({"type": "Prepend", "prepend": "x" * (1 << 20)}), "normalizer: .* 1,048,577"),
    "a table of characters": (normalizing(charsmap(b"x" * 5000)), "normalizer: .* 5,000 times"),
    "a sequence within another": (normalizing(normalizing(*[DOUBLED] * 9)["normalizer"]), "normalizer: .* 512 times"),
    "when it is decoded": (
        definition(decoder={"type": "Sequence", "decoders": [DOUBLED] * 30}),
        "decoder: may make a text 1,073,741,824 times as long",
    ),
    "a thousand steps": (normalizing(*[{"type": "Lowercase"}] * 1000), "normalizer: has 1,000 steps; at most 64"),
    "a thousand splits": (
        definition(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}] * 1000,
            }
        ),
        "pre_tokenizer: has 1,000 steps",
    ),
    "words of any length": (word_piece(10**9), "model.max_input_chars_per_word = 1000000000: at most 256"),
    "a long mark of a word's rest": (word_piece(100, "#" * 9999), "model.continuing_subword_prefix: 9,999 characters"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_definition_that_makes_much_of_little_is_refused(name: str):
    hostile, says = HOSTILE[name]
    with pytest.raises(UserError, match=says):
        Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(hostile)), {})


def test_a_piece_of_a_megabyte_is_refused_before_it_ends_the_process(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram(1 << 20)))
    with pytest.raises(UserError, match=r"tokenizer\.json: a piece of 1,048,576 letters; at most 256 are looked up"):
        Tokenizer.load(tmp_path)


def field(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer, with its length in front."""
    size, shown = len(content), b""
    while size > 0x7F:
        shown, size = shown + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + shown + bytes([size]) + content


@pytest.mark.parametrize("letters", [20, 1 << 20])
def test_a_piece_of_sentencepiece_is_measured_too(tmp_path: Path, letters: int):
    pieces = [b"<unk>", b"a" * letters, b"b"]
    content = b"".join(field(1, field(1, piece)) for piece in pieces) + field(2, b"\x18\x01")
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert letters < longest_piece(content) < letters + 10
    if letters > 20:
        with pytest.raises(UserError, match=r"tokenizer\.model: a piece of 262,145 letters; at most 256"):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 30, b"\x0a", b"\x0a\xff\xff\xff\xff\x7f", b"\x08\x01"])
def test_a_file_that_is_no_protocol_buffer_is_measured(content: bytes):
    assert longest_piece(content) >= 0


PUBLISHED = {
    "Llama 2": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "Gemma": normalizers.Replace(" ", "▁"),
    "CLIP": normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    ),
    "BERT": normalizers.BertNormalizer(),
    "ALBERT": normalizers.Sequence(
        [
            normalizers.Replace("``", '"'),
            normalizers.Replace("''", '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_normalizers_that_people_publish_are_taken(name: str):
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition()))
    backend.normalizer = PUBLISHED[name]
    assert Tokenizer(backend, {}).encode("a  b")


def test_the_table_of_t5_is_taken():
    """nmt_nfkc: its longest word is that of U+FDFA, of 33 bytes."""
    word = "صلى الله عليه وسلم".encode()
    assert len(word) == 33
    require_bounded(normalizing(charsmap(word), replacing("▁", Regex=" {2,}")))


# --- patterns ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backtracking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer takes the square of a text's length."""
    split = {"type": "Split", "pattern": {"Regex": "(?=(a+))"}, "behavior": "Isolated", "invert": False}
    made = definition(pre_tokenizer=split)
    model = small("2F", vocab_size=64)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(made)), {})
    folder = tmp_path_factory.mktemp("backtracking") / "model"
    save(model, folder, tokenizer=tokenizer)
    return folder


def test_a_command_whose_pattern_takes_too_long_is_ended_in_one_line(backtracking: Path, tmp_path: Path):
    (tmp_path / "text").write_text("a" * 100_000)
    command = [sys.executable, "-m", "longwave", "generate", str(backtracking), "--prompt-file", str(tmp_path / "text")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=100
    )
    assert (done.returncode, done.stdout) == (2, "")
    line = "longwave: text: this tokenizer takes more than 3 s for 100,000 characters; use another one"
    assert done.stderr.splitlines()[-1] == line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("part", ["pre_tokenizer", "decoder"])
def test_a_pattern_that_tries_too_many_ways_is_one_line(part: str):
    """The library panics then, which Python does not count among its exceptions."""
    pattern = {"pattern": {"Regex": "(a+)+$"}}
    parts = {
        "pre_tokenizer": {"type": "Split", **pattern, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Replace", **pattern, "content": ""}]},
    }
    made = definition(**{part: parts[part]})
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(made)), {})
    with pytest.raises(UserError, match=r"this tokenizer cannot .* \(.*retry-limit-in-match over\)"):
        tokenizer.decode([LETTERS.index("a") + 1] * 50 + [2]) if part == "decoder" else tokenizer.encode("a" * 50 + "b")


def test_a_definition_on_which_the_library_panics_is_one_line(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(word_piece(100) | {"model": {**bpe(), "merges": [["a", "b"]]}}))
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizers library fails on this tokenizer \(.+\)$"):
        Tokenizer.load(tmp_path)


def bpe() -> dict[str, Any]:
    """A BPE whose mark of a word's rest is longer than the parts of its merges."""
    return {**definition()["model"], "vocab": {"a": 0, "b": 1, "ab": 2}, "continuing_subword_prefix": "#" * 99}


def test_a_program_of_somebody_else_is_not_ended(backtracking: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("longwave.data.patience.SECONDS", -10.0)
    monkeypatch.setattr("longwave.data.patience._OFTEN", 0.0)
    assert Tokenizer.load(backtracking).encode("a" * 3000)
