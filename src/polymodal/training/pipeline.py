"""Run a pipeline: each stage once, in order, with a ledger of what is finished and with which settings.

A stage that was finished with the same settings is not done again, nor is one before it. Settings that decide the
result are compared key by key; where they differ from those of a finished stage the run stops and names them, so that
hours of training are not thrown away by a typing mistake. See `training.recipes.pipeline` for the file itself.
"""

import hashlib
import inspect
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from polymodal.backends import load
from polymodal.checkpoints.model_folder import export_whole
from polymodal.errors import ConfigError, PolymodalError, unknown_name
from polymodal.generation.params import GenerationParams
from polymodal.messages import Image, user
from polymodal.modeling.language_model import quieten_transformers
from polymodal.training.checkpoint import flatten, identity, in_todays_keys
from polymodal.training.feature_cache import MEMORY, OFF
from polymodal.training.process_group import World, join_world
from polymodal.training.recipes import pipeline as stages
from polymodal.training.recipes.pipeline import Pipeline, Stage, TrainStage
from polymodal.training.recipes.sft import Recipe
from polymodal.training.run import train
from polymodal.training.sft.task import SFTTask
from polymodal.utils.files import atomic_folder, make_folder, write_text
from polymodal.utils.progress import duration, log

T = TypeVar("T")

LEDGER = "pipeline.json"
"""Which stages are finished, and with which settings."""

FINISHED = "finished"


def run_pipeline(pipeline: Pipeline, *, force: bool = False) -> Path:
    """Run the stages that are not finished yet."""
    quieten_transformers()
    ledger = _Ledger(pipeline)
    chain = ""
    for number, (name, stage) in enumerate(pipeline.stages.items(), start=1):
        settings = _settings(pipeline, stage)
        chain = _chain(chain, name, settings)
        # The first process decides: another might look when a folder is gone already.
        verdict = on_main_process(partial(ledger.verdict, name, settings, chain))
        if verdict == FINISHED:
            log(f"[{number}/{len(pipeline.stages)}] {name}: finished before")
            continue
        if verdict is not None and not force:
            raise ConfigError(
                f"{pipeline.folder(name)}: finished before with other settings ({verdict}); choose another output_dir, "
                "or --force to do it and everything after it again"
            )
        if verdict is not None:
            on_main_process(partial(ledger.forget_from, name))
        log(f"[{number}/{len(pipeline.stages)}] {name}")
        began = time.monotonic()
        do_stage(pipeline, name, stage)
        spent = time.monotonic() - began
        on_main_process(partial(ledger.add, name, settings, chain, spent))
        log(f"[{number}/{len(pipeline.stages)}] {name}: done in {duration(spent)}, {pipeline.folder(name)}")
    return pipeline.folder(list(pipeline.stages)[-1])


class _Ledger:
    """What is finished, kept in one small file."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.path = pipeline.output_dir / LEDGER
        self.entries: dict[str, Any] = {}
        if self.path.is_file():
            try:
                self.entries = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{self.path}: not valid JSON ({error}); remove it to do all stages again") from None

        # What an earlier version finished counts as finished: its settings in today's keys.
        before = now = ""
        for name, stage in self.pipeline.stages.items():
            entry = self.entries.get(name)
            if entry is None or entry["chain"] != _chain(before, name, entry["settings"]):
                break  # not done, or done before another stage was done again
            before = entry["chain"]
            if isinstance(stage, TrainStage):
                entry["settings"] = {"recipe": in_todays_keys(entry["settings"]["recipe"], stage.recipe)}
            now = entry["chain"] = _chain(now, name, entry["settings"])

    def verdict(self, name: str, settings: dict[str, Any], chain: str) -> str | None:
        """What became of a stage: FINISHED with these settings, what is different now, or None where it never was."""
        if name not in self.entries or not self.pipeline.folder(name).exists():
            return None
        if self.entries[name]["chain"] == chain:
            return FINISHED
        before, now = flatten(self.entries[name]["settings"]), flatten(settings)
        keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        lines = [f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys[:3]]
        return ", ".join(lines) + (", ..." if len(keys) > 3 else "") or "a stage before it was done again"

    def forget_from(self, name: str) -> None:
        """Remove a stage and everything after it."""
        names = list(self.pipeline.stages)
        for later in names[names.index(name) :]:
            self.entries.pop(later, None)
            shutil.rmtree(self.pipeline.folder(later), ignore_errors=True)
        self._write()

    def add(self, name: str, settings: dict[str, Any], chain: str, seconds: float) -> None:
        """Enter a finished stage."""
        self.entries[name] = {"chain": chain, "settings": settings, "seconds": round(seconds, 2)}
        self._write()

    def _write(self) -> None:
        make_folder(self.path.parent)
        write_text(self.path, json.dumps(self.entries, indent=2, ensure_ascii=False) + "\n")


def _chain(before: str, name: str, settings: dict[str, Any]) -> str:
    """A hash of a stage and all before it."""
    return hashlib.sha256(json.dumps([before, name, settings], sort_keys=True).encode()).hexdigest()


def _settings(pipeline: Pipeline, stage: Stage) -> dict[str, Any]:
    """What of a stage decides its result, as plain data; the place of the pipeline's folder does not."""
    if isinstance(stage, TrainStage):
        plain: dict[str, Any] = {"recipe": identity(stage.recipe)}
    else:
        plain = stage.model_dump(mode="json")
    if isinstance(stage, stages.MakeStage):
        plain["sha256"] = hashlib.sha256(Path(stage.make).read_bytes()).hexdigest()
        if not stage.arguments:  # pipelines of before there were any go on
            del plain["arguments"]
    whole = json.loads(json.dumps(plain))
    return dict(stages.map_text(whole, lambda text: text.replace(str(pipeline.output_dir), "${output_dir}")))


def do_stage(pipeline: Pipeline, name: str, stage: Stage) -> None:
    """Do one stage; with several processes, all but training is done by the first, and the others wait."""
    folder = pipeline.folder(name)
    if isinstance(stage, TrainStage):
        train(stage.recipe)
    elif isinstance(stage, stages.MakeStage):
        on_main_process(lambda: _make(Path(stage.make), folder, stage.arguments))
    elif isinstance(stage, stages.BuildStage):
        on_main_process(lambda: _build(stage, folder))
    elif isinstance(stage, stages.FeaturesStage):
        target = pipeline.stages.get(stage.features)
        if not isinstance(target, TrainStage):
            names = [other for other, kind in pipeline.stages.items() if isinstance(kind, TrainStage)]
            raise unknown_name("training stage", stage.features, names)
        recipe = target.recipe
        if not isinstance(recipe, Recipe):
            raise ConfigError(f"stage {name}: {stage.features} learns from pairs and fills its own caches")
        on_main_process(lambda: _features(recipe, folder))
    elif isinstance(stage, stages.ExportStage):
        source = pipeline.stages[stage.export]
        if isinstance(source, TrainStage) and not isinstance(source.recipe, Recipe):
            raise ConfigError(f"stage {name}: the model of {stage.export} is a whole folder already; leave it out")
        on_main_process(lambda: export_whole(pipeline.model_folder(stage.export), folder))
    else:
        on_main_process(lambda: _generate(stage, pipeline.model_folder(stage.generate), folder))


def on_main_process(work: Callable[[], T]) -> T:
    """Run something in the first process only; the others wait for it, fail with it, and get what it returns."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return work()
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


def _build(stage: stages.BuildStage, folder: Path) -> None:
    """Run the generator of `recipes/default/dataset`, which is no part of the package, in a process of its own."""
    if not Path("recipes/default/dataset").is_dir():
        raise ConfigError(
            f"build: {stage.build}: the generator lies in recipes/default/dataset of a checkout of polymodal; run the "
            "pipeline from the checkout's root"
        )
    options = ["--output", str(folder), "--size", stage.size, "--seed", str(stage.seed), "--force"]
    if subprocess.run([sys.executable, "-m", "recipes.default.dataset", stage.build, *options], check=False).returncode:
        raise PolymodalError(f"build: {stage.build}: the dataset was not built, see above")


def _features(recipe: Recipe, folder: Path) -> None:
    """Fill a training stage's feature cache."""
    if recipe.run.feature_cache in (OFF, MEMORY):
        raise ConfigError(f"{recipe.name} keeps no features on disk: set its run.feature_cache to a folder")
    task = SFTTask(recipe, World())
    task.choose_parameters()
    make_folder(folder)
    store = task.make_dataset(folder).store
    assert store is not None
    summary = {"feature_cache": recipe.run.feature_cache, "images": len(store.where)}
    write_text(folder / "features.json", json.dumps(summary, indent=2) + "\n")


def _generate(stage: stages.GenerateStage, model_folder: Path, folder: Path) -> None:
    """Ask one question and keep the answer."""
    model = load(model_folder)
    message = user(*(Image(image) for image in stage.image), stage.prompt)
    reply = model.generate([message], GenerationParams(max_new_tokens=stage.max_new_tokens))
    if not reply.usage.completion_tokens:
        raise PolymodalError(f"{model_folder}: the model gave no token")
    make_folder(folder)
    record = {
        "prompt": stage.prompt,
        "image": list(stage.image),
        "answer": reply.text,
        "finish_reason": reply.finish_reason,
        "usage": asdict(reply.usage),
    }
    write_text(folder / "answer.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    log(f"{stage.prompt} -> {reply.text!r}")
