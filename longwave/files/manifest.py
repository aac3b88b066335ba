"""The manifest of a folder: the names, sizes and checksums of its files, but for the card, as they were saved."""

import json
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from longwave.errors import UserError
from longwave.files.names import MANIFEST
from longwave.files.opened import OpenFolder

FORMAT, VERSION, ALGORITHM = "longwave-folder", 1, "crc32"
REMEDY = "make the folder again, or copy all of it"  # where one is damaged
_LARGEST = 32 << 20  # bytes of a manifest

T = TypeVar("T")


class SavedFile(NamedTuple):
    """A file's entry in the manifest."""

    bytes: int
    checksum: str  # eight hexadecimal digits


def file_names(path: Path) -> list[str]:
    """Every file below `path`: sorted relative names with forward slashes. Raises UserError for a link or a device."""
    names: list[str] = []
    for root, folders, files in os.walk(path):
        for entry in (Path(root, name) for name in folders + files):
            if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
                raise UserError(f"cannot save {entry.relative_to(path)}: it is not a plain file or folder; remove it")
        names += [Path(root, name).relative_to(path).as_posix() for name in files]
    return sorted(names)


def measured(files: Iterable[T], measure: Callable[[T], SavedFile]) -> list[SavedFile]:
    """The size and checksum of each file, in order; files are read side by side, as zlib releases the GIL."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(measure, files))


def measure_path(path: Path) -> SavedFile:
    """The size and checksum of the file at a path."""
    with open(path, "rb", buffering=0) as file:
        return measure(file.fileno())


def measure(descriptor: int) -> SavedFile:
    """The size and CRC-32 of a file: every single flipped bit and every burst of up to 32 bits changes it.

    The fastest in the standard library: 2.2 GB/s on one core, against 1.3 for SHA-256 and 1.05 for BLAKE2b.
    """
    size = checksum = 0
    buffer = memoryview(bytearray(1 << 20))
    while count := os.preadv(descriptor, [buffer], size):
        size += count
        checksum = zlib.crc32(buffer[:count], checksum)
    return SavedFile(size, f"{checksum:08x}")


def manifest_text(files: dict[str, SavedFile]) -> bytes:
    """The manifest: format, version, algorithm, every file, and last a checksum of all that."""
    content = {"format": FORMAT, "version": VERSION, "algorithm": ALGORITHM}
    listed = {name: file._asdict() for name, file in sorted(files.items())}
    body = json.dumps(content | {"files": listed}, indent=1)
    return f'{body[:-2]},\n "checksum": "{zlib.crc32(body.encode()):08x}"\n}}\n'.encode()


def read_manifest(folder: OpenFolder) -> dict[str, SavedFile] | None:
    """The files that the manifest of a folder lists, or None if there is no manifest.

    Raises UserError unless its bytes are exactly those that longwave writes, so that a flipped bit in it cannot pass.
    """
    if MANIFEST not in folder:
        return None
    damaged = UserError(f"{folder / MANIFEST} is damaged, or was not written by longwave; {REMEDY}")
    raw = folder.read(MANIFEST, _LARGEST)
    try:
        content: Any = json.loads(raw)
        version, files = content["version"], {name: SavedFile(**file) for name, file in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged from error
    if version != VERSION:
        raise UserError(
            f"{folder / MANIFEST} has version {version}; this longwave reads version {VERSION}: take a later"
        )
    if raw != manifest_text(files):
        raise damaged
    return files


def checksums(path: str | os.PathLike[str]) -> dict[str, str]:
    """The checksum that every file of a folder was saved with (eight hexadecimal digits).

    Empty without a folder or a manifest.
    """
    if not os.path.isdir(path):
        return {}
    with OpenFolder(path) as folder:
        return saved_checksums(folder)


def saved_checksums(folder: OpenFolder) -> dict[str, str]:
    """The same, of an opened folder."""
    return {name: file.checksum for name, file in (read_manifest(folder) or {}).items()}
