"""Reading and writing safetensors: whole folders, sharded or not; every mismatch is an error that names the tensor.

Files are read once, by as many threads as there are cores. The checksums that a folder was saved with
(`files.saved_checksums`) are compared in the same pass; a folder without a manifest has none, so that there a changed
bit inside a tensor's data cannot be seen. Weights land in memory of their own, aligned as torch aligns it: products on
a CPU may differ in the last bit with the alignment of their operands, and mapped tensors lie where the file puts them.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longwave import files
from longwave.checkpoints.located import weights_file
from longwave.errors import UserError, shown
from longwave.files import OpenFolder
from longwave.files.checksum import joined
from longwave.files.jsonfile import brief, plain

_HEADER, _INDEX = 16 << 20, 32 << 20  # the most bytes of a header and of an index: 150,000 and 300,000 tensors
_BLOCK = 1 << 22  # bytes read at a time: what was read is summed while it lies in a cache
_LARGE = 1 << 22  # bytes from which memory is asked for in huge pages: filling it is then several times as fast
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = {
    **FLOATS,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@runtime_checkable
class Described(Protocol):
    """What is known of a stored tensor before it is read; a tensor itself will do."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...


@runtime_checkable
class Weights(Protocol):
    """The tensors of a folder: what is there by name, and a way to read them.

    source: the file or folder, for error messages.
    """

    @property
    def source(self) -> str: ...

    @property
    def found(self) -> Mapping[str, Described]: ...

    def read(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """The named tensors, each in the given dtype."""
        ...


@dataclass(frozen=True)
class Stored:
    """Where a tensor stands in a file."""

    shape: torch.Size
    dtype: torch.dtype
    begin: int

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class WeightFiles:
    """The tensors of a folder, in one file or in the shards of an index.

    file: the name of either; by default the one that `weights_file` finds. ignoring: the ends of the names of tensors
    that count as absent. UserError for a file that is missing, is no safetensors file, or holds other tensors than its
    index says.
    """

    def __init__(self, folder: OpenFolder, file: str | None = None, ignoring: str | tuple[str, ...] = ()) -> None:
        file = file or weights_file(folder)
        self.source = str(folder / file)
        self._folder, self._saved = folder, files.saved_checksums(folder)
        self._files = _shards(folder, file) if file.endswith(".json") else {file: _stored(folder, file)}
        stored = {name: one for tensors in self._files.values() for name, one in tensors.items()}
        self.found = {name: one for name, one in stored.items() if not name.endswith(ignoring)}

    def names(self) -> set[str]:
        """Every tensor in the folder."""
        return set(self.found)

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors as they were saved."""
        return self.read({name: self.found[name].dtype for name in names})

    def read(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """The named tensors, each in the given dtype. UserError for a file that is not what was saved."""
        read: dict[str, Tensor] = {}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for file, tensors in self._files.items():
                read |= _Reader(self._folder, file, tensors, self._saved.get(file), pool).read(dtypes)
        return read


@dataclass(frozen=True)
class _Piece:
    """A run of bytes in a file: a tensor of its own, or what nobody wants (the header, an unused tensor)."""

    begin: int
    bytes: int
    name: str | None = None


@dataclass(frozen=True)
class _Reader:
    """Reads one file: the wanted tensors, and everything else too where there is a checksum to compare."""

    folder: OpenFolder
    file: str
    tensors: Mapping[str, Stored]
    saved: str | None
    pool: ThreadPoolExecutor

    def read(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        wanted = [piece for piece in self._pieces() if self.saved or piece.name in dtypes]
        descriptor = self.folder.descriptor(self.file)
        with files.reading(self.path):
            results = list(self.pool.map(lambda piece: self._take(descriptor, piece, dtypes), wanted))
        if self.saved:
            checksum = 0
            for piece, (_, own) in zip(wanted, results, strict=True):
                checksum = joined(checksum, own, piece.bytes)
            files.refuse_damaged(self.path, f"{checksum:08x}", self.saved)
        return {
            piece.name: tensor
            for piece, (tensor, _) in zip(wanted, results, strict=True)
            if piece.name is not None and tensor is not None
        }

    @property
    def path(self) -> Path:
        return self.folder / self.file

    def _pieces(self) -> list[_Piece]:
        """The whole file in order; tensors follow each other without a gap."""
        tensors = [_Piece(stored.begin, stored.bytes, name) for name, stored in self.tensors.items()]
        header = min((piece.begin for piece in tensors), default=self.folder.size(self.file))
        return [_Piece(0, header), *sorted(tensors, key=lambda piece: (piece.begin, piece.bytes))]

    def _take(self, descriptor: int, piece: _Piece, dtypes: Mapping[str, torch.dtype]) -> tuple[Tensor | None, int]:
        """The tensor in a piece, or None of one that nobody wants, and the piece's checksum."""
        if piece.name not in dtypes or piece.name is None:
            return None, self._sum(descriptor, piece, memoryview(bytearray(min(_BLOCK, piece.bytes))), moving=True)
        stored, memory = self.tensors[piece.name], _memory(piece.bytes)
        checksum = self._sum(descriptor, piece, memory.numpy().data, moving=False)
        return memory.view(stored.dtype).view(stored.shape).to(dtypes[piece.name]), checksum

    def _sum(self, descriptor: int, piece: _Piece, memory: memoryview, moving: bool) -> int:
        """Reads a piece into memory, or through it where it is `moving`; its checksum, or 0 where none is needed."""
        checksum = at = 0
        while at < piece.bytes:
            begin, length = 0 if moving else at, min(_BLOCK, piece.bytes - at)
            count = os.preadv(descriptor, [memory[begin : begin + length]], piece.begin + at)
            if count == 0:
                raise UserError(f"{self.path}: cut while it was being read")
            if self.saved:
                checksum = zlib.crc32(memory[begin : begin + count], checksum)
            at += count
        return checksum


def _memory(size: int) -> Tensor:
    """Fresh bytes; many of them come in huge pages where the system has those."""
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)


def _stored(folder: OpenFolder, file: str) -> dict[str, Stored]:
    """Every tensor in a file, by its header; safetensors refuses one that does not describe the file to the byte."""
    path, opened = folder / file, folder.reopened(file)
    _check_header(folder, file)
    try:
        with safe_open(opened, framework="pt") as reader:
            slices = {name: reader.get_slice(name) for name in reader.offset_keys()}
            described = {name: (torch.Size(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {brief(error)}") from None
    for name, (_, dtype) in described.items():
        if dtype not in _DTYPES:
            raise UserError(f"{path}: tensor {plain(name)} is {dtype}; supported: {', '.join(FLOATS)}")
    sizes = [prod(shape) * _DTYPES[dtype].itemsize for shape, dtype in described.values()]
    at, stored = folder.size(file) - sum(sizes), dict[str, Stored]()
    for (name, (shape, dtype)), size in zip(described.items(), sizes, strict=True):
        stored[name], at = Stored(shape, _DTYPES[dtype], at), at + size
    return stored


def _check_header(folder: OpenFolder, file: str) -> None:
    """UserError for a header that would take gigabytes of memory to read."""
    length = int.from_bytes(os.pread(folder.descriptor(file), 8, 0), "little")
    if _HEADER < length < folder.size(file):
        raise UserError(f"{folder / file}: a header of {length:,} bytes; at most {_HEADER:,} are read")


def _shards(folder: OpenFolder, index: str) -> dict[str, dict[str, Stored]]:
    """The tensors of every shard that an index names, which must be those that the index puts there."""
    listed = folder.object(index, _INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{folder / index}: not an index of safetensors shards: weight_map names no files")
    shards = {file: _shard(folder, index, file) for file in sorted(set(listed.values()))}
    for name, file in listed.items():
        if name not in shards[file]:
            raise UserError(f"{folder / file}: missing tensor {plain(name)}, which {index} puts there")
    for file, tensors in shards.items():
        for name in tensors:
            if listed.get(name) != file:
                raise UserError(f"{folder / file}: unexpected tensor {plain(name)}: not in {index}")
    return shards


def _shard(folder: OpenFolder, index: str, file: str) -> dict[str, Stored]:
    """The tensors of a shard, which lies beside its index."""
    if file not in folder:
        raise UserError(f"{folder / index}: names {shown(file)}, which is missing")
    return _stored(folder, file)


def check(expected: Mapping[str, torch.Size], found: Mapping[str, Described], source: str) -> None:
    """UserError naming the first tensor that is missing, unexpected or misshapen."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        what, which = ("missing", missing) if missing else ("unexpected", unexpected)
        more = f" and {len(which) - 1} more" if len(which) > 1 else ""
        raise UserError(f"{source}: {what} tensor {plain(which[0])}{more}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            shapes = f"{list(found[name].shape)}, the config says {list(shape)}"
            raise UserError(f"{source}: tensor {name} has shape {shapes}")


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes one safetensors file, readable by `transformers` too."""
    save_file(
        {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
    )
