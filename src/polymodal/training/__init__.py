"""Training stages: one YAML recipe says what is trained, on which data, for how long; `train` runs it.

Read in this order: `recipes` (the files), `run` (what happens when), `task` (what a kind of training gives the
trainer: `sft`, `contrastive`), `trainer` (the steps), `optimizer` (what trains), `distributed` (one device or many),
`checkpoint` (crash-safe state), `feature_cache` (a frozen encoder's output, computed once), `reporting`.
"""

from pathlib import Path
from typing import Any

from polymodal.training.recipes.load import load_any_recipe, load_recipe
from polymodal.training.recipes.sections import RecipeBase
from polymodal.training.recipes.sft import Recipe

__all__ = ["Recipe", "load_any_recipe", "load_recipe", "train"]


def train(recipe: RecipeBase, inputs: Any = None, force: bool = False) -> Path:
    """Run one training stage, or go on with it from its newest checkpoint.

    Args:
        recipe: The stage, of any task.
        inputs: A model already in memory, in place of what `recipe.init` names; see the task, such as
            `sft.dataset.StageInputs`.
        force: Go on from a checkpoint although recipe or data changed.

    Returns:
        The folder of the trained model.
    """
    from polymodal.training.run import train as run  # torch is imported only here

    return run(recipe, inputs, force)
