"""Opening a model by name, folder or hub id, behind one chat protocol."""

from __future__ import annotations

from pathlib import Path

from polymodal.backends.local import LocalBackend
from polymodal.checkpoints.folder import CONFIG_NAME, load_model
from polymodal.errors import CheckpointError, unknown_name

SHIPPED = Path(__file__).resolve().parent.parent / "models"
"""Folder of the models that come with the package."""


def load(name: str | Path = "default", device: str | None = None) -> LocalBackend:
    """Open a model.

    Args:
        name: "default" for the small model that comes with the package, or a model folder of ours.
        device: Where to put it ("cpu", "cuda"); None takes a GPU where there is one.

    Returns:
        The model behind the chat protocol.

    Raises:
        CheckpointError: There is no such model, or its folder is damaged.
    """
    import torch

    shipped = SHIPPED / str(name)
    folder = Path(name).expanduser()
    if (shipped / CONFIG_NAME).is_file():
        folder = shipped
    elif not folder.is_dir():
        known = [p.parent.name for p in SHIPPED.glob(f"*/{CONFIG_NAME}")]
        if "/" in str(name):
            raise CheckpointError(f"{name}: no such model folder (hub models come with a later release)")
        raise unknown_name("model", str(name), known)
    loaded = load_model(folder)
    if loaded.config.llm.device_map is None:
        loaded.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return LocalBackend(loaded.model, loaded.tokenizer, loaded.config, name=str(name), history=loaded.history)
