"""The model that a plan begins with: a recipe's, also where the stage before it has not run yet, or one named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from polymodal.checkpoints.model_folder import CONFIG_NAME, read_config, read_history
from polymodal.config import LLMConfig, ModelConfig, new_image_rules, new_senses
from polymodal.errors import CheckpointError, ConfigError
from polymodal.modeling.meta_device import with_own_towers
from polymodal.training.recipes.load import load_recipe
from polymodal.training.recipes.sft import Recipe
from polymodal.utils.files import home_path, shipped_folder


@dataclass(frozen=True)
class Start:
    """What a recipe starts from."""

    config: ModelConfig  # The model's configuration
    trained: frozenset[str]  # Parts that earlier stages trained, such as "llm"
    origin: str  # Where the configuration was found, for a person

    def under(self, recipe: Recipe) -> Start:
        """The same with what a recipe says of images, and the senses that it adds."""
        config = new_image_rules(self.config, recipe.init.image)
        return replace(self, config=new_senses(config, recipe.init.video, recipe.init.audio))

    def after(self, recipe: Recipe, maker: str) -> Start:
        """What a recipe leaves that starts from this."""
        parts = {rule.match.split(".")[0] for rule in recipe.train if rule.train}
        return Start(self.config, self.trained | parts, f"as {maker} will leave it")


def starting_point(recipe: Recipe, path: Path | None = None) -> Start:
    """Find out what a recipe starts from; recipes beside its file are searched for the one that makes its folder."""
    if recipe.init.model is not None:
        return Start(recipe.init.model, frozenset(), "as the recipe composes it")
    assert recipe.init.from_folder is not None
    folder = Path(recipe.init.from_folder)
    if (folder / CONFIG_NAME).is_file():
        trained = {name for entry in read_history(folder) for name in entry.get("trained", ())}
        return Start(with_own_towers(read_config(folder), folder), frozenset(trained), f"as in {folder}").under(recipe)
    for other in sorted(path.parent.glob("*.yaml")) if path is not None else ():
        try:
            before = load_recipe(other)
        except ConfigError:
            continue  # a pipeline file, or another's recipe with a mistake: not what is looked for
        if Path(before.output_dir) / "final" == folder and other != path:
            return starting_point(before, other).after(before, str(other)).under(recipe)
    if (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: a published model; plan it as a folder of ours (`polymodal convert {folder} DST`)"
        )
    raise CheckpointError(
        f"{folder}: no such model folder, and no recipe beside this one makes it; run the stage before it, or plan that"
    )


def model_config(name: str) -> ModelConfig:
    """The configuration of a shipped model, a folder of ours, or a language model (a folder or hub id)."""
    folder = home_path(name)
    for place in (shipped_folder() / name, folder):
        if (place / CONFIG_NAME).is_file():
            return with_own_towers(read_config(place), place)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: neither a polymodal.json nor a config.json in it")
    if not folder.is_dir() and name.count("/") != 1:
        raise CheckpointError(f"{name}: no such model folder, and no hub id (owner/name)")
    return ModelConfig(llm=LLMConfig(model_name_or_path=str(folder) if folder.is_dir() else name))
