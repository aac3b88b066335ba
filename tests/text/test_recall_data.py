"""`longwave prepare recall`: whole documents of exact length, answers learned, and never what an evaluation asks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import runs
from recall_solver import is_solved

import longwave as lw
from longwave.data.packed import NO_TARGET, PackedTokens
from longwave.data.prepared import PreparedInfo, SplitTokens, iter_documents
from longwave.data.recall import FAMILIES as ALL
from longwave.data.recall import sample
from longwave.data.recall.documents import FAMILIES, recall_plan
from longwave.data.tokenizer import Tokenizer

LENGTHS = (256, 401)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recall") / "data"
    lw.prepare("recall", folder, tokenizer=runs.prepared(), lengths=LENGTHS, tokens="20k", held_out=0.3, seed=5)
    return folder


def test_documents_have_their_lengths_and_windows_cut_none(data: Path):
    info, tokenizer = PreparedInfo.read(data), Tokenizer.load(data)
    assert (info.kind, tokenizer.fingerprint) == ("recall", Tokenizer.load(runs.prepared()).fingerprint)
    documents = [ids for split in ("train", "held_out") for ids in iter_documents(data, split)]
    sizes = Counter(map(len, documents))
    assert set(sizes) == set(LENGTHS)
    shares = [size * count for size, count in sizes.items()]
    assert abs(shares[0] - shares[1]) <= len(FAMILIES) * max(LENGTHS)
    assert 20_000 - max(LENGTHS) < sum(shares) <= 20_000
    assert set(info.sources) == set(FAMILIES)
    packed = PackedTokens(data, "train", 512)
    assert sum(len(packed.batch([number]).runs) for number in range(len(packed))) == info.train.documents
    assert packed.notes() == []


def test_the_answers_alone_are_learned_and_string_search_gives_them(data: Path):
    tokenizer, packed, seen = Tokenizer.load(data), PackedTokens(data, "train", 401), 0
    for number in range(len(packed)):
        batch = packed.batch([number])
        start = 0
        for length in batch.runs:
            ids, targets = batch.tokens[start : start + length], batch.targets[start : start + length]
            learned = (targets != NO_TARGET).nonzero().flatten().tolist()
            assert learned == list(range(learned[0], length - 1))  # from before the answer to before the last token
            prompt, target = (
                tokenizer.decode(ids[: learned[0] + 1].tolist()),
                tokenizer.decode(targets[learned].tolist()),
            )
            answers = [answer for part in target.strip().split(" and ") for answer in part.split(", ")]
            assert target.endswith("\n")
            assert targets[learned[-1]] == tokenizer.eos_id
            assert is_solved(prompt, answers), (prompt, target)
            start, seen = start + length, seen + 1
    assert seen == PreparedInfo.read(data).train.documents > 20


ASKS = {"single": 3, "multi-key": 3, "multi-value": 2, "multi-query": 2, "variables": 2, "key-value": 9, "copy": 1}


@pytest.mark.parametrize("name", ASKS)
def test_every_question_of_a_document_is_learned_and_has_an_answer_of_its_own(tmp_path: Path, name: str):
    """Asked one at a time after the text, as an evaluation would, each of them has the answer that is learned."""
    asked = {"tokenizer": runs.prepared(), "lengths": 900, "tokens": 9000, "held_out": 0.2}
    info = lw.prepare("recall", tmp_path / "a", families=name, questions=9 if name == "copy" else ASKS[name], **asked)
    assert info.train.tokens % 900 == 0
    tokenizer, packed = Tokenizer.load(tmp_path / "a"), PackedTokens(tmp_path / "a", "train", 900)
    for number in range(len(packed)):
        batch = packed.batch([number])
        turns = _turns(batch.tokens.tolist(), batch.targets.tolist())
        texts = [(tokenizer.decode(prompt), tokenizer.decode(said)) for prompt, said in turns]
        text, blanks, _ = texts[0][0].rpartition("\n\n" if name == "key-value" else "\n")
        for prompt, said in texts:
            question, answers = prompt.rpartition("\n")[2], said.strip().replace(" and ", ", ").split(", ")
            assert is_solved(text + blanks + question, answers)
            assert said.endswith("\n")
        assert len(texts) == ASKS[name]
        assert len({prompt.rpartition("\n")[2] for prompt, _ in texts}) == len(texts)


def _turns(tokens: list[int], targets: list[int]) -> list[tuple[list[int], list[int]]]:
    """What comes before each run of targets, and the run."""
    learned = [place for place, target in enumerate(targets) if target != NO_TARGET]
    starts = [place for place in learned if place - 1 not in learned]
    ends = [next(end for end in range(start, len(targets) + 1) if end not in learned) for start in starts]
    return [(tokens[: start + 1], targets[start:end]) for start, end in zip(starts, ends, strict=True)]


def test_a_document_asks_one_question_unless_told_otherwise(data: Path, tmp_path: Path):
    asked = {"tokenizer": data, "lengths": "256,401", "tokens": 20_000, "held_out": 0.3, "seed": 5}
    assert lw.prepare("recall", tmp_path / "one", questions=1, **asked) == PreparedInfo.read(data)


def test_the_same_seed_gives_the_same_folder_and_another_none_of_its_documents(data: Path, tmp_path: Path):
    asked = {"tokenizer": data, "lengths": "256,401", "tokens": 20_000, "held_out": 0.3}
    same = lw.prepare("recall", tmp_path / "same", families=list(FAMILIES), seed=5, **asked)
    assert same == PreparedInfo.read(data)
    for path in sorted(data.rglob("*.bin")):
        assert path.read_bytes() == (tmp_path / "same" / path.relative_to(data)).read_bytes()
    lw.prepare("recall", tmp_path / "other", seed=6, **asked)
    texts = [{ids.tobytes() for ids in iter_documents(folder, "train")} for folder in (data, tmp_path / "other")]
    assert not texts[0] & texts[1]


def test_a_loss_on_all_and_what_is_printed(longwave, tmp_path: Path):
    words = ["--tokenizer", runs.prepared(), "--lengths", "300", "--tokens", "3k", "--families", "copy"]
    found = longwave("prepare", "recall", tmp_path / "a", *words, "--json")
    assert found.json["kind"] == "recall"
    assert "of the training tokens are learned: answers" in found.out
    longwave("prepare", "recall", tmp_path / "b", *words, "--loss-on", "all")
    every, answers = (SplitTokens(tmp_path / name, "train") for name in "ba")
    assert every.edges is None
    assert answers.edges is not None
    assert every.read(0, 600).tolist() == answers.read(0, 600).tolist()


def test_what_is_learned_is_what_a_loss_is_of(tmp_path: Path):
    """A model trains on the folder, and its held-out loss is by family."""
    lw.prepare("recall", tmp_path / "data", tokenizer=runs.prepared(), lengths=256, tokens=20_000, held_out=0.2)
    recipe = runs.write_recipe(tmp_path / "tiny.toml", "llama", steps=3, window=256)
    changed = {"data.folder": str(tmp_path / "data"), "model.context_window": 256}
    trained = lw.train(recipe, changed, output=tmp_path / "run")
    judged = lw.evaluate(trained.model, tmp_path / "data")
    assert judged.loss_on == "answers"
    assert {one.source for one in judged.by_source} <= set(FAMILIES)
    assert judged.tokens == PreparedInfo.read(tmp_path / "data").held_out.targets


BAD = {
    "no tokenizer": (["--lengths", "256", "--tokens", "9k"], "tokenizer: the source recall needs one"),
    "no lengths": (["--tokens", "9k"], "lengths: say how many tokens"),
    "no tokens": (["--lengths", "256"], "tokens: say how many"),
    "a family that is none": (["--families", "needles"], "family = 'needles': use one of"),
    "a family named twice": (["--families", "copy,copy"], "families = copy,copy: name one or more, each once"),
    "a length named twice": (["--lengths", "256,256"], "lengths = 256,256: name one or more, each once"),
    "a length that is none": (["--lengths", "x"], "'x' is no number of tokens"),
    "too short": (["--lengths", "30"], "length = 30: key-value takes "),
    "too few tokens": (["--tokens", "600"], "tokens = 600: two documents of every family and length have 2,048 tokens"),
    "an amount that is none": (["--tokens", "-3"], "'-3' is no amount above 0"),
    "zero questions": (["--questions", "0"], "questions = 0: from 1 to 1,000 in a document"),
    "questions without end": (["--questions", "2000000000"], "questions = 2000000000: from 1 to 1,000"),
    "more questions than fit": (["--questions", "1000"], "length = 256: key-value takes "),
    "a vocabulary": (["--vocab-size", "300"], "vocab_size = 300: has no effect on the source recall"),
    "a field of text": (["--text-field", "a"], "text_field = 'a': has no effect on the source recall"),
    "keys to ignore": (["--ignore", "a"], "ignore = ('a',): has no effect on the source recall"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(refuses, tmp_path: Path, name: str):
    words, says = BAD[name]
    needed = {} if name.startswith("no ") else {"--lengths": "256", "--tokens": "9k"}
    needed |= {} if name == "no tokenizer" else {"--tokenizer": str(runs.prepared())}
    given = {**needed, **dict(zip(words[::2], words[1::2], strict=True))}
    options = [f"{name}={value}" for name, value in given.items()]
    refuses("prepare", "recall", tmp_path / "out", *options, says=[says])
    assert list(tmp_path.iterdir()) == []


def test_options_of_recall_tasks_have_no_effect_on_text(refuses, tmp_path: Path):
    (tmp_path / "a.txt").write_text("text\n")
    for name, shown in {"families": "'9'", "lengths": "'9'", "questions": "9"}.items():
        says = [f"{name} = {shown}: has no effect on any source but recall"]
        refuses("prepare", tmp_path / "a.txt", tmp_path / "b", f"--{name}", "9", says=says)


def test_a_tokenizer_made_for_recall_has_an_entry_for_every_word(tmp_path: Path):
    (tmp_path / "a.txt").write_text("def apple_pie(flour): return flour + 17  # and an apple\n" * 2000)
    lw.prepare(tmp_path / "a.txt", tmp_path / "data", vocab_size=1600, for_recall=True, held_out=0)
    tokenizer = Tokenizer.load(tmp_path / "data")
    for number in range(20):
        pairs, copied = (sample(ALL[name], tokenizer, 300, None, number) for name in ("key-value", "copy"))
        lines = [line for line in pairs.prompt.split("\n") if ": " in line]
        assert len(lines) > 50
        assert {len(tokenizer.encode(f"\n{line}")) for line in lines} == {4}  # line end, key, colon, value
        assert len(tokenizer.encode(f" {copied.answers[0]}")) == 8


def test_entries_for_words_are_refused_where_they_are_none(refuses, tmp_path: Path):
    (tmp_path / "a.txt").write_text("text\n")
    few = "vocab_size = 300: too few for all the words that get entries; give more"
    refuses("prepare", tmp_path / "a.txt", tmp_path / "b", "--vocab-size", "300", "--for-recall", says=[few])
    given = ["--tokenizer", runs.prepared(), "--for-recall"]
    idle = "for_recall = True: has no effect"
    refuses("prepare", tmp_path / "a.txt", tmp_path / "b", *given, says=[f"{idle} beside a given tokenizer"])
    refuses(
        "prepare",
        "recall",
        tmp_path / "b",
        *given,
        "--lengths",
        "256",
        "--tokens",
        "9k",
        says=[f"{idle} on the source recall"],
    )


def test_a_plan_of_many_documents_is_made_as_it_is_read():
    plan = recall_plan("key-value", "256", "2e9")
    names = plan.names
    assert [next(names) for _ in range(3)] == ["key-value-256-0", "key-value-256-1", "key-value-256-2"]
