"""Ways in which a model folder can be damaged or odd, drawn from a seed: bytes, files, JSON, headers and tensors."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from longwave.files import MANIFEST

Mutation = Callable[[random.Random, Path], str]


def pick(draw: random.Random, folder: Path, pattern: str = "*") -> Path:
    return draw.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))


# --- bytes and files: what a disk, a copy or a hand does --------------------------------------------------------------


def flip_bit(draw: random.Random, folder: Path) -> str:
    path = pick(draw, folder)
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"bit flipped in byte {at} of {path.name}"


def flip_header_bit(draw: random.Random, folder: Path) -> str:
    path = pick(draw, folder, "*.safetensors")
    content = bytearray(path.read_bytes())
    at = draw.randrange(8 + int.from_bytes(content[:8], "little"))
    content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"bit flipped in byte {at} of the header of {path.name}"


def cut(draw: random.Random, folder: Path) -> str:
    path = pick(draw, folder)
    length = draw.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:length])
    return f"{path.name} cut to {length} bytes"


def lengthen(draw: random.Random, folder: Path) -> str:
    path = pick(draw, folder)
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 40)))
    return f"bytes behind {path.name}"


def overwrite(draw: random.Random, folder: Path) -> str:
    path = pick(draw, folder)
    path.write_bytes(draw.randbytes(draw.choice([0, 1, 7, 8, 9, 200])))
    return f"{path.name} overwritten"


def remove(draw: random.Random, folder: Path) -> str:
    path = pick(draw, folder)
    path.unlink()
    return f"{path.name} removed"


def swap_files(draw: random.Random, folder: Path) -> str:
    one, other = pick(draw, folder), pick(draw, folder)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"{one.name} and {other.name} swapped"


def make_folder(draw: random.Random, folder: Path) -> str:
    path = pick(draw, folder)
    path.unlink()
    path.mkdir()
    return f"{path.name} is a folder"


DAMAGE: tuple[Mutation, ...] = (
    flip_bit,
    flip_bit,
    flip_header_bit,
    cut,
    lengthen,
    overwrite,
    remove,
    swap_files,
    make_folder,
)


# --- JSON: what another program writes --------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, "", "32", "ключ", "\ud800", "x" * 5000),
    *([], {}, [1], [None], {"a": {"b": []}}, [[[[[[[[]]]]]]]], ["F"] * 50, {"rope_type": "yarn"}, {"type": 5}),
)
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "[" * 100_000, '{"a":' * 3000, "0x10", "'a'", "")


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in inner for place in places(one, (*at, key)))]


def changed_json(draw: random.Random, folder: Path, pattern: str = "*.json") -> tuple[Path, Any, Any, Any]:
    """A JSON file, its content, and a place in it: a container and a key."""
    while True:
        path = pick(draw, folder, pattern)
        content = json.loads(path.read_text())
        found = [place for place in places(content) if place]
        if path.name in (MANIFEST, "tokenizer.json") or not found:
            continue
        *way, key = draw.choice(found)
        inner = content
        for step in way:
            inner = inner[step]
        return path, content, inner, key


def odd_value(draw: random.Random, folder: Path) -> str:
    path, content, inner, key = changed_json(draw, folder)
    inner[key] = draw.choice(ODD)
    path.write_text(json.dumps(content))
    return f"{path.name}: {key} = {inner[key]!r:.60}"


def raw_value(draw: random.Random, folder: Path) -> str:
    path, content, inner, key = changed_json(draw, folder)
    inner[key], raw = "@raw@", draw.choice(RAW)
    path.write_text(json.dumps(content).replace('"@raw@"', raw))
    return f"{path.name}: {key} is {raw:.20}"


def missing_key(draw: random.Random, folder: Path) -> str:
    path, content, inner, key = changed_json(draw, folder)
    del inner[key]
    path.write_text(json.dumps(content))
    return f"{path.name}: no {key}"


def renamed_key(draw: random.Random, folder: Path) -> str:
    path, content, inner, key = changed_json(draw, folder)
    name = draw.choice(["ключ", "\ud800", "", "x" * 3000, f"{key}_", f"{key}".upper(), "../../etc", "a\nb"])
    if isinstance(inner, dict):
        inner[name] = inner.pop(key)
    path.write_text(json.dumps(content))
    return f"{path.name}: {key} renamed {name!r:.30}"


def twice(draw: random.Random, folder: Path) -> str:
    path = pick(draw, folder, "config.json")
    content = json.loads(path.read_text())
    key = draw.choice(sorted(content))
    path.write_text(f'{{"{key}": {json.dumps(draw.choice(ODD))}, {json.dumps(content)[1:]}')
    return f"{path.name}: {key} twice"


def odd_text(draw: random.Random, folder: Path) -> str:
    path = draw.choice([path for path in sorted(folder.glob("*.json")) if path.name != MANIFEST])
    text = path.read_text()
    plain = text.encode()
    forms = [text.encode("utf-16"), b"\xef\xbb\xbf" + plain, b"\xff" + plain, b"[" + plain + b"]"]
    path.write_bytes(draw.choice([*forms, b"null", b"7", b'"text"', b"{}", text.replace(":", "=").encode()]))
    return f"{path.name} in another form"


# --- weights: what a wrong export writes ------------------------------------------------------------------------------


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path: Path, header: str | bytes, data: bytes, length: int | None = None) -> None:
    encoded = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length % 2**64) + encoded + data)


def header_length(draw: random.Random, folder: Path) -> str:
    path = pick(draw, folder, "*.safetensors")
    header, data = header_of(path)
    text = json.dumps(header)
    length = draw.choice([0, 1, 7, len(text) - 1, len(text) + 1, len(text) + 8, 2**31, 2**62, 2**64 - 1, 10**8])
    with_header(path, text, data, length)
    return f"{path.name}: header of {len(text)} bytes says {length}"


def header_entry(draw: random.Random, folder: Path) -> str:
    path = pick(draw, folder, "*.safetensors")
    header, data = header_of(path)
    name = draw.choice(sorted(set(header) - {"__metadata__"}))
    entry, key = header[name], draw.choice(["dtype", "shape", "data_offsets"])
    lies = {
        "dtype": ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "f32", "", None, 7, []],
        "shape": [[], [0], [1], [2**62, 4], [2**32, 2**32], [-1], [1.5], ["2"], entry["shape"][::-1], None, "32"],
        "data_offsets": [[0, 0], [0, 2**63], [8, 4], [-4, 4], [4], [], [4, 8, 12], None, [o + 4 for o in entry[key]]]
        if key == "data_offsets"
        else [],
    }
    entry[key] = draw.choice([*lies[key], *draw.sample(ODD, 2)])
    with_header(path, json.dumps(header), data)
    return f"{path.name}: {name}: {key} = {entry[key]!r:.40}"


def header_form(draw: random.Random, folder: Path) -> str:
    path = pick(draw, folder, "*.safetensors")
    header, data = header_of(path)
    name = draw.choice(sorted(set(header) - {"__metadata__"}))
    entry = json.dumps(header[name])
    text = json.dumps(header)
    forms = {
        "a name twice": f'{{"{name}": {entry}, {text[1:]}',
        "nested": '{"a":' * 50_000 + "1" + "}" * 50_000,
        "metadata of numbers": json.dumps({**header, "__metadata__": {"a": 1}}),
        "no header": "",
        "an array": f"[{text}]",
        "a lone surrogate": text.replace(name, "\\ud800", 1),
        "another key": json.dumps({**header, name: {**header[name], "order": "C"}}),
        "no keys": json.dumps({**header, name: {}}),
    }
    form = draw.choice(sorted(forms))
    with_header(path, forms[form], data)
    return f"{path.name}: header with {form}"


def tensor_set(draw: random.Random, folder: Path) -> str:
    path = pick(draw, folder, "*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kinds: dict[str, dict[str, torch.Tensor]] = {
        "missing": {},
        "renamed": {draw.choice(["ключ", "a b", "x" * 3000, f"{name}.", name.upper()]): tensor},
        "extra": {name: tensor, draw.choice(["extra", "ключ", f"{name}.qweight", "a\nb"]): torch.ones(2)},
        "turned": {name: tensor.T.contiguous() if tensor.ndim == 2 else tensor[None]},
        "longer": {name: torch.cat([tensor, tensor]) if tensor.ndim else tensor[None]},
        "flat": {name: tensor.flatten()[: max(1, tensor.numel() // 2)]},
        "integers": {name: tensor.to(torch.int32)},
        "another float": {name: tensor.to(draw.choice([torch.float16, torch.bfloat16, torch.float64]))},
        "eight bits": {name: tensor.to(torch.float8_e4m3fn)},
        "empty": {name: tensor.new_zeros(0)},
    }
    kind = draw.choice(sorted(kinds))
    save_file(tensors | kinds[kind], path, metadata={"format": "pt"})
    return f"{path.name}: {name} {kind}"


def odd_index(draw: random.Random, folder: Path) -> str:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return tensor_set(draw, folder)
    index = json.loads(path.read_text())
    listed, files = index["weight_map"], sorted(set(index["weight_map"].values()))
    name = draw.choice(sorted(listed))
    kinds: dict[str, Any] = {
        "missing shard": {**listed, name: "model-99999.safetensors"},
        "another shard": {**listed, name: draw.choice([file for file in files if file != listed[name]])},
        "outside": {
            **listed,
            name: draw.choice(["../model.safetensors", "/etc/passwd", "..", "", "\0", "\ud800"]),
        },
        "the index itself": {**listed, name: path.name},
        "unlisted": {key: file for key, file in listed.items() if key != name},
        "unknown": {**listed, "ключ": files[0]},
        "number": {**listed, name: draw.choice([7, None, [], {}, True])},
        "list": list(listed),
        "empty": {},
    }
    kind = draw.choice(sorted(kinds))
    path.write_text(json.dumps({**index, "weight_map": kinds[kind]}))
    return f"index: {kind} for {name}"


ODDITIES: tuple[Mutation, ...] = (
    *(odd_value, odd_value, raw_value, missing_key, renamed_key, twice, odd_text, flip_header_bit),
    *(header_length, header_entry, header_form, tensor_set, odd_index, cut, overwrite, remove, swap_files, make_folder),
)


def mutated(number: int, whole: Path, folder: Path) -> tuple[str, bool]:
    """Copies `whole` to `folder` with a mutation of that number; what was done, and whether its manifest still stands.

    Every other mutation is damage under a manifest, where there is one; the rest are oddities of a folder without.
    """
    draw = random.Random(number)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    sealed = (folder / MANIFEST).exists() and number % 2 == 0
    if not sealed:
        (folder / MANIFEST).unlink(missing_ok=True)
    done = draw.choice(DAMAGE if sealed else ODDITIES)(draw, folder)
    return done, sealed and (folder / MANIFEST).is_file()
