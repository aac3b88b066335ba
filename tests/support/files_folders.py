"""What the tests of longwave.files save and look at."""

import os
from pathlib import Path

from longwave import files
from longwave.files import storage

NAMES = ("model.safetensors", "config.json", "optimizer/part-0")


def content(name: str, version: int) -> bytes:
    return f"{name} {version} ".encode() * 50


def save(path: Path, version: int = 0) -> None:
    with files.folder(path) as staging:
        storage.disk.mkdir(staging / "optimizer")
        for name in NAMES:
            storage.disk.write(staging / name, content(name, version))


def version_of(path: Path) -> int:
    """The version of a whole folder, every byte of which is looked at."""
    assert files.verify(path)
    version = int((path / "config.json").read_text().split()[1])
    assert all((path / name).read_bytes() == content(name, version) for name in NAMES)
    return version


def hidden(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if name.startswith("."))
