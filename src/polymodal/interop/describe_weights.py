"""Where a model to be described lies: on this machine, in the hub's cache, or (headers only) on the hub."""

from __future__ import annotations

from pathlib import Path

from polymodal.checkpoints.locate import HUB_ID
from polymodal.errors import CheckpointError, first_line
from polymodal.safety.model_folder import FolderReport, check_folder
from polymodal.safety.safetensors_header import Header, TensorInfo
from polymodal.utils.files import shipped

SMALL_FILES = ("*.json", "*.jinja", "*.md", "LICENSE*")


def looked_over(name: str) -> FolderReport:
    """Find a model's folder and check it; of a hub id that is not in the cache, fetch what is small.

    Args:
        name: A model that comes with the package, a folder, or a hub id.

    Returns:
        What is in it.

    Raises:
        CheckpointError: It is not to be had, or must not be opened.
    """
    folder = Path(name).expanduser()
    if (ours := shipped(name)) is not None:
        return check_folder(ours)
    if folder.is_dir():
        return check_folder(folder, allow_pickle=True)
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such model folder, and no hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        cached = None
    if cached is not None and any(cached.glob("*.safetensors")):
        return check_folder(cached, allow_pickle=True)
    try:
        small = Path(snapshot_download(name, allow_patterns=list(SMALL_FILES)))
        report = check_folder(small, weights=False)
        return FolderReport(small, report.configs, _hub_headers(name), report.templates)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: no such folder here, and not to be had from the hub ({first_line(error)})"
        ) from error


def _hub_headers(name: str) -> dict[str, Header]:
    """The headers of a repository's safetensors, a few kilobytes of each file."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        found = get_safetensors_metadata(name)
    except NotASafetensorsRepoError:
        return {}
    return {
        file: Header(
            {
                tensor: TensorInfo(info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
                for tensor, info in header.tensors.items()
            },
            {},
        )
        for file, header in found.files_metadata.items()
    }


def referred(source: str) -> Path | None:
    """Find the folder of a part that lies elsewhere.

    Args:
        source: As a model's configuration names it.

    Returns:
        The folder; None where it is not on this machine.
    """
    from polymodal.modeling.default_llm import HUB_ID as SMOLLM2
    from polymodal.modeling.default_llm import converted_folder
    from polymodal.modeling.language_model import DEFAULT_LLM

    if source == DEFAULT_LLM:
        if (converted_folder() / "config.json").is_file():
            return converted_folder()
        source = SMOLLM2
    place = shipped(source) or Path(source).expanduser()
    if place.is_dir():
        return place
    if HUB_ID.fullmatch(source):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(source, local_files_only=True))
        except (OSError, ValueError):
            return None
    return None
