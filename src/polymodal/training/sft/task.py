"""What a stage works with: the model it starts from, its data as tokens, and the features of its frozen encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polymodal.backends.local import processor_of
from polymodal.config import new_image_rules
from polymodal.errors import DataError
from polymodal.messages import Image, Source, user
from polymodal.modeling.build import build_model
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Batch, Sample, collate, collate_packed
from polymodal.processing.processor import Processor
from polymodal.training import feature_cache as features
from polymodal.training import optimizer as policy
from polymodal.training.checkpoint import identity
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import read_log
from polymodal.training.reporting.loss_by_kind import kinds_of_targets
from polymodal.training.sft.dataset import Prepared, prepare, read_mix, with_pixels
from polymodal.training.trainer import State
from polymodal.utils.progress import log, progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from polymodal.config import ModelConfig
    from polymodal.data.readers.conversations import Record
    from polymodal.training.feature_cache import FeatureStore


@dataclass
class Parts:
    """A model in memory, and optionally the records to train it on."""

    model: MultimodalLM  # The model
    tokenizer: PreTrainedTokenizerBase  # Its tokenizer
    config: ModelConfig  # Its configuration
    history: list[dict[str, Any]] = field(default_factory=list)  # The stages it went through
    # For each data source its records and its repeat; None reads the recipe's files
    mix: list[tuple[list[Record], float]] | None = None


def load_parts(recipe: Recipe) -> Parts:
    """Load or build the model that the recipe starts from."""
    if recipe.init.model is not None:
        torch.manual_seed(recipe.run.seed)
        model, tokenizer = build_model(recipe.init.model)
        return Parts(model, tokenizer, recipe.init.model)
    from polymodal.interop.open import open_model

    assert recipe.init.from_folder is not None
    loaded = open_model(recipe.init.from_folder)
    config = new_image_rules(loaded.config, recipe.init.image)
    if recipe.init.template is not None:
        config = config.model_copy(update={"template": recipe.init.template})
    if config.image is not None and config.image.mm_patch_merge_type == "spatial_unpad":
        torch.manual_seed(recipe.run.seed)
        loaded.model.add_image_newline()
    return Parts(loaded.model, loaded.tokenizer, config, list(loaded.history))


@dataclass(frozen=True)
class Feed:
    """The data of a stage, and how a micro-batch is made of it."""

    prepared: Prepared  # Tokens, without pixels
    processor: Processor  # Makes pixels where features are not cached
    store: FeatureStore | None  # Cached features, or None
    packed: bool = False  # Put the samples of a batch into one row, in place of padding them

    def batch(self, indices: np.ndarray) -> Batch:
        """Collate or pack samples, with features from the cache or pixels from the files."""
        samples = [self.prepared.samples[i] for i in indices]
        if self.store is None:
            records = self.prepared.records
            samples = [
                with_pixels(records[i], sample, self.processor) for i, sample in zip(indices, samples, strict=True)
            ]
            return self._collate(samples)
        keys = [key for sample in samples for key in sample.media_keys]
        return replace(self._collate(samples), features=self.store.gather(keys))

    def named_batch(self, indices: np.ndarray) -> tuple[Batch, list[str], list[str]]:
        """A batch, and the kind and the source of each of its targets, in order."""
        records, samples = self.prepared.records, self.prepared.samples
        kinds: list[str] = []
        sources: list[str] = []
        for index in indices:
            of_targets = kinds_of_targets(records[index], samples[index], self.processor.last_answer_only)
            kinds += of_targets
            sources += [records[index].source] * len(of_targets)
        return self.batch(indices), kinds, sources

    def _collate(self, samples: list[Sample]) -> Batch:
        return collate_packed(samples) if self.packed else collate(samples, self.processor.pad_id)


def make_feed(recipe: Recipe, parts: Parts, output_dir: Path) -> Feed:
    """Tokenise the data and fill the feature cache."""
    run, model = recipe.run, parts.model
    store = None
    if run.feature_cache != features.OFF:
        store = features.open_store(model, parts.config, run.feature_cache, run.feature_dtype)
    processor = processor_of(model, parts.tokenizer, parts.config).with_template(recipe.data.template)
    mix = parts.mix if parts.mix is not None else read_mix(recipe.data, run.seed)
    prepared = prepare(mix, processor, recipe.data, progress, run.workers, output_dir / "skipped.jsonl")
    return _filled(Feed(prepared, processor, store, recipe.batch.packing == "pack"), recipe, model, "records")


def make_eval_feed(recipe: Recipe, model: MultimodalLM, feed: Feed, output_dir: Path) -> Feed | None:
    """Prepare the held-out files as the training data were prepared."""
    if not recipe.data.eval:
        return None
    data = recipe.data.model_copy(update={"mix": recipe.data.eval})
    mix = read_mix(data, recipe.run.seed)
    prepared = prepare(mix, feed.processor, data, progress, recipe.run.workers, output_dir / "skipped_eval.jsonl")
    return _filled(replace(feed, prepared=prepared), recipe, model, "held-out records")


def _filled(feed: Feed, recipe: Recipe, model: MultimodalLM, label: str) -> Feed:
    """Say what was left out, and compute the features that are missing."""
    prepared = feed.prepared
    for reason, count in prepared.left_out.items():
        log(f"left out {count} {label} {reason}")
    if feed.store is not None:
        count = _encode_images(feed.store, model, feed.processor, prepared, recipe.run.workers)
        log(f"features: {count} images encoded, {len(feed.store.where)} in the cache")
    return feed


def _encode_images(
    store: FeatureStore, model: MultimodalLM, processor: Processor, prepared: Prepared, workers: int
) -> int:
    """Compute the features of the records' images; says how many were missing."""

    def images() -> Iterator[tuple[str, Source, int]]:
        for record, sample in zip(prepared.records, prepared.samples, strict=True):
            media = [part for message in record.messages for part in message.media]
            for key, plan, part in zip(sample.media_keys, sample.plans, media, strict=True):
                if isinstance(part, Image):
                    yield key, part.source, plan.num_tiles

    def decode(key: str, source: Source) -> torch.Tensor:
        sample = processor([user(Image(source))], add_generation_prompt=True)
        if sample.media_keys != (key,) or sample.pixels is None:
            raise DataError(f"image {source!r} changed on disk while it was being encoded")
        return sample.pixels[0]

    return features.fill_missing(store, images(), decode, model.encode_images, model.device, workers)


# ---- The trained model as a model folder, with the stage added to its history ----


def export(final: Path, recipe: Recipe, parts: Parts, groups: Sequence[policy.Group], state: State) -> None:
    """Write the trained model; the folder does not show how many processes trained it."""
    from polymodal.checkpoints.model_folder import save_model

    names = [name for group in groups for name, _ in group.parameters]
    trained = sorted({"lora" if policy.is_adapter(name) else name.split(".")[0] for name in names})
    lines = [line for line in read_log(Path(recipe.output_dir) / "log.jsonl") if line["loss"] is not None]
    stage = {
        "stage": recipe.name,
        "trained": trained,
        "steps": state.step,
        "samples": state.samples,
        "trained_tokens": state.trained_tokens,
        "loss": lines[-1]["loss"] if lines else None,
        "recipe": identity(recipe),
    }
    history = [*parts.history, stage]
    ever = {name for entry in history for name in entry.get("trained", ())}
    save_model(
        final,
        parts.model.eval(),
        parts.config,
        parts.tokenizer,
        history=history,
        llm_trained="llm" in ever,
        vision_trained="vision_encoder" in ever,
        replace=True,
    )
