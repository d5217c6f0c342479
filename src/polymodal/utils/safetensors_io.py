"""One file of safetensors, in and out, with one-line errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch


SHOWN = 4
"""How many names an error lists."""


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read one file of safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing (only safetensors are read)")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({first_line(error)})") from None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Write one file of safetensors."""
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path.name}: {name} holds NaN or infinity; nothing was saved")
    save_file({k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in tensors.items()}, path)


def compare_tensors(wanted: Mapping[str, Any], found: Mapping[str, Any], where: str | Path = "weights") -> None:
    """Make sure that tensors fit, by their names and shapes."""
    misshaped = [
        f"{name} {_shape_of(found[name])} for {_shape_of(wanted[name])}"
        for name in sorted(wanted.keys() & found.keys())
        if _shape_of(wanted[name]) != _shape_of(found[name])
    ]
    _raise_faults(
        where,
        ("missing", sorted(wanted.keys() - found.keys())),
        ("not expected", sorted(found.keys() - wanted.keys())),
        ("of another shape", misshaped),
    )


def check_finite(state: Mapping[str, torch.Tensor], where: str | Path = "weights") -> None:
    """Make sure that no weight is NaN or infinite."""
    _raise_faults(where, ("with NaN or infinity", sorted(name for name, t in state.items() if not _is_finite(t))))


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()  # sums of 8-bit floats are not there
    # The sum is quick, and not finite where a number is not; where it merely overflows, each number is looked at.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _raise_faults(where: str | Path, *faults: tuple[str, list[str]]) -> None:
    parts = [
        f"{len(names)} {what}: {', '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''}"
        for what, names in faults
        if names
    ]
    if parts:
        raise CheckpointError(f"{where}: tensors do not fit ({'; '.join(parts)})")


def _shape_of(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", value))
