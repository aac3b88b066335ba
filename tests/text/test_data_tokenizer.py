"""The tokenizer: nothing lost on the way to ids and back, in one go or token by token."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from longwave.data.tokenizer import EOS, StreamDecoder, Tokenizer
from longwave.errors import UserError

TEXTS = [
    "the cat sat on the mat; the dog did not.\n" * 20,
    "naïve café, 你好世界 \U0001f9ed\u200d\U0001f9ed {x: 1}\t\r\n" * 20,
]
TOKENIZER = Tokenizer.train(TEXTS, 400)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text(
    "你好界ñ\ufffd\U0001f9ed \n", max_size=60
)


def byte_fallback() -> Tokenizer:
    """A tokenizer in the manner of Llama 2: blanks as U+2581, unknown characters as bytes, the first blank stripped."""
    words = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocab = {word: id for id, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return Tokenizer(backend, {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}})


FALLBACK = byte_fallback()


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(id) for id in ids), decoder.finish()]


@given(UNICODE)
def test_text_survives(text: str):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert FALLBACK.decode(FALLBACK.encode(text)) == text.replace("▁", " ")


@given(st.lists(UNICODE, max_size=5))
def test_a_batch_equals_one_by_one(texts: list[str]):
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


@given(UNICODE)
def test_streaming_gives_the_text_without_half_characters(text: str):
    for tokenizer in (TOKENIZER, FALLBACK):
        pieces = streamed(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(pieces)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=80))
def test_streaming_any_ids_equals_decoding_them(ids: list[int]):
    assert "".join(streamed(TOKENIZER, ids)) == TOKENIZER.decode(ids)


BYTES = Tokenizer.train(["ab"], 258)
YOU, COMPASS = (BYTES.encode(text) for text in ("你", "\U0001f9ed"))
HALVES = [character[:count] for character in (YOU, COMPASS) for count in range(1, len(character))]


def straddling() -> Tokenizer:
    """A tokenizer with one token that ends a character and begins the next, as byte-level merges may."""
    definition = json.loads(BYTES._definition)
    last, first = (BYTES.twin().id_to_token(id) for id in (YOU[2], YOU[0]))
    definition["model"]["vocab"][last + first] = BYTES.vocab_size
    definition["model"]["merges"].append([last, first])
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(definition)), {})


STRADDLING = straddling()


@given(st.lists(st.sampled_from([*HALVES, [BYTES.vocab_size], YOU[1:2]]), min_size=15, max_size=90))
def test_streaming_half_characters_equals_decoding_them_and_does_not_pile_up(halves: list[list[int]]):
    ids, decoder, text = list(chain(*halves)), StreamDecoder(STRADDLING), ""
    for number, id in enumerate(ids, start=1):
        text += decoder.push(id)
        assert len(STRADDLING.decode(ids[:number])) - len(text) <= 17
        assert len(decoder._ids) <= 66
    assert text + decoder.finish() == STRADDLING.decode(ids)


def test_characters_come_out_at_once_though_no_token_ends_with_one():
    ids = STRADDLING.encode("你" * 50)
    assert ids == [*YOU[:2], *[BYTES.vocab_size, YOU[1]] * 49, YOU[2]]
    assert streamed(STRADDLING, ids) == [*["", ""], *["你", ""] * 49, "你", ""]


@given(st.lists(st.sampled_from(["a", " a", "b ", "你", "", "  "]), min_size=2, max_size=6))
def test_streaming_over_special_tokens_equals_decoding_them(texts: list[str]):
    ids = list(chain(*([0, *FALLBACK.encode(text), 1] for text in texts)))
    assert "".join(streamed(FALLBACK, ids)) == FALLBACK.decode(ids)


def test_each_push_says_all_that_is_sure():
    text = "café 你"
    pieces = streamed(TOKENIZER, TOKENIZER.encode(text))
    assert pieces[-1] == ""
    bytewise = streamed(FALLBACK, [FALLBACK.encode("a")[0], *FALLBACK.encode("你")[1:]])
    assert bytewise == ["a", "", "", "你", ""]


def test_a_half_character_at_the_end_comes_out_once():
    half = FALLBACK.encode("你")[1:-1]
    decoder = StreamDecoder(FALLBACK)
    assert [decoder.push(id) for id in half] == ["", ""]
    assert decoder.finish() == FALLBACK.decode(half)
    assert decoder.finish() == ""


def test_special_ids_and_what_text_may_not_do():
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.special_ids) == (0, 1, {0, 1})
    plain = TOKENIZER.encode(f"a{EOS}b")
    assert 1 not in plain
    assert TOKENIZER.decode(plain) == f"a{EOS}b"
    assert 1 in TOKENIZER.twin().encode(f"a{EOS}b").ids
    assert TOKENIZER.encode("a", add_bos=True) == [0, *TOKENIZER.encode("a")]
    assert TOKENIZER.decode([0, *TOKENIZER.encode("a"), 1]) == "a"


def test_training_is_deterministic_and_bounded():
    again = Tokenizer.train(iter(TEXTS), 400)
    assert again.fingerprint == TOKENIZER.fingerprint
    assert Tokenizer.train(TEXTS, 300).fingerprint != TOKENIZER.fingerprint
    elsewhere = "from test_data_tokenizer import TOKENIZER; print(TOKENIZER.fingerprint)"
    command = [sys.executable, "-c", elsewhere]
    assert subprocess.check_output(command, cwd=Path(__file__).parent, text=True).strip() == TOKENIZER.fingerprint
    assert Tokenizer.train(["ab"], 5000).vocab_size == 259
    with pytest.raises(UserError, match="vocab_size = 257"):
        Tokenizer.train(TEXTS, 257)


def test_a_saved_folder_loads_here_and_in_transformers(tmp_path: Path):
    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.fingerprint, loaded.bos_id, loaded.eos_id) == (TOKENIZER.fingerprint, 0, 1)

    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, TOKENIZER.vocab_size)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == TOKENIZER.encode(text)
        assert theirs.encode(text) == TOKENIZER.encode(text, add_bos=True)
        assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": {"content": "<|eos|>"}}'),
        ("tokenizer_config.json", '{"tokenizer_class": "AutoModelForCausalLM"}'),
        ("added_tokens.json", "[]"),
        ("special_tokens_map.json", "?"),
    ],
)
def test_a_bad_folder_is_refused_by_the_file_s_name(tmp_path: Path, name: str, content: str | None):
    TOKENIZER.save(tmp_path)
    path = tmp_path / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_is_the_caller_s_mistake():
    for encode in (TOKENIZER.encode, lambda text: TOKENIZER.encode_batch([text])):
        with pytest.raises(UserError, match="surrogate"):
            encode("a\ud83db")
