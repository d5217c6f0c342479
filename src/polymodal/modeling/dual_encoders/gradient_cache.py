"""One contrast over more pairs than fit: rows from every process, and the cached-feature method over micro-batches.

A contrastive loss needs the features of all pairs at once, so adding up gradients of micro-batches would train another
objective. But it needs only the features: they are small, unlike what the encoders keep for their backward pass. So
every micro-batch is embedded without keeping anything, the loss gives the gradient of the features, and each
micro-batch is then embedded again and its features' gradient sent back through the encoders (GradCache; Gao et al.
2021, arXiv:2101.06983). The result is the big batch's gradient, for one more forward pass; dropout falls on the same
places both times. Running statistics (BatchNorm in training mode) would be updated twice: freeze them.

Each process computes the loss of its own rows; the rows of the others come from here. `gather_with_grad` lets the
gradient of every process's share flow back to the rows that it used, wherever they were computed, so that the sum of
the shares has exactly the gradient of the big batch. `gather` cuts it, with one process too, as BLIP-2's reference does
(LAVIS), and carries ids, masks and whatever else is only looked at.

Differences from the references: the first micro-batch keeps what its backward pass needs and is not embedded twice, so
a step of a single micro-batch is one plain pass; terms that each micro-batch has for itself (`extra`: matching,
captioning, distillation) join the second pass; plain functions, not a wrapper around models and optimizers; rows are
checked to be equally many everywhere, where torch's collectives hang or mix them up.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from polymodal.errors import ConfigError
from polymodal.modeling.dual_encoders.base import METRIC

Item = TypeVar("Item")
Carry = TypeVar("Carry")
Terms = dict[str, Tensor]

MOST_DIMENSIONS = 8
"""Of a gathered tensor; its shape travels in a vector of a fixed length."""


def gather(tensor: Tensor) -> Tensor:  # [b, ...] -> [B, ...]
    """Put the rows of all processes one after the other, by rank, without gradient."""
    return _all_rows(tensor.detach())


def gather_with_grad(tensor: Tensor) -> Tensor:  # [b, ...] -> [B, ...]
    """Put the rows of all processes one after the other, by rank, with gradient."""
    # The backward pass sums the gradient over processes, so every process must run it, and in the same order.
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


def cached_backward(
    embed: Callable[[Item], tuple[Sequence[Tensor], Carry]],
    contrast: Callable[..., Terms],
    extra: Callable[[int, Item, Sequence[Tensor], Carry], Terms],
    micro_batches: Sequence[Item],
) -> Terms:
    """Add the gradient of one step's loss to the parameters: the same as for all micro-batches in one pass."""
    # Collectives belong in `contrast`, which every process calls once, and in `extra`.
    first = embed(micro_batches[0])
    cached, states = [[tensor.detach() for tensor in first[0]]], []
    with torch.no_grad():
        for item in micro_batches[1:]:
            states.append(_random_state())
            cached.append([tensor.detach() for tensor in embed(item)[0]])
    # An older torch would use weights again, under autocast, that it cast while there was no gradient.
    torch.clear_autocast_cache()

    joined = [torch.cat(rows) for rows in zip(*cached, strict=True)]
    leaves = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in joined]  # ids and masks have no gradient
    starts = [0, *accumulate(len(rows[0]) for rows in cached)]
    del cached
    terms = contrast(*leaves)
    found = {name: term.detach() for name, term in terms.items()}
    _backward(terms)
    del terms

    tensors: Sequence[Tensor]
    for number, item in enumerate(micro_batches):
        if number == 0:
            tensors, carry = first
            del first
        else:
            tensors, carry = _replayed(embed, item, states[number - 1])
        terms = extra(starts[number], item, tensors, carry)
        for name, term in terms.items():
            value = term.detach() / (len(micro_batches) if name.startswith(METRIC) else 1)
            found[name] = found[name] + value if name in found else value
        gradients = [None if leaf.grad is None else leaf.grad[starts[number] : starts[number + 1]] for leaf in leaves]
        _backward(terms, tensors, gradients)
        del tensors, carry, terms
    return found


def _backward(terms: Terms, tensors: Sequence[Tensor] = (), gradients: Sequence[Tensor | None] = ()) -> None:
    """Run one backward pass from the loss terms and from tensors whose gradient is known."""
    given = zip(tensors, gradients, strict=True)
    roots: list[Any] = [(root, seed) for root, seed in given if root.requires_grad and seed is not None]
    roots += [(term, None) for name, term in terms.items() if term.requires_grad and not name.startswith(METRIC)]
    if roots:
        torch.autograd.backward([root for root, _ in roots], [seed for _, seed in roots])


def _replayed(embed: Callable[[Item], tuple[Sequence[Tensor], Carry]], item: Item, state: Any) -> Any:
    """Embed with the random numbers of the first time, and go on with those that come next."""
    going_on = _random_state()
    _set_random_state(state)
    try:
        return embed(item)
    finally:
        _set_random_state(going_on)


def _random_state() -> tuple[Tensor, Tensor | None]:
    """Where torch's generators stand: the CPU's, and that of the CUDA device in use."""
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_cuda else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
