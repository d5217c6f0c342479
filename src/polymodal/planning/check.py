"""What is wrong with a recipe or a pipeline, all of it at once and before a weight is read.

Looked at, in this order: keys and values; the parts, by their headers; image rules, beside the tower's own; the chat
template, over the tokenizer; the first rows of each data file; what is trained and what is forgotten; trackers; the
output folder and the room on its disk.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from polymodal.checkpoints.locate import HUB_ID, folder_here, referred_folder
from polymodal.config import ImageConfig, ModelConfig, TemplateConfig
from polymodal.data.load import iter_rows, row_record
from polymodal.errors import CheckpointError, ConfigError, PolymodalError, unknown_name
from polymodal.messages import Image
from polymodal.modeling.encoders.vision import BUNDLED
from polymodal.modeling.language_model import load_tokenizer
from polymodal.modeling.meta_device import llm_settings, outline, tokens_per_tile
from polymodal.modeling.vlm import MultimodalLM
from polymodal.planning.starting_point import Start, starting_point
from polymodal.processing.chat_template.encode import ChatTemplate
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.safety.config_json import read_json
from polymodal.safety.model_folder import check_folder
from polymodal.training.optimizer import apply_policy
from polymodal.training.recipes.load import apply_override, load_any_recipe, read_yaml, recipe_class
from polymodal.training.recipes.pipeline import MakeStage, TrainStage, is_pipeline, load_pipeline
from polymodal.training.recipes.sections import RecipeBase, SourceConfig
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import TRACKERS, tracker_module
from polymodal.utils.extras import extra
from polymodal.utils.files import check_writable, home_path
from polymodal.utils.modules import match_names
from polymodal.utils.strict import mistakes

ROWS = 64
"""Rows of each data file that are read."""
FRESH = {"projector": "projector.*", "temporal_encoder": "temporal_encoder.*", "audio_projector": "audio_projector.*",
         "image_newline": "image_newline"}  # fmt: skip
"""Parts that a stage may begin with random values, and the rule that trains each."""


@dataclass
class Findings:
    """What was found."""

    errors: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # What cannot be known yet, or may be meant

    @contextmanager
    def collect(self, where: str) -> Iterator[None]:
        """Keep a mistake and go on behind the block."""
        try:
            yield
        except PolymodalError as error:
            text = str(error)
            told = text if text.startswith(where) else f"{where}: {text}"
            if told not in self.errors:
                self.errors.append(told)


def check(path: Path, overrides: Sequence[str] = ()) -> Findings:
    """Look a recipe or pipeline file over, with overrides as of `polymodal train`."""
    found = Findings()
    if not is_pipeline(path):
        data = read_yaml(path)
        with found.collect(str(path)):
            for override in overrides:
                apply_override(data, override, recipe_class(data))
        wrong = mistakes(recipe_class(data), data, str(path))
        found.errors += [str(error) for error in wrong]
        if not found.errors:
            recipe = load_any_recipe(path, list(overrides))
            _stage(recipe, None, str(path), path, found)
        return found
    wrong = []
    pipeline = load_pipeline(path, overrides, wrong)
    found.errors += [str(error) for error in wrong]
    left: dict[str, Start] = {}
    makes = any(not isinstance(stage, TrainStage) for stage in pipeline.stages.values())
    for name, stage in pipeline.stages.items():
        if isinstance(stage, MakeStage):
            check_writable(pipeline.output_dir, "output_dir ", folder=True)
        if not isinstance(stage, TrainStage):
            continue
        recipe = stage.recipe
        before = None
        if isinstance(recipe, Recipe) and (known := left.get(recipe.init.from_folder or "")) is not None:
            before = known.under(recipe)
        start = _stage(recipe, before, f"stages.{name}", path, found, pipeline.output_dir if makes else None)
        if start is not None and isinstance(recipe, Recipe):
            left[str(Path(recipe.output_dir) / "final")] = start.after(recipe, recipe.name)
    return found


def _stage(
    recipe: RecipeBase,
    start: Start | None,
    where: str,
    path: Path,
    found: Findings,
    made: Path | None = None,  # The folder that earlier stages of a pipeline fill
) -> Start | None:
    """Look one training stage over; gives what it starts from, where that is known."""
    finished = (Path(recipe.output_dir) / "final").is_dir()  # whose data may be gone
    for key, sources in () if finished else (("mix", recipe.data.mix), ("eval", recipe.data.eval)):
        for number, source in enumerate(sources):
            with found.collect(f"{where}: data.{key}.{number}"):
                _source(source, made, found, f"{where}: data.{key}.{number}")
    for name in recipe.run.trackers:
        with found.collect(f"{where}: run.trackers"):
            if name not in TRACKERS:
                raise unknown_name("tracker", name, TRACKERS)
            tracker_module(name)
    if recipe.run.eval_every and not recipe.data.eval:
        found.remarks.append(f"{where}: run.eval_every without files in data.eval evaluates nothing")
    try:
        extra("matplotlib.figure", f"{where}: curves in the report need", "polymodal[train]")
    except ConfigError as error:
        found.remarks.append(str(error))
    with found.collect(f"{where}: output_dir"):
        check_writable(Path(recipe.output_dir), folder=True)
    if not isinstance(recipe, Recipe):
        return None
    if start is None:
        with found.collect(f"{where}: init"):
            start = _start(recipe, path, where, found)
    if start is None:
        return None
    parts = _parts(recipe, start, where, made, found)
    if parts is None:
        return start
    with found.collect(f"{where}: train"):
        _policy(recipe, start, where, found)
    return start


def _start(recipe: Recipe, path: Path, where: str, found: Findings) -> Start | None:
    """What a stage starts from; None for a published model, whose parts are looked at when it is opened."""
    if recipe.init.from_folder is None:
        return starting_point(recipe)
    folder = folder_here(recipe.init.from_folder)
    if (folder / "config.json").is_file() or (not folder.exists() and HUB_ID.fullmatch(recipe.init.from_folder)):
        return None
    init = recipe.init.model_copy(update={"from_folder": str(folder)})
    start = starting_point(recipe.model_copy(update={"init": init}), path)
    if not folder.is_dir():
        found.remarks.append(f"{where}: init.from: {folder} is not there yet; the recipe beside this one makes it")
    return start


def _inside(name: str, folder: Path | None) -> bool:
    return folder is not None and Path(name).absolute().is_relative_to(folder.absolute())


def _source(source: SourceConfig, made: Path | None, found: Findings, where: str) -> None:
    """Read the first rows of a data file, and see that their images are there."""
    path = Path(source.path)
    if not path.exists() and _inside(source.path, made):
        found.remarks.append(f"{where}: {path} is made by an earlier stage")
        return
    root = None if source.image_root is None else Path(source.image_root)
    second = None if source.annotations is None else Path(source.annotations)
    rows = iter_rows(path, root, format=source.format, annotations=second, prompt=source.prompt)
    for row in islice(rows, ROWS):
        record = row_record(row, kind=source.kind, source=source.source)
        for part in (part for message in record.messages for part in message.media):
            if isinstance(part, Image) and isinstance(part.source, str | Path):
                name = str(part.source)
                if not name.startswith(("data:", "http:", "https:")) and not Path(name).is_file():
                    raise ConfigError(f"{path}: row {row.number}: no image {name}; is image_root right?")


def _parts(recipe: Recipe, start: Start, where: str, made: Path | None, found: Findings) -> ModelConfig | None:
    """Look at the parts that a model is composed of; None where one is missing, or not made yet."""
    config, before = start.config, len(found.errors)
    prefix = f"{where}: init.model" if recipe.init.model is not None else f"{where}: init"
    named = {"llm.model_name_or_path": config.llm.model_name_or_path}
    if config.vision is not None:
        sections = ["vision", *(f"vision.fused.{number}" for number in range(len(config.vision.fused)))]
        towers = dict(zip(sections, config.vision.towers, strict=True))
        named |= {f"{section}.vision_tower": tower.vision_tower for section, tower in towers.items()}
    if config.audio is not None:
        named["audio.audio_tower"] = config.audio.audio_tower
    unmade = [key for key, name in named.items() if _inside(name, made) and not home_path(name).exists()]
    if unmade:
        found.remarks.append(f"{prefix}: {' and '.join(unmade)} are made by an earlier stage")
        return None
    for key, name in named.items():
        with found.collect(f"{prefix}.{key}"):
            folder = home_path(name)
            if name.startswith((".", "/", "~")) and not folder.exists():
                raise CheckpointError(f"{name}: no such folder")
            if folder.is_dir():
                check_folder(folder)
                if key != "audio.audio_tower" and not any(folder.glob("*.safetensors")):
                    raise CheckpointError(f"{folder}: has no weights (*.safetensors)")
    if len(found.errors) == before:
        with found.collect(f"{prefix}.llm"):
            llm_settings(config.llm)
    if config.vision is not None and len(found.errors) == before:
        with found.collect(f"{prefix}.vision"):
            tokens_per_tile(config)
        assert config.image is not None
        for section, tower in towers.items():
            own = tower.model_dump(include={"image_mean", "image_std"}, exclude_none=True)
            key = f"{prefix}.{section}" if own else f"{prefix}.image"
            _beside_the_towers_own(
                config.image.model_copy(update=own), tower.vision_tower, recipe, key, found, section == "vision"
            )
    if len(found.errors) == before:
        with found.collect(f"{prefix}.template"):
            _template(recipe, config)
    return config if len(found.errors) == before else None


def _beside_the_towers_own(
    image: ImageConfig, tower: str, recipe: Recipe, prefix: str, found: Findings, first: bool
) -> None:
    """Compare image rules with the file that the tower brings along."""
    folder = None if tower == BUNDLED else referred_folder(tower)
    file = None if folder is None else folder / "preprocessor_config.json"
    if file is None or not file.is_file():
        return
    try:
        own = image_config_from_hf(read_json(file))
    except PolymodalError:
        return  # a processor that is none of those whose rules are known
    for key in ("image_mean", "image_std"):
        ours, theirs = getattr(image, key), getattr(own, key)
        if any(abs(a - b) > 1e-3 for a, b in zip(ours, theirs, strict=True)):
            told = f"{list(ours)} is not what the tower was trained with, {list(theirs)} ({file})"
            if recipe.init.other_image_rules:
                found.remarks.append(f"{prefix}.{key}: {told}")
            else:
                found.errors.append(f"{prefix}.{key}: {told}; where it is meant, set init.other_image_rules: true")
    for key in ("tile_size", "resample") if first else ():  # the others take what suits it
        if (ours := getattr(image, key)) != (theirs := getattr(own, key)):
            found.remarks.append(f"{prefix}.{key}: {ours}, where the tower's own is {theirs} ({file})")


def _template(recipe: Recipe, config: ModelConfig) -> None:
    """Put the chat templates over the tokenizer, where that is on this machine."""
    start = None if recipe.init.from_folder is None else folder_here(recipe.init.from_folder)  # which has its own
    own = start is not None and (start / "tokenizer.json").is_file()
    if not own and referred_folder(config.llm.model_name_or_path) is None:
        return
    tokenizer = load_tokenizer(config.llm, start)
    names = [config.template.chat_template, *([recipe.data.template] if recipe.data.template else [])]
    for name in names:
        ChatTemplate(
            tokenizer, TemplateConfig(**{**config.template.model_dump(), "chat_template": name}), len(tokenizer)
        )


def _policy(recipe: Recipe, start: Start, where: str, found: Findings) -> None:
    """Apply the rules to the model's names; nothing new may be left at random values."""
    model: MultimodalLM = outline(start.config).model
    names = [name for name, _ in model.named_parameters()]
    before = len(found.errors)
    for number, rule in enumerate(recipe.train):
        with found.collect(f"{where}: train.{number}"):
            match_names(rule.match, names, "train rule")
    if len(found.errors) > before:
        return
    lora = recipe.lora
    if lora is not None:
        plain = tuple(range(len(lora.trainable_tokens)))  # which rows they are makes no difference here
        lora = lora.model_copy(update={"load_in_4bit": False, "trainable_tokens": plain})
    groups = apply_policy(model, recipe.train, lora, recipe.optim)
    trained = {name for group in groups for name, _ in group.parameters}
    for part, match in FRESH.items():
        held = {name for name, _ in model.named_parameters() if name == part or name.startswith(f"{part}.")}
        if not held or held & trained or part in start.trained or _warm(recipe, part):
            continue
        if part in _known(recipe):
            continue
        found.errors.append(
            f"{where}: train: {part} begins with random values and no rule trains it; "
            f'add {{match: "{match}", train: true}}'
        )
    count = sum(parameter.numel() for group in groups for _, parameter in group.parameters)
    needed = (recipe.run.keep + 1) * 12 * count  # weights and two moments of each checkpoint, and the model
    folder = Path(recipe.output_dir).absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if needed > free:
        raise ConfigError(
            f"output_dir {folder}: checkpoints need about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
            "free; lower run.keep, or choose another disk"
        )


def _warm(recipe: Recipe, part: str) -> bool:
    """Whether a warm start trains a part before the stage."""
    starts = {"projector": recipe.warm_start or recipe.scene_warm_start, "audio_projector": recipe.audio_warm_start,
              "temporal_encoder": recipe.video_warm_start}  # fmt: skip
    return starts.get(part) is not None


def _known(recipe: Recipe) -> set[str]:
    """Parts whose values come from elsewhere: a pretrained projector, or the model that the stage goes on from."""
    if recipe.init.model is not None:
        return {"projector"} if recipe.init.model.projector.pretrained is not None else set()
    new = {"temporal_encoder": recipe.init.video, "audio_projector": recipe.init.audio}
    return {part for part in FRESH if new.get(part) is None}
