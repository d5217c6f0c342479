"""A model with an image tower and a text tower, loaded from a stock folder, as a function to vectors.

Tokens and pixels are made as the folder's own tokenizer and image processor make them, through our preprocessing
(which the parity tests hold equal to theirs), so a folder of CLIP, SigLIP or any dual encoder from elsewhere is scored
as `transformers` scores it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polymodal.config import ImageConfig, parse_config
from polymodal.errors import CheckpointError, ConfigError, first_line
from polymodal.media.image import open_image
from polymodal.media_plan import Size, plan_image
from polymodal.modeling.dual_encoders.base import PairBatch, PairModel
from polymodal.modeling.dual_encoders.config import ObjectiveConfig
from polymodal.modeling.dual_encoders.registry import NOTES, load_pair_model, read_notes
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.processing.image_transform import tile_bytes
from polymodal.utils.files import shipped
from polymodal.utils.threads import ahead

if TYPE_CHECKING:
    from polymodal.messages import Source

Progress = Callable[[int], object]
"""Told how many more images or texts are done."""

_TOWERS_WITHOUT_TEXT = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "vit", "beit")


@dataclass(frozen=True)
class Embedder:
    """Images and texts to unit vectors of one space."""

    model: PairModel  # The two towers, in eval mode
    image: ImageConfig  # The image rules
    device: torch.device  # Where the model is

    @torch.no_grad()
    def images(
        self, sources: Sequence[Source], *, batch_size: int = 32, workers: int = 2, progress: Progress | None = None
    ) -> Tensor:
        """Embed images."""
        # -> [N, D]
        found: list[Tensor] = []
        tiles: list[Tensor] = []
        for tile in ahead(self._tile, sources, workers, batch_size + workers):
            tiles.append(tile)
            if len(tiles) == batch_size or len(found) * batch_size + len(tiles) == len(sources):
                features = self.model.encode(torch.stack(tiles).to(self.device))
                ids = torch.full((len(tiles), 2), _special_id(self.model.tokenizer), device=self.device)
                batch = PairBatch(ids, torch.ones_like(ids, dtype=torch.bool), ids[:, 0], features=features)
                found.append(self.model.embed(batch).image.float().cpu())
                if progress is not None:
                    progress(len(tiles))
                tiles = []
        return torch.cat(found)

    @torch.no_grad()
    def texts(self, texts: Sequence[str], *, batch_size: int = 64, progress: Progress | None = None) -> Tensor:
        """Embed texts; what is longer than the text tower takes is cut."""
        # -> [N, D]
        found: list[Tensor] = []
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            encoded = self.model.tokenizer(
                part,
                padding="longest" if self.model.text_length is None else "max_length",
                max_length=self.model.text_length or self.model.max_text,
                truncation=True,
                return_attention_mask=True,
                return_tensors="pt",
            ).to(self.device)
            ids = encoded["input_ids"]
            blank = torch.zeros(len(part), *self.model.features_shape, device=self.device)
            batch = PairBatch(ids, encoded["attention_mask"].bool(), torch.arange(len(part)), features=blank)
            found.append(self.model.embed(batch).text.float().cpu())
            if progress is not None:
                progress(len(part))
        return torch.cat(found)

    def _tile(self, source: Source) -> Tensor:
        image = open_image(source, background=self.image.background, max_pixels=self.image.max_pixels)
        plan = plan_image(Size(image.height, image.width), self.image, Size(1, 1))
        return torch.from_numpy(tile_bytes(image, plan, self.image)[0])


def load_embedder(source: str | Path, device: str | torch.device = "cpu") -> Embedder:
    """Load a folder with an image tower and a text tower."""
    source = str(shipped(str(source)) or source)
    kind = _family(source)
    notes = read_notes(Path(source).expanduser())
    objective = ObjectiveConfig(type=notes.get("objective", "siglip" if kind == "siglip" else "clip"))
    where = f"{source}/{NOTES}: image"
    image = parse_config(ImageConfig, notes["image"], where) if "image" in notes else _image_rules(source)
    model: Any = load_pair_model(source, image, objective)
    return Embedder(model.to(device).eval(), image, torch.device(device))


def _family(source: str) -> str:
    """The `model_type` of a folder, with a plain word where it is another sort of model."""
    from transformers import PreTrainedConfig

    folder = Path(source).expanduser()
    if (folder / "polymodal.json").is_file():
        raise ConfigError(f"{source}: a chat model has no text tower to compare images with; use --task questions")
    if folder.is_file():
        raise CheckpointError(f"{source} is a file; name the folder of a CLIP, SigLIP or other dual-encoder model")
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: cannot be opened as a model ({first_line(error)})") from error
    kind = str(settings.get("model_type", ""))
    if kind in _TOWERS_WITHOUT_TEXT:
        raise ConfigError(
            f"{source}: model_type {kind!r} is an image tower without a text tower, so no text can be compared with "
            "it; name the whole dual-encoder folder, or compare towers with `python -m benchmarks.towers`"
        )
    return kind


def _image_rules(source: str) -> ImageConfig:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        rules, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: has no readable preprocessor_config.json ({first_line(error)})") from error
    return image_config_from_hf(rules)


def _special_id(tokenizer: Any) -> int:
    """A token for texts that nobody looks at; CLIP must find its end token."""
    found = next((i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None), 0)
    return int(found)
