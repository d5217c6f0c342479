"""What is ours in the folder of a pair model that is otherwise stock: `polymodal_pair.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polymodal.safety.config_json import read_json

NOTES = "polymodal_pair.json"
"""History, picture rules, objective, temperature, scores."""


def read_notes(folder: Path) -> dict[str, Any]:
    """Read what a pair stage wrote beside its model.

    Args:
        folder: The model folder; a hub id finds nothing.

    Returns:
        The notes; empty for a folder of other origin.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / NOTES
    return read_json(path) if path.is_file() else {}
