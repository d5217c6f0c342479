"""One optimizer step over pairs: a single contrast, however many micro-batches and processes share it.

With `micro_size` the cached-feature method takes the step (`modeling.dual_encoders.gradient_cache`; Gao et al. 2021,
arXiv:2101.06983): the gradient is that of the whole batch, while only one micro-batch's activations are kept. A frozen
tower runs once for each image, not once for each pass.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from polymodal.modeling.dual_encoders.base import METRIC, Embedded, Everyone, PairBatch, PairModel
from polymodal.modeling.dual_encoders.gradient_cache import cached_backward, gather, gather_with_grad
from polymodal.utils.modules import frozen

Terms = dict[str, torch.Tensor]
Autocast = Callable[[], AbstractContextManager[Any]]


def pair_gradients(
    model: PairModel, batches: Sequence[PairBatch], autocast: Autocast, seed: int, rank: int = 0, with_grad: bool = True
) -> Terms:
    """Leave this process's part of a step's gradient; summed over processes it is the gradient of the global batch."""
    batches, towers = _through_tower(model, batches, autocast)
    everyone: list[Everyone] = []
    own_pairs = sum(len(batch) for batch in batches)

    def embed(batch: PairBatch) -> tuple[list[torch.Tensor], Embedded]:
        with autocast():
            found = model.embed(batch)
        return [found.image, found.text], found

    def contrast(image: torch.Tensor, text: torch.Tensor) -> Terms:
        collect = gather_with_grad if with_grad else gather
        all_image, all_text, offset = collect(image), collect(text), rank * own_pairs
        all_of_them = Everyone(
            image=all_image.detach(),
            text=all_text.detach(),
            image_ids=gather(torch.cat([batch.image_ids for batch in batches])),
            input_ids=gather(torch.cat([batch.input_ids for batch in batches])),
            attention_mask=gather(torch.cat([batch.attention_mask for batch in batches])),
            features=gather(torch.cat(towers)) if towers else None,
            offset=offset,
            seed=seed,
        )
        everyone.append(all_of_them)
        ids = all_of_them.pair_ids
        own_ids = ids[offset : offset + own_pairs]
        with autocast():
            return model.contrast(Embedded(image, text), own_ids, all_image, all_text, ids, offset)

    def extra(start: int, batch: PairBatch, tensors: Sequence[torch.Tensor], embedded: Embedded) -> Terms:
        here = replace(everyone[0], offset=rank * own_pairs + start)
        with autocast():
            return model.extra(batch, embedded, here)

    return cached_backward(embed, contrast, extra, batches)


@torch.no_grad()
def pair_losses(
    model: PairModel, batches: Sequence[PairBatch], autocast: Autocast, seed: int
) -> tuple[Terms, torch.Tensor, torch.Tensor]:
    """The terms of one contrast in this process alone, without a gradient."""
    batches, towers = _through_tower(model, batches, autocast)
    with autocast():
        found = [model.embed(batch) for batch in batches]
    image, text = torch.cat([one.image for one in found]), torch.cat([one.text for one in found])
    everyone = Everyone(
        image,
        text,
        torch.cat([batch.image_ids for batch in batches]),
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.attention_mask for batch in batches]),
        torch.cat(towers) if towers else None,
        seed=seed,
    )
    ids = everyone.pair_ids
    with autocast():
        terms = dict(model.contrast(Embedded(image, text), ids, image, text, ids, 0))
        start = 0
        for batch, embedded in zip(batches, found, strict=True):
            for name, term in model.extra(batch, embedded, replace(everyone, offset=start)).items():
                share = len(batch) / len(ids) if name.startswith(METRIC) else 1
                terms[name] = terms.get(name, torch.zeros((), device=term.device)) + term * share
            start += len(batch)
    return terms, image, text


def _through_tower(
    model: PairModel, batches: Sequence[PairBatch], autocast: Autocast
) -> tuple[list[PairBatch], list[torch.Tensor]]:
    """Run a frozen tower once; and collect its output where the model needs that of every pair."""
    done: list[PairBatch] = []
    towers: list[torch.Tensor] = []
    still = frozen(model.tower)
    for batch in batches:
        features = batch.features
        if features is None and (still or model.needs_features):
            assert batch.pixel_values is not None
            with torch.no_grad(), autocast():
                features = model.encode(batch.pixel_values)
        if model.needs_features:
            assert features is not None
            towers.append(features.detach())
        done.append(replace(batch, features=features, pixel_values=None) if still else batch)
    return done, towers
