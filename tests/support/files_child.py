"""Saves checkpoints until it is killed: `files_child.py ROOT STATE SEED exchange|renames`.

STATE is a shared file of two integers: what is going on now (a phase), and the last save that returned. Each is written
at once, so that a kill cannot tear it. Standard library only, so that it starts in an instant.
"""

import mmap
import random
import struct
import sys
from pathlib import Path

from longwave import files
from longwave.files import storage
from longwave.training import checkpoints

IDLE, WRITING, COMMITTING, PRUNING = range(4)
STATE = struct.Struct("@QQ")
KEEP = 3


def content(name: str, step: int, version: int) -> bytes:
    """Bytes that only this file of this save has."""
    return random.Random(f"{name} {step} {version}").randbytes(1000) * 200


def one_number(step: int, version: int) -> int:
    return step << 32 | version


def save(root: Path, step: int, version: int, enter=lambda phase: None) -> None:
    enter(WRITING)
    with files.folder(checkpoints.step_folder(root, step)) as staging:
        (staging / "version").write_text(str(version))
        (staging / "optimizer").mkdir()
        for name in ("model.safetensors", "optimizer/part-0", "optimizer/part-1"):
            (staging / name).write_bytes(content(name, step, version))
        enter(COMMITTING)
    enter(IDLE)


def run(root: Path, state: mmap.mmap, draw: random.Random) -> None:
    step = version = 0

    def enter(phase: int) -> None:
        STATE.pack_into(state, 0, phase, one_number(step, version))

    files.sweep(root)
    newest = checkpoints.newest(root)
    step = newest.step if newest else 0
    version = int((newest.path / "version").read_text()) if newest else 0
    while True:
        following = (step, version + 1) if step and draw.random() < 0.5 else (step + 1, 0)
        save(root, *following, enter)
        step, version = following
        enter(PRUNING)
        checkpoints.prune(root, KEEP)
        enter(IDLE)


if __name__ == "__main__":
    if sys.argv[4] == "renames":
        storage.Disk.renameat2 = None
    with open(sys.argv[2], "r+b") as file:
        run(Path(sys.argv[1]), mmap.mmap(file.fileno(), STATE.size), random.Random(int(sys.argv[3])))
