"""The look at held-out pairs between steps: the loss, and retrieval both ways.

The loss is taken over whole contrasts of `batch.global_size` pairs, since it depends on how many are contrasted;
images that are left over count for retrieval only. Retrieval is over all held-out images and all their captions.
It changes nothing in the run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polymodal.errors import CheckpointError
from polymodal.metrics.retrieval import chance, embedding_ranks, recall_of
from polymodal.modeling.dual_encoders.base import METRIC, PairModel
from polymodal.modeling.dual_encoders.registry import METADATA_NAME
from polymodal.training import optimizer as policy
from polymodal.training.checkpoint import identity
from polymodal.training.contrastive.dataset import PairFeed, Plan
from polymodal.training.contrastive.step import pair_losses
from polymodal.training.contrastive.task import PairParts
from polymodal.training.reporting.log import read_log
from polymodal.training.trainer import State, step_seed
from polymodal.utils.files import atomic_folder, write_text
from polymodal.utils.threads import ahead

if TYPE_CHECKING:
    from polymodal.training.distributed import Engine
    from polymodal.training.recipes.contrastive import PairRecipe


MICRO = 64
"""Pairs that go through the encoders at once where the recipe does not say."""


@dataclass(frozen=True)
class PairEvaluation:
    """Call it with an engine and a step."""

    feed: PairFeed  # The held-out pairs
    recipe: PairRecipe  # For batch sizes

    def __call__(self, engine: Engine, step: int) -> dict[str, Any]:
        """Evaluate; every process must call it."""
        began = time.monotonic()
        engine.inner.eval()
        model: Any = engine.inner
        mine, terms = self._parts(model, engine)
        parts = engine.world.gather((mine, terms))
        rounds = sorted((part for own, _ in parts for part in own), key=lambda part: part[0])
        losses = [found for _, own in parts for found in own]
        pairs = self.feed.prepared
        image = torch.cat([part[1] for part in rounds if part[1] is not None])
        text, image_of_text = torch.cat([part[2] for part in rounds]), torch.cat([part[3] for part in rounds])
        # Images of two sources with the same pixels are one image.
        _, first, same = np.unique(pairs.image_ids, return_index=True, return_inverse=True)
        owner = torch.from_numpy(same)[image_of_text]
        line: dict[str, Any] = {"step": step, "data": "held-out", "images": len(first), "captions": len(text)}
        if losses:
            means = {name: sum(one[name] for one in losses) / len(losses) for name in losses[0]}
            line["loss"] = sum(value for name, value in means.items() if not name.startswith(METRIC))
            line["terms"] = {name: value for name, value in means.items() if not name.startswith(METRIC)}
            line["metrics"] = {n.removeprefix(METRIC): value for n, value in means.items() if n.startswith(METRIC)}
        line["recall"] = recall_of(embedding_ranks(image[torch.from_numpy(first)], text, owner))
        line["chance"] = chance(len(first), owner)
        line["seconds"] = round(time.monotonic() - began, 2)
        return line

    def _parts(self, model: PairModel, engine: Engine) -> tuple[list[Any], list[dict[str, float]]]:
        """This process's share of the features and losses: every so many-th contrast."""
        world, found, terms = engine.world, [], []
        plans = self._plans()
        mine = [(number, *plan) for number, plan in enumerate(plans) if number % world.size == world.rank]
        size = self.recipe.batch.micro_size or min(MICRO, self.recipe.batch.global_size)
        micro = [part for _, plan, _ in mine for part in plan.split(size)]
        batches = ahead(self.feed.batch, micro, self.recipe.run.workers)
        for number, plan, first in mine:
            own = [next(batches).to(world.device) for _ in plan.split(size)]
            whole = first and len(plan.indices) == self._contrasted()
            seed = step_seed(self.recipe.run.seed, number, 0)
            if whole:
                named, image, text = pair_losses(model, own, engine.autocast, seed)
                terms.append({name: float(term) for name, term in named.items()})
            else:
                with torch.no_grad(), engine.autocast():
                    both = [model.embed(batch) for batch in own]
                image, text = torch.cat([one.image for one in both]), torch.cat([one.text for one in both])
            indices = torch.from_numpy(plan.indices)
            found.append((number, image.float().cpu() if first else None, text.float().cpu(), indices))
        return found, terms

    def _contrasted(self) -> int:
        """Pairs of a contrast: those of a training step, or all there are."""
        return min(self.recipe.batch.global_size, len(self.feed.prepared.ids))

    def _plans(self) -> list[tuple[Plan, bool]]:
        """Each image with its first caption, then with the others; and whether it is the first."""
        captions = self.feed.prepared.captions
        plans: list[tuple[Plan, bool]] = []
        for turn in range(max(len(own) for own in captions)):
            indices = np.array([i for i, own in enumerate(captions) if len(own) > turn], dtype=np.int64)
            texts = np.array([captions[i].start + turn for i in indices], dtype=np.int64)
            whole = Plan(indices, texts, None, self.feed.length(texts))
            plans += [(part, turn == 0) for part in whole.split(self._contrasted())]
        return plans


# ---- The trained model as a folder that other tools load, with a file of ours beside it ----


def export_pair_model(
    final: Path, recipe: PairRecipe, parts: PairParts, groups: Sequence[policy.Group], state: State
) -> None:
    """Write the trained model; the folder does not show how many processes trained it."""
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
        write_text(work / METADATA_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
