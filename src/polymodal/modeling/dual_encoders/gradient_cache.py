"""One contrast over more pairs than fit: the cached-feature method (GradCache; Gao et al. 2021, arXiv:2101.06983).

A contrastive loss needs the features of all pairs at once, so adding up gradients of micro-batches would train another
objective. But it needs only the features: they are small, unlike what the encoders keep for their backward pass. So
every micro-batch is embedded without keeping anything, the loss gives the gradient of the features, and each
micro-batch is then embedded again and its features' gradient sent back through the encoders. The result is the big
batch's gradient, for one more forward pass; dropout falls on the same places both times.

Differences from the reference: the first micro-batch keeps what its backward pass needs and is not embedded twice, so a
step of a single micro-batch is one plain pass; terms that each micro-batch has for itself (`extra`: matching,
captioning, distillation) join the second pass; plain functions, not a wrapper around models and optimizers.
Running statistics (BatchNorm in training mode) would be updated twice: freeze them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from polymodal.modeling.dual_encoders.base import METRIC

Item = TypeVar("Item")
Carry = TypeVar("Carry")
Terms = dict[str, Tensor]


def cached_backward(
    embed: Callable[[Item], tuple[Sequence[Tensor], Carry]],
    contrast: Callable[..., Terms],
    extra: Callable[[int, Item, Sequence[Tensor], Carry], Terms],
    micro_batches: Sequence[Item],
) -> Terms:
    """Add the gradient of one step's loss to the parameters: the same as for all micro-batches in one pass.

    Collectives belong in `contrast`, which every process calls once, and in `extra`.

    Args:
        embed: A micro-batch -> tensors [b, ...] to contrast, and anything that `extra` goes on with.
        contrast: The tensors, one argument each, with the rows of all micro-batches in order -> named terms. Parameters
            that it uses itself, such as a temperature, get their gradient from it. Called once, before any `extra`.
        extra: How many rows come before the micro-batch, the micro-batch, its tensors and what `embed` gave with them
            -> its own named terms, already divided by the counts of the whole step.
        micro_batches: Of this process, in order; at least one.

    Returns:
        Each term's value, detached: terms of `extra` are summed over micro-batches. Names that begin with `METRIC` are
        no part of the loss; those of `extra` are averaged.
    """
    first = embed(micro_batches[0])
    cached, states = [[tensor.detach() for tensor in first[0]]], []
    with torch.no_grad():
        for item in micro_batches[1:]:
            states.append(_random_state())
            cached.append([tensor.detach() for tensor in embed(item)[0]])
    # An older torch would use weights again, under autocast, that it cast while there was no gradient.
    torch.clear_autocast_cache()

    leaves = [_leaf(torch.cat(rows)) for rows in zip(*cached, strict=True)]
    starts = [0]
    for parts in cached:
        starts.append(starts[-1] + len(parts[0]))
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
    roots: list[Tensor] = []
    seeds: list[Tensor | None] = []
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if tensor.requires_grad and gradient is not None:
            roots.append(tensor)
            seeds.append(gradient)
    for name, term in terms.items():
        if term.requires_grad and not name.startswith(METRIC):
            roots.append(term)
            seeds.append(None)
    if roots:
        torch.autograd.backward(roots, seeds)


def _leaf(tensor: Tensor) -> Tensor:
    """What gathers the gradient of the loss; ids and masks have none."""
    return tensor.requires_grad_(tensor.is_floating_point())


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
