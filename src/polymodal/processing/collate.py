"""What the processor hands on: one `Sample` a conversation, one `Batch` a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from polymodal.media_plan import ImagePlan


@dataclass(frozen=True)
class Slot:
    """One media item's place in the sequence.

    Attributes:
        modality: "image" (video, audio and document come later).
        start: First placeholder position.
        length: Number of placeholders; equals the plan's `num_tokens`.
        message: Index of the message the item was in.
    """

    modality: str
    start: int
    length: int
    message: int


@dataclass(frozen=True)
class Sample:
    """One conversation, tokenised.

    Attributes:
        input_ids: [T] int64, placeholders expanded.
        loss_mask: [T] bool; True where the token is the assistant's (its end token included).
        slots: Where each media item is, in order.
        plans: One plan a picture, in order.
        pixels: One [n, 3, H, W] tensor a picture, float32 normalised or uint8 to be normalised on the device; None
            where features are cached.
        media_keys: One content hash a picture: pixels and preprocessing; the key of the feature cache.
        id: The record's id, for error messages.
        contexts: One [t] int64 tensor a picture: what the projector reads beside it; empty where it reads nothing.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    slots: tuple[Slot, ...] = ()
    plans: tuple[ImagePlan, ...] = ()
    pixels: tuple[torch.Tensor, ...] | None = None
    media_keys: tuple[str, ...] = ()
    id: str = ""
    contexts: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Batch:
    """A padded batch, or one row of samples packed end to end, ready for `MultimodalLM`.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] bool; False on padding.
        labels: [B, T] int64; the token itself where it is trained, -100 elsewhere. Not shifted: the model shifts.
        plans: All pictures of the batch, in order of sample, then of place.
        sample_of_image: For each picture, the row it belongs to.
        pixel_values: [N, 3, H, W], all tiles of all pictures, float32 normalised or uint8; None when `features` are
            given or there is none.
        features: [N, P, E], the frozen encoder's output, in place of `pixel_values`.
        ids: The samples' ids.
        segments: Lengths of the samples packed in the single row, in order; None for a padded batch.
        target_places: [R] int64, the positions of the flattened [B * T] that predict a label, in order. Known here,
            they need not be looked for on the device, which would have to be waited for.
        media_places: [M] int64, the positions of the flattened [B * T] that hold placeholders, in order; None where
            the samples do not say.
        left_padded: Padding is on the left, so the mask is needed; on the right causal attention never sees it.
        context_ids: [pictures, t] int64, what the projector reads beside each picture, -1 behind the end of a row;
            None where it reads nothing.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    plans: tuple[ImagePlan, ...] = ()
    sample_of_image: tuple[int, ...] = ()
    pixel_values: torch.Tensor | None = None
    features: torch.Tensor | None = None
    ids: tuple[str, ...] = field(default=())
    segments: tuple[int, ...] | None = None
    target_places: torch.Tensor | None = None
    media_places: torch.Tensor | None = None
    left_padded: bool = False
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
