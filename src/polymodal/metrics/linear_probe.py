"""What can be read from a frozen tower's features without any text: nearest neighbours and a linear probe.

For towers that no text was ever compared with, so that all kinds stand on equal terms: k-NN as DINO reports it (Caron
et al. 2021, arXiv:2104.14294: cosine, votes weighted with exp(cosine / 0.07)) and a linear classifier, here ridge
regression to one-hot labels in closed form, which needs no schedule and gives the same answer every time. Its strength
is chosen on training images put aside group by group, so that two views of one thing are never on both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from polymodal.errors import DataError

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties that are tried, as shares of the features' mean variance times the number of images."""
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Labelled:
    """Features of images whose class is known."""

    features: Tensor  # [N, E], one vector an image
    labels: Tensor  # [N] int64, 0 to C - 1
    # [N] images of one group show the same thing; None where every image is its own group
    groups: Sequence[str] | None = None


def knn(train: Labelled, test: Labelled, k: int = 20, chunk: int = 1024) -> Tensor:  # -> [n]
    """Classify by the nearest training images."""
    classes = _check(train, test)
    learnt, asked = (F.normalize(part.features.float(), dim=-1) for part in (train, test))
    marks = F.one_hot(train.labels, classes).float()
    right = []
    for start in range(0, len(asked), chunk):
        near, where = (asked[start : start + chunk] @ learnt.T).topk(min(k, len(learnt)), dim=1)
        votes = ((near / TEMPERATURE).exp()[..., None] * marks[where]).sum(dim=1)
        right.append(_right(votes, test.labels[start : start + chunk]))
    return torch.cat(right)


def linear_probe(train: Labelled, test: Labelled, seed: int = 0) -> Tensor:  # -> [n]
    """Classify with a ridge regression to one-hot labels, every class weighted alike."""
    classes = _check(train, test)
    groups = list(train.groups) if train.groups is not None else [str(i) for i in range(len(train.labels))]
    names = sorted(set(groups))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    aside = {names[i] for i in order[: max(1, len(names) // 5)]}
    held = torch.tensor([group in aside for group in groups])
    strength = STRENGTHS[len(STRENGTHS) // 2]
    if 0 < int(held.sum()) < len(held):
        solve = _Ridge(train.features[~held], train.labels[~held], classes)
        scores = [float(_right(solve(s, train.features[held]), train.labels[held]).double().mean()) for s in STRENGTHS]
        strength = STRENGTHS[max(range(len(STRENGTHS)), key=lambda i: (scores[i], i))]
    return _right(_Ridge(train.features, train.labels, classes)(strength, test.features), test.labels)


class _Ridge:
    """Ridge regression whose expensive half is done once for all strengths."""

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        features = features.double()
        self.mean, self.scale = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-6)
        inputs = (features - self.mean) / self.scale
        targets = F.one_hot(labels, classes).double()
        weight = 1 / targets.sum(dim=0).clamp_min(1)[labels]
        weight *= len(labels) / weight.sum()
        self.centre = (inputs * weight[:, None]).mean(dim=0)
        self.prior = (targets * weight[:, None]).mean(dim=0)
        inputs = inputs - self.centre
        values, self.vectors = torch.linalg.eigh(inputs.T @ (inputs * weight[:, None]))
        self.values = values.clamp_min(0)
        self.product = self.vectors.T @ (inputs.T @ ((targets - self.prior) * weight[:, None]))
        self.size = len(labels)

    def __call__(self, strength: float, features: Tensor) -> Tensor:
        weights = self.vectors @ (self.product / (self.values + strength * self.size)[:, None])
        return ((features.double() - self.mean) / self.scale - self.centre) @ weights + self.prior


def _right(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether the right class scores higher than every other."""
    own = scores.gather(1, labels[:, None])
    return (scores >= own).sum(dim=1) == 1


def _check(train: Labelled, test: Labelled) -> int:
    """The number of classes, after a look at the shapes."""
    for name, part in (("training", train), ("test", test)):
        if part.features.ndim != 2 or len(part.features) != len(part.labels) or not len(part.labels):
            raise DataError(f"{name} features of shape {list(part.features.shape)} for {len(part.labels)} labels")
        if not bool(torch.isfinite(part.features).all()):
            raise DataError(f"{name} features are not finite")
    if train.features.shape[1] != test.features.shape[1]:
        raise DataError(f"features of {train.features.shape[1]} numbers for training, {test.features.shape[1]} to test")
    return int(max(train.labels.max(), test.labels.max())) + 1
