"""What the processor hands on: one `Sample` a conversation, one `Batch` a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from polymodal.media_plan import ImagePlan


@dataclass(frozen=True)
class Slot:
    """One media item's place in the sequence."""

    modality: str  # "image" (video, audio and document come later)
    start: int  # First placeholder position
    length: int  # Number of placeholders; equals the plan's `num_tokens`
    message: int  # Index of the message the item was in


@dataclass(frozen=True)
class Sample:
    """One conversation, tokenised."""

    input_ids: torch.Tensor  # [T] int64, placeholders expanded
    loss_mask: torch.Tensor  # [T] bool; True where the token is the assistant's (its end token included)
    slots: tuple[Slot, ...] = ()  # Where each media item is, in order
    plans: tuple[ImagePlan, ...] = ()  # One plan an image, in order
    # One [n, 3, H, W] tensor an image, float32 normalised or uint8 to be normalised on the device; None where
    # features are cached
    pixels: tuple[torch.Tensor, ...] | None = None
    # One content hash an image: pixels and preprocessing; the key of the feature cache
    media_keys: tuple[str, ...] = ()
    id: str = ""  # The record's id, for error messages
    # One [t] int64 tensor an image: what the projector reads beside it; empty where it reads nothing
    contexts: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Batch:
    """A padded batch, or one row of samples packed end to end, ready for `MultimodalLM`."""

    input_ids: torch.Tensor  # [B, T] int64
    attention_mask: torch.Tensor  # [B, T] bool; False on padding
    # [B, T] int64; the token itself where it is trained, -100 elsewhere. Not shifted: the model shifts
    labels: torch.Tensor
    plans: tuple[ImagePlan, ...] = ()  # All images of the batch, in order of sample, then of place
    sample_of_image: tuple[int, ...] = ()  # For each image, the row it belongs to
    # [N, 3, H, W], all tiles of all images, float32 normalised or uint8; None when `features` are given or there is
    # none
    pixel_values: torch.Tensor | None = None
    features: torch.Tensor | None = None  # [N, P, E], the frozen encoder's output, in place of `pixel_values`
    ids: tuple[str, ...] = field(default=())  # The samples' ids
    # Lengths of the samples packed in the single row, in order; None for a padded batch
    segments: tuple[int, ...] | None = None
    # [R] int64, the positions of the flattened [B * T] that predict a label, in order. Known here, they need not be
    # looked for on the device, which would have to be waited for
    target_places: torch.Tensor | None = None
    # [M] int64, the positions of the flattened [B * T] that hold placeholders, in order; None where the samples do
    # not say
    media_places: torch.Tensor | None = None
    # Padding is on the left, so the mask is needed; on the right causal attention never sees it
    left_padded: bool = False
    # [images, t] int64, what the projector reads beside each image, -1 behind the end of a row; None where it
    # reads nothing
    context_ids: torch.Tensor | None = None

    def inputs(self) -> dict[str, Any]:
        """Everything that `MultimodalLM.forward` takes, by name."""
        taken = {name: value for name, value in vars(self).items() if name not in ("ids", "left_padded")}
        return taken if self.left_padded else {**taken, "attention_mask": None}

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to a device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


# ---- Samples -> one batch, padded or packed. Nothing is computed here: plans and masks are carried, not rebuilt ----


IGNORE = -100
"""The label of a position that is not trained, as in torch's cross entropy."""


def collate(samples: Sequence[Sample], pad_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """Pad samples to one length."""
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
    """Put samples end to end in one row, without padding."""
    # The model keeps them apart: attention stays within a segment, positions start anew in each, and a segment's last
    # token predicts nothing, since the next one's first token carries no label.
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


def context_ids(samples: Sequence[Sample]) -> torch.Tensor | None:  # -> [images, t]
    """Put what the projector reads beside each image into one table."""
    rows = [row for sample in samples for row in sample.contexts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1) if rows else None


def target_places(labels: torch.Tensor) -> torch.Tensor:  # [B, T] -> [R]
    """Where the flattened sequence predicts a label: position t predicts token t + 1."""
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return (shifted != IGNORE).reshape(-1).nonzero().squeeze(1)


def media_places(samples: Sequence[Sample], starts: Sequence[int]) -> torch.Tensor | None:  # -> [M]
    """Where the flattened sequence holds placeholders."""
    if any(len(sample.slots) != len(sample.plans) for sample in samples):
        return None
    runs = [
        torch.arange(start + slot.start, start + slot.start + slot.length)
        for sample, start in zip(samples, starts, strict=True)
        for slot in sample.slots
    ]
    return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64)
