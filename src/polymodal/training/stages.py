"""What each kind of pipeline stage does; `training.pipeline` decides which, and when."""

from __future__ import annotations

import inspect
import json
import os
import runpy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from polymodal.errors import ConfigError, PolymodalError, unknown_name
from polymodal.training.recipes.pipeline import (
    BuildStage,
    ExportStage,
    FeaturesStage,
    GenerateStage,
    MakeStage,
    Pipeline,
    Stage,
    TrainStage,
)
from polymodal.training.recipes.sft import Recipe
from polymodal.utils.files import atomic_folder, write_text
from polymodal.utils.progress import say

T = TypeVar("T")


def do_stage(pipeline: Pipeline, name: str, stage: Stage) -> None:
    """Do one stage; with several processes, all but training is done by the first, and the others wait.

    Args:
        pipeline: The pipeline.
        name: The stage's name.
        stage: The stage.

    Raises:
        PolymodalError: It failed.
    """
    folder = pipeline.folder(name)
    if isinstance(stage, TrainStage):
        from polymodal.training import train

        train(stage.recipe)
    elif isinstance(stage, MakeStage):
        on_main_process(lambda: _make(Path(stage.make), folder, stage.arguments))
    elif isinstance(stage, BuildStage):
        on_main_process(lambda: _build(stage, folder))
    elif isinstance(stage, FeaturesStage):
        target = pipeline.stages.get(stage.features)
        if not isinstance(target, TrainStage):
            known = [other for other, kind in pipeline.stages.items() if isinstance(kind, TrainStage)]
            raise unknown_name("training stage", stage.features, known)
        recipe = target.recipe
        if not isinstance(recipe, Recipe):
            raise ConfigError(f"stage {name}: {stage.features} learns from pairs and fills its own caches")
        on_main_process(lambda: _features(recipe, folder))
    elif isinstance(stage, ExportStage):
        source = pipeline.stages[stage.export]
        if isinstance(source, TrainStage) and not isinstance(source.recipe, Recipe):
            raise ConfigError(f"stage {name}: the model of {stage.export} is a whole folder already; leave it out")
        from polymodal.checkpoints.whole import export_whole

        on_main_process(lambda: export_whole(pipeline.model_folder(stage.export), folder))
    else:
        on_main_process(lambda: _generate(stage, pipeline.model_folder(stage.generate), folder))


def on_main_process(work: Callable[[], T]) -> T:
    """Run something in the first process only; the others wait for it, fail with it, and get what it returns."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return work()
    from polymodal.training.process_group import join_world

    world = join_world(timeout_minutes=10)
    result: list[T] = []
    with world.together():
        if world.is_main:
            result.append(work())
    return world.gather(result)[0][0]


def _make(script: Path, folder: Path, arguments: dict[str, Any]) -> None:
    """Let a script fill a folder that appears whole or not at all."""
    main = runpy.run_path(str(script)).get("main")
    if not callable(main):
        raise ConfigError(f"{script}: has no function main(folder)")
    try:
        inspect.signature(main).bind(folder, **arguments)
    except TypeError as error:
        raise ConfigError(f"{script}: main cannot be given `arguments` {arguments}: {error}") from None
    with atomic_folder(folder, replace=True) as work:
        main(work, **arguments)


def _build(stage: BuildStage, folder: Path) -> None:
    from recipes.default.dataset import build_default
    from recipes.default.dataset.pairs import build_pairs

    options: dict[str, Any] = {"seed": stage.seed, "size": stage.size, "progress": False, "force": True}
    say(str(build_pairs(folder, **options) if stage.build == "pairs" else build_default(folder, **options)))


def _features(recipe: Recipe, folder: Path) -> None:
    """Fill a training stage's feature cache."""
    from polymodal.training import feature_cache as features
    from polymodal.training import optimizer as policy
    from polymodal.training.sft.task import load_parts, make_feed

    if recipe.run.feature_cache in (features.OFF, features.MEMORY):
        raise ConfigError(f"{recipe.name} keeps no features on disk: set its run.feature_cache to a folder")
    parts = load_parts(recipe)
    policy.apply_policy(parts.model, recipe.train, recipe.lora, recipe.optim, parts.tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    feed = make_feed(recipe, parts, folder)
    assert feed.store is not None
    summary = {"feature_cache": recipe.run.feature_cache, "pictures": len(feed.store.where)}
    write_text(folder / "features.json", json.dumps(summary, indent=2) + "\n")


def _generate(stage: GenerateStage, model_folder: Path, folder: Path) -> None:
    """Ask one question and keep the answer."""
    from polymodal.backends import load
    from polymodal.generation.params import GenerationParams
    from polymodal.messages import Image, user

    model = load(model_folder)
    message = user(*(Image(picture) for picture in stage.image), stage.prompt)
    reply = model.generate([message], GenerationParams(max_new_tokens=stage.max_new_tokens))
    if not reply.usage.completion_tokens:
        raise PolymodalError(f"{model_folder}: the model gave no token")
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "prompt": stage.prompt,
        "image": list(stage.image),
        "answer": reply.text,
        "finish_reason": reply.finish_reason,
        "usage": asdict(reply.usage),
    }
    write_text(folder / "answer.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    say(f"{stage.prompt} -> {reply.text!r}")
