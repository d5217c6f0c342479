"""What the processor hands on: one `Sample` a conversation, one `Batch` a step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

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
