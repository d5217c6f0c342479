"""Cross entropy of the tokens that carry a label, without ever holding all logits where they would not fit.

Logits of R positions over a vocabulary V take R * V * 4 bytes, twice with their gradient; for a vocabulary of 150,000
and 8,000 labels that is ten gigabytes. Past a budget the head is run over a few positions at a time and the gradient is
taken at once, chunk by chunk, so nothing is recomputed and only one chunk of logits exists (the idea of Liger Kernel,
arXiv:2410.10989, and of cut cross entropy, arXiv:2411.09009, without a kernel of its own: the head stays the model's
own module, adapters and all). torch's `F.linear_cross_entropy` does it for a bare weight and with its automatic chunks
is far slower on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polymodal.errors import ConfigError
from polymodal.utils.modules import evaluating

if TYPE_CHECKING:  # whose module takes a second to load
    from transformers import PreTrainedModel

CPU_BUDGET, GPU_BUDGET = 256 * 2**20, 2 * 2**30
"""Bytes of float32 logits up to which they are computed at once."""

Head = Callable[[Tensor], Tensor]

_CHECKED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether `after_head` is all that a language model does after its head; looked at once."""


@dataclass(frozen=True)
class Output:
    """What `forward` returns."""

    # Sum of the token losses, float32 scalar; divide by the global count of targets. None without labels
    loss_sum: Tensor | None
    num_targets: int  # How many tokens carry a label
    # [R, V] at the positions that predict a label, or [B, T, V] without labels; None where they would not fit into
    # memory and the loss was taken in chunks
    logits: Tensor | None
    targets: Tensor | None  # [R] the labels those logits predict, row by row; None without labels
    losses: Tensor | None = None  # [R] float32, each target's loss, detached; None without labels

    @property
    def loss(self) -> Tensor | None:
        """The mean loss of a token, as models of transformers give it; None without labels."""
        return None if self.loss_sum is None else self.loss_sum / max(1, self.num_targets)


def label_losses(
    llm: PreTrainedModel,
    embeds: Tensor,  # [B, T, D]
    inputs: dict[str, Any],
    rows: Tensor,  # [R]
    targets: Tensor,  # [R]
    budget: int | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Run a language model and take the cross entropy at the chosen positions only."""
    vocab_size = llm.config.get_text_config().vocab_size
    if not fits(len(rows), vocab_size, embeds.device, budget):
        found = _in_chunks(llm, embeds, inputs, rows, targets, chunk_rows(vocab_size, embeds.device, budget))
        if found is not None:
            return None, *found
    with head_only_at(llm, rows):
        logits = llm(inputs_embeds=embeds, use_cache=False, **inputs).logits
    losses = token_losses(logits, targets)
    return logits, losses.detach(), losses.sum()


def knows_head(llm: PreTrainedModel) -> bool:
    """Whether `after_head` is all that a model does after its head, so that its loss can be taken in chunks."""
    if llm not in _CHECKED:
        weight = llm.get_input_embeddings().weight
        embeds = torch.randn((1, 2, weight.shape[1]), generator=torch.Generator().manual_seed(0))
        rows = torch.arange(2, device=weight.device)
        # An encoder-decoder's head sees the decoder's positions.
        inputs = {"decoder_input_ids": rows[None]} if llm.config.is_encoder_decoder else {}
        with evaluating(llm), torch.no_grad(), head_only_at(llm, rows, shown=2) as kept:
            logits = llm(inputs_embeds=embeds.to(weight.device, weight.dtype), use_cache=False, **inputs).logits
        with torch.no_grad():
            ours = after_head(llm, output_head(llm)(kept[0]))
        tolerance = 1e-3 if logits.dtype is torch.float32 else 5e-2
        _CHECKED[llm] = bool((ours - logits.view_as(ours)).abs().max() <= tolerance * logits.abs().max() + 1e-6)
    return _CHECKED[llm]


def output_head(llm: PreTrainedModel) -> torch.nn.Module:
    """The layer that makes logits."""
    head = llm.get_output_embeddings()
    if head is None:
        raise ConfigError(
            f"{type(llm).__name__} has no output head; a causal or encoder-decoder language model is needed"
        )
    return head


@contextmanager
def head_only_at(llm: PreTrainedModel, rows: Tensor, shown: int | None = None) -> Iterator[list[Tensor]]:  # rows [R]
    """While active, the head sees only the chosen positions, or only the first few of them; all are kept."""
    # The head is the dearest layer of a small model (a fifth to a quarter of the whole step), and most positions of a
    # multimodal sample carry no label. Selecting before the head, inside the model's own forward, keeps whatever the
    # architecture does after its head (soft caps, logit scales).
    kept: list[Tensor] = []

    def select(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        kept.append(args[0].reshape(-1, args[0].shape[-1]).index_select(0, rows))
        return (kept[-1] if shown is None else kept[-1][:shown],)

    handle = output_head(llm).register_forward_pre_hook(select)
    try:
        yield kept
    finally:
        handle.remove()


def after_head(llm: PreTrainedModel, logits: Tensor) -> Tensor:
    """What architectures do to their logits after the head: Gemma's soft cap, Cohere's and Granite's scales."""
    config = llm.config.get_text_config()
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if scale is not None:
        logits = logits * scale
    if divisor is not None:
        logits = logits / divisor
    return torch.tanh(logits / cap) * cap if cap is not None else logits


def _in_chunks(
    llm: PreTrainedModel, embeds: Tensor, inputs: dict[str, Any], rows: Tensor, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor] | None:
    """Losses and their sum; None where it is not known what this model does after its head."""
    head = output_head(llm)
    parameters = list(head.parameters())
    # A head that is sharded by itself gathers its weights in its own call, under another identity than here.
    if any(hasattr(parameter, "full_tensor") for parameter in parameters):
        return None

    def logits_of(hidden: Tensor) -> Tensor:
        return after_head(llm, head(hidden))

    if not knows_head(llm):
        return None
    # The model's own head sees one position only; what it makes of it is not used.
    with head_only_at(llm, rows, shown=1) as kept:
        llm(inputs_embeds=embeds, use_cache=False, **inputs)
    loss_sum, losses = chunked_losses(kept[0], targets, logits_of, parameters, chunk)
    return losses, loss_sum


def fits(rows: int, vocab_size: int, device: torch.device, budget: int | None = None) -> bool:
    """Whether the logits of so many positions may be held at once."""
    return rows * vocab_size * 4 <= _budget(device, budget)


def chunk_rows(vocab_size: int, device: torch.device, budget: int | None = None) -> int:
    """Positions at a time: half the budget, since the gradient of the logits needs as much again."""
    return max(1, _budget(device, budget) // (2 * 4 * vocab_size))


def _budget(device: torch.device, given: int | None) -> int:
    return given if given is not None else CPU_BUDGET if device.type == "cpu" else GPU_BUDGET


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each position, [R] float32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def chunked_losses(
    hidden: Tensor, targets: Tensor, head: Head, parameters: list[nn.Parameter], chunk: int
) -> tuple[Tensor, Tensor]:
    """Head and cross entropy, a few positions at a time."""
    # hidden [R, D], targets [R], head [r, D]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not torch.is_grad_enabled():
        hidden, trained = hidden.detach(), []
    loss_sum, losses = _Chunked.apply(hidden, targets, head, chunk, *trained)
    return loss_sum, losses


class _Chunked(torch.autograd.Function):
    """Takes gradients in the forward pass, chunk by chunk, and scales them in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, chunk: int, *trained: nn.Parameter
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grads = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained] if wanted else []
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(wanted):
                rows = hidden[part].detach().requires_grad_(grad_hidden is not None)
                found = token_losses(head(rows), targets[part])
                total = found.sum()
            losses[part] = found.detach()
            if not wanted:
                continue
            inputs = ([rows] if grad_hidden is not None else []) + list(trained)
            parts = list(torch.autograd.grad(total, inputs, allow_unused=True))
            if grad_hidden is not None:
                grad_hidden[part] = parts.pop(0)
            for so_far, new in zip(grads, parts, strict=True):
                if new is not None:
                    so_far += new
        ctx.save_for_backward(grad_hidden, *grads)
        ctx.dtypes = [parameter.dtype for parameter in trained]
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _losses: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *grads = ctx.saved_tensors
        scaled = [(grad * scale).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
        return (grad_hidden * scale if grad_hidden is not None else None, None, None, None, *scaled)
