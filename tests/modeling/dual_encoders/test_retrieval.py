"""Recall and zero-shot scores: counted by hand, against a naive sort, in parts as whole, ties never helping."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from polymodal.errors import DataError
from polymodal.metrics.retrieval import (
    chance,
    class_embeddings,
    embedding_ranks,
    recall,
    recall_of,
    similarity_ranks,
    zero_shot,
    zero_shot_chance,
)


def test_by_hand() -> None:
    # Two captions of the first image, one of the second.
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.8, 0.7]])
    found = recall(similarity, torch.tensor([0, 0, 1]), ks=(1, 2))
    assert found["image_to_text@1"] == 0.5  # the first image by its second caption; the second image's is beaten
    assert found["image_to_text@2"] == 1.0
    assert found["text_to_image@1"] == pytest.approx(2 / 3)  # the first caption prefers the wrong image
    assert found["text_to_image@2"] == 1.0


def naive_recall(similarity: torch.Tensor, own: list[int], k: int) -> tuple[float, float]:
    images, texts = similarity.shape
    rows = [sorted(range(texts), key=lambda t: -float(similarity[i, t]))[:k] for i in range(images)]
    columns = [sorted(range(images), key=lambda i: -float(similarity[i, t]))[:k] for t in range(texts)]
    by_image = sum(any(own[t] == i for t in row) for i, row in enumerate(rows)) / images
    return by_image, sum(own[t] in column for t, column in enumerate(columns)) / texts


@pytest.mark.parametrize("seed", range(4))
def test_equals_a_naive_sort(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, texts = 7, 15
    own = [*range(images), *torch.randint(images, (texts - images,), generator=generator).tolist()]
    similarity = torch.randn(images, texts, generator=generator)
    found = recall(similarity, torch.tensor(own), ks=(1, 3, 5))
    for k in (1, 3, 5):
        expected = naive_recall(similarity, own, k)
        assert (found[f"image_to_text@{k}"], found[f"text_to_image@{k}"]) == pytest.approx(expected)


def test_ties_do_not_help() -> None:
    own = torch.arange(12)
    assert set(recall(torch.zeros(12, 12), own).values()) == {0.0}
    assert zero_shot(torch.ones(3, 4), torch.ones(8, 4), torch.tensor([0, 1, 2])) == {"top1": 0.0, "top5": 0.0}
    # Two captions of one image that tie are both right.
    assert recall(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([0, 0, 1]), ks=(1,)) == {
        "image_to_text@1": 1.0,
        "text_to_image@1": 1.0,
    }


@pytest.mark.parametrize("queries", [0, 3])
def test_in_parts_as_whole(queries: int) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(9, *([queries] if queries else []), 6, generator=generator)
    text = torch.randn(14, 6, generator=generator)
    own = torch.tensor([*range(9), 0, 1, 2, 3, 4])
    whole = image @ text.T if not queries else torch.stack([(q @ text.T).amax(0) for q in image])
    expected = similarity_ranks(whole, own)
    for budget in (1, 500, 1 << 20):
        ranks = embedding_ranks(image, text, own, budget=budget)
        assert torch.equal(ranks.image_to_text, expected.image_to_text)
        assert torch.equal(ranks.text_to_image, expected.text_to_image)
    assert recall_of(expected) == recall(whole, own)


def test_chance_is_what_random_orders_score() -> None:
    own = torch.tensor([0, 0, 0, 1, 2])
    exact = chance(3, own, ks=(1, 2))
    hits = dict.fromkeys(exact, 0.0)
    orders = list(itertools.permutations(range(5)))
    for order in orders:
        for k in (1, 2):
            top = [int(own[t]) for t in order[:k]]
            hits[f"image_to_text@{k}"] += sum(i in top for i in range(3)) / 3 / len(orders)
    assert exact["image_to_text@1"] == pytest.approx(hits["image_to_text@1"])
    assert exact["image_to_text@2"] == pytest.approx(hits["image_to_text@2"])
    assert exact["text_to_image@1"] == pytest.approx(1 / 3)
    assert chance(3, own, ks=(10,)) == {"image_to_text@10": 1.0, "text_to_image@10": 1.0}


def test_a_class_is_the_mean_of_its_prompts_directions() -> None:
    prompts = torch.tensor([[[10.0, 0.0], [0.0, 0.1]], [[-1.0, 0.0], [-5.0, 0.0]]])
    classes = class_embeddings(prompts)
    half = math.sqrt(0.5)
    assert torch.allclose(classes, torch.tensor([[half, half], [-1.0, 0.0]]))
    image = torch.tensor([[0.0, 1.0], [-1.0, -0.1]])
    assert zero_shot(image, classes, torch.tensor([0, 1]))["top1"] == 1.0
    assert zero_shot(image, classes, torch.tensor([1, 1]), budget=1)["top1"] == 0.5


def test_several_right_classes() -> None:
    classes = torch.eye(6)
    image = torch.eye(6)[:2] * 1.0 + torch.linspace(0.1, 0.6, 6)[None] * 0.5
    labels = torch.zeros(2, 6, dtype=torch.bool)
    labels[0, 0] = labels[0, 3] = labels[1, 2] = True
    assert zero_shot(image, classes, labels) == {"top1": 0.5, "top5": 1.0}
    assert zero_shot_chance(labels, 6)["top1"] == pytest.approx((2 / 6 + 1 / 6) / 2)
    assert zero_shot_chance(torch.tensor([1]), 3) == {"top1": pytest.approx(1 / 3), "top5": 1.0}


@pytest.mark.parametrize(
    ("similarity", "own", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1]), "3 texts but image_of_text has 2"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 2]), "0 to 2"),
        (torch.zeros(2, 3), torch.tensor([0, 0, 0]), "image 1 has no text"),
        (torch.zeros(0, 0), torch.zeros(0, dtype=torch.long), "nothing"),
        (torch.tensor([[math.nan, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), "not finite"),
    ],
)
def test_what_cannot_be_scored(similarity: torch.Tensor, own: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        recall(similarity, own)


def test_labels_that_cannot_be_used() -> None:
    image, classes = torch.eye(3), torch.eye(3)
    for labels, message in (
        (torch.tensor([0, 1, 3]), "there are 3 classes"),
        (torch.zeros(3, 3, dtype=torch.bool), "image 0 has no right class"),
        (torch.zeros(3, 2, dtype=torch.bool), "labels for 2 classes"),
        (torch.tensor([0]), "labels of 1"),
    ):
        with pytest.raises(DataError, match=message):
            zero_shot(image, classes, labels)
