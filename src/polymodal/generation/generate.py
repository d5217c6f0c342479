"""Token by token: read the prompt once, then decode from the key-value cache (`generation.decoding`).

Rows of a batch are padded on the left, so that unequal prompts give the same tokens as one by one. Placeholder ids
and rows of the head that belong to no token are never chosen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from polymodal.generation.decoding import start_decoding
from polymodal.generation.params import GenerationParams
from polymodal.generation.sampling import new_generator, sample_next
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Batch


@dataclass(frozen=True)
class Step:
    """One decoding step.

    Attributes:
        ids: One id a row; None for rows that ended earlier. A row's last id is its stop id where it met one.
        encode_s: Seconds spent on embedding and encoding media (first step only).
    """

    ids: tuple[int | None, ...]
    encode_s: float = 0.0


@torch.inference_mode()
def stream_ids(
    model: MultimodalLM,
    batch: Batch,
    params: GenerationParams,
    stop_ids: Sequence[int],
    vocab_size: int | None = None,
) -> Iterator[Step]:
    """Generate, one step at a time.

    Args:
        model: The model, in eval mode.
        batch: Prompts, padded on the left.
        params: The settings.
        stop_ids: Ids that end a row.
        vocab_size: Ids from here on belong to no token and are never made; None allows all of the head.

    Yields:
        A step for each new position, until every row ended or `max_new_tokens` is reached.
    """
    batch = batch.to(model.device)
    begin = time.perf_counter()
    embeds = model.embed(
        batch.input_ids,
        batch.plans,
        batch.sample_of_image,
        batch.pixel_values,
        batch.features,
        context_ids=batch.context_ids,
    )
    encode_s = time.perf_counter() - begin

    next_logits = start_decoding(model, embeds, batch.attention_mask)
    generator = new_generator(params, model.device)
    stops = torch.tensor(sorted(set(stop_ids)), device=model.device)
    running = torch.ones(len(embeds), dtype=torch.bool, device=model.device)
    made = torch.empty((len(embeds), 0), dtype=torch.int64, device=model.device)
    next_ids: torch.Tensor | None = None
    for step in range(params.max_new_tokens):
        logits = _forbid(next_logits(next_ids), model.image_token_id, vocab_size)
        next_ids = sample_next(logits, params, made, generator)
        yield Step(
            tuple(i if on else None for i, on in zip(next_ids.tolist(), running.tolist(), strict=True)),
            encode_s if step == 0 else 0.0,
        )
        running &= ~torch.isin(next_ids, stops)
        if not running.any():
            return
        made = torch.cat((made, next_ids[:, None]), dim=1)


def generate_ids(
    model: MultimodalLM,
    batch: Batch,
    params: GenerationParams,
    stop_ids: Sequence[int],
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Generate whole answers.

    Args:
        model: As in `stream_ids`.
        batch: As in `stream_ids`.
        params: As in `stream_ids`.
        stop_ids: As in `stream_ids`.
        vocab_size: As in `stream_ids`.

    Returns:
        The ids of each row, its stop id included where it met one.
    """
    rows: list[list[int]] = [[] for _ in range(len(batch.input_ids))]
    for step in stream_ids(model, batch, params, stop_ids, vocab_size):
        for row, token in zip(rows, step.ids, strict=True):
            if token is not None:
                row.append(token)
    return rows


def _forbid(logits: torch.Tensor, image_token_id: int, vocab_size: int | None) -> torch.Tensor:
    """Put ids that must not be made at -inf: placeholders, and head rows past the tokenizer."""
    logits = logits.clone()
    if image_token_id < logits.shape[-1]:
        logits[:, image_token_id] = -torch.inf
    if vocab_size is not None:
        logits[:, vocab_size:] = -torch.inf
    return logits
