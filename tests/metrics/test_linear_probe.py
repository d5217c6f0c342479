"""k-NN and the linear probe: against plain formulas, on data whose answer is known, and groups kept apart."""

from __future__ import annotations

import math

import pytest
import torch

from polymodal.errors import DataError
from polymodal.metrics.linear_probe import STRENGTHS, Labelled, _Ridge, knn, linear_probe


def blobs(seed: int, each: int = 30, classes: int = 3, width: int = 6, noise: float = 0.6) -> Labelled:
    centres = torch.eye(classes, width) * 2
    labels = torch.arange(classes).repeat_interleave(each)
    random = torch.Generator().manual_seed(seed)
    return Labelled(centres[labels] + noise * torch.randn(len(labels), width, generator=random), labels)


def test_both_solve_what_can_be_solved() -> None:
    train, test = blobs(0), blobs(1)
    assert knn(train, test).double().mean() > 0.9
    assert linear_probe(train, test).double().mean() > 0.9
    wrong = Labelled(test.features, (test.labels + 1) % 3)
    assert linear_probe(train, wrong).double().mean() < 0.1 and knn(train, wrong).double().mean() < 0.1


def test_knn_equals_votes_counted_one_by_one() -> None:
    train, test = blobs(2, each=8, noise=2.0), blobs(3, each=5, noise=2.0)
    expected = []
    for vector, label in zip(test.features, test.labels, strict=True):
        near = sorted(
            ((float(vector @ other / vector.norm() / other.norm()), int(own)) for other, own in
             zip(train.features, train.labels, strict=True)), reverse=True,
        )[:5]  # fmt: skip
        votes = [sum(math.exp(cosine / 0.07) for cosine, own in near if own == c) for c in range(3)]
        expected.append(votes.index(max(votes)) == int(label))
    assert knn(train, test, k=5, chunk=4).tolist() == expected


def test_the_closed_form_is_the_weighted_least_squares_solution() -> None:
    train = blobs(4, each=10, noise=1.0)
    keep = torch.tensor([*range(4), *range(10, 30)])  # classes of unequal size weigh alike
    features, labels = train.features[keep].double(), train.labels[keep]
    inputs = (features - features.mean(0)) / features.std(0, correction=0)
    targets = torch.nn.functional.one_hot(labels, 3).double()
    weight = 1 / targets.sum(0)[labels]
    weight *= len(labels) / weight.sum()
    weights = torch.zeros(6, 3, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        error = ((inputs @ weights + bias - targets) ** 2).sum(1) @ weight
        loss = error + 0.1 * len(labels) * (weights**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    asked = blobs(5, each=4).features
    expected = (asked.double() - features.mean(0)) / features.std(0, correction=0) @ weights + bias
    assert torch.allclose(_Ridge(features, labels, 3)(0.1, asked), expected.detach(), atol=1e-5)


def test_groups_stay_together_when_the_strength_is_chosen() -> None:
    """Every thing carries a mark of its own: split within things, a weak penalty that reads marks would look best."""
    random = torch.Generator().manual_seed(0)
    things = 24
    labels = torch.randint(2, (things,), generator=random)
    signal = (labels * 2 - 1)[:, None] * 0.7 + torch.randn(things, 1, generator=random)
    marks = torch.randn(things, 60, generator=random)
    image = torch.cat([signal, marks], dim=1).repeat_interleave(5, dim=0)
    groups = [str(i) for i in range(things) for _ in range(5)]
    train = Labelled(image + 0.01 * torch.randn(image.shape, generator=random), labels.repeat_interleave(5), groups)
    chosen = []
    original = _Ridge.__call__

    def watch(self: _Ridge, strength: float, features: torch.Tensor) -> torch.Tensor:
        chosen.append((strength, len(features)))
        return original(self, strength, features)

    test = Labelled(train.features[:7], train.labels[:7])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Ridge, "__call__", watch)
        linear_probe(train, test)
    tried = [size for _, size in chosen[:-1]]
    assert [s for s, _ in chosen[:-1]] == list(STRENGTHS)
    assert set(tried) == {(things // 5) * 5} and chosen[-1][1] == 7


def test_ties_are_wrong_and_bad_features_are_refused() -> None:
    same = Labelled(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))
    assert not knn(same, same).any() and not linear_probe(same, same).any()
    with pytest.raises(DataError, match="not finite"):
        knn(same, Labelled(torch.full((1, 3), torch.nan), torch.tensor([0])))
    with pytest.raises(DataError, match="3 numbers for training, 2 to test"):
        linear_probe(same, Labelled(torch.ones(1, 2), torch.tensor([0])))
    with pytest.raises(DataError, match="for 2 labels"):
        knn(Labelled(torch.ones(1, 2), torch.tensor([0, 1])), same)
