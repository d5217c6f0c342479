"""One pair stage from recipe to `final/`: set up, run the loop, export, report.

The same order of things as `train_recipe`, and the same loop, checkpoints and report; what differs is the data, the
engine and the step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from polymodal.errors import ConfigError
from polymodal.modeling.dual_encoders.base import PairModel
from polymodal.modeling.dual_encoders.registry import METADATA_NAME
from polymodal.training import optimizer as policy
from polymodal.training.checkpoint import find_checkpoint
from polymodal.training.contrastive.dataset import PairFeed, PairSteps
from polymodal.training.contrastive.evaluate import PairEvaluation, export_pair_model
from polymodal.training.contrastive.images import crops
from polymodal.training.contrastive.task import PairParts, load_pair_parts, make_pair_eval_feed, make_pair_feed
from polymodal.training.contrastive.teacher import Teacher, add_distiller, load_teacher
from polymodal.training.contrastive.trainer import PairEngine, PairRun
from polymodal.training.process_group import World, clear_loss_of_peers, join_world
from polymodal.training.recipes.contrastive import PairRecipe
from polymodal.training.recipes.sections import RuleConfig
from polymodal.training.reporting.report import draw_curves, write_report
from polymodal.training.run import begin_logs, finished_before, make_folder, take_steps
from polymodal.training.steps import Order
from polymodal.utils.modules import frozen
from polymodal.utils.progress import log

MEASURED = 512
"""Images from which a tower's channels are measured."""


def train_pairs(recipe: PairRecipe, force: bool = False) -> Path:
    """Run a pair stage, or go on with it from its newest checkpoint."""
    world = join_world(recipe.run.timeout_minutes)
    with clear_loss_of_peers(world, recipe.name):
        return _train(recipe, force, world)


def _train(recipe: PairRecipe, force: bool, world: World) -> Path:
    output_dir = Path(recipe.output_dir)
    final = output_dir / "final"
    found = find_checkpoint(recipe, world, force)
    if finished_before(recipe, found, final / METADATA_NAME):
        log(f"{recipe.name}: finished before, see {final}")
        return final
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    parts = load_pair_parts(recipe)
    with world.together():
        if world.is_main:
            make_folder(output_dir)
    run = make_pair_run(recipe, parts, world, found, force)
    take_steps(run)
    with world.together():
        if world.is_main:
            draw_curves(output_dir / "log.jsonl", output_dir / "loss.png", recipe.name)
            export_pair_model(final, recipe, parts, run.engine.groups, run.state)
            write_report(output_dir)
            log(f"{recipe.name}: done, {final}")
    return final


def make_pair_run(
    recipe: PairRecipe, parts: PairParts, world: World, found: Path | None = None, force: bool = False
) -> PairRun:
    """Set everything up, without taking a step."""
    if recipe.batch.global_size % world.size:
        raise ConfigError(
            f"batch.global_size {recipe.batch.global_size} cannot be shared evenly by {world.size} processes"
        )
    output_dir, distill = Path(recipe.output_dir), recipe.objective.distill
    torch.manual_seed(recipe.run.seed)
    module: Any = parts.model
    module.to(world.device)
    rules, teacher = recipe.train, None
    if distill is not None:
        teacher = load_teacher(distill, parts.model, world.device)
        add_distiller(parts.model, teacher, distill)
        rules = (RuleConfig(match="distiller.*", train=True), *rules)
    groups = policy.apply_policy(module, rules, None, recipe.optim)
    policy.check_groups(module, groups)
    if teacher is not None and frozen(parts.model.tower):
        raise ConfigError("objective.distill: the vision encoder is not trained; leave it out, or add a `train` rule")
    if world.is_main:
        log(policy.policy_table(module, groups))
    with world.main_first():
        feed = make_pair_feed(recipe, parts.model, output_dir, teacher)
        held_out = make_pair_eval_feed(recipe, parts.model, output_dir)
    if held_out is None and recipe.run.eval_every:
        raise ConfigError("run.eval_every: name held-out files in data.eval, or set it to 0")
    if recipe.init.model is not None and hasattr(module, "measure"):
        module.measure(_tower_output(parts.model, feed, world))
    if teacher is not None:
        _measure(parts.model, teacher, feed, world)
    if recipe.run.checkpointing == "on":
        if not hasattr(module, "checkpoint_layers"):
            raise ConfigError("run.checkpointing: this model has no layers for it; use batch.micro_size to save memory")
        module.checkpoint_layers()
    engine = PairEngine(world, recipe, module, groups)
    if engine.bf16 and world.device.type == "cpu" and hasattr(module, "attend_plainly"):
        # On sequences as short as patches and captions fused attention in bf16 takes four times as long (torch 2.13).
        module.attend_plainly()
    steps = PairSteps(Order(feed.prepared.mixture, recipe.run.seed), recipe.batch.global_size)
    live = teacher if teacher is not None and feed.teacher is None else None
    evaluation = None if held_out is None else PairEvaluation(held_out, recipe)
    run = PairRun(recipe, engine, feed, steps, evaluation, live)
    if found is not None:
        run.resume(found, force)
    begin_logs(run)
    return run


def _tower_output(model: PairModel, feed: PairFeed, world: World) -> torch.Tensor:
    """What the tower gives for some images from all over the data, the same in every process."""
    count = len(feed.prepared.images)
    chosen = range(0, count, -(-count // MEASURED))
    if feed.store is not None:
        found = feed.store.gather([feed.prepared.images[i] for i in chosen])
        assert found is not None
        return found.to(world.device)
    tiles = [torch.from_numpy(feed.images.tile(feed.prepared.sources[i])[None]) for i in chosen]
    with torch.no_grad():
        return torch.cat([model.encode(tile.to(world.device)) for tile in tiles])


def _measure(model: Any, teacher: Teacher, feed: PairFeed, world: World) -> None:
    """Measure the teacher's channels on some images, the same in every process."""
    pairs = feed.prepared
    if feed.teacher is not None:
        found = feed.teacher.gather(feed.teacher_images[:MEASURED])
        assert found is not None
    else:
        if tuple(teacher.image.tile_size) != tuple(model.image.tile_size) and crops(feed.images.augment):
            raise ConfigError(
                "objective.distill: where images are cut, the teacher sees the student's tiles; "
                "make image.tile_size the same, or set augment.scale to [1, 1]"
            )
        tiles = [feed.images.tile(source)[None] for source in pairs.sources[:MEASURED]]
        found = torch.cat([teacher.encode(torch.from_numpy(tile).to(world.device)).cpu() for tile in tiles])
    model.distiller.fit(found.to(world.device))
