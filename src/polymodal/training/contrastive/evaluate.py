"""Evaluation between steps: the loss over held-out pairs, and retrieval both ways.

The loss is taken over whole contrasts of `batch.global_size` pairs, since it depends on how many are contrasted;
images that are left over count for retrieval only. Retrieval is over all held-out images and all their captions.
It changes nothing in the run.
"""

import time
from typing import Any

import numpy as np
import torch

from polymodal.metrics.retrieval import chance, embedding_ranks, recall_of
from polymodal.modeling.dual_encoders.base import METRIC
from polymodal.training.contrastive.dataset import PairDataset, Plan
from polymodal.training.contrastive.step import pair_losses
from polymodal.training.distributed import Engine
from polymodal.training.recipes.contrastive import PairRecipe
from polymodal.training.steps import step_seed
from polymodal.utils.threads import ahead

MICRO = 64
"""Pairs that go through the encoders at once where the recipe does not say."""


def evaluate_pairs(engine: Engine, dataset: PairDataset, recipe: PairRecipe, step: int) -> dict[str, Any]:
    """Evaluate; every process must call it."""
    began = time.monotonic()
    engine.inner.eval()
    shares = engine.world.gather(_embed(engine, dataset, recipe))
    rounds = sorted((found for own, _ in shares for found in own), key=lambda found: found[0])
    losses = [terms for _, own in shares for terms in own]
    image = torch.cat([found[1] for found in rounds if found[1] is not None])
    text, image_of_text = torch.cat([found[2] for found in rounds]), torch.cat([found[3] for found in rounds])
    # Images of two sources with the same pixels are one image; those that broke since are none.
    shown = torch.cat([found[3] for found in rounds if found[1] is not None]).numpy()
    ids, first = np.unique(dataset.prepared.image_ids[shown], return_index=True)
    asked = dataset.prepared.image_ids[image_of_text.numpy()]
    whole = np.isin(asked, ids)
    text, owner = text[torch.from_numpy(whole)], torch.from_numpy(np.searchsorted(ids, asked[whole]))
    line: dict[str, Any] = {"step": step, "data": "held-out", "images": len(first), "captions": len(text)}
    if losses:
        means = {name: sum(one[name] for one in losses) / len(losses) for name in losses[0]}
        terms = {name: value for name, value in means.items() if not name.startswith(METRIC)}
        line |= {"loss": sum(terms.values()), "terms": terms}
        line["metrics"] = {n.removeprefix(METRIC): value for n, value in means.items() if n.startswith(METRIC)}
    line["recall"] = recall_of(embedding_ranks(image[torch.from_numpy(first)], text, owner))
    line["chance"] = chance(len(first), owner)
    line["seconds"] = round(time.monotonic() - began, 2)
    return line


def _embed(engine: Engine, dataset: PairDataset, recipe: PairRecipe) -> tuple[list[Any], list[dict[str, float]]]:
    """This process's share of the features and losses: every so many-th contrast."""
    world, model = engine.world, engine.inner
    features: list[Any] = []
    losses: list[dict[str, float]] = []
    contrasted = min(recipe.batch.global_size, len(dataset.prepared.ids))  # pairs of a contrast, or all there are
    plans = list(enumerate(_plans(dataset, contrasted)))[world.rank :: world.size]
    size = recipe.batch.micro_size or min(MICRO, recipe.batch.global_size)
    micro = [part for _, (plan, _) in plans for part in plan.split(size)]
    batches = ahead(dataset.batch, micro, recipe.run.workers)
    for number, (plan, first) in plans:
        own = [next(batches).to(world.device) for _ in plan.split(size)]
        if first and len(plan.indices) == contrasted:
            terms, image, text = pair_losses(model, own, engine.autocast, step_seed(recipe.run.seed, number, 0))
            losses.append({name: float(term) for name, term in terms.items()})
        else:
            with torch.no_grad(), engine.autocast():
                both = [model.embed(batch) for batch in own]
            image, text = torch.cat([one.image for one in both]), torch.cat([one.text for one in both])
        names = [name for batch in own for name in batch.ids]
        rows = [row for row, index in enumerate(plan.indices) if names[row] == dataset.prepared.ids[index]]
        indices = torch.from_numpy(plan.indices[rows])
        features.append((number, image[rows].float().cpu() if first else None, text[rows].float().cpu(), indices))
    return features, losses


def _plans(dataset: PairDataset, contrasted: int) -> list[tuple[Plan, bool]]:
    """Each image with its first caption, then with the others; and whether it is the first."""
    captions = dataset.prepared.captions
    plans: list[tuple[Plan, bool]] = []
    for number in range(max(len(own) for own in captions)):
        indices = np.array([i for i, own in enumerate(captions) if len(own) > number], dtype=np.int64)
        texts = np.array([captions[i].start + number for i in indices], dtype=np.int64)
        whole = Plan(indices, texts, None, dataset.length(texts))
        plans += [(part, number == 0) for part in whole.split(contrasted)]
    return plans
