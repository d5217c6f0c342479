"""What is kept of frozen towers: the model's own, and the teacher that its vision encoder learns from.

Images that are not cut pass through a teacher once in a whole run (mirrored ones take the mirrored features); where
every view is another cut, the teacher sees each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from polymodal.config import VISION_ORIGINS, ImageConfig
from polymodal.errors import ConfigError, DataError, PolymodalError
from polymodal.media_plan import Size
from polymodal.messages import Source
from polymodal.modeling.dual_encoders.base import PairBatch, PairModel
from polymodal.modeling.dual_encoders.config import DistillConfig
from polymodal.modeling.dual_encoders.distillation import Distiller
from polymodal.modeling.encoders.pixel_norm import PixelNorm
from polymodal.modeling.encoders.vision import build_vision_encoder
from polymodal.training.contrastive.dataset import PairDataset
from polymodal.training.contrastive.images import Images, crops, index_file, open_images, scan, source_name
from polymodal.training.feature_cache import MEMORY, OFF, FeatureStore, fill_missing, together, weights_identity
from polymodal.training.recipes.contrastive import AugmentConfig, PairRecipe
from polymodal.utils.modules import frozen

MEASURED = 512
"""Images from which a tower's channels are measured."""


@dataclass(frozen=True)
class Teacher:
    """A frozen tower."""

    encoder: Any  # A `VisionEncoder`, in eval mode
    pixel_norm: PixelNorm
    image: ImageConfig  # Its image rules
    rules: str  # What decides its features of a tile, besides its weights

    @classmethod
    def load(cls, distill: DistillConfig, model: PairModel, device: torch.device) -> Teacher:
        """Load a teacher, and give the model the layer that compares its patches with the teacher's features."""
        image = distill.image or model.image
        encoder: Any = build_vision_encoder(distill.tower, tile=Size(*image.tile_size))
        encoder.to(device).eval().requires_grad_(False)
        grid = getattr(model, "patch_grid", None)
        if grid is None:
            raise ConfigError("objective.distill: this model's vision encoder cannot be distilled; leave it out")
        model.distiller = Distiller(model.features_shape[1], grid, encoder.embed_dim, encoder.grid, distill.loss)
        rules = distill.tower.model_dump_json(exclude=VISION_ORIGINS)
        return cls(encoder, PixelNorm(image.image_mean, image.image_std).to(device), image, rules)

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode tiles: [B, 3, H, W] uint8 to [B, P, E]."""
        found: torch.Tensor = self.encoder(self.pixel_norm(pixel_values))
        return found

    def see(self, batch: PairBatch) -> PairBatch:
        """A batch with the teacher's features of its pixels."""
        assert batch.pixel_values is not None
        return replace(batch, teacher=self.encode(batch.pixel_values))

    def keep(self, recipe: PairRecipe, dataset: PairDataset, output_dir: Path) -> PairDataset:
        """Add kept features of what steps see: in `run.feature_cache`, else beside the kept tiles, else in memory."""
        # A stage on this tower with the same image rules keeps the same, under the same names.
        where = next((w for w in (recipe.run.feature_cache, recipe.data.tile_cache) if w != OFF), MEMORY)
        images, keys = dataset.images, dataset.prepared.images
        if self.image != images.image:
            images = open_images(self.image, AugmentConfig(), OFF)
            folder = Path(recipe.data.index) if recipe.data.index is not None else output_dir / "index"
            own = [dataset.prepared.sources[index] for index in dataset.seen]
            faults = scan(images, own, index_file(folder, self.image), recipe.run.workers, "reading images")
            names = [source_name(source) for source in dataset.prepared.sources]
            for index in dataset.seen:
                if (error := faults.get(names[index])) is not None:
                    named = type(error)(f"record {dataset.prepared.ids[index]}: {error}", error.code)
                    dataset.broken.note(dataset.prepared.ids[index], named)
            dataset.broken.images |= faults
            # An image that was not looked at, or broke, goes by its name, which no store has.
            keys = tuple(images.metadata[name].key if name in images.metadata else name for name in names)
        grid = self.encoder.grid
        row = (grid.area, self.encoder.embed_dim)
        store = _fill(recipe, where, self.encoder, self.rules, row, self.encode, images, dataset, keys)
        return replace(dataset, teacher=store, teacher_grid=grid, teacher_images=keys)

    def measure(self, model: Any, dataset: PairDataset, device: torch.device) -> None:
        """Measure the teacher's channels on some images, the same in every process."""
        chosen = dataset.seen[:MEASURED]
        if dataset.teacher is not None:
            found = _kept(dataset.teacher, [dataset.teacher_images[index] for index in chosen])
        else:
            if tuple(self.image.tile_size) != tuple(model.image.tile_size) and crops(dataset.images.augment):
                raise ConfigError(
                    "objective.distill: where images are cut, the teacher sees the student's tiles; "
                    "make image.tile_size the same, or set augment.scale to [1, 1]"
                )
            tiles = [torch.from_numpy(dataset.tile(index)[None]) for index in chosen]
            found = torch.cat([self.encode(tile.to(device)).cpu() for tile in tiles])
        model.distiller.fit(found.to(device))


def tower_store(recipe: PairRecipe, model: PairModel, dataset: PairDataset) -> FeatureStore | None:
    """Kept output of the model's frozen tower."""
    if recipe.run.feature_cache == OFF:
        return None
    if not frozen(model.tower):
        if recipe.objective.distill is not None:
            return None  # the folder is for the teacher
        raise ConfigError("run.feature_cache: the vision encoder is trained; set it to off")
    # A tower with the rules of a language model's stage shares what that keeps: both read the same output.
    rules = getattr(model, "tower_rules", type(model).__name__)
    return _fill(
        recipe, recipe.run.feature_cache, model.tower, rules, model.features_shape, model.encode, dataset.images,
        dataset, dataset.prepared.images,
    )  # fmt: skip


def _fill(
    recipe: PairRecipe,
    where: str,
    tower: torch.nn.Module,
    rules: str,
    row: tuple[int, int],
    encode: Callable[[torch.Tensor], torch.Tensor],
    images: Images,
    dataset: PairDataset,
    keys: Sequence[str],
) -> FeatureStore:
    """Open a tower's store, and compute what is missing of the images that are seen, one tile each."""
    dtype, device = recipe.run.feature_dtype, next(tower.parameters()).device
    store = FeatureStore.under(where, lambda: weights_identity(tower, rules), row, dtype)

    pairs, broken = dataset.prepared, dataset.broken
    first = {keys[index]: pairs.ids[index] for index in reversed(dataset.seen)}

    def decode(key: str, source: Source) -> torch.Tensor:
        try:
            return torch.from_numpy(images.tile(source)[None])
        except PolymodalError as error:
            if broken.file is not None:
                raise
            raise type(error)(f"record {first[key]}: {error}", error.code) from error

    tiles = ((keys[index], pairs.sources[index], 1) for index in dataset.seen if keys[index] not in broken.images)
    fill_missing(store, tiles, decode, together(encode, device), device, recipe.run.workers, broken)
    return store


def _kept(store: FeatureStore, keys: Sequence[str]) -> torch.Tensor:
    """Features of the images that a store has."""
    found = store.gather([key for key in keys if key in store.where])
    if found is None:
        raise DataError("no image of the data can be read any more; mend them and run the same command")
    return found


def tower_output(model: PairModel, dataset: PairDataset, device: torch.device) -> torch.Tensor:
    """What the tower gives for some images from all over the data, the same in every process."""
    chosen = dataset.seen[:: -(-len(dataset.seen) // MEASURED)]
    if dataset.store is not None:
        return _kept(dataset.store, [dataset.prepared.images[index] for index in chosen]).to(device)
    tiles = [torch.from_numpy(dataset.tile(index)[None]) for index in chosen]
    with torch.no_grad():
        return torch.cat([model.encode(tile.to(device)) for tile in tiles])
