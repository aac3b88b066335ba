"""Prepared folders and packed windows, against constructions by brute force."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longwave.data import shards
from longwave.data.documents import Document
from longwave.data.packed import NO_TARGET, Batch, PackedTokens, WindowSampler
from longwave.data.prepared import PreparedInfo, SplitTokens, iter_documents
from longwave.data.shards import prepare
from longwave.data.sources import standard_library
from longwave.data.splitting import split_held_out
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError

TOKENIZER = Tokenizer.train(["some words of a text to train on, and then more of these words\n"], 280)
SIZES = [3, 40, 0, 1, 7, 25, 2, 60, 11, 5, 90, 4]
TEXTS = [f"{number} " + "words, "[: size % 8] * size for number, size in enumerate(SIZES)]


def corpus() -> Iterator[Document]:
    return (Document(f"doc-{number}", text) for number, text in enumerate(TEXTS))


def encoded(held_out: bool, fraction: float = 0.3) -> list[list[int]]:
    """The documents of one split as they should be stored."""
    texts = [document.text for document, out in split_held_out(corpus(), fraction) if out == held_out]
    return [[0, *TOKENIZER.encode(text), 1] for text in texts]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(corpus, tmp_path / "data", tokenizer=TOKENIZER, held_out=0.3)
    return tmp_path / "data"


@pytest.fixture(scope="module", params=[2, 7, 64, 100])
def sharded(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The same corpus in shards so small that documents and windows cross them; read only."""
    folder = tmp_path_factory.mktemp("sharded") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", request.param)
        prepare(corpus, folder, tokenizer=TOKENIZER, held_out=0.3)
    return folder


def test_every_document_is_stored_once(sharded: Path):
    for split, held_out in (("train", False), ("held_out", True)):
        assert [tokens.tolist() for tokens in iter_documents(sharded, split)] == encoded(held_out)


def test_a_shard_holds_its_share(sharded: Path):
    info = PreparedInfo.read(sharded)
    assert len(info.train.shards) > 1
    assert len(set(info.train.shards[:-1])) == 1
    assert info.train.shards[-1] <= info.train.shards[0]
    assert sum(info.train.shards) == info.train.tokens == len(list(chain(*encoded(False))))


@pytest.mark.parametrize("window", [1, 2, 13, 64, 150])
def test_windows_equal_a_brute_force_construction(sharded: Path, window: int):
    for split, keep_last in (("train", False), ("train", True), ("held_out", True)):
        packed = PackedTokens(sharded, split, window, keep_last=keep_last)
        expected = brute_force(encoded(split == "held_out"), window, keep_last)
        assert len(packed) == len(expected)
        order = [*reversed(range(len(packed))), 0]
        check(packed.batch(order), [expected[number] for number in order], order)


def brute_force(documents: list[list[int]], window: int, keep_last: bool) -> list[list[tuple[int, int, int]]]:
    """Windows of (token, target, number of the document)."""
    rows = []
    for number, tokens in enumerate(documents):
        rows += zip(tokens, [*tokens[1:], NO_TARGET], [number] * len(tokens), strict=True)
    windows = [rows[start : start + window] for start in range(0, len(rows), window)]
    return windows if keep_last else [rows for rows in windows if len(rows) == window]


def check(batch: Batch, windows: list[list[tuple[int, int, int]]], samples: list[int]) -> None:
    rows = list(chain(*windows))
    assert batch.tokens.tolist() == [token for token, _, _ in rows]
    assert batch.targets.tolist() == [target for _, target, _ in rows]
    assert batch.windows == tuple(map(len, windows))
    assert batch.samples == tuple(samples)
    runs = []
    for window in windows:
        owners = [owner for _, _, owner in window]
        borders = [0, *(row for row in range(1, len(owners)) if owners[row] != owners[row - 1]), len(owners)]
        runs += [end - start for start, end in pairwise(borders)]
    assert batch.runs == tuple(runs)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64), st.integers(0, 5))
def test_every_epoch_is_a_permutation(count: int, seed: int, epoch: int):
    sampler = WindowSampler(count, seed)
    order = [sampler.window(position) for position in range(epoch * count, (epoch + 1) * count)]
    assert sorted(order) == list(range(count))


def test_epochs_and_seeds_differ_and_an_order_is_well_mixed():
    count = 1000
    epoch = [WindowSampler(count, 0).window(position) for position in range(2 * count)]
    other = [WindowSampler(count, 1).window(position) for position in range(count)]
    for a, b in ((epoch[:count], epoch[count:]), (epoch[:count], other), (epoch[:count], list(range(count)))):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 10
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15
    assert abs(np.corrcoef(epoch[: count - 1], epoch[1:count])[0, 1]) < 0.15


def test_the_order_is_fixed_for_good():
    """Runs resume by position alone, so a change of this order would silently repeat and skip data."""
    sampler = WindowSampler(10**12, seed=3)
    assert [sampler.window(position) for position in (0, 1, 10**12)] == [373934967683, 212921818504, 4252346419]


def test_an_epoch_covers_every_token_once(folder: Path):
    packed = PackedTokens(folder, "train", 10, keep_last=True)
    sampler = WindowSampler(len(packed), seed=5)
    batch = packed.batch(range(len(packed)), sampler)
    by_window = dict(
        zip(
            (sampler.window(sample) for sample in batch.samples),
            np.split(batch.tokens.numpy(), ends(batch)),
            strict=True,
        )
    )
    joined = np.concatenate([by_window[number] for number in range(len(packed))])
    assert joined.tolist() == list(chain(*encoded(False)))


def ends(batch: Batch) -> list[int]:
    return np.cumsum(batch.windows)[:-1].tolist()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.integers(0, 200), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_resuming_and_any_division_into_batches_continue_the_same_data(folder: Path, start: int, pieces: list[int]):
    whole, packed = PackedTokens(folder, "train", 8), PackedTokens(folder, "train", 8)
    sampler = WindowSampler(len(whole), seed=1)
    expected = whole.batch(range(start, start + sum(pieces)), sampler)
    positions = iter(range(start, start + sum(pieces)))
    batches = [packed.batch(list(islice(positions, piece)), sampler) for piece in pieces]
    assert expected.tokens.tolist() == [token for batch in batches for token in batch.tokens.tolist()]
    assert expected.targets.tolist() == [target for batch in batches for target in batch.targets.tolist()]
    assert expected.runs == tuple(chain(*(batch.runs for batch in batches)))
    assert expected.samples == tuple(chain(*(batch.samples for batch in batches)))


def test_tokens_stay_on_the_disk_until_read(folder: Path):
    tokens = SplitTokens(folder, "train")
    owner = tokens.shards[0]
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert isinstance(owner, mmap.mmap)
    assert np.shares_memory(tokens.read(3, 9), tokens.shards[0])


def test_meta_tells_what_the_folder_holds(folder: Path):
    info = PreparedInfo.read(folder)
    texts = {out: [d.text for d, held in split_held_out(corpus(), 0.3) if held == out] for out in (False, True)}
    assert (info.vocab_size, info.dtype, info.tokenizer) == (TOKENIZER.vocab_size, "uint16", TOKENIZER.fingerprint)
    for split, held_out in ((info.train, False), (info.held_out, True)):
        assert split.documents == len(texts[held_out])
        assert split.bytes == sum(len(text.encode()) for text in texts[held_out])
        assert split.tokens == sum(map(len, encoded(held_out)))
    assert Tokenizer.load(folder).fingerprint == TOKENIZER.fingerprint
    info.require_vocab(TOKENIZER.vocab_size)
    info.require_tokenizer(TOKENIZER)
    with pytest.raises(UserError, match=f"vocab_size = {TOKENIZER.vocab_size - 1}: .*{TOKENIZER.vocab_size}"):
        info.require_vocab(TOKENIZER.vocab_size - 1)
    with pytest.raises(UserError, match="tokenizer = "):
        info.require_tokenizer(Tokenizer.train(["other text"], 270))


def test_large_vocabularies_take_four_bytes(tmp_path: Path):
    definition = json.loads(TOKENIZER._definition)
    definition["added_tokens"].append(definition["added_tokens"][0] | {"id": 70_000, "content": "Ω", "special": False})
    definition["model"]["vocab"]["Ω"] = 70_000
    TOKENIZER.save(tmp_path / "large")
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(definition))
    info = prepare(
        lambda: iter([Document("a", "wΩ\nwΩ\n")]),
        tmp_path / "data",
        tokenizer=Tokenizer.load(tmp_path / "large"),
        held_out=0.0,
    )
    assert (info.dtype, info.vocab_size) == ("uint32", 70_001)
    assert 70_000 in next(iter_documents(tmp_path / "data", "train"))


def test_without_bos_and_eos_documents_are_bare_and_still_apart(tmp_path: Path):
    TOKENIZER.save(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer_config.json").write_text("{}")
    definition = json.loads((tmp_path / "bare" / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "bare" / "tokenizer.json").write_text(json.dumps(definition))
    prepare(corpus, tmp_path / "data", tokenizer=Tokenizer.load(tmp_path / "bare"), held_out=0.3)
    assert [tokens.tolist() for tokens in iter_documents(tmp_path / "data", "train")] == [
        d[1:-1] for d in encoded(False)
    ]


def test_a_tokenizer_is_trained_on_the_training_documents_alone(tmp_path: Path):
    info = prepare(corpus, tmp_path / "data", vocab_size=270, held_out=0.3)
    texts = [document.text for document, held_out in split_held_out(corpus(), 0.3) if not held_out]
    assert info.tokenizer == Tokenizer.train(texts, 270).fingerprint
    assert info.tokenizer != Tokenizer.train(TEXTS, 270).fingerprint


def test_memory_is_bounded_by_the_chunk_and_by_what_the_tokenizer_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    whole = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: [seen.append(len(texts)), whole(self, texts)][1])
    monkeypatch.setattr(shards, "_CHUNK_BYTES", 30)
    monkeypatch.setattr(shards, "TRAINING_CHARACTERS", len(TEXTS[0]) + 1)
    info = prepare(corpus, tmp_path / "data", vocab_size=270, held_out=0.0)
    assert seen[:2] == [4, 1]
    assert sum(seen) == len(TEXTS)
    assert info.tokenizer == Tokenizer.train(TEXTS[:2], 270).fingerprint


def test_the_same_source_gives_the_same_bytes_and_progress_reaches_the_end(tmp_path: Path):
    seen: list[tuple[str, int]] = []
    prepare(corpus, tmp_path / "a", vocab_size=270, held_out=0.3, progress=lambda *step: seen.append(step))
    prepare(corpus, tmp_path / "b", vocab_size=270, held_out=0.3)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert len(files) == 10
    total = sum(len(text.encode()) for text in TEXTS)
    assert [step for step in seen if step[1] == total] == [("tokenizer", total), ("tokens", total)]


def test_a_folder_of_files_end_to_end(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "in" / f"{number:02d}.txt").write_text(text)
    (tmp_path / "in" / "picture.txt").write_bytes(b"\x89PNG\0")
    info = prepare(tmp_path / "in", tmp_path / "out", vocab_size=270, held_out=0.3)
    assert info.train.documents + info.held_out.documents == len(TEXTS)
    tokenizer = Tokenizer.load(tmp_path / "out")
    stored = [
        tokenizer.decode(ids.tolist())
        for split in ("train", "held_out")
        for ids in iter_documents(tmp_path / "out", split)
    ]
    assert sorted(stored) == sorted(TEXTS)


def test_a_failure_leaves_nothing_behind(tmp_path: Path):
    def failing() -> Iterator[Document]:
        yield from corpus()
        raise UserError("the source broke")

    with pytest.raises(UserError, match="the source broke"):
        prepare(failing, tmp_path / "data", tokenizer=TOKENIZER, held_out=0.3)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_prepare_are_refused(folder: Path):
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="exists"):
        prepare(corpus, folder, tokenizer=TOKENIZER)
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(UserError, match="vocab_size = 300: has no effect"):
        prepare(corpus, folder.parent / "new", tokenizer=TOKENIZER, vocab_size=300)
    with pytest.raises(UserError, match="vocab_size = 0"):
        prepare(corpus, folder.parent / "new", vocab_size=0, held_out=0.3)
    assert not (folder.parent / "new").exists()


def test_a_window_that_does_not_fit_is_refused(folder: Path):
    total = PreparedInfo.read(folder).train.tokens
    for window in (0, -1, total + 1):
        with pytest.raises(UserError, match=f"window = {window}: .*1 to {total}"):
            PackedTokens(folder, "train", window)
    assert len(PackedTokens(folder, "train", total)) == 1
    assert PackedTokens(folder, "train", total + 1, keep_last=True).batch([0]).windows == (total,)
    with pytest.raises(IndexError):
        PackedTokens(folder, "train", total).batch([1])


def test_an_empty_split_is_refused(tmp_path: Path):
    prepare(corpus, tmp_path / "data", tokenizer=TOKENIZER, held_out=0.0)
    for read in (lambda: PackedTokens(tmp_path / "data", "held_out", 4), lambda: iter_documents(tmp_path / "data")):
        with pytest.raises(UserError, match="held_out: holds no"):
            read()


def damage(folder: Path, name: str, old: bytes, new: bytes) -> None:
    path = folder / name
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def test_a_damaged_folder_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="not a prepared folder"):
        PackedTokens(tmp_path / "nowhere", "train", 4)
    damage(folder, "meta.json", b'"format": 1', b'"format": 2')
    with pytest.raises(UserError, match="format = 2"):
        PackedTokens(folder, "train", 4)
    damage(folder, "meta.json", b'"format": 2', b'"format": {')
    with pytest.raises(UserError, match=r"meta\.json: corrupted") as caught:
        PackedTokens(folder, "train", 4)
    assert "\n" not in str(caught.value)


def test_meta_with_another_content_is_refused(folder: Path):
    total = str(PreparedInfo.read(folder).train.tokens).encode()
    damage(folder, "meta.json", b'"shards": [\n      ' + total, b'"shards": [\n      ' + total[:-1] + b"x")
    with pytest.raises(UserError, match=r"meta\.json.* (corrupted|damaged)|meta\.json: corrupted"):
        PackedTokens(folder, "train", 4)
    wrong = str(int(total) ^ 1).encode()
    damage(folder, "meta.json", total[:-1] + b"x", wrong)
    with pytest.raises(UserError, match=r"meta\.json.* (corrupted|damaged)|meta\.json: corrupted"):
        PackedTokens(folder, "train", 4)


@pytest.mark.parametrize("name", ["train/tokens-00000.bin", "train/documents-00000.npy", "manifest.json"])
def test_a_missing_or_cut_file_is_refused(folder: Path, name: str):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-2])
    with pytest.raises(UserError, match=Path(name).name.replace(".", r"\.")):
        PackedTokens(folder, "train", 4)
    (folder / name).unlink()
    with pytest.raises(UserError, match=Path(name).name.replace(".", r"\.")):
        PackedTokens(folder, "train", 4)


def test_the_standard_library_becomes_windows(tmp_path: Path):
    prepare(lambda: islice(standard_library(), 60), tmp_path / "data", vocab_size=512, held_out=0.1)
    packed = PackedTokens(tmp_path / "data", "train", 512)
    batch = packed.batch(range(4), WindowSampler(len(packed)))
    assert batch.tokens.shape == batch.targets.shape == (2048,)
    text = Tokenizer.load(tmp_path / "data").decode(batch.tokens.tolist())
    assert "import " in text or "def " in text
