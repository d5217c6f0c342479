"""What every model that learns from pairs of image and text has in common, and what goes between it and its training.

One optimizer step is one contrast: each image against all texts of the step, over all micro-batches and processes.
So a model gives its features (`embed`), contrasts them once they are gathered (`contrast`), and adds what can be
computed for each pair apart (`extra`). `training.contrastive.step` puts these together, exactly, in as little memory as
the recipe asks for (Gao et al. 2021, arXiv:2101.06983).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.config import VISION_ORIGINS, ImageConfig, TowerConfig
from polymodal.modeling.dual_encoders.losses import pair_ids
from polymodal.modeling.encoders.pixel_norm import PixelNorm
from polymodal.modeling.encoders.vision import BUNDLED, VisionEncoder
from polymodal.utils.files import whole_path
from polymodal.utils.modules import frozen

METRIC = "metric/"
"""How the name of a term begins that is logged (its mean over the micro-batches) and is no part of the loss."""


@dataclass(frozen=True)
class PairBatch:
    """B pairs of image and text."""

    input_ids: Tensor  # [B, T] int64, padded on the right
    attention_mask: Tensor  # [B, T] bool; False for padding
    image_ids: Tensor  # [B] int64; pairs of one image share it, and are never each other's negatives (as for a text)
    # [B, 3, H, W], float normalised or uint8; None where `features` take their place
    pixel_values: Tensor | None = None
    features: Tensor | None = None  # [B, P, E] kept output of a frozen tower
    teacher: Tensor | None = None  # [B, P', E'] kept features of another tower, to distil from
    ids: tuple[str, ...] = ()  # The samples' ids, for messages

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> PairBatch:
        """Move every tensor."""
        moved: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                moved[entry.name] = value.to(device)
        return replace(self, **moved)


@dataclass(frozen=True)
class Embedded:
    """What is contrasted, with gradient."""

    image: Tensor  # [B, D], or [B, Q, D] for a Q-Former's queries; normalised
    text: Tensor  # [B, D], normalised
    # What `extra` goes on with; stays with its micro-batch and is never gathered
    carry: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Everyone:
    """All pairs of a step, over its micro-batches and processes, without gradient, in global order."""

    image: Tensor  # [G, D] or [G, Q, D]
    text: Tensor  # [G, D]
    image_ids: Tensor  # [G]
    input_ids: Tensor  # [G, T]
    attention_mask: Tensor  # [G, T]
    # [G, P, E] tower output, for models whose `extra` needs the features of negatives (`needs_features`)
    features: Tensor | None = None
    offset: int = 0  # Where the micro-batch at hand begins
    seed: int = 0  # For what a step draws once for all processes, such as hard negatives

    @property
    def pair_ids(self) -> Tensor:  # [G, 2]
        """The number of each pair's image and text, by which equal ones are known."""
        return pair_ids(self.image_ids, self.input_ids, self.attention_mask)


class PairModel(nn.Module, ABC):
    """A model that learns from pairs.

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

    needs_features = False
    tokenizer: Any
    image: ImageConfig
    text_length: int | None
    max_text: int
    features_shape: tuple[int, int]
    distiller: nn.Module | None

    def __init__(self, tokenizer: Any, image: ImageConfig) -> None:
        """Keep what goes with the encoders; the tokenizer pads on the right from here on."""
        super().__init__()
        self.tokenizer, self.image = tokenizer, image
        tokenizer.padding_side = "right"
        self.pixel_norm = PixelNorm(image.image_mean, image.image_std)
        self.text_length = self.distiller = None

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """The part that `encode` runs; while it is frozen, its output may be kept from one epoch to the next."""

    @abstractmethod
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Run the tower alone.

        Args:
            pixel_values: [B, 3, H, W], float normalised or uint8.

        Returns:
            [B, P, E]; `embed` gives the same for a batch with these as `features` as for one with the pixels.
        """

    @abstractmethod
    def embed(self, batch: PairBatch) -> Embedded:
        """Encode images and texts.

        Args:
            batch: The pairs.

        Returns:
            Their features.
        """

    @abstractmethod
    def contrast(
        self, own: Embedded, own_ids: Tensor, all_image: Tensor, all_text: Tensor, all_ids: Tensor, offset: int
    ) -> dict[str, Tensor]:
        """Contrast this process's pairs of a step with everyone's, without a collective: all it needs is given.

        Args:
            own: All of this process's pairs of the step, with gradient.
            own_ids: [b, 2] numbers of their images and texts; or [b] of images alone, where all texts differ.
            all_image: Everyone's image features.
            all_text: Everyone's text features.
            all_ids: Everyone's, in the same form.
            offset: Where this process's pairs begin in them.

        Returns:
            Named terms: this process's share, which summed over processes is the loss of the global batch. Names that
            begin with `METRIC` are logged only, as a mean over the pairs.
        """

    def extra(self, batch: PairBatch, embedded: Embedded, everyone: Everyone) -> dict[str, Tensor]:
        """Further terms of one micro-batch, without a collective; none unless a model has some.

        Args:
            batch: The pairs.
            embedded: Their features, with gradient.
            everyone: All pairs of the step.

        Returns:
            Named terms, each already divided by the global count of pairs. Names that begin with `METRIC` are logged
            only, as a mean over the pairs, and not divided.
        """
        return {}

    @abstractmethod
    def after_step(self) -> None:
        """Keep the temperature in its range; called after every optimizer step."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Plain numbers worth keeping beside the weights, such as the temperature."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the model as a folder that `load_pair_model` reads.

        Args:
            folder: An existing folder.
        """


class TowerPairModel(PairModel):
    """A `PairModel` over a vision tower of ours, which is kept only where it is trained or comes from nowhere else."""

    def __init__(self, encoder: VisionEncoder, vision: TowerConfig, tokenizer: Any, image: ImageConfig) -> None:
        super().__init__(tokenizer, image)
        self.vision_encoder: Any = encoder
        self.vision = vision
        self.features_shape = (encoder.grid.area, encoder.embed_dim)

    @property
    def tower(self) -> nn.Module:
        """The vision tower, without what is trained on top of it."""
        tower: nn.Module = self.vision_encoder
        return tower

    @property
    def tower_rules(self) -> str:
        """What decides the tower's output besides its weights; by it another stage finds what this one kept."""
        return self.vision.model_dump_json(exclude=VISION_ORIGINS)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Run the tower; see `PairModel.encode`."""
        with torch.no_grad() if frozen(self.tower) else nullcontext():
            features: Tensor = self.vision_encoder(self.pixel_norm(pixel_values))
        return features

    def save_tower(self, folder: Path) -> TowerConfig:
        """Write the tower if it is trained or came from a model's own folder, and say where it is."""
        if self.vision.vision_tower != BUNDLED and frozen(self.tower):
            return self.vision.model_copy(update={"vision_tower": whole_path(self.vision.vision_tower)})
        self.vision_encoder.save(folder / "vision")
        return self.vision.model_copy(update={"vision_tower": BUNDLED})
