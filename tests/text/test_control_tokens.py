"""No special token comes out of text, whatever kind of tokenizer it is and however it could come to make one."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator

import pytest
import tokenizers
from test_tokenizer_folders import llama2, unigram, word_piece
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from longwave.data.chat import Chat
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError

STRINGS = 10_000
CONTROL = ["<s>", "</s>", "<|x|>", "[end]", "STOP"]
LETTERS = sorted({*"abcdefghijklmnopqrstuvwxyz<>/|[]STOP ", "▁"})
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "extra_token": "STOP"}


def words() -> dict[str, int]:
    return {word: id for id, word in enumerate(["<unk>", *CONTROL, *LETTERS, "ab", "<s", "</", "/s", "[e", "nd]"])}


def merges_to(piece: str) -> list[tuple[str, str]]:
    """Merges that put a piece together from its letters."""
    return [(piece[:place], piece[place]) for place in range(1, len(piece))]


def bpe(ignore_merges: bool = False) -> Backend:
    """A BPE whose merges reach every control token."""
    merges = [pair for piece in CONTROL for pair in merges_to(piece)]
    vocab = {piece: id for id, piece in enumerate(dict.fromkeys([*words(), *(a + b for a, b in merges)]))}
    return Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, ignore_merges=ignore_merges))


def fallback() -> Backend:
    backend = llama2()
    backend.pre_tokenizer = backend.normalizer = None
    return backend


def pieces() -> Backend:
    scores = [(word, 0.0 if word in CONTROL else -3.0) for word in words()]
    return Backend(models.Unigram(scores, unk_id=0, byte_fallback=False))


def of_bytes() -> Backend:
    backend = Tokenizer.train(["".join(CONTROL) * 50, "ab <s> </s>" * 50], 300).twin()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return backend


KINDS: dict[str, Callable[[], Backend]] = {
    "BPE": bpe,
    "BPE that looks up whole words": lambda: bpe(ignore_merges=True),
    "BPE of bytes": of_bytes,
    "BPE with bytes to fall back on": fallback,
    "WordLevel": lambda: Backend(models.WordLevel(words(), unk_token="<unk>")),
    "WordPiece": lambda: Backend(models.WordPiece(words() | {"##</s>": 90}, unk_token="<unk>")),
    "Unigram": pieces,
    "Unigram of T5": unigram,
    "WordPiece of BERT": word_piece,
}
NORMALIZERS = {
    "as it is": None,
    "lower case": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    "replacing": normalizers.Replace(tokenizers.Regex("[({]"), "<"),
    "stripping": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Strip()]),
}
SPLITS = {"whole": None, "words": pre_tokenizers.WhitespaceSplit(), "metaspace": pre_tokenizers.Metaspace()}
FLAGS = {
    "plain": {},
    "normalized": {"normalized": True},
    "greedy": {"lstrip": True, "rstrip": True},
    "alone": {"single_word": True},
}


def shapes() -> Iterator[tuple[str, Tokenizer]]:
    for number, (kind, make) in enumerate(KINDS.items()):
        for place, (change, normalizer) in enumerate(NORMALIZERS.items()):
            split, flags = (list(table)[(number + place) % len(table)] for table in (SPLITS, FLAGS))
            backend = make()
            if kind not in ("BPE of bytes", "WordPiece of BERT"):
                backend.normalizer, backend.pre_tokenizer = normalizer, SPLITS[split]
            backend.add_special_tokens([AddedToken(name, **{"normalized": False, **FLAGS[flags]}) for name in CONTROL])
            named = NAMES if backend.token_to_id("<unk>") is not None else {**NAMES, "unk_token": "[UNK]"}
            known = {name: token for name, token in named.items() if backend.token_to_id(token) is not None}
            yield f"{kind}, {change}, {split}, {flags}", Tokenizer(backend, known)


SHAPES = dict(shapes())
SPELLINGS = [
    *CONTROL,
    *(name.upper() for name in CONTROL),
    *(name.replace("<", "(") for name in CONTROL),
    *("".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in name) for name in CONTROL),
    *(unicodedata.normalize("NFD", name.replace("s", "ś")) for name in CONTROL),
    *("▁" + name for name in CONTROL),
    *(name[:2] for name in CONTROL),
    *(name[2:] for name in CONTROL),
    *(
        "a",
        "b",
        " ",
        "\n",
        "\t",
        "é",
        "你",
        "<0x0A>",
        "<0x3C>s>",
        "\u200d",
        "\ue000",
        "\ue0001.1\ue001",
        "<unk>",
        "[UNK]",
    ),
]


ELSEWHERE = ["BPE of bytes", "BPE with bytes to fall back on", "WordPiece of BERT"]
"""Kinds whose special tokens no merge reaches and no word is."""


def strings(count: int = STRINGS) -> list[str]:
    draw = random.Random(7)
    return ["".join(draw.choices(SPELLINGS, k=draw.randint(1, 6))) for _ in range(count)]


def said(tokenizer: Tokenizer, texts: list[str]) -> set[str]:
    """The special tokens that come out of texts, but for the tokenizer's word for what it does not know."""
    unknown = tokenizer.named_tokens.get("unk_token")
    ids = {id for row in tokenizer.encode_batch(texts) for id in row} & tokenizer.special_ids
    return {tokenizer.special_tokens[id] for id in ids} - {unknown}


@pytest.mark.parametrize("name", SHAPES)
def test_no_special_token_comes_out_of_text(name: str):
    tokenizer = SHAPES[name]
    assert tokenizer.special_ids
    assert said(tokenizer, strings()) == set()
    assert [said(tokenizer, [text]) for text in CONTROL] == [set()] * len(CONTROL)


def test_the_library_by_itself_makes_them_in_every_kind_but_where_no_merge_reaches_them():
    """What is guarded against is there: the same strings, and the library's own way of not parsing special tokens."""
    made = dict[str, int]()
    for name, tokenizer in SHAPES.items():
        plain = tokenizer.twin()
        plain.encode_special_tokens = True
        unknown = plain.token_to_id(tokenizer.named_tokens.get("unk_token", ""))
        rows = plain.encode_batch(strings(2000), add_special_tokens=False)
        count = sum(bool((set(row.ids) & tokenizer.special_ids) - {unknown}) for row in rows)
        made[name.split(",")[0]] = made.get(name.split(",")[0], 0) + count
    assert [kind for kind, count in made.items() if not count] == ELSEWHERE


@pytest.mark.parametrize("kind", ["BPE", "WordLevel", "Unigram"])
def test_no_message_writes_a_special_token_and_the_template_does(kind: str):
    template = "{{ bos_token }}{% for m in messages %} {{ m.content }} {% endfor %}{{ eos_token }}"
    backend = KINDS[kind]()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(CONTROL)
    chat = Chat(Tokenizer(backend, {**NAMES, "chat_template": template}))
    special = {chat.tokenizer.bos_id, chat.tokenizer.eos_id}
    for text in strings(300):
        ids = chat.prompt([{"role": "user", "content": text}])
        assert [ids[0], ids[-1]] == [chat.tokenizer.bos_id, chat.tokenizer.eos_id]
        assert not (set(ids[1:-1]) & chat.tokenizer.special_ids) - {chat.tokenizer.twin().token_to_id("<unk>")}
    assert None not in special


def test_unknown_text_that_would_be_the_end_of_a_text_is_refused():
    backend = Backend(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(backend, {"eos_token": "</s>", "unk_token": "</s>"})
    assert tokenizer.encode("a a") == [1, 1]
    with pytest.raises(UserError, match="writes what it does not know as '</s>'"):
        tokenizer.encode("a b")


def test_text_that_no_piece_covers_is_refused_and_not_dropped():
    backend = Backend(models.WordLevel({"a": 0, "b": 1}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match="cannot write it"):
        Tokenizer(backend, {}).encode("a c")


def test_text_that_makes_no_special_token_has_the_ids_that_it_has_anyway():
    texts = [text for text in strings(1000) if "unk" not in text.lower()]
    for name, tokenizer in SHAPES.items():
        theirs = [row.ids for row in tokenizer.twin().encode_batch(texts, add_special_tokens=False)]
        control = tokenizer.special_ids - {tokenizer.twin().token_to_id(tokenizer.named_tokens.get("unk_token", ""))}
        pairs = list(zip(tokenizer.encode_batch(texts), theirs, strict=True))
        plain = [(ours, its) for ours, its in pairs if not control & set(its)]
        assert len(plain) > 100
        assert [ours for ours, _ in plain] == [its for _, its in plain], name


def test_special_tokens_are_left_out_of_what_is_decoded():
    for tokenizer in SHAPES.values():
        ids = [id for id in range(tokenizer.vocab_size) if id not in tokenizer.special_ids]
        assert tokenizer.decode([*tokenizer.special_ids, *ids]) == tokenizer.decode(ids)
        assert tokenizer.decode(ids) == tokenizer.twin().decode(ids)
