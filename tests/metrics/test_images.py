"""PSNR and SSIM against closed forms and scikit-image's values; what is used of a codebook."""

from __future__ import annotations

import math

import pytest
import torch

from polymodal.metrics.images import code_usage, psnr, ssim


def waves(shift: float) -> torch.Tensor:
    """An image that any library can make again."""
    rows, columns = torch.arange(24, dtype=torch.float64)[:, None], torch.arange(32, dtype=torch.float64)[None]
    bands = [torch.sin(rows / 3 + shift), torch.cos(columns / 4 - shift), torch.sin((rows + columns) / 5)]
    return (torch.stack([band.expand(24, 32) for band in bands]) / 2 + 0.5)[None]


def test_psnr_is_the_logarithm_of_the_mean_squared_error() -> None:
    images, references = torch.full((2, 3, 8, 8), 0.5), torch.stack([torch.full((3, 8, 8), v) for v in (0.6, 0.5)])
    assert psnr(images, references).tolist() == pytest.approx([20.0, 100.0], abs=1e-5)


def test_ssim_of_flat_images_is_that_of_their_means() -> None:
    low, high = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.7)
    wanted = (2 * 0.2 * 0.7 + 1e-4) / (0.2**2 + 0.7**2 + 1e-4)
    assert ssim(low, high).item() == pytest.approx(wanted, abs=1e-6)


def test_ssim_of_an_image_with_itself_is_one_and_is_counted_image_by_image() -> None:
    first, second = waves(0), waves(0.3)
    both = ssim(torch.cat([first, second]), torch.cat([first, first]))
    assert both[0].item() == pytest.approx(1) and both[1].item() == pytest.approx(ssim(second, first).item())


def test_ssim_and_psnr_are_those_of_scikit_image() -> None:
    # structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0)
    # and peak_signal_noise_ratio of scikit-image 0.26.0.
    assert ssim(waves(0.3), waves(0)).item() == pytest.approx(0.8966059897532542, abs=1e-6)
    assert psnr(waves(0.3), waves(0)).item() == pytest.approx(21.42163723407197, abs=1e-6)


def test_usage_and_perplexity() -> None:
    assert code_usage(torch.tensor([5, 5, 5, 5])) == {"used": 1.0, "perplexity": pytest.approx(4)}
    assert code_usage(torch.tensor([8, 0, 0, 0])) == {"used": 0.25, "perplexity": pytest.approx(1)}
    shares = [0.5, 0.25, 0.25]
    wanted = math.exp(-sum(share * math.log(share) for share in shares))
    assert code_usage(torch.tensor([2, 1, 1]))["perplexity"] == pytest.approx(wanted)
