"""What a stage works with: the model it starts from, its data as tokens, and the features of its frozen encoder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polymodal.model import MultimodalLM, build_model
from polymodal.processing.batch import collate
from polymodal.processing.processor import Processor
from polymodal.processing.sample import Batch
from polymodal.training import features
from polymodal.training.log import progress, say
from polymodal.training.recipe import Recipe
from polymodal.training.samples import Prepared, prepare, read_mix, with_pixels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from polymodal.config import ModelConfig
    from polymodal.data.records import Record
    from polymodal.training.features import FeatureStore


@dataclass
class Parts:
    """A model in memory, and optionally the records to train it on.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        config: Its configuration.
        history: The stages it went through.
        mix: For each data source its records and its repeat; None reads the recipe's files.
    """

    model: MultimodalLM
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig
    history: list[dict[str, Any]] = field(default_factory=list)
    mix: list[tuple[list[Record], float]] | None = None


def load_parts(recipe: Recipe) -> Parts:
    """Load or build the model that the recipe starts from.

    Args:
        recipe: The stage.

    Returns:
        The model with its tokenizer, configuration and history.
    """
    if recipe.init.model is not None:
        torch.manual_seed(recipe.run.seed)
        model, tokenizer = build_model(recipe.init.model)
        return Parts(model, tokenizer, recipe.init.model)
    from polymodal.checkpoints.folder import load_model

    assert recipe.init.from_folder is not None
    loaded = load_model(Path(recipe.init.from_folder))
    return Parts(loaded.model, loaded.tokenizer, loaded.config, list(loaded.history))


@dataclass(frozen=True)
class Feed:
    """The data of a stage, and how a micro-batch is made of it.

    Attributes:
        prepared: Tokens, without pixels.
        processor: Makes pixels where features are not cached.
        store: Cached features, or None.
    """

    prepared: Prepared
    processor: Processor
    store: FeatureStore | None

    def batch(self, indices: np.ndarray) -> Batch:
        """Collate samples, with features from the cache or pixels from the files."""
        samples = [self.prepared.samples[i] for i in indices]
        if self.store is None:
            records = self.prepared.records
            samples = [
                with_pixels(records[i], sample, self.processor) for i, sample in zip(indices, samples, strict=True)
            ]
            return collate(samples, self.processor.pad_id)
        keys = [key for sample in samples for key in sample.media_keys]
        return replace(collate(samples, self.processor.pad_id), features=self.store.gather(keys))


def make_feed(recipe: Recipe, parts: Parts, output_dir: Path) -> Feed:
    """Tokenise the data and fill the feature cache.

    Args:
        recipe: The stage.
        parts: The model, already on its device, with what is trained marked.
        output_dir: Where skipped records are listed.

    Returns:
        The feed.

    Raises:
        PolymodalError: Data is missing or damaged, or a cache is asked for with an encoder that is trained.
    """
    run, model = recipe.run, parts.model
    store = None
    if run.feature_cache != features.OFF:
        store = features.open_store(model, parts.config, run.feature_cache, run.feature_dtype)
    config = parts.config
    if recipe.data.template is not None:
        template = config.template.model_copy(update={"chat_template": recipe.data.template})
        config = config.model_copy(update={"template": template})
    processor = Processor(config, parts.tokenizer, model.tokens_per_tile, model.image_token_id)
    mix = parts.mix if parts.mix is not None else read_mix(recipe.data, run.seed)
    prepared = prepare(mix, processor, recipe.data, progress, run.workers, output_dir / "skipped.jsonl")
    for reason, count in prepared.left_out.items():
        say(f"left out {count} records {reason}")
    if store is not None:
        count = features.fill(store, model, processor, prepared.records, prepared.samples, progress, run.workers)
        say(f"features: {count} pictures encoded, {len(store.where)} in the cache")
    return Feed(prepared, processor, store)
