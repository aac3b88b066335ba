"""Where a model is: a folder, or a hub id whose files are fetched once and then lie in huggingface_hub's cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from longwave import files
from longwave.errors import UserError
from longwave.files.jsonfile import brief

CONFIGS = ("config.json",)
WHOLE = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_templates/*.jinja"),
    *("manifest.json", "*.py"),  # of longwave's own folders: what the manifest lists must be there; no code is run
)
FETCHING = ("revision", "token", "cache_dir", "force_download", "local_files_only")  # of huggingface_hub
_DEEPER = ["*/*.py", "*/*.safetensors"]  # `*` in a pattern stands for a slash too
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find(path: str | Path, patterns: tuple[str, ...] = WHOLE, **options: Any) -> Path:
    """The folder of a model: `path` if there is one, or else what the hub has under that id (`org/name`).

    patterns: of the names of the files to fetch. options: huggingface_hub's, by the names in `FETCHING`. UserError if
    it is neither, or the hub cannot be reached or does not have it.
    """
    folder = Path(path)
    files.recover(folder)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path}: a file; give a model folder, or a hub id such as org/name")
    if not is_hub_id(path):
        raise UserError(f"{path}: no such folder, and no hub id (those read org/name); give a model folder")
    return _fetched(str(path), patterns, options)


def is_hub_id(path: str | Path) -> bool:
    """Whether this can only be a hub id: it reads `org/name`, and nothing lies there."""
    return _ID.fullmatch(str(path)) is not None and Path(path).suffix != ".toml" and not Path(path).exists()


def _fetched(name: str, patterns: tuple[str, ...], options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=_DEEPER, **options))
    except Exception as error:  # the library's own, and whatever its HTTP client raises
        said = brief(error)
        raise UserError(f"{name}: no such folder, and as a hub id it could not be fetched: {said}") from None
