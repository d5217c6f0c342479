"""Training stages: one YAML recipe says what is trained, on which data, for how long; `train` runs it.

Read in this order: `recipe` (the file), `train_recipe` (what happens when), `policy` (what trains), `samples` (records
to tokens, and their order), `features` (the frozen encoder's output, computed once), `packing` (what makes a step),
`loop` (the steps), `engine` (one device or many), `checkpoint` and `resume` (crash-safe state), `evaluate`, `report`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.training.recipes.load import AnyRecipe, load_any_recipe, load_recipe
from polymodal.training.recipes.sft import Recipe

if TYPE_CHECKING:
    from polymodal.training.sft.task import Parts

__all__ = ["Recipe", "load_any_recipe", "load_recipe", "train"]


def train(recipe: AnyRecipe, parts: Parts | None = None, force: bool = False) -> Path:
    """Run one training stage; see `train_recipe.train`, and `pairs.train` for a recipe with an `objective`.

    Args:
        recipe: The stage.
        parts: A language model already in memory, in place of what `recipe.init` names.
        force: Go on from a checkpoint although recipe or data changed.

    Returns:
        The folder of the trained model.
    """
    if not isinstance(recipe, Recipe):
        from polymodal.training.contrastive.run import train_pairs

        return train_pairs(recipe, force)
    from polymodal.training.run import train as run

    return run(recipe, parts, force)
