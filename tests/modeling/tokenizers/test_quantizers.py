"""What quantizers promise: the nearest entry, running means, revival, gradients straight through, levels one to one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polymodal.errors import ConfigError
from polymodal.modeling.tokenizers.quantizers import FSQ, VectorQuantizer, nearest


def plain(codebook_size: int = 8, dim: int = 4, **options: float) -> VectorQuantizer:
    """A codebook between two layers that change nothing."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(dim, codebook_size, dim, **options)  # type: ignore[arg-type]
    for layer in (quantizer.project_in, quantizer.project_out):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    return quantizer


def begun(entries: torch.Tensor, **options: float) -> VectorQuantizer:
    quantizer = plain(len(entries), entries.shape[1], **options)
    quantizer.codebook.copy_(entries)
    quantizer.counts.fill_(1)
    quantizer.sums.copy_(entries)
    quantizer.begun.fill_(True)
    return quantizer


def test_the_nearest_entry_is_taken_in_float32_whatever_autocast_says() -> None:
    torch.manual_seed(1)
    vectors, entries = torch.randn(50, 4), torch.randn(8, 4)
    wanted = torch.tensor([min(range(8), key=lambda k: float((v - entries[k]).norm())) for v in vectors])
    assert torch.equal(nearest(vectors, entries), wanted)
    close = torch.tensor([[1.0, 0.0], [1.001, 0.0]])  # which bf16 cannot tell apart
    quantizer = begun(close).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = quantizer(close.flip(0))
    assert found.ids.tolist() == [1, 0] and torch.allclose(found.vectors, close.flip(0), atol=1e-6)
    assert torch.allclose(quantizer.lookup(found.ids), close.flip(0), atol=1e-6)


def test_the_gradient_passes_straight_through_and_the_commitment_goes_to_the_encoder_alone() -> None:
    entries = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    quantizer = begun(entries, commitment=0.25)
    vectors = torch.tensor([[0.9, 0.8]], requires_grad=True)
    found = quantizer(vectors)
    (found.vectors * torch.tensor([2.0, 3.0])).sum().backward(retain_graph=True)
    assert torch.equal(vectors.grad, torch.tensor([[2.0, 3.0]]))
    vectors.grad = None
    found.loss.backward()
    # 0.25 * mean((z - e)^2): the gradient is 0.25 * 2 * (z - e) / 2, and was not zeroed by the straight-through line
    assert torch.allclose(vectors.grad, 0.25 * (torch.tensor([[0.9, 0.8]]) - 1))
    assert found.loss.item() == pytest.approx(0.25 * (0.01 + 0.04) / 2)


def test_entries_are_running_means_of_the_vectors_nearest_to_them() -> None:
    quantizer = begun(torch.tensor([[0.0, 0.0], [10.0, 10.0]]), decay=0.9, revive_below=0)
    quantizer(torch.tensor([[1.0, 0.0], [3.0, 0.0], [10.0, 12.0]]))
    before = quantizer.codebook.clone()
    assert torch.equal(before, torch.tensor([[0.0, 0.0], [10.0, 10.0]]))  # nothing moves within a step
    quantizer.update()
    # counts 0.9 * 1 + 0.1 * n, sums likewise
    wanted = torch.tensor([[0.1 * 4 / 1.1, 0.0], [(9 + 1) / 1.0, (9 + 1.2) / 1.0]])
    assert torch.allclose(quantizer.codebook, wanted)
    quantizer.update()  # nothing was seen since
    assert torch.allclose(quantizer.codebook, wanted)


def test_micro_batches_of_a_step_are_one_batch() -> None:
    torch.manual_seed(2)
    vectors, entries = torch.randn(32, 4), torch.randn(8, 4)
    whole, parts = begun(entries, revive_below=0), begun(entries, revive_below=0)
    whole(vectors)
    for part in vectors.split(8):
        parts(part)
    whole.update()
    parts.update()
    assert torch.allclose(whole.codebook, parts.codebook, atol=1e-6)


def test_dead_entries_come_to_life_where_vectors_are_far_from_theirs() -> None:
    far = torch.cat([torch.tensor([[0.0, 0.0], [0.1, 0.1]]), torch.full((6, 2), 1000.0)])
    quantizer = begun(far, revive_below=0.05, decay=0.5)
    torch.manual_seed(0)
    vectors = torch.cat([torch.randn(200, 2) * 0.01, torch.randn(20, 2) + 5])
    used = []
    for _ in range(30):
        used.append(len(quantizer(vectors).ids.unique()))
        quantizer.update()
    assert used[0] == 2 and used[-1] == 8
    still = begun(far, revive_below=0, decay=0.5)
    for _ in range(30):
        assert len(still(vectors).ids.unique()) == 2
        still.update()


def test_a_step_that_is_not_finite_leaves_the_codebook_alone() -> None:
    quantizer = begun(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    quantizer(torch.tensor([[float("nan"), 0.0]]))
    quantizer.update()
    assert torch.equal(quantizer.codebook, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))


def test_the_codebook_begins_with_the_first_batch_and_evaluation_changes_nothing() -> None:
    quantizer = plain().eval()
    before = quantizer.codebook.clone()
    vectors = torch.randn(100, 4) + 7
    quantizer(vectors)
    quantizer.update()
    assert torch.equal(quantizer.codebook, before) and not quantizer.begun
    found = quantizer.train()(vectors)
    assert quantizer.begun and torch.cdist(quantizer.codebook, vectors).min(dim=1).values.max() < 0.1
    assert len(found.ids.unique()) == 8
    few = plain(codebook_size=16)
    few(torch.randn(3, 4))  # fewer vectors than entries
    assert few.codebook.isfinite().all() and len(few.codebook.unique(dim=0)) == 16


def test_directions_alone_with_l2_norm() -> None:
    quantizer = plain(l2_norm=True)
    vectors = torch.randn(64, 4)
    quantizer(vectors)
    quantizer.update()
    assert torch.allclose(quantizer.codebook.norm(dim=1), torch.ones(8), atol=1e-5)
    quantizer.eval()
    assert torch.equal(quantizer(vectors).ids, quantizer(5 * vectors).ids)


@pytest.mark.parametrize("levels", [(2, 2), (3, 4), (8, 5, 5), (7,)])
def test_fsq_levels_and_codes_are_one_to_one(levels: tuple[int, ...]) -> None:
    quantizer = FSQ(6, levels)
    ids = torch.arange(quantizer.codebook_size)
    combinations = quantizer.levels_of(ids)
    assert len(combinations.unique(dim=0)) == quantizer.codebook_size
    assert torch.equal(combinations.amax(dim=0) + 1, torch.tensor(levels)) and int(combinations.min()) == 0
    assert torch.equal((combinations * quantizer.places).sum(dim=1), ids)


def test_fsq_reaches_every_code_and_looks_up_what_it_gave() -> None:
    torch.manual_seed(0)
    quantizer = FSQ(2, (4, 3))
    nn.init.eye_(quantizer.project_in.weight)
    nn.init.zeros_(quantizer.project_in.bias)
    vectors = (8 * torch.rand(2000, 2) - 4).requires_grad_()
    found = quantizer(vectors)
    assert len(found.ids.unique()) == 12 and found.loss.item() == 0
    assert torch.allclose(quantizer.lookup(found.ids), found.vectors, atol=1e-5)
    found.vectors.sum().backward()
    assert (vectors.grad.abs().sum(dim=1) > 0).all()  # rounding does not stop the gradient
    assert len(FSQ(2, (5, 5))(torch.zeros(1, 2)).ids) == 1


def test_fsq_needs_levels() -> None:
    with pytest.raises(ConfigError, match="give 2 or more"):
        FSQ(4, (8, 1))
