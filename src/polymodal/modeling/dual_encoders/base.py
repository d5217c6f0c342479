"""What every model that learns from pairs of image and text has in common, and what goes between it and its training.

One optimizer step is one contrast: each image against all texts of the step, over all micro-batches and processes.
So a model gives its features (`embed`), contrasts them once they are gathered (`contrast`), and adds what can be
computed for each pair apart (`extra`). `training.contrastive.step` puts these together, exactly, in as little memory as
the recipe asks for (Gao et al. 2021, arXiv:2101.06983).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from polymodal.config import ImageConfig

METRIC = "metric/"
"""How the name of a term begins that is logged (its mean over the micro-batches) and is no part of the loss."""


@dataclass(frozen=True)
class PairBatch:
    """B pairs of image and text."""

    input_ids: torch.Tensor  # [B, T] int64, padded on the right
    attention_mask: torch.Tensor  # [B, T] bool; False for padding
    image_ids: torch.Tensor  # [B] int64; pairs of one image share it, and are never each other's negatives
    # [B, 3, H, W], float normalised or uint8; None where `features` take their place
    pixel_values: torch.Tensor | None = None
    features: torch.Tensor | None = None  # [B, P, E] kept output of a frozen tower
    teacher: torch.Tensor | None = None  # [B, P', E'] kept features of another tower, to distil from
    ids: tuple[str, ...] = ()  # The samples' ids, for messages

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> PairBatch:
        """Move every tensor."""
        moved: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, torch.Tensor):
                moved[entry.name] = value.to(device)
        return replace(self, **moved)


@dataclass(frozen=True)
class Embedded:
    """What is contrasted, with gradient."""

    image: torch.Tensor  # [B, D], or [B, Q, D] for a Q-Former's queries; normalised
    text: torch.Tensor  # [B, D], normalised
    # What `extra` goes on with; stays with its micro-batch and is never gathered
    carry: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Everyone:
    """All pairs of a step, over its micro-batches and processes, without gradient, in global order."""

    image: torch.Tensor  # [G, D] or [G, Q, D]
    text: torch.Tensor  # [G, D]
    image_ids: torch.Tensor  # [G]
    input_ids: torch.Tensor  # [G, T]
    attention_mask: torch.Tensor  # [G, T]
    # [G, P, E] tower output, for models whose `extra` needs the features of negatives (`needs_features`)
    features: torch.Tensor | None = None
    offset: int = 0  # Where the micro-batch at hand begins
    seed: int = 0  # For what a step draws once for all processes, such as hard negatives


class PairModel(Protocol):
    """A model that learns from pairs; every implementation is an `nn.Module`.

    Attributes:
        needs_features: Whether `extra` needs `Everyone.features`.
        tokenizer: Of the texts; it adds what the text encoder wants at both ends, and has a pad token.
        image: How an image becomes the one tile that the tower takes.
        text_length: What every text is padded to, where the text encoder reads its padding (SigLIP); else None, and a
            step is padded to its longest text.
        max_text: Most tokens of a text.
        features_shape: (P, E) of what `encode` gives.
        distiller: Takes a batch and the tower's patches [B, P, E] to the mean distance to `batch.teacher`; or None.
    """

    needs_features: bool
    tokenizer: Any
    image: ImageConfig
    text_length: int | None
    max_text: int
    features_shape: tuple[int, int]
    distiller: torch.nn.Module | None

    @property
    def tower(self) -> torch.nn.Module:
        """The part that `encode` runs; while it is frozen, its output may be kept from one epoch to the next."""
        ...

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the tower alone.

        Args:
            pixel_values: [B, 3, H, W], float normalised or uint8.

        Returns:
            [B, P, E]; `embed` gives the same for a batch with these as `features` as for one with the pixels.
        """
        ...

    def embed(self, batch: PairBatch) -> Embedded:
        """Encode images and texts.

        Args:
            batch: The pairs.

        Returns:
            Their features.
        """
        ...

    def contrast(
        self,
        own: Embedded,
        own_ids: torch.Tensor,
        all_image: torch.Tensor,
        all_text: torch.Tensor,
        all_ids: torch.Tensor,
        offset: int,
    ) -> dict[str, torch.Tensor]:
        """Contrast this process's pairs of a step with everyone's, without a collective: all it needs is given.

        Args:
            own: All of this process's pairs of the step, with gradient.
            own_ids: Their image ids.
            all_image: Everyone's image features.
            all_text: Everyone's text features.
            all_ids: Everyone's image ids.
            offset: Where this process's pairs begin in them.

        Returns:
            Named terms: this process's share, which summed over processes is the loss of the global batch. Names that
            begin with `METRIC` are logged only, as a mean over the pairs.
        """
        ...

    def extra(self, batch: PairBatch, embedded: Embedded, everyone: Everyone) -> dict[str, torch.Tensor]:
        """Further terms of one micro-batch, without a collective.

        Args:
            batch: The pairs.
            embedded: Their features, with gradient.
            everyone: All pairs of the step.

        Returns:
            Named terms, each already divided by the global count of pairs; none for CLIP and SigLIP. Names that begin
            with `METRIC` are logged only, as a mean over the pairs, and not divided.
        """
        ...

    def after_step(self) -> None:
        """Keep parameters in their range, such as CLIP's temperature; called after every optimizer step."""
        ...

    def facts(self) -> dict[str, Any]:
        """Plain numbers worth keeping beside the weights, such as the temperature."""
        ...

    def save(self, folder: Path) -> None:
        """Write the model as a folder that other tools load.

        Args:
            folder: An existing folder.
        """
        ...


def as_floats(pixel_values: torch.Tensor, image: ImageConfig) -> torch.Tensor:
    """Normalise tiles that came as bytes; a quarter of the memory to keep and to move."""
    # pixel_values [B, 3, H, W] -> [B, 3, H, W]
    if pixel_values.dtype != torch.uint8:
        return pixel_values
    mean = torch.tensor(image.image_mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(image.image_std, dtype=torch.float64)[:, None, None]
    # As `processing.image_transform.normalise` rounds.
    scale, shift = (1 / (255 * std)).float(), (mean / std).float()
    return pixel_values.float() * scale.to(pixel_values.device) - shift.to(pixel_values.device)
