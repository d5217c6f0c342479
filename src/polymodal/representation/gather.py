"""Every process's rows of a batch, so that each pair is contrasted with those of the whole step.

A contrastive loss looks at all pairs of the global batch. Each process computes the share of its own rows; the rows of
the others come from here. `gather_with_grad` lets the gradient of every process's share flow back to the rows that it
used, wherever they were computed, so that the sum of the shares has exactly the gradient of the big batch. `gather`
cuts it, as BLIP-2's reference does (LAVIS), and carries ids, masks and whatever else is only looked at.

Difference from the references: rows are checked to be equally many everywhere. torch's collectives hang or mix up rows
where they are not. With one process, `gather` cuts the gradient too, so that a run does not depend on how many there
are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from polymodal.errors import ConfigError

MOST_DIMENSIONS = 8
"""Of a gathered tensor; its shape travels in a vector of a fixed length."""


def gather(tensor: Tensor) -> Tensor:
    """Put the rows of all processes one after the other, by rank, without gradient.

    Args:
        tensor: [b, ...] of any dtype; b and all other sizes are the same in every process.

    Returns:
        [B, ...], B = b times the number of processes, detached; one process gets its own rows.

    Raises:
        ConfigError: The processes hold differently many rows, or rows of different shapes.
    """
    return _all_rows(tensor.detach())


def gather_with_grad(tensor: Tensor) -> Tensor:
    """Put the rows of all processes one after the other, by rank, with gradient.

    The backward pass sums the gradient over processes, so every process must run it, and in the same order.

    Args:
        tensor: [b, ...] floating point; b and all other sizes are the same in every process.

    Returns:
        [B, ...], B = b times the number of processes; one process gets its own rows.

    Raises:
        ConfigError: The processes hold differently many rows, or rows of different shapes.
    """
    return tensor if process_count() == 1 else _Gather.apply(tensor)


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """`_all_rows`, and the sum of the gradient over processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return _all_rows(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Summed in float32 where the features are half precision.
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.rows
        return total[start : start + ctx.rows].to(grad.dtype)


def _all_rows(tensor: Tensor) -> Tensor:
    if process_count() == 1:
        return tensor
    _check_shapes(tensor)
    # Not every backend carries booleans.
    sent = tensor.contiguous().view(torch.uint8) if tensor.dtype is torch.bool else tensor.contiguous()
    rows = sent.new_empty((process_count() * len(sent), *sent.shape[1:]))
    dist.all_gather(list(rows.chunk(process_count())), sent)
    return rows.view(tensor.dtype)


def _check_shapes(tensor: Tensor) -> None:
    """Raise in every process alike where one would bring another shape."""
    if tensor.ndim == 0 or tensor.ndim > MOST_DIMENSIONS:
        raise ValueError(f"a gathered tensor has 1 to {MOST_DIMENSIONS} dimensions, not {tensor.ndim}")
    padded = [*tensor.shape, *[-1] * (MOST_DIMENSIONS - tensor.ndim)]
    own = torch.tensor(padded, dtype=torch.int64, device=tensor.device)
    found = [torch.empty_like(own) for _ in range(process_count())]
    dist.all_gather(found, own)
    shapes = [[size for size in shape if size >= 0] for shape in torch.stack(found).tolist()]
    if len({shape[0] for shape in shapes}) > 1:
        counts = ", ".join(str(shape[0]) for shape in shapes)
        raise ConfigError(
            f"the processes hold {counts} rows of one step, and must hold equally many: "
            "choose a batch size that the number of processes divides"
        )
    if any(shape != shapes[0] for shape in shapes):
        listed = ", ".join("x".join(map(str, shape)) for shape in shapes)
        raise ConfigError(f"the processes hold rows of different shapes ({listed}): pad them to the same length")
