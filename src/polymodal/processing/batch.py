"""Samples -> one batch, padded or packed. Nothing is computed here: plans and masks are carried, not rebuilt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from polymodal.processing.collate import Batch, Sample

IGNORE = -100
"""The label of a position that is not trained, as in torch's cross entropy."""


def collate(samples: Sequence[Sample], pad_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """Pad samples to one length.

    Args:
        samples: At least one.
        pad_id: The id put on padding; any valid id, since padding is masked.
        side: "right" for training, "left" for generation, so that every row ends at its last prompt token.

    Returns:
        The batch; pictures in order of sample, then of place.
    """
    length = max(sample.input_ids.numel() for sample in samples)
    shape = (len(samples), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    starts = []
    for row, sample in enumerate(samples):
        size = sample.input_ids.numel()
        place = slice(0, size) if side == "right" else slice(length - size, length)
        starts.append(row * length + place.start)
        input_ids[row, place] = sample.input_ids
        attention_mask[row, place] = True
        labels[row, place] = torch.where(sample.loss_mask, sample.input_ids, IGNORE)
    pixels = [tiles for sample in samples for tiles in (sample.pixels or ())]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        plans=tuple(plan for sample in samples for plan in sample.plans),
        sample_of_image=tuple(row for row, sample in enumerate(samples) for _ in sample.plans),
        pixel_values=torch.cat(pixels) if pixels else None,
        ids=tuple(sample.id for sample in samples),
        target_places=target_places(labels),
        media_places=media_places(samples, starts),
        left_padded=side == "left" and not bool(attention_mask.all()),
        context_ids=context_ids(samples),
    )


def collate_packed(samples: Sequence[Sample]) -> Batch:
    """Put samples end to end in one row, without padding.

    The model keeps them apart: attention stays within a segment, positions start anew in each, and a segment's last
    token predicts nothing, since the next one's first token carries no label.

    Args:
        samples: At least one.

    Returns:
        A batch of one row [1, T] with the samples' lengths as `segments`; pictures in order of sample, then of place.
    """
    masks = [sample.loss_mask.clone() for sample in samples]
    for mask in masks:
        mask[:1] = False
    input_ids = torch.cat([sample.input_ids for sample in samples])[None]
    pixels = [tiles for sample in samples for tiles in (sample.pixels or ())]
    plans = tuple(plan for sample in samples for plan in sample.plans)
    labels = torch.where(torch.cat(masks)[None], input_ids, IGNORE)
    lengths = [sample.input_ids.numel() for sample in samples]
    return Batch(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids, dtype=torch.bool),
        labels=labels,
        plans=plans,
        sample_of_image=(0,) * len(plans),
        pixel_values=torch.cat(pixels) if pixels else None,
        ids=tuple(sample.id for sample in samples),
        segments=tuple(lengths),
        target_places=target_places(labels),
        media_places=media_places(samples, [sum(lengths[:row]) for row in range(len(lengths))]),
        context_ids=context_ids(samples),
    )


def context_ids(samples: Sequence[Sample]) -> torch.Tensor | None:
    """Put what the projector reads beside each picture into one table.

    Args:
        samples: The samples.

    Returns:
        [pictures, t] int64, -1 behind the end of a row; None where the projector reads nothing.
    """
    rows = [row for sample in samples for row in sample.contexts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1) if rows else None


def target_places(labels: torch.Tensor) -> torch.Tensor:
    """Where the flattened sequence predicts a label: position t predicts token t + 1.

    Args:
        labels: [B, T], -100 where untrained.

    Returns:
        [R] int64, in order.
    """
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return (shifted != IGNORE).reshape(-1).nonzero().squeeze(1)


def media_places(samples: Sequence[Sample], starts: Sequence[int]) -> torch.Tensor | None:
    """Where the flattened sequence holds placeholders.

    Args:
        samples: The samples.
        starts: Where each of them begins.

    Returns:
        [M] int64, in order; None where a sample does not say where its media are.
    """
    if any(len(sample.slots) != len(sample.plans) for sample in samples):
        return None
    runs = [
        torch.arange(start + slot.start, start + slot.start + slot.length)
        for sample, start in zip(samples, starts, strict=True)
        for slot in sample.slots
    ]
    return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64)
