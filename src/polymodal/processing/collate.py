"""One `Sample` a conversation, and samples collated into one `Batch` a step, padded or packed.

Nothing is computed here: plans and masks are carried along, not rebuilt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

import torch

from polymodal.media_plan import AudioPlan, MediaPlan
from polymodal.utils.html import notebook_view

IGNORE = -100
"""The label of a position that is not trained, as in torch's cross entropy."""


@dataclass(frozen=True)
class Slot:
    """One media item's place in the sequence."""

    modality: str  # "image", "video" or "audio"; a page of a document is an image
    start: int  # First placeholder position
    length: int  # Number of placeholders; equals the plan's `num_tokens`
    message: int  # Index of the message the item was in


@dataclass(frozen=True)
class Sample:
    """One conversation, tokenised."""

    input_ids: torch.Tensor  # [T] int64, placeholders expanded
    loss_mask: torch.Tensor  # [T] bool; True where the token is the assistant's (its end token included)
    slots: tuple[Slot, ...] = ()  # Where each media item is, in order
    plans: tuple[MediaPlan, ...] = ()  # One plan a medium, in order
    # An image or video: [n, 3, H, W], float32 normalised or uint8 to be normalised on the device. None: features are
    # cached
    pixels: tuple[torch.Tensor, ...] | None = None
    media_keys: tuple[str, ...] = ()  # A hash a medium, of content and preprocessing; the key of the feature cache
    id: str = ""  # The record's id, for error messages
    contexts: tuple[torch.Tensor, ...] = ()  # A medium: [t] int64, what the projector reads beside it
    sounds: tuple[torch.Tensor, ...] | None = None  # A sound: [W, F, L] float32, its windows. None: as for `pixels`
    tokenizer: Any = field(default=None, repr=False, compare=False)  # For a person's view of it alone

    _repr_html_ = notebook_view

    @property
    def heard(self) -> tuple[bool, ...]:
        """Of each medium, whether it is a sound."""
        return tuple(isinstance(plan, AudioPlan) for plan in self.plans)


@dataclass(frozen=True)
class Batch:
    """A padded batch, or one row of samples packed end to end, ready for `MultimodalLM`."""

    input_ids: torch.Tensor  # [B, T] int64
    attention_mask: torch.Tensor  # [B, T] bool; False on padding
    labels: torch.Tensor  # [B, T] int64; the token itself or `IGNORE`. Not shifted: the model shifts
    plans: tuple[MediaPlan, ...] = ()  # All media of the batch, in order of sample, then of place
    sample_of_image: tuple[int, ...] = ()  # For each medium, the row it belongs to
    # [N, 3, H, W], all tiles of all images; float32 normalised, or uint8. Of several sizes: one tensor a medium
    pixel_values: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    # [N, P, E], the frozen encoder's output, in place of `pixel_values`; as there, one tensor a medium
    features: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    audio_values: torch.Tensor | None = None  # [W, F, L] float32, all windows of all sounds
    audio_features: torch.Tensor | None = None  # [A, E'], the frozen audio encoder's true tokens, in their place
    ids: tuple[str, ...] = ()  # The samples' ids
    segments: tuple[int, ...] | None = None  # Lengths of the samples packed in the single row, in order
    # [R] int64: where the flattened [B * T] predicts a label. Known here, it need not be looked for on the device,
    # which would have to be waited for
    target_places: torch.Tensor | None = None
    media_places: torch.Tensor | None = None  # [M] int64: where it holds placeholders; None: the samples do not say
    left_padded: bool = False  # The mask is needed; causal attention never sees padding on the right
    context_ids: torch.Tensor | None = None  # [images, t] int64, what the projector reads, -1 behind the end of a row

    def inputs(self) -> dict[str, Any]:
        """Everything that `MultimodalLM.forward` takes, by name."""
        taken = {name: value for name, value in vars(self).items() if name not in ("ids", "left_padded")}
        return taken if self.left_padded else {**taken, "attention_mask": None}

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to a device."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device, non_blocking=True)
            elif name in ("pixel_values", "features") and value is not None:
                moved[name] = tuple(part.to(device, non_blocking=True) for part in value)
        return replace(self, **moved)


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
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        sample_of_image=tuple(row for row, sample in enumerate(samples) for _ in sample.plans),
        left_padded=side == "left" and not bool(attention_mask.all()),
        **_carried(samples, starts, labels),
    )


def collate_packed(samples: Sequence[Sample]) -> Batch:
    """Put samples end to end in one row, without padding."""
    # The model keeps them apart: attention stays within a segment, positions start anew in each, and a segment's last
    # token predicts nothing, since the next one's first token carries no label.
    masks = [sample.loss_mask.clone() for sample in samples]
    for mask in masks:
        mask[:1] = False
    input_ids = torch.cat([sample.input_ids for sample in samples])[None]
    labels = torch.where(torch.cat(masks)[None], input_ids, IGNORE)
    lengths = [sample.input_ids.numel() for sample in samples]
    return Batch(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids, dtype=torch.bool),
        labels=labels,
        sample_of_image=(0,) * sum(len(sample.plans) for sample in samples),
        segments=tuple(lengths),
        **_carried(samples, list(accumulate(lengths, initial=0))[:-1], labels),
    )


def _carried(samples: Sequence[Sample], starts: Sequence[int], labels: torch.Tensor) -> dict[str, Any]:
    """What a batch has of its samples, however they are laid out; `starts` are theirs in the flattened batch."""
    pixels = [tiles for sample in samples for tiles in (sample.pixels or ())]
    sounds = [sound for sample in samples for sound in (sample.sounds or ())]
    contexts = [row for sample in samples for row in sample.contexts]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "plans": tuple(plan for sample in samples for plan in sample.plans),
        "pixel_values": as_one(pixels),
        "audio_values": stack_windows(sounds),
        "ids": tuple(sample.id for sample in samples),
        "target_places": target_places(labels),
        "media_places": media_places(samples, starts),
        "context_ids": pad(contexts, batch_first=True, padding_value=-1) if contexts else None,
    }


def as_one(media: Sequence[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
    """The tiles or features of media as one tensor, where all are of one size."""
    if len({part.shape[1:] for part in media}) > 1:
        return tuple(media)
    return torch.cat(list(media)) if media else None


def stack_windows(sounds: Sequence[torch.Tensor]) -> torch.Tensor | None:  # each [W, F, L] -> [all W, F, longest L]
    """Put the windows of sounds together; the encoder leaves out what fills the shorter ones."""
    longest = max((sound.shape[-1] for sound in sounds), default=0)
    filled = [torch.nn.functional.pad(sound, (0, longest - sound.shape[-1])) for sound in sounds]
    return torch.cat(filled) if filled else None


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
