"""Files and folders: written so that they appear whole or not at all, and read back strictly.

    with files.folder("runs/a/step-00000100") as staging:
        save_file(tensors, staging / "model.safetensors")
    files.verify("runs/a/step-00000100")

- The caller writes into a hidden sibling. Every file is fsynced, a manifest of sizes and checksums (of all but
  `README.md`, which people edit) is written last, and one rename makes the folder visible; an existing folder is
  exchanged for the new one in a single system call.
- Where the file system cannot exchange, two renames do it; readers put the old folder back if a crash fell between.
- Hidden siblings are named `.{name}.{kind}-{pid}-{token}` (`leftovers.py`). None is ever taken for a folder; those
  whose process is dead can be swept.

POSIX only, standard library only: importing this package does not import torch.
"""

from longwave.files.faults import faults, reading
from longwave.files.leftovers import delete, folder_names, recover, sweep
from longwave.files.lock import Lock, locked
from longwave.files.manifest import checksums, saved_checksums
from longwave.files.names import CARD, MANIFEST
from longwave.files.opened import OpenFolder, read_whole
from longwave.files.paths import resolved
from longwave.files.verification import refuse_damaged, refuse_other, verify
from longwave.files.writing import add_to, file, folder, write_file

__all__ = [
    "CARD",
    "MANIFEST",
    "Lock",
    "OpenFolder",
    "add_to",
    "checksums",
    "delete",
    "faults",
    "file",
    "folder",
    "folder_names",
    "locked",
    "read_whole",
    "reading",
    "recover",
    "refuse_damaged",
    "refuse_other",
    "resolved",
    "saved_checksums",
    "sweep",
    "verify",
    "write_file",
]
