"""Model folders from the Hugging Face hub, through its own client and cache.

The client is told by the environment where to look and whether to: `HF_ENDPOINT` names a private mirror,
`HF_HUB_OFFLINE=1` keeps to what is in the cache, `HF_TOKEN` opens private repositories. No token is passed on from
here. Only weights as safetensors and what describes them are fetched. What was fetched is pinned by its commit.
"""

from __future__ import annotations

import re
from pathlib import Path

from polymodal.errors import CheckpointError, first_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""The form of a hub id: owner and name."""

WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.md", "tokenizer.model", "spiece.model")
UNWANTED = ("original/*", "consolidated*", "onnx/*", "openvino/*")
"""Some repositories hold their weights twice, once for other programs."""


def fetch_folder(name: str, revision: str | None = None) -> Path:
    """Fetch a repository's folder, or find it in the hub's cache.

    Args:
        name: The hub id.
        revision: A commit, tag or branch; the newest of the main branch when None.

    Returns:
        The folder, in the hub's cache.

    Raises:
        CheckpointError: It is not to be had; says why.
    """
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
    """The commit that a folder of the hub's cache is a snapshot of.

    Args:
        folder: Any folder.

    Returns:
        The commit's hash; None for a folder that is not in the cache.
    """
    return folder.name if folder.parent.name == "snapshots" else None
