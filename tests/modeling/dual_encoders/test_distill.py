"""Distillation against plain loops: grids, standardised channels, both distances, micro-batches, mirrored images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polymodal.errors import ConfigError, DataError
from polymodal.media_plan import Size
from polymodal.modeling.dual_encoders.base import PairBatch
from polymodal.modeling.dual_encoders.distillation import Distance, Distiller, flip_grid, pool_grid


def batch_of(teacher: Tensor | None, count: int = 3) -> PairBatch:
    ids = torch.zeros(count, 1, dtype=torch.long)
    return PairBatch(ids, ids.bool(), torch.arange(count), teacher=teacher)


def naive(patches: Tensor, teacher: Tensor, fitted: Tensor, module: Distiller, side: int, small: int) -> float:
    """One image, cell and channel after the other, in float64."""
    patches, teacher, fitted = patches.double(), teacher.double(), fitted.double()
    weight, bias = module.head.weight.detach().double(), module.head.bias.detach().double()
    step = side // small
    flat = fitted.reshape(-1, fitted.shape[-1])
    mean, deviation = flat.mean(0), (((flat - flat.mean(0)) ** 2).sum(0) / (len(flat) - 1)).sqrt()
    deviation = deviation + 0.05 * deviation.mean() + 1e-6
    total, terms = 0.0, 0
    for image in range(len(patches)):
        for row in range(small):
            for column in range(small):
                cell = torch.zeros(patches.shape[-1], dtype=torch.float64)
                for y in range(row * step, (row + 1) * step):
                    for x in range(column * step, (column + 1) * step):
                        cell += patches[image, y * side + x] / step**2
                said = weight @ cell + bias
                wanted = (teacher[image, row * small + column] - mean) / deviation
                if module.distance == "cosine":
                    total += float(1 - said @ wanted / (said.norm() * wanted.norm()))
                    terms += 1
                else:
                    for difference in (said - wanted).abs().tolist():
                        total += difference**2 / 2 if difference < 1 else difference - 0.5
                        terms += 1
    return total / terms


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_equals_plain_loops(distance: Distance) -> None:
    generator = torch.Generator().manual_seed(0)
    module = Distiller(5, Size(4, 4), 6, Size(2, 2), distance)
    seen = torch.randn(20, 4, 6, generator=generator) * torch.tensor([1, 9, 0.1, 3, 1, 1]) + 4
    module.fit(seen)
    patches = torch.randn(3, 16, 5, generator=generator)
    assert module(batch_of(seen[:3]), patches).item() == pytest.approx(
        naive(patches, seen[:3], seen, module, 4, 2), abs=1e-5
    )


def test_micro_batches_weighted_with_their_size_give_the_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    module = Distiller(5, Size(2, 2), 3, Size(2, 2), "smooth_l1")
    teacher, patches = torch.randn(7, 4, 3, generator=generator), torch.randn(7, 4, 5, generator=generator)
    module.fit(teacher)
    whole = module(batch_of(teacher, 7), patches)
    parts = [module(batch_of(teacher[a:b], b - a), patches[a:b]) * (b - a) / 7 for a, b in ((0, 4), (4, 7))]
    assert torch.allclose(whole, parts[0] + parts[1], atol=1e-6)


def test_a_finer_teacher_is_averaged_too() -> None:
    module = Distiller(2, Size(1, 1), 2, Size(2, 2), "smooth_l1")
    teacher = torch.randn(8, 4, 2, generator=torch.Generator().manual_seed(2))
    module.fit(teacher)
    pooled = teacher.mean(1, keepdim=True)
    other = Distiller(2, Size(1, 1), 2, Size(1, 1), "smooth_l1")
    other.load_state_dict({**module.state_dict()})
    other.fit(pooled)
    patches = torch.randn(8, 1, 2)
    assert torch.allclose(module(batch_of(teacher, 8), patches), other(batch_of(pooled, 8), patches), atol=1e-6)


def test_it_can_be_learnt_and_strong_channels_do_not_rule() -> None:
    torch.manual_seed(0)
    module = Distiller(8, Size(2, 2), 8, Size(2, 2), "cosine")
    patches = torch.randn(32, 4, 8)
    teacher = torch.relu(patches @ torch.randn(8, 8)) * torch.tensor([100.0, *[1.0] * 7])
    module.fit(teacher)
    batch = batch_of(teacher, 32)
    before = module(batch, patches).item()
    assert before > 0.7  # far from 0, although all raw features point into nearly one direction
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = module(batch, patches)
        loss.backward()
        optimizer.step()
    assert loss.item() < before / 2


def test_the_gradient_reaches_the_student_only() -> None:
    module = Distiller(3, Size(2, 2), 3, Size(2, 2))
    teacher = torch.randn(3, 4, 3, requires_grad=True)
    module.fit(teacher)
    patches = torch.randn(3, 4, 3, requires_grad=True)
    module(batch_of(teacher.detach()), patches).backward()
    assert patches.grad is not None and float(patches.grad.abs().sum()) > 0
    assert {name for name, _ in module.named_parameters()} == {"head.weight", "head.bias"}


def test_half_precision_features_are_compared_in_float32() -> None:
    module = Distiller(3, Size(1, 1), 2, Size(1, 1), "smooth_l1")
    teacher = torch.tensor([[[60000.0, 1.0]], [[-60000.0, 0.0]]], dtype=torch.float16)
    module.fit(teacher)
    assert torch.isfinite(module(batch_of(teacher, 2), torch.randn(2, 1, 3)))


def test_pooling_and_mirroring() -> None:
    features = torch.arange(12.0).reshape(1, 6, 2).repeat(2, 1, 1)  # 2 rows, 3 columns
    assert torch.equal(pool_grid(features, Size(2, 3), Size(1, 3))[0, :, 0], torch.tensor([3.0, 5.0, 7.0]))
    mirrored = flip_grid(features, Size(2, 3), torch.tensor([False, True]))
    assert torch.equal(mirrored[0], features[0])
    assert mirrored[1, :, 0].tolist() == [4, 2, 0, 10, 8, 6]


def test_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="cosine or smooth_l1"):
        Distiller(2, Size(1, 1), 2, Size(1, 1), "l3")  # type: ignore[arg-type]
    module = Distiller(2, Size(2, 2), 3, Size(1, 1))
    with pytest.raises(DataError, match="not been measured"):
        module(batch_of(torch.randn(3, 1, 3)), torch.randn(3, 4, 2))
    with pytest.raises(DataError, match="not finite"):
        module.fit(torch.full((3, 1, 3), torch.nan))
    module.fit(torch.randn(3, 1, 3))
    with pytest.raises(DataError, match="no teacher"):
        module(batch_of(None), torch.randn(3, 4, 2))
    with pytest.raises(DataError, match=r"student features of shape \[3, 5, 2\], expected \[B, 4, 2\]"):
        module(batch_of(torch.randn(3, 1, 3)), torch.randn(3, 5, 2))
    with pytest.raises(DataError, match="teacher features"):
        module(batch_of(torch.randn(3, 4, 3)), torch.randn(3, 4, 2))
