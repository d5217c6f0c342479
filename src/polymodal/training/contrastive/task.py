"""What a pair stage works with: the model it starts from, its pairs, and what is kept of frozen towers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from polymodal.config import ImageConfig, parse_config
from polymodal.errors import ConfigError, DataError, first_line
from polymodal.modeling.dual_encoders.registry import METADATA_NAME, build_pair_model, load_pair_model, read_metadata
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.training.contrastive.captions import prepare_pairs
from polymodal.training.contrastive.dataset import PairFeed
from polymodal.training.contrastive.images import Images, crops, notes_file, open_images, scan, source_name
from polymodal.training.contrastive.teacher import Teacher
from polymodal.training.feature_cache import MEMORY, OFF, FeatureStore, fill_missing, weights_identity
from polymodal.training.recipes.contrastive import AugmentConfig, PairRecipe
from polymodal.training.sft.dataset import read_mix
from polymodal.utils.modules import frozen
from polymodal.utils.progress import log

if TYPE_CHECKING:
    from polymodal.messages import Source
    from polymodal.modeling.dual_encoders.base import PairModel


@dataclass
class PairParts:
    """A model in memory."""

    model: PairModel  # The model
    history: list[dict[str, Any]]  # The stages it went through


def load_pair_parts(recipe: PairRecipe) -> PairParts:
    """Load or build the model that the recipe starts from."""
    torch.manual_seed(recipe.run.seed)
    if recipe.init.model is not None:
        return PairParts(build_pair_model(recipe.init.model, recipe.objective), [])
    source = recipe.init.from_folder
    assert source is not None
    metadata = read_metadata(Path(source))
    image = recipe.init.image or folder_image(source, metadata)
    return PairParts(load_pair_model(source, image, recipe.objective), list(metadata.get("history", [])))


def folder_image(source: str, metadata: dict[str, Any]) -> ImageConfig:
    """The image rules of a model folder."""
    if "image" in metadata:
        return parse_config(ImageConfig, metadata["image"], f"{source}/{METADATA_NAME}")
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{source}: no image processor ({first_line(error)}); give the image rules as init.image"
        ) from error
    image = image_config_from_hf(settings)
    if image.image_aspect_ratio not in ("squash", "crop"):
        raise ConfigError(f"{source}: its images become several tiles; give rules for one tile as init.image")
    return image


def make_pair_feed(recipe: PairRecipe, model: PairModel, output_dir: Path, teacher: Teacher | None) -> PairFeed:
    """Read the pairs, and fill the caches."""
    images = open_images(model.image, recipe.augment, recipe.data.tile_cache)
    feed = _feed(recipe, recipe.data.mix, model, images, output_dir / "skipped.jsonl")
    size, images_held = recipe.batch.global_size, len(set(feed.prepared.images))
    if images_held < 2:
        raise DataError("all pairs are of one image: there is nothing to tell it from; give more images")
    if size > images_held:
        log(f"{recipe.name}: a step has {size} pairs of only {images_held} images; pairs of one are no negatives")
    feed = replace(feed, store=_tower_store(recipe, model, feed))
    if teacher is not None and not crops(recipe.augment):
        feed = _with_teacher(recipe, teacher, feed, output_dir)
    return feed


def make_pair_eval_feed(recipe: PairRecipe, model: PairModel, output_dir: Path) -> PairFeed | None:
    """Read the held-out pairs; their images are never cut or mirrored."""
    if not recipe.data.eval:
        return None
    images = open_images(model.image, AugmentConfig(), recipe.data.tile_cache)
    feed = _feed(recipe, recipe.data.eval, model, images, output_dir / "skipped_eval.jsonl")
    return replace(feed, store=_tower_store(recipe, model, feed))


def _feed(recipe: PairRecipe, mix: Any, model: PairModel, images: Images, skipped_file: Path) -> PairFeed:
    data: Any = recipe.data.model_copy(update={"mix": mix})
    readings = read_mix(data, recipe.run.seed)
    weights = [source.weight for source in mix]
    pairs = prepare_pairs(readings, weights, model, images, recipe, skipped_file)
    return PairFeed(pairs, images, recipe.run.seed, model.tokenizer.pad_token_id, model.text_length)


def _tower_store(recipe: PairRecipe, model: PairModel, feed: PairFeed) -> FeatureStore | None:
    """Kept output of the model's frozen tower."""
    where, dtype = recipe.run.feature_cache, recipe.run.feature_dtype
    if where == OFF:
        return None
    if not frozen(model.tower):
        if recipe.objective.distill is not None:
            return None  # the folder is for the teacher
        raise ConfigError("run.feature_cache: the vision encoder is trained; set it to off")
    # A tower with the rules of a language model's stage shares what that keeps: both read the same output.
    rules = getattr(model, "tower_rules", type(model).__name__)
    store = _open_store(where, weights_identity(model.tower, rules)[:16], model.features_shape, dtype)
    keys = feed.prepared.images
    _fill(store, model.encode, feed.images, keys, feed.prepared.sources, recipe.run.workers, _device(model))
    return store


def _with_teacher(recipe: PairRecipe, teacher: Teacher, feed: PairFeed, output_dir: Path) -> PairFeed:
    """Add kept output of the teacher: in `run.feature_cache`, else beside the kept tiles, else in memory."""
    # A stage on this tower with the same image rules keeps the same, under the same names.
    where = next((w for w in (recipe.run.feature_cache, recipe.data.tile_cache) if w != OFF), MEMORY)
    identity = weights_identity(teacher.encoder, teacher.rules)[:16]
    store = _open_store(where, identity, teacher.features_shape, recipe.run.feature_dtype)
    images, pairs, keys = feed.images, feed.prepared, feed.prepared.images
    if teacher.image != images.image:
        images = open_images(teacher.image, AugmentConfig(), OFF)
        folder = Path(recipe.data.index) if recipe.data.index is not None else output_dir / "index"
        scan(images, pairs.sources, notes_file(folder, teacher.image), recipe.run.workers, "reading images")
        keys = tuple(images.seen[source_name(source)].key for source in pairs.sources)
    device = next(teacher.encoder.parameters()).device
    _fill(store, teacher.encode, images, keys, pairs.sources, recipe.run.workers, device)
    return replace(feed, teacher=store, teacher_grid=teacher.encoder.grid, teacher_images=keys)


def _open_store(where: str, identity: str, row: tuple[int, int], dtype: str) -> FeatureStore:
    folder = None if where == MEMORY else Path(where) / f"{identity}-{dtype}"
    return FeatureStore(folder, row, dtype)


def _fill(
    store: FeatureStore,
    encode: Callable[[torch.Tensor], torch.Tensor],
    images: Images,
    keys: Sequence[str],
    sources: Sequence[Source],
    workers: int,
    device: torch.device,
) -> None:
    """Compute what is missing of the pairs' images, one tile each."""

    def decode(_key: str, source: Source) -> torch.Tensor:
        return torch.from_numpy(images.tile(source)[None])

    tiles = ((key, source, 1) for key, source in zip(keys, sources, strict=True))
    fill_missing(store, tiles, decode, encode, device, workers)


def _device(model: PairModel) -> torch.device:
    return next(model.tower.parameters()).device
