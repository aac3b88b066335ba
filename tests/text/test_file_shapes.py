"""Files as people keep data: each is read as what its name says, or named with the reason why it was not."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from chats import talk

from longwave.cli import main
from longwave.data import formats
from longwave.data.documents import Conversation
from longwave.data.prepared import PreparedInfo
from longwave.data.shards import prepare
from longwave.data.sources import Census, documents
from longwave.errors import UserError

CHATS = [
    {"conversations": [{"from": "human", "value": f"hi {n}"}, {"from": "gpt", "value": f"yo {n}"}]} for n in range(5)
]
TALKS = [tuple(talk(f"hi {n}", f"yo {n}")) for n in range(5)]
TEXTS = [{"text": f'text, {n} "ü"\nand more'} for n in range(5)]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def array(rows: list[Any], indent: int | None = None) -> bytes:
    return json.dumps(rows, indent=indent, ensure_ascii=False).encode()


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def parquet(rows: list[Any]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


PAIRS = [{"prompt": f"hi {n}", "completion": f"yo {n}"} for n in range(5)]
DATA: dict[str, tuple[bytes, bool]] = {  # a file's name, its content, whether it holds conversations
    "a.jsonl": (lines(CHATS), True),
    "a.JSONL": (lines(CHATS), True),
    "a.ndjson": (lines(CHATS), True),
    "a.jsonlines": (lines(TEXTS), False),
    "a.json": (array(CHATS, 1), True),
    "a.Json": (array(TEXTS), False),
    "bom.json": (b"\xef\xbb\xbf \n" + array(TEXTS), False),
    "lines.json": (lines(CHATS), True),
    "pretty.json": (b"\n".join(array(row, 2) for row in CHATS), True),  # type: ignore[arg-type]
    "a.csv": (table(PAIRS), True),
    "text.csv": (table(TEXTS), False),
    "a.tsv": (table(TEXTS, "\t"), False),
    "a.parquet": (parquet(CHATS), True),
    "text.parquet": (parquet(TEXTS), False),
    "a.jsonl.gz": (gzip.compress(lines(CHATS)), True),
    "two.jsonl.gz": (gzip.compress(lines(TEXTS[:2])) + gzip.compress(lines(TEXTS[2:])), False),
    "a.json.bz2": (bz2.compress(array(CHATS)), True),
    "a.csv.xz": (lzma.compress(table(TEXTS)), False),
    "a.jsonl.zst": (zstandard.compress(lines(CHATS)), True),
    "two.jsonl.zst": (zstandard.compress(lines(TEXTS[:2])) + zstandard.compress(lines(TEXTS[2:])), False),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_rows_are_read_out_of_every_kind_of_file(
    name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(formats, "_BLOCK", block)
    content, is_chat = DATA[name]
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, tmp_path):
        found = list(documents(source))
        assert len({one.name for one in found}) == 5
        if is_chat:
            assert [one.messages for one in found if isinstance(one, Conversation)] == TALKS
        else:
            assert [one.text for one in found] == [row["text"] for row in TEXTS]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_text_is_read_out_of_packed_files(pack: Callable[[bytes], bytes], tmp_path: Path):
    text = "ünï\r\nline\n" * 50
    suffix = {gzip: ".gz", bz2: ".bz2", lzma: ".xz"}.get(sys.modules[pack.__module__], ".zst")
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(text.encode()))
    (tmp_path / f"b{suffix}").write_bytes(pack(text.encode()))
    assert [one.text for one in documents(tmp_path)] == [text] * 2


BROKEN: dict[str, tuple[bytes, str]] = {
    "a.jsonl.gz": (b"\x1f\x8b\x08\x00rest", "damaged, or not packed as its name says"),
    "cut.jsonl.gz": (gzip.compress(lines(CHATS))[:-9], "damaged, or not packed as its name says"),
    "none.txt.gz": (b"plain text", "damaged, or not packed as its name says: Not a gzipped file"),
    "a.txt.bz2": (b"BZh9 rest", "damaged, or not packed as its name says"),
    "a.txt.xz": (b"\xfd7zXZ\x00rest", "damaged, or not packed as its name says"),
    "a.txt.zst": (b"plain text", "damaged, or not packed as its name says"),
    "a.parquet": (b"PAR1rest", "not a readable Parquet file"),
    "cut.json": (array(CHATS)[:-20], r"cut\.json\[4\]: not a row of JSON in UTF-8"),
    "comma.json": (array(CHATS)[:-1] + b" {}]", r"comma\.json\[5\]: not JSON: a comma or the end"),
    "open.json": (array(CHATS)[:-1], r"open\.json\[5\]: not JSON: a comma or the end"),
    "more.json": (array(CHATS) + b" x", r"more\.json\[5\]: not JSON: a comma or the end"),
    "word.json": (array(CHATS)[:-1] + b", tru]", r"word\.json\[5\]: not a row of JSON"),
    "mixed.json": (array([*CHATS, 3]), r"mixed\.json\[5\]: a int; each row must be a JSON object"),
    "latin.jsonl": (lines(TEXTS) + '{"text": "é"}'.encode("latin-1"), r"latin\.jsonl:6: not a row of JSON in UTF-8"),
    "wide.csv": (b"text,id\na,1\nb,2,3\n", r"wide\.csv:3: 3 fields, where 2 are named"),
    "quote.csv": (b'text\n"a\nb\n', r"quote\.csv:3: not CSV"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_refused_by_name_and_place(name: str, tmp_path: Path):
    content, says = BROKEN[name]
    (tmp_path / "z.txt").write_text("text")
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=says) as caught:
            list(documents(source))
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


NOT_READ: dict[str, tuple[bytes, str]] = {
    "latin.txt": ("déjà vu".encode("latin-1"), "not UTF-8 text"),
    "wide.txt": ("text".encode("utf-16"), "not UTF-8 text"),
    "wide.json": (array(CHATS).decode().encode("utf-16"), "not UTF-8 text"),
    "latin.csv": ("text\né\n".encode("latin-1"), "not UTF-8 text"),
    "picture.png": (b"\x89PNG\0", "not UTF-8 text"),
    "a.zip": (b"PK\3\4\0", "not UTF-8 text"),
    "a.tar.gz": (gzip.compress(b"name\0\0"), "not UTF-8 text"),
    "empty.txt": (b"", "empty"),
    "empty.jsonl": (b"\n\n", "empty"),
    "package.json": (b'{"name": "a", "version": 1}', "JSON without rows of a known form"),
    "comments.json": (b'{ // why\n "a": 1}', "JSON without rows of a known form"),
    "other.json": (array([{"question": "a", "answer": "b"}]), "JSON without rows of a known form"),
    "none.json": (b"[]", "JSON without rows of a known form"),
    "blank.json": (b" ", "JSON without rows of a known form"),
    "numbers.json": (b"[1, 2]", "JSON without rows of a known form"),
    "wrapped.json": (json.dumps({"data": CHATS}).encode(), "JSON without rows of a known form"),
    "numbers.csv": (b"a,b\n1,2\n", "a table without columns of a known form"),
    ".hidden": (b"text", "hidden"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_a_file_that_is_not_read_is_named_with_the_reason(name: str, tmp_path: Path):
    content, reason = NOT_READ[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    if not name.startswith("."):
        with pytest.raises(UserError, match=f"{name}: holds no text .*{reason}"):
            list(documents(tmp_path / "in" / name))
    with pytest.raises(UserError, match=rf"in: holds no text \(1 \({reason}.*\): {name}\)"):
        list(documents(tmp_path / "in"))
    (tmp_path / "in" / "good.txt").write_text("text")
    census = Census()
    assert [one.text for one in documents(tmp_path / "in", census=census)] == ["text"]
    [found] = census.found()
    assert (found.count, found.names, found.reason.startswith(reason)) == (1, [name], True)


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path: Path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "good.txt").write_text("text")
    (folder / "link.txt").symlink_to("good.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / ".git").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.txt"))
        census = Census()
        assert [one.name for one in documents(folder, census=census)] == ["good.txt", "link.txt"]
    assert {one.reason: one.names for one in census.found()} == {
        "hidden": [".git"],
        "a link to a folder": ["sub/up"],
        "not a regular file": ["gone.txt", "loop.txt", "pipe.txt", "socket.txt"],
    }
    for name in ("pipe.txt", "socket.txt"):
        if name == "pipe.txt" or (folder / name).exists():
            with pytest.raises(UserError, match=f"{name}: not a file that can be read more than once"):
                documents(folder / name)
    with pytest.raises(UserError, match=r"loop\.txt: no such file or folder"):
        documents(folder / "loop.txt")
    with pytest.raises(UserError, match="/dev/zero: not a file that can be read"):
        documents("/dev/zero")


def test_names_that_are_not_utf_8_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"t\xff.txt", b"line\nend.txt", b"u\xff.bin"):
        Path(folder, os.fsdecode(name)).write_bytes(b"text\n" * 30 if name.endswith(b"txt") else b"\0")
    assert main(["prepare", str(folder), str(tmp_path / "out"), "--vocab-size", "270"]) == 0
    assert "left out: 1 (not UTF-8 text): u\\xff.bin" in capsys.readouterr().out
    assert PreparedInfo.read(tmp_path / "out").documents == 2


def test_a_folder_deeper_than_calls_may_be_is_read(tmp_path: Path):
    deep = tmp_path.joinpath(*["d"] * 1100)
    descend = "import os\nfor _ in range(1100): os.mkdir('d'); os.chdir('d')\nopen('deep.txt', 'w').write('deep')"
    try:
        subprocess.run([sys.executable, "-c", descend], cwd=tmp_path, check=True)
        assert [one.text for one in documents(tmp_path)] == ["deep"]
        assert (deep / "deep.txt").is_file()
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)  # what pytest removes with would fail


def test_prepare_says_what_it_left_out_and_keeps_it_in_meta(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "in").mkdir()
    for number in range(9):
        (tmp_path / "in" / f"{number}.txt").write_bytes(b"\xe9" if number > 1 else b"some text\n" * 9)
    (tmp_path / "in" / "rows.jsonl").write_bytes(lines([{"text": ""}, {"text": "a row"}]))
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--vocab-size", "270", "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "3 documents, vocabulary of" in printed[0]
    assert printed[1:3] == [
        "left out: 7 (not UTF-8 text): 2.txt, 3.txt, 4.txt, 5.txt, 6.txt and 2 more",
        "left out: 1 (rows without text): rows.jsonl:1",
    ]
    info = PreparedInfo.read(tmp_path / "out")
    assert [(one.count, one.reason) for one in info.not_read] == [(7, "not UTF-8 text"), (1, "rows without text")]
    assert json.loads(printed[3])["not_read"][0]["names"][:2] == ["2.txt", "3.txt"]
    (tmp_path / "one.txt").write_text("a line\n" * 40)
    main(["prepare", str(tmp_path / "one.txt"), str(tmp_path / "one"), "--vocab-size", "270", "--held-out", "0"])
    assert "held out, 1 document, vocabulary" in capsys.readouterr().out


def test_libraries_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "a.jsonl.zst").write_bytes(DATA["a.jsonl.zst"][0])
    (tmp_path / "a.parquet").write_bytes(DATA["a.parquet"][0])
    for name in ("zstandard", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    census = Census()
    assert len(list(documents(tmp_path, census=census))) == 1
    assert [one.reason for one in census.found()] == [
        f"needs {name} (pip install 'longwave[data]')" for name in ("pyarrow", "zstandard")
    ]
    for name, library in {"a.jsonl.zst": "zstandard", "a.parquet": "pyarrow"}.items():
        with pytest.raises(UserError, match=rf"{name}: holds no text \(needs {library} \(pip install"):
            list(documents(tmp_path / name))


@pytest.mark.parametrize("count", range(1, 13))
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_few_documents_are_split_without_asking(count: int, kind: str, tmp_path: Path):
    (tmp_path / "in").mkdir()
    for number in range(count):
        row = {"messages": talk(f"{number}?", "yes")} if kind == "chat" else {"text": "some text\n" * 5}
        (tmp_path / "in" / f"{number}.jsonl").write_text(json.dumps(row))
    if kind == "chat" and count == 1:
        with pytest.raises(UserError, match=r"the only conversation; give more of them, or --held-out 0"):
            prepare(tmp_path / "in", tmp_path / "out", vocab_size=270)
        return
    info = prepare(tmp_path / "in", tmp_path / "out", vocab_size=270)
    assert info.held_out.documents == 1
    assert info.train.documents == max(count - 1, 1)


def test_rows_beyond_the_limit_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "ROW_BYTES", 1000)
    monkeypatch.setattr(formats, "_BLOCK", 100)
    long = {"text": "x" * 5000}
    for name, content in {
        "a.jsonl": lines([*TEXTS, long]),
        "a.json": array([*TEXTS, long]),
        "a.csv": table([*TEXTS, long]),
        "open.csv": b'text\n"' + b"a\n" * 5000,
        "a.jsonl.gz": gzip.compress(lines([*TEXTS, long])),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*a row of more than|{name}.*field larger than field limit"):
            list(documents(tmp_path / name))


def test_a_long_text_of_a_row_is_cut_like_that_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "PIECE_BYTES", 50)
    text = "a line of it\n" * 40
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "short"}, {"text": text}]))
    found = list(documents(tmp_path / "a.jsonl"))
    assert "".join(one.text for one in found[1:]) == text
    assert [one.name for one in found[:4]] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:2#1", "a.jsonl:2#2"]


PEAK = """
import resource, sys
from longwave.data.shards import prepare
from longwave.data.tokenizer import Tokenizer
prepare(sys.argv[1], sys.argv[2], tokenizer=Tokenizer.train(["0123456789"], 270))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_the_memory_of_preparing_is_flat(name: str, tmp_path: Path):
    """15 MiB of digits without a line end: no text takes more memory per byte, since each of them is a token."""
    text = "0123456789" * (3 << 19)
    content = {"txt": text.encode(), "jsonl": lines([{"text": text}]), "json": array([{"text": text}])}
    content |= {"csv": table([{"text": text}]), "gz": gzip.compress(lines([{"text": text}]))}
    (tmp_path / name).write_bytes(content[name.split(".")[-1]])
    run = [sys.executable, "-c", PEAK, str(tmp_path / name), str(tmp_path / "out")]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 800  # MiB
