"""The repository: text that people can review, no binaries or large files; rooms that do not import each other."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 200_000  # bytes


def tracked() -> list[Path]:
    """Every file that git tracks; the test is skipped where there is no repository, as in an unpacked archive."""
    if not (ROOT / ".git").exists():
        pytest.skip(f"{ROOT} is no git checkout, so nothing says which files belong to the project")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for path in (ROOT / name for name in listed.split("\0") if name) if path.is_file()]


def refusal(content: bytes) -> str | None:
    """Why a file of this content does not belong into the repository, or None."""
    if len(content) > LARGEST:
        return f"{len(content):,} bytes; at most {LARGEST:,}"
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "not UTF-8 text"
    return "holds a NUL byte" if "\0" in text else None


def test_tracked_files_are_text_of_a_readable_size():
    refused = {path.relative_to(ROOT).as_posix(): refusal(path.read_bytes()) for path in tracked()}
    assert {name: why for name, why in refused.items() if why} == {}


@pytest.mark.parametrize("content", [b"x" * (LARGEST + 1), b"\x89PNG\r\n", b"PK\x03\x04\0\0"])
def test_binaries_and_large_files_would_be_refused(content: bytes):
    assert refusal(content)


def rooms_imported() -> dict[str, set[str]]:
    """The rooms of the package (folders and modules) that each of them imports, within functions too."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "longwave").rglob("*.py"):
        room = path.relative_to(ROOT / "longwave").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module == "longwave":
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longwave."):
                names = [str(node.module).split(".")[1]]
            found.setdefault(room, set()).update(name for name in names if name not in (room, "__version__"))
    return found


def test_no_rooms_import_each_other():
    """Not around corners either: the rooms can be put in an order in which each imports earlier ones only."""
    left = {room: others for room, others in rooms_imported().items() if room != "__init__"}
    assert {"model", "states", "mixers"} <= set(left), "the package was found"
    while free := {room for room, others in left.items() if not others & set(left)}:
        left = {room: others for room, others in left.items() if room not in free}
    assert left == {}, "these import each other"
