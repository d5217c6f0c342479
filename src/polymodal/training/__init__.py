"""Training stages: one YAML recipe says what is trained, on which data, for how long; `train` runs it.

Read in this order: `recipe` (the file), `policy` (what trains), `samples` (records to tokens, and their order),
`features` (the frozen encoder's output, computed once), `loop` (the steps), `checkpoint` (crash-safe state).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.training.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from polymodal.training.loop import Parts


def train(recipe: Recipe, parts: Parts | None = None) -> Path:
    """Run one training stage; see `loop.train`.

    Args:
        recipe: The stage.
        parts: A model already in memory, in place of what `recipe.init` names.

    Returns:
        The folder of the trained model.
    """
    from polymodal.training.loop import train as run

    return run(recipe, parts)


__all__ = ["Recipe", "load_recipe", "train"]
