"""Contrastive learning: images and texts that belong together are told from all others of a step.

CLIP, SigLIP and BLIP-2 learn so. A step embeds every micro-batch twice and gathers features over processes inside its
loss, so each process's loss is its share of the global one and gradients are summed; see `contrastive.step`.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from polymodal.config import ImageConfig, parse_config
from polymodal.errors import CheckpointError, ConfigError, DataError, first_line
from polymodal.modeling.dual_encoders.base import METRIC, PairBatch, PairModel
from polymodal.modeling.dual_encoders.registry import METADATA_NAME, build_pair_model, load_pair_model, read_metadata
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.training.checkpoint import State, identity
from polymodal.training.contrastive.dataset import PairDataset, PairSteps, Plan, prepare_pairs
from polymodal.training.contrastive.evaluate import evaluate_pairs
from polymodal.training.contrastive.images import Images, crops, open_images
from polymodal.training.contrastive.step import pair_gradients
from polymodal.training.contrastive.teacher import Teacher, tower_output, tower_store
from polymodal.training.distributed import Engine, wants_bf16
from polymodal.training.feature_cache import Broken
from polymodal.training.optimizer import Group, apply_policy
from polymodal.training.process_group import World
from polymodal.training.recipes.contrastive import AugmentConfig, PairRecipe
from polymodal.training.recipes.sections import RuleConfig, SourceConfig
from polymodal.training.reporting.log import LossByKind, merge, read_log
from polymodal.training.steps import Order, step_seed
from polymodal.training.task import StepPlan, Task, read_mix
from polymodal.utils.files import atomic_folder, write_text
from polymodal.utils.modules import frozen
from polymodal.utils.progress import log


def load_start(recipe: PairRecipe) -> tuple[PairModel, list[dict[str, Any]]]:
    """Load or build the model that the recipe starts from; and the stages that it went through."""
    torch.manual_seed(recipe.run.seed)
    if recipe.init.model is not None:
        return build_pair_model(recipe.init.model, recipe.objective), []
    source = recipe.init.from_folder
    assert source is not None
    metadata = read_metadata(Path(source))
    image = recipe.init.image or folder_image(source, metadata)
    return load_pair_model(source, image, recipe.objective), list(metadata.get("history", []))


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


def make_pair_dataset(recipe: PairRecipe, model: PairModel, output_dir: Path, teacher: Teacher | None) -> PairDataset:
    """Read the pairs, and fill the caches with what the steps will see."""
    images = open_images(model.image, recipe.augment, recipe.data.tile_cache)
    dataset = _read(recipe, recipe.data.mix, model, images, output_dir / "skipped.jsonl")
    size, images_held = recipe.batch.global_size, len(set(dataset.prepared.images))
    if images_held < 2:
        raise DataError("all pairs are of one image: there is nothing to tell it from; give more images")
    if size > images_held:
        log(f"{recipe.name}: a step has {size} pairs of only {images_held} images; pairs of one are no negatives")
    steps = make_steps(recipe, dataset)
    total = min(steps.total(recipe.run.epochs), recipe.run.max_steps or sys.maxsize)
    dataset = replace(dataset, seen=steps.members(total, len(dataset.prepared.ids)).tolist())
    dataset = replace(dataset, store=tower_store(recipe, model, dataset))
    if teacher is not None and not crops(recipe.augment):
        dataset = teacher.keep(recipe, dataset, output_dir)
    return dataset


def make_pair_eval_dataset(recipe: PairRecipe, model: PairModel, output_dir: Path) -> PairDataset | None:
    """Read the held-out pairs; their images are never cut or mirrored."""
    if not recipe.data.eval:
        return None
    images = open_images(model.image, AugmentConfig(), recipe.data.tile_cache)
    dataset = _read(recipe, recipe.data.eval, model, images, output_dir / "skipped_eval.jsonl")
    return replace(dataset, store=tower_store(recipe, model, dataset))


def _read(
    recipe: PairRecipe, mix: Sequence[SourceConfig], model: PairModel, images: Images, skipped_file: Path
) -> PairDataset:
    readings = read_mix(recipe.data.model_copy(update={"mix": mix}), recipe.run.seed)
    pairs = prepare_pairs(readings, [source.weight for source in mix], model, images, recipe, skipped_file)
    broken = Broken(skipped_file if recipe.data.on_error == "skip" else None)
    pad_id, seen = model.tokenizer.pad_token_id, range(len(pairs.ids))
    return PairDataset(pairs, images, recipe.run.seed, pad_id, model.text_length, broken=broken, seen=seen)


def make_steps(recipe: PairRecipe, dataset: PairDataset) -> PairSteps:
    """Cut the run into steps."""
    return PairSteps(Order(dataset.prepared.mixture, recipe.run.seed), recipe.batch.global_size)


class ContrastiveTask(Task):
    """See `Task`."""

    document: ClassVar[str] = METADATA_NAME
    log_keys: ClassVar[tuple[str, str]] = ("terms", "metrics")
    sums_gradients: ClassVar[bool] = True

    def __init__(self, recipe: PairRecipe, world: World, inputs: Any = None) -> None:
        self.recipe: PairRecipe = recipe
        self.world = world
        self.model: Any  # a `PairModel`, which is an `nn.Module`
        self.history: list[dict[str, Any]]
        self.model, self.history = inputs or load_start(recipe)
        self.teacher: Teacher | None = None
        self.dataset: PairDataset
        self.steps: PairSteps
        self.held_out: PairDataset | None = None

    def choose_parameters(self) -> list[Group]:
        """Apply the recipe's rules, and add the layer that learns from a teacher."""
        recipe, rules = self.recipe, self.recipe.train
        if recipe.batch.global_size % self.world.size:
            raise ConfigError(
                f"batch.global_size {recipe.batch.global_size} cannot be shared evenly by {self.world.size} processes"
            )
        if recipe.objective.distill is not None:
            self.teacher = Teacher.load(recipe.objective.distill, self.model, self.world.device)
            rules = (RuleConfig(match="distiller.*", train=True), *rules)
        groups = apply_policy(self.model, rules, None, recipe.optim)
        if self.teacher is not None and frozen(self.model.tower):
            raise ConfigError(
                "objective.distill: the vision encoder is not trained; leave it out, or add a `train` rule"
            )
        return groups

    def load_data(self) -> None:
        """Read the pairs and the held-out pairs, and fill the caches."""
        recipe, folder = self.recipe, Path(self.recipe.output_dir)
        self.dataset = make_pair_dataset(recipe, self.model, folder, self.teacher)
        self.held_out = make_pair_eval_dataset(recipe, self.model, folder)
        self.fingerprint = self.dataset.prepared.fingerprint
        self.steps = make_steps(recipe, self.dataset)

    def prepare(self, fresh: bool) -> None:
        """Measure towers, and save memory."""
        recipe, model = self.recipe, self.model
        if self.held_out is None and recipe.run.eval_every:
            raise ConfigError("run.eval_every: name held-out files in data.eval, or set it to 0")
        if recipe.init.model is not None and hasattr(model, "measure"):
            model.measure(tower_output(model, self.dataset, self.world.device))
        if self.teacher is not None:
            self.teacher.measure(model, self.dataset, self.world.device)
        if recipe.run.checkpointing == "on":
            if not hasattr(model, "checkpoint_layers"):
                raise ConfigError(
                    "run.checkpointing: this model has no layers for it; use batch.micro_size to save memory"
                )
            model.checkpoint_layers()
        if wants_bf16(recipe.run.precision) and self.world.device.type == "cpu" and hasattr(model, "attend_plainly"):
            # On sequences as short as patches and captions fused attention in bf16 takes four times as long
            # (torch 2.13).
            model.attend_plainly()

    def contrast_plan(self, step: int) -> Plan:
        """What a step shows, over all processes."""
        return self.dataset.plan(self.steps.indices(step), *self.steps.places(step))

    def plan(self, step: int) -> StepPlan:
        """Cut this process's run of the step's pairs into micro-batches."""
        whole, starts = self.contrast_plan(step), self.dataset.prepared.starts
        count = len(whole.indices)
        own = count // self.world.size
        mine = whole.cut(slice(own * self.world.rank, own * (self.world.rank + 1)))
        return StepPlan(
            step,
            mine.split(self.recipe.batch.micro_size or own),
            samples=count,
            targets=count,
            tokens=int((starts[whole.texts + 1] - starts[whole.texts]).sum()),
        )

    def load(self, micro: Plan) -> PairBatch:
        """Make a micro-batch: tokens, and pixels or kept features."""
        return self.dataset.batch(micro)

    def backward(self, engine: Engine, plan: StepPlan, batches: Iterator[PairBatch], losses: LossByKind) -> float:
        """Take one contrast, whatever the micro-batches and processes; its terms are logged by name."""
        live = self.teacher if self.dataset.teacher is None else None
        micro = [batch.to(self.world.device) for batch in batches]
        if live is not None:
            micro = [live.see(batch) for batch in micro]
        seed = step_seed(self.recipe.run.seed, plan.step, 0)
        with_grad = self.recipe.objective.gather_with_grad
        terms = pair_gradients(engine.inner, micro, engine.autocast, seed, self.world.rank, with_grad)
        values = dict(zip(terms, torch.stack([t.double() for t in terms.values()]).tolist(), strict=True))
        own = sum(len(batch) for batch in micro)
        parts = {name: value * plan.targets for name, value in values.items() if not name.startswith(METRIC)}
        metrics = {name.removeprefix(METRIC): v * own for name, v in values.items() if name.startswith(METRIC)}
        if not all(map(math.isfinite, parts.values())):
            self._watch(engine, micro, losses)
        losses.kinds = merge([losses.kinds, {name: [value, own] for name, value in parts.items()}])
        losses.sources = merge([losses.sources, {name: [value, own] for name, value in metrics.items()}])
        return sum(parts.values())

    @torch.no_grad()
    def _watch(self, engine: Engine, batches: Sequence[PairBatch], losses: LossByKind) -> None:
        """Find the pairs whose own features are not finite; a contrast spreads them over the losses of all."""
        for batch in batches:
            with engine.autocast():
                found = engine.inner.embed(batch)
            sums = found.image.flatten(1).sum(dim=1) + found.text.flatten(1).sum(dim=1)
            losses.watch(sums, [f"record {name}" for name in batch.ids])

    def after_step(self) -> None:
        """Keep the temperature in its range."""
        self.model.after_step()

    def evaluate(self, engine: Engine, step: int) -> dict[str, Any] | None:
        """The loss over held-out pairs, and retrieval both ways."""
        return None if self.held_out is None else evaluate_pairs(engine, self.held_out, self.recipe, step)

    def export(self, final: Path, groups: Sequence[Group], state: State) -> None:
        """Write a folder that other tools load, with a file of ours beside it."""
        model: Any = self.model
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise CheckpointError(f"{final}: {name} holds NaN or infinity; nothing was saved")
        lines = read_log(Path(self.recipe.output_dir) / "eval.jsonl")
        scores = lines[-1] if lines else {}
        kept = ("loss", "terms", "metrics", "recall", "chance")
        stage = {
            "stage": self.recipe.name,
            "objective": self.recipe.objective.type,
            "trained": sorted({name.split(".")[0] for group in groups for name, _ in group.parameters}),
            "steps": state.step,
            "samples": state.samples,
            "loss": self.last_loss(),
            "recipe": identity(self.recipe),
        }
        document = {
            "format": 1,
            "objective": self.recipe.objective.type,
            "image": model.image.model_dump(mode="json"),
            "facts": model.facts(),
            "held_out": {key: scores[key] for key in kept if key in scores},
            "history": [*self.history, stage],
        }
        with atomic_folder(final, replace=True) as work:
            model.eval()
            model.save(work)
            write_text(work / METADATA_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
