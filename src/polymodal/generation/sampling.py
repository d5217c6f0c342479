"""Logits -> next ids."""

from __future__ import annotations

import torch

from polymodal.generation.params import GenerationParams


def sample_next(
    logits: torch.Tensor, params: GenerationParams, made: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Choose the next id of each row.

    Args:
        logits: [B, V] float; ids that must not be made are already at -inf.
        params: The settings.
        made: [B, n] ids made so far, for the repetition penalty.
        generator: The random state; None when greedy.

    Returns:
        [B] int64.
    """
    logits = logits.float()
    if params.repetition_penalty != 1.0 and made.shape[1]:
        seen = logits.gather(1, made)
        seen = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
        logits = logits.scatter(1, made, seen)
    if params.temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits / params.temperature
    if params.top_k:
        floor = logits.topk(min(params.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if params.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(before >= params.top_p, -torch.inf)  # the first token always stays
        logits = torch.full_like(logits, -torch.inf).scatter(1, order, ordered)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


def new_generator(params: GenerationParams, device: torch.device) -> torch.Generator | None:
    """Make the random state of one answer.

    Args:
        params: The settings.
        device: Where the logits are.

    Returns:
        The state, seeded as the settings say; None when greedy.
    """
    if params.temperature == 0.0:
        return None
    generator = torch.Generator(device=device)
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator
