"""Hard negatives: never a pair of the same image, as often as the softmax says, the same however a step is split."""

from __future__ import annotations

import math

import pytest
import torch

from polymodal.errors import DataError
from polymodal.modeling.dual_encoders.losses import draw_negatives, itm_inputs

IDS = torch.tensor([4, 9, 4, 1, 9, 0])


def similarity(rows: int, columns: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * scale


def test_negatives_are_never_of_the_same_image() -> None:
    """Even where the own text is by far the closest, and the others' weights are nothing."""
    for scale in (2.0, 5000.0):
        close = similarity(6, 6, scale) + 10 * scale * (IDS[:, None] == IDS[None])
        random = torch.Generator().manual_seed(0)
        for _ in range(300):
            drawn = draw_negatives(close, IDS, IDS, 0, random)
            assert drawn.dtype is torch.int64 and drawn.shape == (6,)
            assert (IDS[drawn] != IDS).all()


def test_negatives_come_as_often_as_the_softmax_says() -> None:
    close, random, draws = similarity(6, 6), torch.Generator().manual_seed(0), 3000
    drawn = torch.stack([draw_negatives(close, IDS, IDS, 0, random) for _ in range(draws)])
    for row in range(6):
        others = [column for column in range(6) if IDS[column] != IDS[row]]
        total = sum(math.exp(close[row, column]) for column in others)
        for column in others:
            share = math.exp(close[row, column]) / total
            found = int((drawn[:, row] == column).sum()) / draws
            # Four standard deviations.
            assert abs(found - share) <= 4 * math.sqrt(share * (1 - share) / draws), (row, column)


def test_a_split_step_draws_what_a_whole_one_does() -> None:
    close = similarity(6, 6)
    whole = draw_negatives(close, IDS, IDS, 0, 11)
    parts = [draw_negatives(close[i : i + 2], IDS[i : i + 2], IDS, i, 11) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(draw_negatives(close, IDS, IDS, 0, torch.Generator().manual_seed(11)), whole)
    others = [draw_negatives(close, IDS, IDS, 0, seed) for seed in range(20)]
    assert any(not torch.equal(other, whole) for other in others)


def test_torchs_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    draw_negatives(similarity(6, 6).requires_grad_(), IDS, IDS, 0, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("count", [1, 3])
def test_pairs_of_a_single_image_are_refused(count: int) -> None:
    ids = torch.full((count,), 5)
    with pytest.raises(DataError, match=f"the {count} pairs of a step all show the same image"):
        draw_negatives(similarity(count, count), ids, ids, 0, 0)


def test_rows_of_the_matching_loss() -> None:
    images, texts = itm_inputs(torch.tensor([5, 0]), torch.tensor([1, 4]), offset=2)
    assert images.tolist() == [2, 3, 5, 0, 2, 3]
    assert texts.tolist() == [2, 3, 2, 3, 1, 4]
