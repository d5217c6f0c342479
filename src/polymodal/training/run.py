"""One training stage from recipe to `final/`: set up, run the loop, export, report.

Read this file to see in which order things happen; each of them lives in a module of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from polymodal.errors import PolymodalError
from polymodal.modeling.token_loss import knows_head
from polymodal.training import checkpoint
from polymodal.training import optimizer as policy
from polymodal.training.activation_checkpointing import save_memory
from polymodal.training.checkpoint import find_checkpoint, identity
from polymodal.training.distributed import Engine, wants_bf16
from polymodal.training.optimizer import Group
from polymodal.training.process_group import World, clear_loss_of_peers, join_world
from polymodal.training.recipes.load import AnyRecipe, dump_recipe
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import environment, open_trackers, start_log
from polymodal.training.reporting.report import draw_curves, write_report
from polymodal.training.sft import class_prototypes as prototypes
from polymodal.training.sft import warm_start as align
from polymodal.training.sft.evaluate import make_evaluation
from polymodal.training.sft.task import Parts, export, load_parts, make_feed
from polymodal.training.steps import Order, Steps
from polymodal.training.trainer import Run, StopRequest, total_steps
from polymodal.utils.files import write_text
from polymodal.utils.progress import log

if TYPE_CHECKING:
    from polymodal.modeling.vlm import MultimodalLM


def train(recipe: Recipe, parts: Parts | None = None, force: bool = False) -> Path:
    """Run a stage, or go on with it from its newest checkpoint."""
    world = join_world(recipe.run.timeout_minutes)
    with clear_loss_of_peers(world, recipe.name):
        return _train(recipe, parts, force, world)


def _train(recipe: Recipe, parts: Parts | None, force: bool, world: World) -> Path:
    output_dir = Path(recipe.output_dir)
    final = output_dir / "final"
    found = find_checkpoint(recipe, world, force)
    if finished_before(recipe, found, final / "polymodal.json"):
        log(f"{recipe.name}: finished before, see {final}")
        return final
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    parts = parts or load_parts(recipe)
    with world.together():
        if world.is_main:
            make_folder(output_dir)
    run = make_run(recipe, parts, world, found, force)
    take_steps(run)
    run.engine.gather_weights()
    with world.together():
        if world.is_main:
            draw_curves(output_dir / "log.jsonl", output_dir / "loss.png", recipe.name)
            export(final, recipe, parts, run.engine.groups, run.state)
            write_report(output_dir)
            log(f"{recipe.name}: done, {final}")
    return final


def make_run(recipe: Recipe, parts: Parts, world: World, found: Path | None = None, force: bool = False) -> Run:
    """Set everything up, without taking a step."""
    output_dir = Path(recipe.output_dir)
    torch.manual_seed(recipe.run.seed)
    groups = policy.apply_policy(parts.model, recipe.train, recipe.lora, recipe.optim, parts.tokenizer)
    policy.check_groups(parts.model, groups)
    parts.model.to(world.device)
    # Both look at the language model's output once; sharded, they would have to do so in step.
    knows_head(parts.model.llm)
    if recipe.batch.packing == "pack":
        parts.model.prepare_packing()
    if world.is_main:
        log(policy.policy_table(parts.model, groups))
    with world.main_first():
        feed = make_feed(recipe, parts, output_dir)
        evaluation = make_evaluation(recipe, parts.model, feed, output_dir)
    if recipe.warm_start is not None and found is None:
        align.warm_start(parts.model, parts.tokenizer, feed, recipe.warm_start, recipe.run.seed)
    if recipe.prototypes is not None:
        feed = prototypes.add_samples(feed, parts.model, recipe.prototypes, recipe.run.seed)
    steps = Steps(Order(feed.prepared.sources, recipe.run.seed), feed.prepared.lengths, recipe.batch)
    bf16 = wants_bf16(recipe.run.precision)
    if (
        bf16
        and recipe.run.engine != "deepspeed"
        and not any("llm" in stage.get("trained", ()) for stage in parts.history)
    ):
        policy.cast_frozen_linears(parts.model.llm, torch.bfloat16)
    longest = int(feed.prepared.lengths.max())
    for line in save_memory(recipe, parts.model, world.device, total_steps(recipe, steps), longest, 2 if bf16 else 4):
        log(f"{recipe.name}: {line}")
    engine = make_engine(world, recipe, parts.model, groups)
    run = Run(recipe, engine, feed, steps, evaluation)
    if found is not None:
        run.resume(found, force)
    begin_logs(run)
    return run


def begin_logs(run: Run) -> None:
    """Write what is known before the first step: the recipe, the machine, logs up to where the run goes on from."""
    recipe, output_dir, world = run.recipe, run.output_dir, run.world
    with world.together():
        if world.is_main:
            start_log(output_dir / "log.jsonl", run.state.step)
            start_log(output_dir / "eval.jsonl", run.state.step)
            write_text(output_dir / "recipe.yaml", dump_recipe(recipe))
            facts = environment(world.device) | {"processes": world.size, "engine": run.engine.kind}
            write_text(output_dir / "env.json", json.dumps(facts, indent=2) + "\n")
            plain = json.loads(recipe.model_dump_json(by_alias=True))
            run.trackers = open_trackers(recipe.run.trackers, output_dir, recipe.name, plain, run.state.step)


def finished_before(recipe: AnyRecipe, found: Path | None, document: Path) -> bool:
    """Whether a run of this very recipe is over and its model written."""
    if found is None or not document.is_file():
        return False
    stored = checkpoint.read_state(found)
    return bool(stored["progress"]["finished"]) and stored["recipe"] == identity(recipe)


def take_steps(run: Run) -> None:
    """Run the loop until it is over, or a signal came."""
    with StopRequest() as stop:
        run.loop(stop)
    for tracker in run.trackers:
        tracker.close()
    if run.stopped is not None and not run.state.finished:
        log(f"{run.recipe.name}: stopped after step {run.state.step}, saved; the same command goes on from here")
        raise SystemExit(128 + run.stopped)


def make_folder(folder: Path) -> None:
    """Make the run's folder; one line where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PolymodalError(f"output_dir {folder}: cannot be made ({error.strerror or error})") from error


def make_engine(world: World, recipe: Recipe, model: MultimodalLM, groups: Sequence[Group]) -> Engine:
    """Build the engine that a recipe asks for; see `Engine`."""
    if recipe.run.engine == "deepspeed":
        from polymodal.training.deepspeed import ZeroEngine

        return ZeroEngine(world, recipe, model, groups)
    return Engine(world, recipe, model, groups)
