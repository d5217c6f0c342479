"""A pipeline file: several stages that run one after the other, from building parts to a first answer.

    name: tiny
    output_dir: runs/tiny
    stages:
      parts:    {make: make_parts.py}
      data:     {build: default, size: tiny}
      features: {features: stage1}
      stage1:   {recipe: stage1.yaml, data: {mix: [{path: "${output_dir}/data/stage1.json"}]}}
      stage2:   {recipe: stage2.yaml}
      export:   {export: stage2}
      answer:   {generate: export, image: [cat.jpg], prompt: "What is this?"}

Each stage writes `output_dir/<its name>/`. A training stage is a recipe file, with sections of the pipeline file laid
over it; where its recipe goes on from a model folder (`init.from`), that is the training stage of its kind (a language
model's, or one of pairs) before it. File names of the pipeline file itself are relative to it; `${output_dir}` stands
for the folder. A stage that was finished with the same settings is not done again; one that was finished with other
settings is refused, unless forced.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from polymodal.config import Strict, parse_config
from polymodal.errors import ConfigError, unknown_name
from polymodal.training.recipes.load import apply_override, dump_recipe, read_yaml, recipe_class
from polymodal.training.recipes.sections import Name, RecipeBase
from polymodal.utils.paths import FilePath, OutputFolder, full_name


class MakeStage(Strict):
    """Run `main(folder: Path)` of a Python file, which fills the folder.

    Attributes:
        make: The file.
        arguments: What else `main` is given, by name.
    """

    make: FilePath
    arguments: dict[str, Any] = Field(default_factory=dict)


class BuildStage(Strict):
    """Build a generated dataset, as `python -m recipes.default.dataset` does.

    Attributes:
        build: Which dataset.
        size: full, small or tiny.
        seed: Everything follows from it.
    """

    build: Literal["default", "pairs"]
    size: str = "full"
    seed: int = Field(default=0, ge=0, lt=2**63)


class FeaturesStage(Strict):
    """Fill the feature cache of a training stage beforehand.

    Attributes:
        features: The training stage; its `run.feature_cache` must be a folder.
    """

    features: str


class ExportStage(Strict):
    """Write a training stage's model as one folder that needs nothing else: adapters folded in, all parts in it.

    Attributes:
        export: The training stage.
    """

    export: str


class GenerateStage(Strict):
    """Ask a finished model one question; the answer is printed and written to `answer.json`.

    Attributes:
        generate: An export or a training stage.
        prompt: The question; images come before it.
        image: Image files.
        max_new_tokens: Length at most.
    """

    generate: str
    prompt: str = "What is in the picture?"
    image: tuple[FilePath, ...] = ()
    max_new_tokens: int = Field(default=32, gt=0, le=1_000_000)


class TrainStage(Strict):
    """A training stage, resolved.

    Attributes:
        recipe: The whole recipe.
    """

    recipe: RecipeBase


Stage = MakeStage | BuildStage | FeaturesStage | ExportStage | GenerateStage | TrainStage

KINDS: dict[str, type[Strict]] = {
    "make": MakeStage,
    "build": BuildStage,
    "features": FeaturesStage,
    "recipe": TrainStage,
    "export": ExportStage,
    "generate": GenerateStage,
}
"""The key that says what a stage does."""


class PipelineFile(Strict):
    """The pipeline file as it is written.

    Attributes:
        name: For logs.
        output_dir: Each stage writes into a folder in it.
        stages: What is done, in order.
    """

    name: Name
    output_dir: OutputFolder
    stages: dict[str, dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline, resolved."""

    name: str  # For logs
    output_dir: Path  # Where everything goes
    stages: dict[str, Stage]  # By name, in order
    source: Path  # The pipeline file

    def folder(self, stage: str) -> Path:
        """Where a stage writes."""
        return self.output_dir / stage

    def model_folder(self, stage: str) -> Path:
        """Where a stage leaves its model."""
        return self.folder(stage) / "final" if isinstance(self.stages[stage], TrainStage) else self.folder(stage)


def is_pipeline(path: Path | str) -> bool:
    """Whether a YAML file is a pipeline; a recipe has no `stages`."""
    data = read_yaml(Path(path))
    return isinstance(data, dict) and "stages" in data


def load_pipeline(
    path: Path | str, overrides: Sequence[str] = (), mistakes: list[ConfigError] | None = None
) -> Pipeline:
    """Read a pipeline file and the recipes it names; with a list for mistakes, stages that have some are left out."""
    path = Path(path)
    data = read_yaml(path)
    own = [override for override in overrides if not override.startswith("stages.")]
    for override in own:
        apply_override(data, override, PipelineFile)
    parsed = parse_config(PipelineFile, data, str(path))
    to_stage: dict[str, list[str]] = {}
    for override in overrides:
        if override in own:
            continue
        _, name, rest = [*override.split(".", 2), ""][:3]
        if name not in parsed.stages:
            raise ConfigError(f"override {override!r}: {unknown_name('stage', name, parsed.stages)}")
        to_stage.setdefault(name, []).append(rest)
    pipeline = Pipeline(parsed.name, Path(parsed.output_dir), {}, path)
    for name, raw in parsed.stages.items():
        filled = dict(map_text(raw, lambda text: text.replace("${output_dir}", str(pipeline.output_dir))))
        try:
            pipeline.stages[name] = _stage(pipeline, name, filled, to_stage.get(name, []))
        except ConfigError as error:
            if mistakes is None:
                raise
            left_out = parsed.stages.keys() - pipeline.stages.keys() - {name}
            if not left_out & {value for value in raw.values() if isinstance(value, str)}:  # which may be to blame
                mistakes.append(error)
    return pipeline


def dump_pipeline(pipeline: Pipeline) -> str:
    """Write a resolved pipeline for a person to read: every stage with every default."""
    plain: dict[str, Any] = {"name": pipeline.name, "output_dir": str(pipeline.output_dir), "stages": {}}
    for name, stage in pipeline.stages.items():
        plain["stages"][name] = (
            {"recipe": yaml.safe_load(dump_recipe(stage.recipe))}
            if isinstance(stage, TrainStage)
            else stage.model_dump(mode="json")
        )
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Apply a function to every string in plain data."""
    if isinstance(value, dict):
        return {key: map_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _stage(pipeline: Pipeline, name: str, raw: dict[str, Any], overrides: list[str]) -> Stage:
    """Resolve one stage of a pipeline file; the pipeline has those before it."""
    where, folder = f"{pipeline.source}: stages.{name}", pipeline.source.parent
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"{where}: a stage's name is also its folder's; use letters, digits, - and _")
    found = [key for key in KINDS if key in raw]
    if len(found) != 1:
        if not found and raw:
            raise ConfigError(f"{where}: {unknown_name('kind of stage', next(iter(raw)), KINDS)}")
        raise ConfigError(
            f"{where}: give exactly one of {', '.join(KINDS)}" + f" (given {' and '.join(found)})" * bool(found)
        )
    kind = found[0]
    if kind == "recipe":
        return _train_stage(pipeline, name, raw, overrides)
    for override in overrides:
        apply_override(raw, override, KINDS[kind])
    stage: Any = parse_config(KINDS[kind], raw, where)
    if isinstance(stage, MakeStage):
        script = folder / stage.make
        if not script.is_file():
            raise ConfigError(f"{where}: no file {script}")
        return stage.model_copy(update={"make": str(script)})
    if isinstance(stage, GenerateStage):
        missing = [image for image in stage.image if not (folder / image).is_file()]
        if missing:
            raise ConfigError(f"{where}: no file {folder / missing[0]}")
        _refer(pipeline, stage.generate, (ExportStage, TrainStage), f"{where}.generate")
        return stage.model_copy(update={"image": tuple(str(folder / image) for image in stage.image)})
    if isinstance(stage, ExportStage):
        _refer(pipeline, stage.export, (TrainStage,), f"{where}.export")
    return stage


def _train_stage(pipeline: Pipeline, name: str, raw: dict[str, Any], overrides: list[str]) -> TrainStage:
    """Resolve a training stage: the recipe file, the pipeline's sections over it, the overrides over both."""
    where, output_dir = f"{pipeline.source}: stages.{name}", pipeline.folder(name)
    chosen = [override.partition("=")[2] for override in overrides if override.startswith("recipe=")]
    overrides = [override for override in overrides if not override.startswith("recipe=")]
    file = pipeline.source.parent / full_name(chosen[-1] if chosen else str(raw["recipe"]))
    data = read_yaml(file)
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected a mapping of keys, found {type(data).__name__}")
    sections = {key: value for key, value in raw.items() if key != "recipe"}
    _lay_over(data, sections)
    for override in overrides:
        apply_override(data, override, recipe_class(data))
        sections |= {override.partition(".")[0].partition("=")[0]: override}
    if "output_dir" in sections:
        raise ConfigError(f"{where}: a pipeline puts this stage into {output_dir}; leave its output_dir out")
    data["output_dir"] = str(output_dir)
    kind = recipe_class(data)
    recipe = parse_config(kind, data, where)
    # A language model does not go on from a pair of encoders, nor the other way round.
    stages = pipeline.stages.items()
    trained = [o for o, stage in stages if isinstance(stage, TrainStage) and isinstance(stage.recipe, kind)]
    if recipe.init.from_folder is not None and "init" not in sections and trained:
        start: Any = recipe.init.model_copy(update={"from_folder": str(pipeline.model_folder(trained[-1]))})
        recipe = recipe.model_copy(update={"init": start})
    return TrainStage(recipe=recipe)


def _lay_over(data: dict[str, Any], sections: dict[str, Any]) -> None:
    """Merge sections into a recipe's plain data, key by key; lists are replaced."""
    for key, value in sections.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            _lay_over(data[key], value)
        else:
            data[key] = value


def _refer(pipeline: Pipeline, name: str, kinds: tuple[type, ...], where: str) -> None:
    """Raise unless a name is that of an earlier stage of the right kind."""
    fitting = [other for other, stage in pipeline.stages.items() if isinstance(stage, kinds)]
    if name not in fitting:
        raise ConfigError(f"{where}: {unknown_name('stage before it', name, fitting)}")
