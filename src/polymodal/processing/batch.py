"""Samples -> one padded batch. Nothing is computed here: plans and masks are carried, not rebuilt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from polymodal.processing.sample import Batch, Sample

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
    for row, sample in enumerate(samples):
        size = sample.input_ids.numel()
        place = slice(0, size) if side == "right" else slice(length - size, length)
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
    )
