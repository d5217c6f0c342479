"""Weights as safetensors in the layout of transformers: one file, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from polymodal.errors import CheckpointError
from polymodal.interop.huggingface.weights import INDEX_NAME, WEIGHTS_NAME
from polymodal.utils.files import write_text

MAX_SHARD_BYTES = 5_000_000_000
"""The largest file, as transformers cuts them; a single larger tensor has a file of its own."""


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None = None,
    max_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write tensors, no more than one file of them in memory besides their sources.

    Args:
        folder: Where to; must be there.
        tensors: Names and values; a name may come once.
        dtype: Of the floating-point ones on disk; None keeps theirs.
        max_bytes: Begin another file where one would get larger than this.

    Returns:
        Bytes of all tensors.

    Raises:
        CheckpointError: A name comes twice, or there are no tensors.
    """
    files: list[list[str]] = []
    sizes: list[int] = []
    held: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    size = 0

    def flush() -> None:
        nonlocal held, size
        _save(held, folder / f".part-{len(files):05d}.safetensors")
        files.append(list(held))
        sizes.append(size)
        held, size = {}, 0

    for name, tensor in tensors:
        if name in seen:
            raise CheckpointError(f"two tensors are called {name}; nothing was written")
        seen.add(name)
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        value = tensor.detach().to("cpu", kind).contiguous()
        if held and size + value.nbytes > max_bytes:
            flush()
        # A tensor that shares its memory with one before it cannot be written twice by safetensors.
        held[name] = value.clone() if value.data_ptr() == tensor.data_ptr() else value
        size += value.nbytes
    if held:
        flush()
    if not files:
        raise CheckpointError(f"{folder}: there are no tensors to write")
    if len(files) == 1:
        (folder / ".part-00000.safetensors").rename(folder / WEIGHTS_NAME)
        return sizes[0]
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f".part-{number:05d}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return sum(sizes)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})  # transformers asks for this
