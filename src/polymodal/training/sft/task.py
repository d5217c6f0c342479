"""Supervised tuning: a language model learns the assistant's answers to text and images, token by token."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from polymodal.backends.local import processor_of
from polymodal.checkpoints.model_folder import save_model
from polymodal.config import ImageConfig, ModelConfig, Strict, new_image_rules, new_output, new_senses, parse_config
from polymodal.data.readers.conversations import Record
from polymodal.errors import CheckpointError, ConfigError
from polymodal.interop.open import open_model
from polymodal.media_plan import AudioPlan, ImagePlan, MediaPlan, VideoPlan
from polymodal.modeling.build import add_senses, build_model, fit_native
from polymodal.modeling.ctranslate2 import missing_whisper
from polymodal.modeling.dual_encoders.registry import read_metadata
from polymodal.modeling.lora import fuse_adapters
from polymodal.modeling.token_loss import knows_head
from polymodal.modeling.vlm import MultimodalLM
from polymodal.modeling.vocabulary import add_output
from polymodal.training.activation_checkpointing import save_memory
from polymodal.training.checkpoint import State, identity
from polymodal.training.distributed import Engine, wants_bf16
from polymodal.training.feature_cache import OFF, Broken, open_audio_store, open_store
from polymodal.training.optimizer import Group, apply_policy, cast_frozen_linears, cast_norms, is_adapter
from polymodal.training.process_group import World
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import LossByKind
from polymodal.training.sft.audio_warm_start import audio_warm_start
from polymodal.training.sft.class_prototypes import MEASURED, add_samples
from polymodal.training.sft.conditions import without_conditions
from polymodal.training.sft.dataset import NamedBatch, Prepared, SFTDataset, prepare
from polymodal.training.sft.evaluate import Evaluation, make_evaluation
from polymodal.training.sft.packing import plan_micro
from polymodal.training.sft.scene_warm_start import scene_warm_start
from polymodal.training.sft.video_warm_start import video_warm_start
from polymodal.training.sft.warm_start import SAMPLE_ROWS, warm_start
from polymodal.training.steps import Order, Steps
from polymodal.training.task import StepPlan, Task, read_mix
from polymodal.utils.progress import log, progress

MEDIA_MODULES = (
    "vision_encoder.",
    "projector.",
    "image_newline",
    "temporal_encoder.",
    "audio_encoder.",
    "audio_projector.",
)


@dataclass
class StageInputs:
    """A model in memory, and optionally the records to train it on."""

    model: MultimodalLM  # The model
    tokenizer: PreTrainedTokenizerBase  # Its tokenizer
    config: ModelConfig  # Its configuration
    history: list[dict[str, Any]] = field(default_factory=list)  # The stages it went through
    # For each data source its records and its repeat; None reads the recipe's files
    mix: list[tuple[list[Record], float]] | None = None


def load_inputs(recipe: Recipe) -> StageInputs:
    """Load or build the model that the recipe starts from."""
    if recipe.init.model is not None:
        torch.manual_seed(recipe.run.seed)
        model, tokenizer = build_model(recipe.init.model)
        if (source := recipe.init.model.projector.pretrained) is not None:
            metadata = read_metadata(Path(source))
            image = parse_config(ImageConfig, metadata["image"], source) if "image" in metadata else None
            say_changed_rules(recipe, source, "image", image)
        return StageInputs(model, tokenizer, recipe.init.model)
    assert recipe.init.from_folder is not None
    loaded = open_model(recipe.init.from_folder)
    for kind in ("image", "video", "audio"):
        say_changed_rules(recipe, recipe.init.from_folder, kind, getattr(loaded.config, kind))
    config = new_image_rules(loaded.config, recipe.init.image)
    config = new_senses(config, recipe.init.video, recipe.init.audio)
    config = new_output(config, recipe.init.output)
    if recipe.init.template is not None:
        config = config.model_copy(update={"template": recipe.init.template})
    torch.manual_seed(recipe.run.seed)
    fit_native(loaded.model, config)
    add_senses(loaded.model, config)
    add_output(loaded.model, loaded.tokenizer, config)
    if config.image is not None and config.image.mm_patch_merge_type == "spatial_unpad":
        loaded.model.add_image_newline()
    return StageInputs(loaded.model, loaded.tokenizer, config, list(loaded.history))


def say_changed_rules(recipe: Recipe, source: str, kind: str, had: Strict | None) -> None:
    """Say which rules of a medium are not those of the stage before; another layout of the same pixels is a choice."""
    rules = getattr(recipe.init if recipe.init.model is None else recipe.init.model, kind)
    if had is not None and rules is not None:
        before, now = had.model_dump(), rules.model_dump()
        changed = [f"{key} was {before[key]}, is {now[key]}" for key in now if before[key] != now[key]]
        if changed:
            log(f"{recipe.name}: other {kind} rules than {source} was trained with: {'; '.join(changed)}")


class SFTTask(Task):
    """See `Task`."""

    document: ClassVar[str] = "polymodal.json"
    log_keys: ClassVar[tuple[str, str]] = ("loss_by_kind", "loss_by_source")

    def __init__(self, recipe: Recipe, world: World, inputs: StageInputs | None = None) -> None:
        self.recipe: Recipe = recipe
        self.world = world
        self.inputs = inputs or load_inputs(recipe)
        self.model: MultimodalLM = self.inputs.model
        if (audio := self.inputs.config.audio) is not None and self.model.audio_encoder is None:
            missing = missing_whisper(audio.audio_tower)
            raise CheckpointError(f"{recipe.name}: trained now, the model would lose its ears: {missing}")
        self.trains_media = False
        self.dataset: SFTDataset
        self.evaluation: Evaluation | None = None

    def choose_parameters(self) -> list[Group]:
        """Apply the recipe's rules, and inject adapters."""
        recipe = self.recipe
        groups = apply_policy(self.model, recipe.train, recipe.lora, recipe.optim, self.inputs.tokenizer)
        self.trains_media = any(name.startswith(MEDIA_MODULES) for group in groups for name, _ in group.parameters)
        return groups

    def load_data(self) -> None:
        """Tokenise the data and the held-out data, and fill the feature cache."""
        # Both look at the language model's output once; sharded, they would have to do so in step.
        knows_head(self.model.llm)
        if self.recipe.batch.packing == "pack":
            self.model.prepare_packing()
        elif next(self.model.llm.parameters()).device.type == "cpu" and not self.model.encoder_decoder:
            with suppress(ConfigError):  # the quicker attention serves rows with padding too
                self.model.prepare_packing()
        folder = Path(self.recipe.output_dir)
        self.dataset = self.make_dataset(folder)
        self.evaluation = make_evaluation(self.recipe, self.model, self.dataset, folder)

    def make_dataset(self, folder: Path) -> SFTDataset:
        """Tokenise the data and fill the feature cache; lists and indices go to a folder."""
        recipe, run, inputs = self.recipe, self.recipe.run, self.inputs
        store = sounds = None
        self._check_warm_starts()
        if run.feature_cache != OFF:
            store = open_store(self.model, inputs.config, run.feature_cache, run.feature_dtype)
            sounds = open_audio_store(self.model, inputs.config, run.feature_cache, run.feature_dtype)
        processor = processor_of(self.model, inputs.tokenizer, inputs.config).with_template(recipe.data.template)
        mix = inputs.mix if inputs.mix is not None else read_mix(recipe.data, run.seed)
        prepared = prepare(mix, processor, recipe.data, progress, run.workers, folder / "skipped.jsonl")
        broken = Broken(folder / "skipped.jsonl" if recipe.data.on_error == "skip" else None)
        dataset = SFTDataset(prepared, processor, store, recipe.batch.packing == "pack", broken, sounds=sounds)
        seen = self._seen(prepared) if run.feature_cache != OFF else None
        return dataset.fill_store(self.model, run.workers, "records", seen)

    def _check_warm_starts(self) -> None:
        """Refuse what reads whole tiles from the feature cache, where images have shapes of their own."""
        image, recipe = self.inputs.config.image, self.recipe
        if image is not None and image.image_aspect_ratio == "native":
            for name in ("warm_start", "scene_warm_start", "video_warm_start", "prototypes"):
                if getattr(recipe, name) is not None:
                    raise ConfigError(f"{name} compares tiles of one size, and image_aspect_ratio is 'native'; drop it")

    def _seen(self, prepared: Prepared) -> np.ndarray | None:
        """The records of which features are needed; all where None."""
        recipe, count = self.recipe, len(prepared.lengths)
        # These look at media from all over the data; of a run that is cut short at many, of every other at all.
        warmed = (recipe.warm_start, recipe.scene_warm_start, recipe.audio_warm_start, recipe.video_warm_start)
        looks = [(SAMPLE_ROWS, part) for part in warmed] + [(MEASURED, recipe.prototypes)]
        most = max((most for most, part in looks if part is not None), default=0)
        if most and (recipe.run.max_steps is None or recipe.batch.global_tokens is not None):
            return None
        if recipe.prototypes is not None:  # they will stand after the records
            made = (range(count, count + recipe.prototypes.count), 1.0)
            prepared = replace(prepared, sources=(*prepared.sources, made))
        self.steps = self.make_steps(prepared)
        seen = self.steps.members(self.total_steps, sum(len(found) for found, _ in prepared.sources))
        return np.union1d(seen[seen < count], np.linspace(0, count - 1, min(most, count), dtype=np.int64))

    def make_steps(self, prepared: Prepared) -> Steps:
        """Cut the run into steps."""
        batch, run = self.recipe.batch, self.recipe.run
        order = Order(prepared.sources, run.seed)
        samples = max(1, round(run.epochs * order.epoch_size)) if batch.last_step == "short" else None
        return Steps(order, batch.global_size, batch.global_tokens, prepared.lengths, samples)

    def prepare(self, fresh: bool) -> None:
        """Warm the projector up, add prototypes, and save memory."""
        recipe, run = self.recipe, self.recipe.run
        bf16 = wants_bf16(run.precision)
        if recipe.scene_warm_start is not None and fresh:
            scene_warm_start(self.model, self.inputs.tokenizer, self.dataset, recipe.scene_warm_start, run.seed, bf16)
        if recipe.warm_start is not None and fresh:
            warm_start(self.model, self.inputs.tokenizer, self.dataset, recipe.warm_start, run.seed)
        if recipe.audio_warm_start is not None and fresh:
            audio_warm_start(self.model, self.inputs.tokenizer, self.dataset, recipe.audio_warm_start, run.seed)
        if recipe.video_warm_start is not None and fresh:
            video_warm_start(self.model, self.inputs.tokenizer, self.dataset, recipe.video_warm_start, run.seed, bf16)
        if recipe.prototypes is not None:
            self.dataset = add_samples(self.dataset, self.model, recipe.prototypes, run.seed)
        prepared = self.dataset.prepared
        self.fingerprint = prepared.fingerprint
        self.steps = self.make_steps(prepared)
        if bf16 and not any("llm" in stage.get("trained", ()) for stage in self.inputs.history):
            cast_frozen_linears(self.model.llm, torch.bfloat16)
            cast_norms(self.model.llm, torch.bfloat16)
        fuse_adapters(self.model.llm)
        longest, value_bytes = int(prepared.lengths.max()), 2 if bf16 else 4
        for line in save_memory(recipe, self.model, self.world.device, self.total_steps, longest, value_bytes):
            log(f"{recipe.name}: {line}")

    def plan(self, step: int) -> StepPlan:
        """Cut a step into micro-batches: padded ones of like lengths, or packs."""
        prepared, indices = self.dataset.prepared, self.steps.indices(step)
        micro = plan_micro(indices, prepared.lengths, self.recipe.batch, self.world.rank, self.world.size)
        return StepPlan(
            step,
            [without_conditions(each, self.drops, self.recipe.run.seed, step) for each in micro],
            samples=len(indices),
            targets=int(prepared.targets[indices].sum()),
            tokens=int(prepared.lengths[indices].sum()),
        )

    @property
    def drops(self) -> float:
        """How often a text-to-image row goes without its text."""
        return self.recipe.data.condition_dropout if self.model.vocabulary is not None else 0.0

    def load(self, micro: Any) -> NamedBatch:
        """Collate or pack samples."""
        return self.dataset.named_batch(micro)

    def padded_tokens(self, batch: NamedBatch) -> int:
        """Count the tokens of a micro-batch, padding among them."""
        return batch.batch.input_ids.numel()

    def lost_targets(self, batch: NamedBatch) -> int:
        """Count the targets of records that cannot be read any more."""
        return batch.lost

    def backward(
        self, engine: Engine, plan: StepPlan, batches: Iterator[NamedBatch], losses: LossByKind
    ) -> torch.Tensor | float:
        """Add up the micro-batches' gradients; the loss is a sum over tokens."""
        total: torch.Tensor | float = 0.0
        seen: set[type[MediaPlan]] = set()
        for number, named in enumerate(batches, start=1):
            seen |= {type(medium) for medium in named.batch.plans}
            last = number == len(plan.micro)
            # Every process must take part in every collective; and parts that a step does not need must be left with
            # the same gradients, zero, whether one process takes it or several: of none, momentum would not move them.
            touch = self.world.size > 1 or (self.trains_media and last and not self._media_kinds <= seen)
            total = total + self.forward_backward(engine, named, self.world.size / plan.targets, last, touch, losses)
        return total

    @cached_property
    def _media_kinds(self) -> set[type[MediaPlan]]:
        """The kinds of media that the model has parts for."""
        model = self.model
        parts = {ImagePlan: model.projector, VideoPlan: model.temporal_encoder, AudioPlan: model.audio_projector}
        return {kind for kind, part in parts.items() if part is not None}

    def forward_backward(
        self, engine: Engine, named: NamedBatch, scale: float, last: bool, touch_media: bool, losses: LossByKind
    ) -> torch.Tensor:
        """One micro-batch; returns its sum of losses, detached. Gradients are averaged over processes at the last."""
        inputs = named.batch.to(self.world.device).inputs()
        out = engine.forward(last, touch_media=touch_media, **inputs)
        loss: torch.Tensor = out.loss_sum
        # A micro-batch of text alone has no way to a projector; nothing is to be learnt from it.
        if loss.requires_grad:
            (loss * scale).backward()
        losses.add(out.losses, named.kinds, named.sources, named.records)
        return loss.detach()

    def evaluate(self, engine: Engine, step: int) -> dict[str, Any] | None:
        """Held-out loss, and a few answers."""
        return None if self.evaluation is None else self.evaluation(engine, step)

    def export(self, final: Path, groups: Sequence[Group], state: State) -> None:
        """Write a model folder, with the stage added to its history."""
        names = [name for group in groups for name, _ in group.parameters]
        names += ["temporal_encoder"] if self.recipe.video_warm_start is not None else []
        stage = {
            "stage": self.recipe.name,
            "trained": sorted({"lora" if is_adapter(name) else name.split(".")[0] for name in names}),
            "steps": state.step,
            "samples": state.samples,
            "trained_tokens": state.trained_tokens,
            "loss": self.last_loss(),
            "recipe": identity(self.recipe),
        }
        history = [*self.inputs.history, stage]
        ever = {name for entry in history for name in entry.get("trained", ())}
        save_model(
            final,
            self.model.eval(),
            self.inputs.config,
            self.inputs.tokenizer,
            history=history,
            llm_trained="llm" in ever,
            vision_trained="vision_encoder" in ever,
            audio_trained="audio_encoder" in ever,
            replace=True,
        )
