"""One file of safetensors, in and out, with one-line errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read one file of safetensors.

    Args:
        path: The file.

    Returns:
        Tensors by name.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing (only safetensors are read)")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({first_line(error)})") from None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Write one file of safetensors.

    Args:
        path: The file.
        tensors: By name, on any device.
        dtype: Cast them to this on disk; None keeps them as they are.

    Raises:
        CheckpointError: One is not finite; names it.
    """
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path.name}: {name} holds NaN or infinity; nothing was saved")
    save_file({k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in tensors.items()}, path)
