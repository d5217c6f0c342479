"""Run a pipeline: each stage once, in order, with a ledger of what is finished and with which settings.

A stage that was finished with the same settings is not done again, nor is one before it. Settings that decide the
result are compared key by key; where they differ from those of a finished stage the run stops and names them, so that
hours of training are not thrown away by a typing mistake. See `training.recipes.pipeline` for the file itself.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from polymodal.errors import ConfigError
from polymodal.training.recipes.pipeline import MakeStage, Pipeline, Stage, TrainStage, map_text
from polymodal.utils.files import write_text

LEDGER = "pipeline.json"
"""Which stages are finished, and with which settings."""
FINISHED = "finished"


def run_pipeline(pipeline: Pipeline, *, force: bool = False) -> Path:
    """Run the stages that are not finished yet.

    Args:
        pipeline: The pipeline.
        force: Where a finished stage has other settings now, remove it and everything after it, and do them again.

    Returns:
        The last stage's folder.

    Raises:
        PolymodalError: A finished stage has other settings now, or a stage failed.
        SystemExit: A training stage was stopped by a signal; it is saved, and the same command goes on.
    """
    from polymodal.modeling.language_model import quieten_transformers
    from polymodal.training.stages import do_stage, on_main_process
    from polymodal.utils.progress import duration, say

    quieten_transformers()
    ledger = _Ledger(pipeline)
    chain = ""
    for number, (name, stage) in enumerate(pipeline.stages.items(), start=1):
        settings = _settings(pipeline, stage)
        chain = hashlib.sha256(json.dumps([chain, name, settings], sort_keys=True).encode()).hexdigest()
        # The first process decides: another might look when a folder is gone already.
        verdict = on_main_process(partial(ledger.verdict, name, settings, chain))
        if verdict == FINISHED:
            say(f"[{number}/{len(pipeline.stages)}] {name}: finished before")
            continue
        if verdict is not None and not force:
            raise ConfigError(
                f"{pipeline.folder(name)}: finished before with other settings ({verdict}); choose another output_dir, "
                "or --force to do it and everything after it again"
            )
        if verdict is not None:
            on_main_process(partial(ledger.forget_from, name))
        say(f"[{number}/{len(pipeline.stages)}] {name}")
        began = time.monotonic()
        do_stage(pipeline, name, stage)
        spent = time.monotonic() - began
        on_main_process(partial(ledger.add, name, settings, chain, spent))
        say(f"[{number}/{len(pipeline.stages)}] {name}: done in {duration(spent)}, {pipeline.folder(name)}")
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
        """Note a finished stage."""
        self.entries[name] = {"chain": chain, "settings": settings, "seconds": round(seconds, 2)}
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.entries, indent=2, ensure_ascii=False) + "\n")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain data as dotted keys, for comparing settings key by key.

    Args:
        value: Plain data.
        prefix: The dotted key of `value` itself.

    Returns:
        Dotted key to plain value.
    """
    if isinstance(value, dict) and value:
        pairs = value.items()
    elif isinstance(value, list) and value:
        pairs = enumerate(value)  # type: ignore[assignment]
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in pairs:
        found |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _settings(pipeline: Pipeline, stage: Stage) -> dict[str, Any]:
    """What of a stage decides its result, as plain data; the place of the pipeline's folder does not."""
    from polymodal.training.resume import identity

    if isinstance(stage, TrainStage):
        plain: dict[str, Any] = {"recipe": identity(stage.recipe)}
    else:
        plain = stage.model_dump(mode="json")
    if isinstance(stage, MakeStage):
        plain["sha256"] = hashlib.sha256(Path(stage.make).read_bytes()).hexdigest()
        if not stage.arguments:  # pipelines of before there were any go on
            del plain["arguments"]
    whole = json.loads(json.dumps(plain))
    return dict(map_text(whole, lambda text: text.replace(str(pipeline.output_dir), "${output_dir}")))
