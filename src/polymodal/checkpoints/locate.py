"""Where a model lies: shipped with the package, in a folder, or on the Hugging Face hub, through its own client.

The client is told by the environment where to look and whether to: `HF_ENDPOINT` names a private mirror,
`HF_HUB_OFFLINE=1` keeps to what is in the cache, `HF_TOKEN` opens private repositories. No token is passed on from
here. Only weights as safetensors and what describes them are fetched. What was fetched is pinned by its commit.
"""

import re
from pathlib import Path

from polymodal.errors import CheckpointError, ConfigError, first_line, unknown_name
from polymodal.safety.model_folder import OURS
from polymodal.utils.files import home_path, shipped, shipped_folder

ENDPOINT = "openai:"
"""What names of models behind an endpoint begin with."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""The form of a hub id: owner and name."""

WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.md", "tokenizer.model", "spiece.model")
UNWANTED = ("original/*", "consolidated*", "onnx/*", "openvino/*")
"""Some repositories hold their weights twice, once for other programs."""


def fetch_folder(name: str, revision: str | None = None) -> Path:
    """Fetch a repository's folder, or find it in the hub's cache."""
    from huggingface_hub import snapshot_download

    at = f"{name} at {revision}" if revision is not None else name
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
    except (OSError, ValueError) as error:  # not there, no network, offline mode: all of them name the reason
        raise CheckpointError(
            f"{at}: no such folder here, and not to be had from the hub ({first_line(error)})"
        ) from error
    return Path(found)


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache is a snapshot of."""
    return folder.name if folder.parent.name == "snapshots" else None


USES = {
    **dict.fromkeys(
        (".yaml", ".yml"), "a recipe; `polymodal check` looks it over, `polymodal train` makes a model of it"
    ),
    **dict.fromkeys((".jsonl", ".parquet"), "data; `polymodal data check` looks it over"),
    ".gguf": "a language model that a recipe builds on (init.model.llm.model_name_or_path), and llama.cpp runs",
}
"""What files are that are given as something else, by their endings, and what to do with them."""


def folder_here(name: str | Path) -> Path:
    """Where a name lies on this machine, with the package or as a path, if it is here."""
    here = shipped_folder() / str(name)
    return here if (here / OURS).is_file() else home_path(name)


def find_model(name: str | Path, revision: str | None = None) -> Path:
    """Find a model's folder by name, path or hub id; of a hub id, fetch it."""
    if str(name).startswith(ENDPOINT):
        raise CheckpointError(f"{name}: the model is behind an endpoint; this needs its folder")
    here = folder_here(name)
    if here.is_dir():
        if revision is not None:
            raise ConfigError(f"{name}: is a folder here, which has no revisions; leave revision out")
        return here
    if here.is_file():
        use = USES.get(here.suffix.lower())
        told = f"this is {use}" if use else f"name the one that its config.json lies in, such as {here.parent}"
        raise CheckpointError(f"{name}: a file, and a model is a folder; {told}")
    if HUB_ID.fullmatch(str(name)):
        found = fetch_folder(str(name), revision)
        if not any((found / file).is_file() for file in (OURS, "config.json")):
            raise CheckpointError(f"{name}: the hub's repository has no {OURS} and no config.json; it is no model")
        return found
    if "/" in str(name):
        raise CheckpointError(f"{name}: no such model folder")
    raise unknown_name("model", str(name), [path.parent.name for path in shipped_folder().glob(f"*/{OURS}")])


def referred_folder(source: str) -> Path | None:
    """The folder of a part that a model folder refers to; None where it is not on this machine."""
    from polymodal.modeling import ctranslate2
    from polymodal.modeling.language_model import DEFAULT_LLM, SMOLLM2, converted_folder

    if source == DEFAULT_LLM:
        if (converted_folder() / "config.json").is_file():
            return converted_folder()
        source = SMOLLM2
    if source in ctranslate2.PACKAGED and ctranslate2.is_converted(source):
        return ctranslate2.converted_folder(source)
    place = shipped(source) or home_path(source)
    return place if place.is_dir() else cached_folder(source)


def cached_folder(name: str) -> Path | None:
    """A repository's folder in the hub's cache; None where it is not there, or the name is no hub id."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True)) if HUB_ID.fullmatch(name) else None
    except (OSError, ValueError):
        return None
