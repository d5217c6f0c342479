"""What each kind of pipeline stage does; `training.pipeline` decides which, and when."""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from polymodal.errors import ConfigError, PolymodalError, unknown_name
from polymodal.files import atomic_folder, write_text
from polymodal.training.log import say
from polymodal.training.pipeline_file import (
    BuildStage,
    ExportStage,
    FeaturesStage,
    GenerateStage,
    MakeStage,
    Pipeline,
    Stage,
    TrainStage,
)
from polymodal.training.recipe import Recipe

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
        on_main_process(lambda: _make(Path(stage.make), folder))
    elif isinstance(stage, BuildStage):
        on_main_process(lambda: _build(stage, folder))
    elif isinstance(stage, FeaturesStage):
        target = pipeline.stages.get(stage.features)
        if not isinstance(target, TrainStage):
            known = [other for other, kind in pipeline.stages.items() if isinstance(kind, TrainStage)]
            raise unknown_name("training stage", stage.features, known)
        on_main_process(lambda: _features(target.recipe, folder))
    elif isinstance(stage, ExportStage):
        on_main_process(lambda: export_whole(pipeline.model_folder(stage.export), folder))
    else:
        on_main_process(lambda: _generate(stage, pipeline.model_folder(stage.generate), folder))


def on_main_process(work: Callable[[], T]) -> T:
    """Run something in the first process only; the others wait for it, fail with it, and get what it returns."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return work()
    from polymodal.training.world import join_world

    world = join_world(timeout_minutes=10)
    result: list[T] = []
    with world.together():
        if world.is_main:
            result.append(work())
    return world.gather(result)[0][0]


def export_whole(source: Path, target: Path) -> None:
    """Write a model as one folder that needs nothing else.

    Adapters are added to the weights they adapt and are gone; the language model and the vision tower lie in the
    folder, also where they were only referred to.

    Args:
        source: A model folder of ours.
        target: Where to; replaced where it is there.

    Raises:
        PolymodalError: The model cannot be read, or the folder not be written.
    """
    from polymodal.checkpoints.folder import is_peft, load_model, save_model
    from polymodal.training.adapters import fold_in

    loaded = load_model(source)
    entry = {"stage": "export", "folded_in": ["adapter"] if is_peft(loaded.model.llm) else []}
    fold_in(loaded.model.llm)
    save_model(
        target,
        loaded.model,
        loaded.config,
        loaded.tokenizer,
        history=[*loaded.history, entry],
        llm_trained=True,
        vision_trained=loaded.config.vision is not None,
        replace=True,
    )


def _make(script: Path, folder: Path) -> None:
    """Let a script fill a folder that appears whole or not at all."""
    main = runpy.run_path(str(script)).get("main")
    if not callable(main):
        raise ConfigError(f"{script}: has no function main(folder)")
    with atomic_folder(folder, replace=True) as work:
        main(work)


def _build(stage: BuildStage, folder: Path) -> None:
    from polymodal.data.default import build_default

    say(str(build_default(folder, seed=stage.seed, size=stage.size, progress=False, force=True)))


def _features(recipe: Recipe, folder: Path) -> None:
    """Fill a training stage's feature cache."""
    from polymodal.training import features, policy
    from polymodal.training.parts import load_parts, make_feed

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
