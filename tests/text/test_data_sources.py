"""Documents out of files: what is read, in which order, what is refused, what is held out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longwave.data import formats
from longwave.data.documents import Document
from longwave.data.sources import documents, standard_library
from longwave.data.splitting import is_held_out, split_held_out
from longwave.errors import UserError


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def named(pairs: Iterator[tuple[Document, bool]]) -> dict[str, bool]:
    return {document.name: held_out for document, held_out in pairs}


def test_a_folder_gives_its_text_in_order_of_names(tmp_path: Path):
    rows = "\n".join(json.dumps({"text": text}) for text in ["one", "", "zwei ü"])
    write(
        tmp_path,
        {
            "b.txt": "b\r\n",
            "a/z.md": "\ufeffz",
            "a/b.txt": "ab",
            "c.jsonl": rows + "\n\n",
            "nul.txt": b"text\0text",
            "latin.txt": "é".encode("latin-1"),
            "cut.txt": "é".encode()[:1],
            "empty.txt": "",
            ".hidden": "no",
            ".git/config": "no",
        },
    )
    expected = [("b.txt", "b\r\n"), ("c.jsonl:1", "one"), ("c.jsonl:3", "zwei ü"), ("a/b.txt", "ab"), ("a/z.md", "z")]
    assert [(document.name, document.text) for document in documents(tmp_path)] == expected


def test_a_single_file_goes_by_its_own_name(tmp_path: Path):
    write(tmp_path, {"a.txt": "text"})
    assert list(documents(str(tmp_path / "a.txt"))) == [Document("a.txt", "text", source="a.txt")]


def test_a_long_file_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "PIECE_BYTES", 20)
    text = "ünï\r\n" * 7 + "x" * 45
    pieces = list(documents(write(tmp_path, {"a.txt": text}) / "a.txt"))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.name for piece in pieces[:3]] == ["a.txt", "a.txt#1", "a.txt#2"]
    assert pieces[0].text == "ünï\r\n" * 2
    assert max(len(piece.text.encode()) for piece in pieces) <= 20


def test_the_field_of_a_jsonl_line_can_be_chosen(tmp_path: Path):
    write(tmp_path, {"a.jsonl": '{"text": "no", "content": "yes"}'})
    assert [document.text for document in documents(tmp_path / "a.jsonl", text_field="content")] == ["yes"]


@pytest.mark.parametrize(
    "line",
    [b"{", b'{"other": "a"}', b'{"text": 3}', b'["text"]', b'{"text": "\xff"}', b'{"text": "\\ud83d"}', b"[" * 10**5],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: bytes):
    write(tmp_path, {"a.jsonl": b'{"text": "good"}\n' + line + b"\n"})
    with pytest.raises(UserError, match=r"a\.jsonl:2: ") as caught:
        list(documents(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("files", [{}, {"a.bin": b"\0\1", "b.bin": b"\xff"}, {"empty.txt": ""}])
def test_a_source_without_text_is_refused(tmp_path: Path, files: dict[str, bytes | str]):
    with pytest.raises(UserError, match=r"holds no text \(.*give text in UTF-8"):
        list(documents(write(tmp_path, files)))


def test_other_sources_without_text_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        documents(tmp_path / "nowhere")
    with pytest.raises(UserError, match="b: holds no text"):
        list(documents(write(tmp_path, {"b": b"\0"}) / "b"))

    def nothing() -> Iterator[Document]:
        yield from ()

    with pytest.raises(UserError, match="nothing: holds no text"):
        list(documents(nothing))


def test_the_standard_library_is_real_text_without_its_tests():
    found = list(documents(standard_library))
    names = [document.name for document in found]
    assert sum(len(document.text) for document in found) > 8_000_000
    assert len(set(names)) == len(names)
    assert {"argparse.py", "json/decoder.py"} < set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert names == [document.name for document in standard_library()]


NAMES = st.lists(st.text("abc/.", min_size=1), min_size=2, unique=True)


@given(NAMES, st.floats(0, 0.99), st.integers(0, 3))
def test_holding_out_goes_by_name_alone(names: list[str], fraction: float, seed: int):
    expected = [is_held_out(name, fraction, seed) for name in names]
    pairs = split_held_out((Document(name, "x") for name in names), fraction, seed)
    assert [next(pairs) for _ in names] == list(zip((Document(name, "x") for name in names), expected, strict=True))
    one_side_is_empty = fraction > 0 and len(set(expected)) == 1
    with pytest.raises(UserError) if one_side_is_empty else nullcontext():
        assert next(pairs, None) is None


def test_about_the_fraction_is_held_out_and_the_seed_chooses_which():
    names = [f"doc-{number}" for number in range(5000)]
    first, second = ([is_held_out(name, 0.1, seed) for name in names] for seed in (0, 1))
    assert 400 < sum(first) < 600
    assert 20 < sum(a and b for a, b in zip(first, second, strict=True)) < 90


def test_a_split_that_leaves_one_side_empty_says_what_would_do():
    pair = [Document("a", "x"), Document("b", "y")]
    with pytest.raises(UserError, match="none of 2 documents") as caught:
        list(split_held_out(pair, 1e-9))
    enough = float(str(caught.value).split("; ")[1].split()[0])
    assert sum(named(split_held_out(pair, enough)).values()) == 1
    with pytest.raises(UserError, match="2 documents, all held out"):
        list(split_held_out(pair, 0.999))
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="held_out = "):
            split_held_out(pair, fraction)


def test_a_lone_document_holds_out_its_end():
    text = "line\n" * 100
    (train, first), (end, second) = split_held_out([Document("a", text)], 0.1)
    assert (first, second) == (False, True)
    assert train.text + end.text == text
    assert end.text == "line\n" * 10
    assert named(split_held_out([Document("a", text)], 0.0)) == {"a": False}
    assert [part.text for part, _ in split_held_out([Document("a", "x" * 100)], 0.1)] == ["x" * 90, "x" * 10]
    with pytest.raises(UserError, match="too short"):
        split_held_out([Document("a", "x")], 0.1)
