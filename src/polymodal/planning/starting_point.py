"""What a recipe starts from, also where the stage before it has not run yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polymodal.config import ModelConfig, new_image_rules
from polymodal.errors import CheckpointError, ConfigError
from polymodal.training.recipes.load import load_recipe
from polymodal.training.recipes.sft import Recipe


@dataclass(frozen=True)
class Start:
    """What a recipe starts from."""

    config: ModelConfig  # The model's configuration
    trained: frozenset[str]  # Parts that earlier stages trained, such as "llm"
    note: str  # Where the configuration was found, for a person


def starting_point(recipe: Recipe, path: Path | None = None) -> Start:
    """Find out what a recipe starts from, also where the stage before it has not run yet."""
    from polymodal.checkpoints.model_folder import CONFIG_NAME, read_config, read_history

    if recipe.init.model is not None:
        return Start(recipe.init.model, frozenset(), "as the recipe composes it")
    assert recipe.init.from_folder is not None
    folder, image = Path(recipe.init.from_folder), recipe.init.image
    if (folder / CONFIG_NAME).is_file():
        trained = {name for entry in read_history(folder) for name in entry.get("trained", ())}
        config = new_image_rules(resolve_bundled(read_config(folder), folder), image)
        return Start(config, frozenset(trained), f"as in {folder}")
    for other in sorted(path.parent.glob("*.yaml")) if path is not None else ():
        try:
            before = load_recipe(other)
        except ConfigError:
            continue  # a pipeline file, or another's recipe with a mistake: not what is looked for
        if Path(before.output_dir) / "final" == folder and other != path:
            start = starting_point(before, other)
            parts = {rule.match.split(".")[0] for rule in before.train if rule.train}
            config = new_image_rules(start.config, image)
            return Start(config, start.trained | parts, f"as {other} will leave it")
    if (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: a published model; plan it as a folder of ours (`polymodal convert {folder} DST`)"
        )
    raise CheckpointError(
        f"{folder}: no such model folder, and no recipe beside this one makes it; run the stage before it, or plan that"
    )


def resolve_bundled(config: ModelConfig, folder: Path) -> ModelConfig:
    """Name the folders of parts that lie in a model's own folder."""
    if config.vision is not None and config.vision.vision_tower == "bundled":
        tower = config.vision.model_copy(update={"vision_tower": str(folder / "vision")})
        return config.model_copy(update={"vision": tower})
    return config
