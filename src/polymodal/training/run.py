"""One training stage from recipe to `final/`: set up, run the loop, export, report.

Read this file to see in which order things happen; each of them lives in a module of its own.
"""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from polymodal.errors import first_line
from polymodal.training.checkpoint import differences, find_checkpoint, read_state
from polymodal.training.distributed import Engine
from polymodal.training.optimizer import check_groups, policy_table
from polymodal.training.process_group import World, clear_loss_of_peers, join_world
from polymodal.training.recipes.load import dump_recipe
from polymodal.training.recipes.sections import RecipeBase
from polymodal.training.reporting.log import environment, open_trackers, start_log
from polymodal.training.reporting.report import draw_curves, write_report
from polymodal.training.task import Task
from polymodal.training.trainer import StopRequest, Trainer
from polymodal.utils.devices import peak_memory
from polymodal.utils.files import check_writable, make_folder, write_text
from polymodal.utils.progress import log


def train(recipe: RecipeBase, inputs: Any = None, force: bool = False) -> Path:
    """Run a stage, or go on with it from its newest checkpoint."""
    world = join_world(recipe.run.timeout_minutes)
    with clear_loss_of_peers(world, recipe.name):
        return _train(recipe, inputs, force, world)


def _train(recipe: RecipeBase, inputs: Any, force: bool, world: World) -> Path:
    output_dir = Path(recipe.output_dir)
    final = output_dir / "final"
    kind = task_class(recipe)
    found = find_checkpoint(recipe, world, force)
    if found is not None and (final / kind.document).is_file():
        stored = read_state(found)
        if stored["progress"]["finished"] and not differences(stored["recipe"], recipe):
            log(f"{recipe.name}: finished before, see {final}")
            return final
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    torch.manual_seed(recipe.run.seed)
    check_writable(output_dir, "output_dir ", folder=True)
    task = kind(recipe, world, inputs)
    with world.together():
        if world.is_main:
            make_folder(output_dir, "output_dir ")
    trainer = make_trainer(task, found, force)
    _take_steps(trainer)
    trainer.engine.gather_weights()
    with world.together():
        if world.is_main:
            task.export(final, trainer.engine.groups, trainer.state)
            _draw(recipe.name, "curves", draw_curves, output_dir / "log.jsonl", output_dir / "loss.png", recipe.name)
            _draw(recipe.name, "report", write_report, output_dir)
            peak = peak_memory()
            held = "" if peak is None else f" (at most {peak / 2**30:.1f} GiB of memory)"
            log(f"{recipe.name}: done, {final}{held}")
    return final


def _draw(name: str, what: str, draw: Callable[..., Any], *given: Any) -> None:
    """Draw what is shown of a finished run; the model is there, and nothing that draws may take it away."""
    try:
        draw(*given)
    except Exception as error:
        log(f"{name}: no {what}: {first_line(error)}")


def task_class(recipe: RecipeBase) -> type[Task]:
    """The task that a recipe names."""
    module, _, name = recipe.task.partition(":")
    kind: type[Task] = getattr(import_module(module), name)
    return kind


def make_trainer(task: Task, found: Path | None = None, force: bool = False) -> Trainer:
    """Set everything up, without taking a step."""
    recipe, world = task.recipe, task.world
    torch.manual_seed(recipe.run.seed)
    groups = task.choose_parameters()
    check_groups(task.model, groups)
    task.model.to(world.device)
    if world.is_main:
        log(policy_table(task.model, groups))
    with world.main_first():
        task.load_data()
    task.prepare(fresh=found is None)
    if rounding := task.rounding():
        log(f"{recipe.name}: {rounding}")
    trainer = Trainer(task, Engine(world, recipe, task.model, groups, task.sums_gradients))
    if found is not None:
        trainer.resume(found, force)
    _begin_logs(trainer)
    return trainer


def _begin_logs(trainer: Trainer) -> None:
    """Write what is certain before the first step: the recipe, the machine, logs up to where the run goes on from."""
    recipe, output_dir, world = trainer.recipe, trainer.output_dir, trainer.world
    with world.together():
        if world.is_main:
            start_log(output_dir / "log.jsonl", trainer.state.step)
            start_log(output_dir / "eval.jsonl", trainer.state.step)
            write_text(output_dir / "recipe.yaml", dump_recipe(recipe))
            facts = environment(world.device) | {"processes": world.size, "engine": trainer.engine.kind}
            write_text(output_dir / "env.json", json.dumps(facts, indent=2) + "\n")
            plain = json.loads(recipe.model_dump_json(by_alias=True))
            trainer.trackers = open_trackers(recipe.run.trackers, output_dir, recipe.name, plain, trainer.state.step)


def _take_steps(trainer: Trainer) -> None:
    """Run the loop until it is over, or a signal came: then exit with 128 + its number (143, 130)."""
    with StopRequest() as stop:
        trainer.loop(stop)
    for tracker in trainer.trackers:
        tracker.close()
    if trainer.stopped is not None and not trainer.state.finished:
        name, step = trainer.recipe.name, trainer.state.step
        log(f"{name}: stopped after step {step}, saved; the same command goes on from here")
        raise SystemExit(128 + trainer.stopped)
