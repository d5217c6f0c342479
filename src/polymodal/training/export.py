"""The trained model as a model folder, with the stage added to its history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polymodal.training import optimizer as policy
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import read_log
from polymodal.training.resume import identity
from polymodal.training.sft.task import Parts
from polymodal.training.state import State


def export(final: Path, recipe: Recipe, parts: Parts, groups: Sequence[policy.Group], state: State) -> None:
    """Write the trained model; the folder does not show how many processes trained it.

    Args:
        final: Where to; an earlier one is replaced.
        recipe: The stage.
        parts: The model, whole and on this process.
        groups: What was trained.
        state: At the end of the run.

    Raises:
        PolymodalError: It cannot be written.
    """
    from polymodal.checkpoints.model_folder import save_model

    names = [name for group in groups for name, _ in group.parameters]
    trained = sorted({"lora" if policy.is_adapter(name) else name.split(".")[0] for name in names})
    lines = [line for line in read_log(Path(recipe.output_dir) / "log.jsonl") if line["loss"] is not None]
    stage = {
        "stage": recipe.name,
        "trained": trained,
        "steps": state.step,
        "samples": state.samples,
        "trained_tokens": state.trained_tokens,
        "loss": lines[-1]["loss"] if lines else None,
        "recipe": identity(recipe),
    }
    history = [*parts.history, stage]
    ever = {name for entry in history for name in entry.get("trained", ())}
    save_model(
        final,
        parts.model.eval(),
        parts.config,
        parts.tokenizer,
        history=history,
        llm_trained="llm" in ever,
        vision_trained="vision_encoder" in ever,
        replace=True,
    )
