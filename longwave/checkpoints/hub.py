"""Where a model is: a folder, or a hub id whose files are fetched once and then lie in huggingface_hub's cache.

A hub id reads `org/name`, `hf:org/name`, or either with a revision, `org/name@v1.0`. It is said before the hub is
asked, and afterwards which commit was fetched. In a place where a folder `org` lies, `org/name` is taken for a folder
of one's own that is not there, and `hf:` in front is asked for.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
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
    "adapter_config.json",  # an adapter is refused by it
    *("manifest.json", "*.py"),  # of longwave's own folders: what the manifest lists must be there; no code is run
)
FETCHING = ("revision", "token", "cache_dir", "force_download", "local_files_only")  # of huggingface_hub
_DEEPER = ["*/*.py", "*/*.safetensors"]  # `*` in a pattern stands for a slash too
_ID = re.compile(r"(hf:)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w./-]*))?")
_CACHED = "models--"  # how the cache begins the name of a model's folder


def find(path: str | Path, patterns: tuple[str, ...] = WHOLE, **options: Any) -> Path:
    """The folder of a model: `path` if there is one, or else what the hub has under that id.

    patterns: of the names of the files to fetch. options: huggingface_hub's, by the names in `FETCHING`. UserError if
    it is neither, or the hub cannot be reached or does not have it.
    """
    folder = Path(path)
    if _stands(folder) or _stands(folder):  # again: an overwrite by two renames may fall between the first two looks
        return folder
    if folder.exists():
        raise UserError(f"{path}: a file; give a model folder, or a hub id such as org/name")
    id = _ID.fullmatch(str(path))
    if id is None or folder.suffix == ".toml":
        raise UserError(f"{path}: no such folder, and no hub id (those read org/name); give a model folder")
    explicit, name, revision = id.groups()
    if not explicit and folder.parent.is_dir():
        raise UserError(f"{path}: no such folder; {_near(folder)}for a model of the hub write hf:{path}")
    return _fetched(name, patterns, {"revision": revision, **options} if revision else options)


def _stands(folder: Path) -> bool:
    """Whether there is a folder, which is put back if an interrupted overwrite hid it."""
    files.recover(folder)
    return folder.is_dir()


def is_hub_id(path: str | Path) -> bool:
    """Whether this can only be a hub id: it reads like one, and neither it nor the folder before its `/` lies here."""
    id, folder = _ID.fullmatch(str(path)), Path(path)
    if id is None or folder.suffix == ".toml" or folder.exists():
        return False
    return id[1] is not None or not folder.parent.is_dir()


def fetched_from(folder: Path) -> str | None:
    """The id and commit of a model in huggingface_hub's cache, as `org/name@commit`; None of any other folder."""
    home = files.resolved(folder).parent
    if home.name != "snapshots" or not home.parent.name.startswith(_CACHED):
        return None
    return f"{home.parent.name.removeprefix(_CACHED).replace('--', '/', 1)}@{files.resolved(folder).name}"


def _near(folder: Path) -> str:
    """A folder beside with a name like this one's, in words for an error."""
    found = get_close_matches(folder.name, sorted(path.name for path in folder.parent.iterdir()), 1)
    return f"did you mean {folder.parent / found[0]}? " if found else ""


def _fetched(name: str, patterns: tuple[str, ...], options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    from longwave.progress import say

    revision = options.get("revision")
    say(f"fetching {name}{f' at {revision}' if revision else ''} from the Hugging Face hub, unless it is in its cache")
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=_DEEPER, **options))
    except Exception as error:  # the library's own, and whatever its HTTP client raises
        said = brief(error)
        raise UserError(f"{name}: no such folder, and as a hub id it could not be fetched: {said}") from None
    say(f"{name}: commit {(fetched_from(folder) or '@unknown').partition('@')[2]}")
    return folder
