"""A model with an image tower and a text tower, loaded from a stock folder, as a function to vectors.

Tokens and pixels are made as the folder's own tokenizer and image processor make them, through our preprocessing
(which the parity tests hold equal to theirs), so a folder of CLIP, SigLIP, BLIP or any dual encoder from elsewhere is
scored as `transformers` scores it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from polymodal.backends.base import sampled_hash
from polymodal.checkpoints.locate import find_model
from polymodal.config import ImageConfig, parse_config
from polymodal.errors import CheckpointError, ConfigError, first_line
from polymodal.media.image import open_image
from polymodal.media_plan import Size, plan_image
from polymodal.messages import Source
from polymodal.modeling.dual_encoders.base import PairBatch, PairModel
from polymodal.modeling.dual_encoders.config import ObjectiveConfig
from polymodal.modeling.dual_encoders.registry import METADATA_NAME, folder_type, load_pair_model, read_metadata
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.processing.image_transform import tile_bytes
from polymodal.utils.devices import check_device
from polymodal.utils.files import home_path, sha256_json, shipped
from polymodal.utils.threads import ahead

Progress = Callable[[int], object]
"""Told how many more images or texts are done."""


@dataclass(frozen=True)
class Embedder:
    """Images and texts to unit vectors of one space."""

    model: PairModel  # The two towers, in eval mode
    image: ImageConfig  # The image rules
    device: torch.device  # Where the model is
    name: str = ""  # What it was loaded as

    def fingerprint(self) -> str:
        """A hash of weights and image rules."""
        return sha256_json([sampled_hash(self.model), self.settings()])

    def settings(self) -> dict[str, str]:
        """A hash of the image rules."""
        return {"preprocessing": sha256_json(self.image.model_dump(mode="json"))}

    @torch.no_grad()
    def features(
        self, sources: Sequence[Source], *, batch_size: int = 32, workers: int = 2, progress: Progress | None = None
    ) -> Iterator[Tensor]:
        """Run the image tower, a batch at a time."""
        # each [B, P, E]
        tiles = ahead(self._tile, sources, workers, batch_size + workers)
        while batch := list(islice(tiles, batch_size)):
            yield self.model.encode(torch.stack(batch).to(self.device))
            if progress is not None:
                progress(len(batch))

    @torch.no_grad()
    def images(self, sources: Sequence[Source], *, batch_size: int = 32, progress: Progress | None = None) -> Tensor:
        """Embed images."""
        # -> [N, D]
        tokenizer = self.model.tokenizer
        # Texts that nobody looks at; CLIP must find its end token in them.
        token = next((i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None), 0)
        found: list[Tensor] = []
        for features in self.features(sources, batch_size=batch_size, progress=progress):
            ids = torch.full((len(features), 2), token, device=self.device)
            batch = PairBatch(ids, torch.ones_like(ids, dtype=torch.bool), ids[:, 0], features=features)
            found.append(self.model.embed(batch).image.float().cpu())
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
    check_device(str(device))
    name = str(source)
    source = str(shipped(str(source)) or source)
    folder = home_path(source)
    if (folder / "polymodal.json").is_file():
        raise ConfigError(f"{source}: a chat model has no text tower; `eval --task questions` scores it")
    if folder.is_file():
        raise CheckpointError(f"{source} is a file; name the folder of a CLIP, SigLIP or other dual-encoder model")
    folder = find_model(source)
    source = str(folder)
    try:
        family = folder_type(source)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; without a text tower nothing can be compared with its images (`python -m benchmarks.towers` "
            "compares image towers)"
        ) from error
    metadata = read_metadata(folder)
    objective = ObjectiveConfig(type=metadata.get("objective", "siglip" if family == "siglip" else "clip"))
    where = f"{source}/{METADATA_NAME}: image"
    image = parse_config(ImageConfig, metadata["image"], where) if "image" in metadata else _image_rules(source)
    model: Any = load_pair_model(source, image, objective)
    return Embedder(model.to(device).eval(), image, torch.device(device), name)


def _image_rules(source: str) -> ImageConfig:
    try:
        rules, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: has no readable preprocessor_config.json ({first_line(error)})") from error
    return image_config_from_hf(rules)
