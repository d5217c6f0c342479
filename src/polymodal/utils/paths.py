"""Names of files and folders as configuration keys hold them: `~` is the home folder, nothing is not a name."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator


def full_name(value: str) -> str:
    """Put the home folder in for `~`; refuse what names no file."""
    if not value.strip() or "\0" in value:
        raise ValueError("is no name of a file or folder")
    found = os.path.expanduser(value)
    if found.startswith("~"):
        raise ValueError(f"there is no user {found[1:].partition('/')[0]!r}; a file of that name is ./{value}")
    return found


def full_names(value: Any) -> Any:
    """The same for the parts that a model's plain data name, at any depth."""
    if isinstance(value, list):
        return [full_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    named = {key for key in PART_KEYS & value.keys() if isinstance(value[key], str)}
    return {key: full_name(item) if key in named else full_names(item) for key, item in value.items()}


def own_folder(value: str) -> str:
    """Refuse a folder that others' files lie in: the root, the home folder, and what holds the current one."""
    folder = Path(full_name(value)).resolve()
    if Path.cwd().is_relative_to(folder) or Path.home().resolve().is_relative_to(folder):
        raise ValueError("a run fills this folder, so it must be one of its own, such as runs/first")
    return full_name(value)


def without_places(value: Any) -> Any:
    """A document without the places of this machine: of each absolute path the last part, in the hub's cache the id."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if found := SNAPSHOT.search(value):
        return f"{found[1]}/{found[2]}"
    if value.startswith("/") and "\n" not in value and Path(value).name:
        return Path(value).name
    return _PATH.sub(r"\1", value)


PART_KEYS = {"vision_tower", "audio_tower", "model_name_or_path", "pretrained", "tokenizer", "bert", "image_tokenizer"}
"""Keys of models whose values are folders, files or hub ids."""

Parts = BeforeValidator(full_names)
"""For a key that holds a model."""

FilePath = Annotated[str, AfterValidator(full_name)]
"""A file or folder, or where the key allows it a hub id."""

OutputFolder = Annotated[str, AfterValidator(own_folder)]
"""A folder to be filled."""

SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]+/?$")
"""A repository's folder in the hub's cache: its owner and its name."""

_PATH = re.compile(r"(?<![\w:/.<\\])(?:file://|~)?(?:[A-Za-z]:)?[\\/](?:[^\s\"'\\/<>]+[\\/])+([^\s\"'\\/<>]*)")
