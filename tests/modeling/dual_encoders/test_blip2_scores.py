"""Retrieval with a second look, and matching with hard negatives, counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from polymodal.metrics.retrieval import recall, similarities
from polymodal.modeling.dual_encoders.blip2_stage1 import Blip2Stage1
from recipes.blip2.evaluate import Gallery, matching_scores, open_gallery, retrieval_scores, second_look

Make = Callable[..., Any]
TEXTS = ["a red apple", "rain", "two apples on a wooden table", "the car", "a cat", "a dog in the rain", "a table"]
OWNER = torch.tensor([0, 0, 1, 2, 3, 4, 5])


def gallery_of(model: Blip2Stage1, batch: Any, size: int = 64) -> Gallery:
    return open_gallery(model, model.encode(batch.pixel_values), TEXTS, OWNER, size)


def test_batches_change_nothing(blip2_model: Make, blip2_batch: Make) -> None:
    model = blip2_model().eval()
    one, other = (gallery_of(model, blip2_batch(model), size) for size in (64, 2))
    assert (one.image - other.image).abs().max() < 1e-5 and (one.text - other.text).abs().max() < 1e-5
    close = similarities(one.image, one.text)
    for of_texts, matrix in ((False, close), (True, close.T)):
        looks = [second_look(model, one, matrix, 3, size, of_texts) for size in (64, 4)]
        assert (looks[0] - looks[1]).abs().max() < 1e-4


def test_without_a_second_look_it_is_contrast(blip2_model: Make, blip2_batch: Make) -> None:
    model = blip2_model().eval()
    gallery = gallery_of(model, blip2_batch(model))
    assert retrieval_scores(model, gallery) == recall(similarities(gallery.image, gallery.text), OWNER)


def test_a_second_look_orders_the_nearest_and_no_others(blip2_model: Make, blip2_batch: Make) -> None:
    model = blip2_model().eval()
    gallery = gallery_of(model, blip2_batch(model))
    close = similarities(gallery.image, gallery.text)
    looked = second_look(model, gallery, close, 2)
    for row in range(6):
        nearest = set(close[row].topk(2).indices.tolist())
        assert set(looked[row].topk(2).indices.tolist()) == nearest
        for column in range(7):
            logit = model.match_queries(
                gallery.features[[row]], gallery.input_ids[[column]], gallery.attention_mask[[column]]
            ).mean(dim=1)[0, 1]
            wanted = close[row, column] + (logit.detach() if column in nearest else -1000)
            assert float(looked[row, column]) == pytest.approx(float(wanted), abs=1e-3)
    by_text = second_look(model, gallery, close.T, 7, of_texts=True)
    whole = second_look(model, gallery, close, 7)
    assert (by_text.T - whole).abs().max() < 1e-4


def test_a_head_that_knows_finds_everything(
    blip2_model: Make, blip2_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the matching head is always right, looking at all texts finds every pair; always no finds none."""
    model = blip2_model().eval()
    gallery = gallery_of(model, blip2_batch(model))
    images = {tuple(f.flatten().tolist()): number for number, f in enumerate(gallery.features)}
    texts = {tuple(ids.tolist()): number for ids, number in zip(gallery.input_ids, OWNER.tolist(), strict=True)}

    def knows(features: torch.Tensor, ids: torch.Tensor, _mask: torch.Tensor) -> torch.Tensor:
        own = [images[tuple(f.flatten().tolist())] for f in features]
        right = [number == texts[tuple(row.tolist())] for number, row in zip(own, ids, strict=True)]
        yes = torch.where(torch.tensor(right), 9.0, -9.0)
        return torch.stack([-yes, yes], dim=1)[:, None].expand(-1, 4, -1)

    with monkeypatch.context() as patch:
        patch.setattr(model, "match_queries", knows)
        assert set(retrieval_scores(model, gallery, reranked=7).values()) == {1.0}
        found = matching_scores(model, gallery)
        assert (found.accuracy, found.balanced, found.pairs, found.negatives) == (1.0, 1.0, 1.0, 1.0)
        patch.setattr(model, "match_queries", lambda f, i, m: torch.tensor([1.0, 0.0]).expand(len(f), 4, 2))
        found = matching_scores(model, gallery, group=3)
        assert found.accuracy == pytest.approx(2 / 3) and (found.balanced, found.pairs) == (0.5, 0.0)
