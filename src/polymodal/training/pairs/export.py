"""The trained model as a folder that other tools load, with a file of ours beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from polymodal.errors import CheckpointError
from polymodal.representation.notes import NOTES
from polymodal.training import optimizer as policy
from polymodal.training.contrastive.task import PairParts
from polymodal.training.reporting.log import read_log
from polymodal.training.resume import identity
from polymodal.training.state import State
from polymodal.utils.files import atomic_folder, write_text

if TYPE_CHECKING:
    from polymodal.training.recipes.contrastive import PairRecipe


def export_pair_model(
    final: Path, recipe: PairRecipe, parts: PairParts, groups: Sequence[policy.Group], state: State
) -> None:
    """Write the trained model; the folder does not show how many processes trained it.

    Args:
        final: Where to; an earlier one is replaced.
        recipe: The stage.
        parts: The model.
        groups: What was trained.
        state: At the end of the run.

    Raises:
        PolymodalError: It cannot be written, or a weight is not finite.
    """
    model: Any = parts.model
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"{final}: {name} holds NaN or infinity; nothing was saved")
    output_dir = Path(recipe.output_dir)
    lines = [line for line in read_log(output_dir / "log.jsonl") if line["loss"] is not None]
    looks = read_log(output_dir / "eval.jsonl")
    scores = (
        {key: looks[-1][key] for key in ("loss", "terms", "metrics", "recall", "chance") if key in looks[-1]}
        if looks
        else {}
    )
    stage = {
        "stage": recipe.name,
        "objective": recipe.objective.type,
        "trained": sorted({name.split(".")[0] for group in groups for name, _ in group.parameters}),
        "steps": state.step,
        "samples": state.samples,
        "loss": lines[-1]["loss"] if lines else None,
        "recipe": identity(recipe),
    }
    document = {
        "format": 1,
        "objective": recipe.objective.type,
        "image": model.image.model_dump(mode="json"),
        "facts": model.facts(),
        "held_out": scores,
        "history": [*parts.history, stage],
    }
    with atomic_folder(final, replace=True) as work:
        model.eval()
        model.save(work)
        write_text(work / NOTES, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
