"""One file of safetensors: its header, its tensors in and out, and whether they fit, with one-line errors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch


SHOWN = 4
"""How many names an error lists."""
MAX_NAME = 1000
"""Characters of a tensor's name."""
DERIVED = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq|masked_bias)$")
"""Buffers that old folders hold and that follow from the configuration."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor."""

    dtype: str  # As the format writes it, such as "F32" or "BF16"
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size in the file; a type's first number is its bits, such as 8 of "F8_E4M3"."""
        bits = re.search(r"\d+", self.dtype)
        return self.numel * (int(bits[0]) if bits else 8) // 8


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read names, types and shapes of a file's tensors; the format's library checks it and maps no data."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
            found = {name: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        reason = first_line(error).removeprefix("Error while deserializing header: ")[:200]
        raise CheckpointError(f"{path}: damaged, or no safetensors file ({reason})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({first_line(error)})") from error
    if any(len(name) > MAX_NAME for name in found):
        raise CheckpointError(f"{path}: the name of a tensor has more than {MAX_NAME:,} characters")
    return found


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
    shapes = {name: (_shape_of(found[name]), _shape_of(wanted[name])) for name in sorted(wanted.keys() & found.keys())}
    _raise_faults(
        where,
        ("missing", sorted(wanted.keys() - found.keys())),
        ("not expected", sorted(found.keys() - wanted.keys())),
        ("of another shape", [f"{name} {given} for {want}" for name, (given, want) in shapes.items() if given != want]),
    )


def check_finite(state: Mapping[str, torch.Tensor], where: str | Path = "weights") -> None:
    """Make sure that no weight is NaN or infinite."""
    _raise_faults(where, ("with NaN or infinity", sorted(name for name, t in state.items() if not _is_finite(t))))


def copy_tensors(into: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], where: str | Path) -> None:
    """Copy tensors that fit and are finite into those of a module."""
    import torch

    compare_tensors(into, given, where)
    check_finite(given, where)
    with torch.no_grad():
        for name, tensor in given.items():
            into[name].copy_(tensor)


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
