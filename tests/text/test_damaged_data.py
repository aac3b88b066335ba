"""Prepared data damaged with its sizes kept: refused in one line that names the file, never trained on or a traceback.

Two kinds of damage: bytes that changed on the disk, which a checksum tells, and a folder whose manifest agrees with its
files all the same, of which no file may say what the others contradict.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import chats
import numpy as np
import pytest
from chats import TEMPLATES, talk

from longwave import files
from longwave.data import shards
from longwave.data.documents import Conversation, Document
from longwave.data.packed import PackedTokens
from longwave.data.prepared import PreparedInfo, iter_documents
from longwave.data.shards import prepare
from longwave.data.tokenizer import Tokenizer
from longwave.errors import MachineError, UserError
from longwave.files.manifest import measure_path

TOKENIZER = chats.tokenizer(TEMPLATES["chatml"])


@pytest.fixture(scope="module", params=["text", "chat"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of several shards; read only."""
    folder = tmp_path_factory.mktemp(request.param) / "data"
    texts = [f"{number} some words of a text" for number in range(12)]
    chat = [Conversation(str(n), text, tuple(talk(text, f"{n} yes"))) for n, text in enumerate(texts)]
    documents = chat if request.param == "chat" else [Document(str(n), text) for n, text in enumerate(texts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 100)
        prepare(lambda: iter(documents), folder, tokenizer=TOKENIZER, held_out=0.4)
    return folder


def use(folder: Path) -> list[bytes]:
    """Everything that a run, an evaluation and a look at the documents read; its content."""
    info = PreparedInfo.read(folder)
    info.require_tokenizer(Tokenizer.load(folder))
    found = []
    for split in ("train", "held_out"):
        data = PackedTokens(folder, split, 128, keep_last=True)
        batch = data.batch(range(len(data)))
        assert int(batch.tokens.max()) < info.vocab_size
        found += [batch.tokens.numpy().tobytes(), batch.targets.numpy().tobytes(), bytes(str(batch.runs), "ascii")]
        found += [tokens.tobytes() for tokens in iter_documents(folder, split)]
    return found


def refused(folder: Path, name: str) -> None:
    with pytest.raises((UserError, MachineError)) as caught:
        use(folder)
    assert "\n" not in str(caught.value)
    assert Path(name).name in str(caught.value)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit at the start": lambda old: bytes([old[0] ^ 1]) + old[1:],
    "a bit in the middle": lambda old: (
        old[: len(old) // 2] + bytes([old[len(old) // 2] ^ 4]) + old[len(old) // 2 + 1 :]
    ),
    "a bit at the end": lambda old: old[:-1] + bytes([old[-1] ^ 64]),
    "zeros": lambda old: bytes(len(old)),
    "zeros in its second half": lambda old: old[: len(old) // 2] + bytes(len(old) - len(old) // 2),
    "ones": lambda old: b"\xff" * len(old),
    "its halves exchanged": lambda old: old[len(old) // 2 :] + old[: len(old) // 2],
    "backwards": lambda old: old[::-1],
    "a digit": lambda old: _another_digit(old),
}


def _another_digit(old: bytes) -> bytes:
    """The content with its last digit changed; text stays text, and JSON stays JSON."""
    place = max(old.rfind(str(digit).encode()) for digit in range(10))
    return old[:place] + str((old[place] - 47) % 10).encode() + old[place + 1 :] if place >= 0 else old[:-1] + b"7"


def test_every_change_of_every_file_is_refused(whole: Path, tmp_path: Path):
    names = sorted(path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file())
    tries = 0
    for name in names:
        content = (whole / name).read_bytes()
        for change in CHANGES.values():
            if (new := change(content)) != content:
                folder = tmp_path / str(tries)
                shutil.copytree(whole, folder)
                (folder / name).write_bytes(new)
                refused(folder, name if name != files.MANIFEST else "")
                tries += 1
    assert tries >= 80


def signed(whole: Path, folder: Path, name: str, content: bytes) -> Path:
    """A copy with another content of one file, in a manifest that agrees with it."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(files.MANIFEST))
    (folder / name).write_bytes(content)
    with files.folder(folder.with_suffix(".new")) as staging:
        shutil.copytree(folder, staging, dirs_exist_ok=True)
    saved = files.checksums(folder.with_suffix(".new"))
    assert saved[name] == measure_path(folder.with_suffix(".new") / name).checksum
    return folder.with_suffix(".new")


def npy(array: np.ndarray, folder: Path) -> bytes:
    np.save(folder / "made.npy", array, allow_pickle=True)
    return (folder / "made.npy").read_bytes()


def test_lists_of_places_that_do_not_fit_are_refused_though_signed(whole: Path, tmp_path: Path):
    name = "train/documents-00001.npy"
    good = np.load(whole / name)
    bad = {
        "beyond the shard": good + 1000,
        "before the shard": good - 1000,
        "negative": good * -1,
        "twice": np.repeat(good, 2),
        "backwards": good[::-1] if len(good) > 1 else good + 500,
        "floats": good.astype(np.float64),
        "32 bits": good.astype(np.int32),
        "big-endian": good.astype(">i8"),
        "two dimensions": good.reshape(1, -1),
        "none at all": np.array(7),
        "objects": np.array([{}], dtype=object),
    }
    for number, (what, array) in enumerate(bad.items()):
        refused(signed(whole, tmp_path / str(number), name, npy(np.asarray(array), tmp_path)), name)
        assert what
    for number, content in enumerate([b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff", b"not one", b"PK\x03\x04"]):
        refused(signed(whole, tmp_path / f"raw{number}", name, content), name)


def test_ids_beyond_the_vocabulary_are_refused_though_signed(whole: Path, tmp_path: Path):
    name = "held_out/tokens-00000.bin"
    ids = np.fromfile(whole / name, "<u2")
    ids[len(ids) // 2] = TOKENIZER.vocab_size
    refused(signed(whole, tmp_path / "a", name, ids.tobytes()), name)
    refused(signed(whole, tmp_path / "b", name, ids.tobytes()[:-1]), name)
    refused(signed(whole, tmp_path / "c", name, ids.tobytes() * 2), name)


def test_answers_that_do_not_fit_are_refused_though_signed(whole: Path, tmp_path: Path):
    name = "train/learned.bin"
    if not (whole / name).exists():
        return
    edges = np.fromfile(whole / name, "<i8")
    moved = edges.copy()
    moved[1] += 1  # one more token is learned than meta.json says
    bad = [edges[:-1], edges[::-1].copy(), edges * -1, edges + 10**6, np.repeat(edges, 2), moved, edges[:0]]
    for number, array in enumerate(bad):
        refused(signed(whole, tmp_path / str(number), name, array.tobytes()), name)


def test_a_description_that_does_not_fit_is_refused_though_signed(whole: Path, tmp_path: Path):
    info = json.loads((whole / "meta.json").read_text())
    train = info["train"]
    bad = [
        {"vocab_size": 5},
        {"vocab_size": -1},
        {"dtype": "uint32"},
        {"dtype": "int8"},
        {"format": 7},
        {"kind": "songs"},
        {"more": 1},
        {"train": {**train, "tokens": train["tokens"] + 1}},
        {"train": {**train, "shards": train["shards"][:-1]}},
        {"train": {**train, "shards": [*train["shards"], 0]}},
        {"train": {**train, "shards": train["shards"][::-1]}},
        {"train": {**train, "shards": [train["tokens"]]}},
        {"train": {**train, "shards": [-1, *train["shards"]], "tokens": train["tokens"] - 1}},
        {"train": {**train, "learned": 3}},
        {"train": None},
    ]
    for number, change in enumerate(bad):
        content = json.dumps({**info, **change}).encode()
        with pytest.raises((UserError, MachineError)) as caught:
            use(signed(whole, tmp_path / str(number), "meta.json", content))
        assert "\n" not in str(caught.value)


def test_a_file_is_summed_once_until_it_changes(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from longwave.data import intact

    folder, read = tmp_path / "data", list[Path]()
    shutil.copytree(whole, folder)
    monkeypatch.setattr(intact, "measure_path", lambda path: read.append(path) or measure_path(path))
    first = use(folder)
    count = len(read)
    assert count == sum(path.is_file() for path in folder.rglob("*")) - 1  # all but the manifest
    assert use(folder) == first == use(whole)
    assert len(set(read)) == len(read)
    path = folder / "train" / "tokens-00000.bin"
    data = PackedTokens(folder, "train", 128, keep_last=True)
    path.write_bytes(CHANGES["a bit in the middle"](path.read_bytes()))
    with pytest.raises(MachineError, match=r"tokens-00000\.bin"):  # it is read for the first time only now
        data.batch([0])
