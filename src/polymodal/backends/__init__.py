"""Opening a model by name, folder or hub id, behind one chat protocol."""

from __future__ import annotations

import re
from pathlib import Path

from polymodal.backends.local import LocalBackend
from polymodal.checkpoints.folder import CONFIG_NAME, load_model, merge_adapter, read_config
from polymodal.errors import CheckpointError, first_line, unknown_name
from polymodal.files import shipped_folder
from polymodal.processing.processor import Processor

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""The form of a hub id: owner and name."""


def load(name: str | Path = "default", device: str | None = None) -> LocalBackend:
    """Open a model.

    Args:
        name: "default" for the small model that comes with the package, a model folder of ours, or the hub id of one.
        device: Where to put it ("cpu", "cuda"); None takes a GPU where there is one.

    Returns:
        The model behind the chat protocol.

    Raises:
        CheckpointError: There is no such model, or its folder is damaged.
    """
    import torch

    loaded = load_model(find_model(name))
    if loaded.config.llm.device_map is None:
        loaded.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    merge_adapter(loaded.model)
    return LocalBackend(loaded.model, loaded.tokenizer, loaded.config, name=str(name), history=loaded.history)


def find_model(name: str | Path) -> Path:
    """Find a model's folder.

    Args:
        name: As in `load`.

    Returns:
        The folder.

    Raises:
        CheckpointError: There is no such folder.
    """
    shipped = shipped_folder() / str(name)
    folder = Path(name).expanduser()
    if (shipped / CONFIG_NAME).is_file():
        return shipped
    if folder.is_dir():
        return folder
    if HUB_ID.fullmatch(str(name)):
        return _from_hub(str(name))
    if "/" in str(name):
        raise CheckpointError(f"{name}: no such model folder")
    raise unknown_name("model", str(name), [path.parent.name for path in shipped_folder().glob(f"*/{CONFIG_NAME}")])


def _from_hub(name: str) -> Path:
    """Fetch a model folder of ours from the Hugging Face hub, or find it in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.md"]))
    except (OSError, ValueError) as error:  # not there, no network, offline mode: all of them name the reason
        raise CheckpointError(
            f"{name}: no such folder here, and not to be had from the hub ({first_line(error)})"
        ) from error
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{name}: the hub's repository has no {CONFIG_NAME}; it is not a polymodal model")
    return folder


def load_processor(name: str | Path = "default") -> Processor:
    """Open only a model's processor: everything up to the tensors, without the language model.

    Args:
        name: As in `load`.

    Returns:
        The processor, equal to that of `load(name)`.

    Raises:
        CheckpointError: There is no such model, or its folder is damaged.
    """
    from polymodal.llm import load_tokenizer, quieten_transformers
    from polymodal.model import build_vision

    folder = find_model(name)
    config = read_config(folder)
    quieten_transformers()
    if config.image_token_id is None:
        raise CheckpointError(f"{folder / CONFIG_NAME}: config.image_token_id is missing")
    tokenizer = load_tokenizer(config.llm, folder)
    # Only the projector's grid is asked for, so the width of the language model does not matter.
    vision = build_vision(config, folder, llm_dim=1)
    tokens = vision[1].output_grid if vision is not None else None
    return Processor(config, tokenizer, tokens, config.image_token_id)
