"""How close one image is to another, by PSNR and SSIM; how much of a codebook is used, by share and perplexity."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-10
"""Mean squared error that counts as none: 100 dB."""
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(images: Tensor, references: Tensor) -> Tensor:  # [N, C, H, W] each, 0 to 1 -> [N]
    """Peak signal-to-noise ratio of each image in dB; at most 100."""
    errors = (images.double() - references.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(errors.clamp_min(_LEAST))


def ssim(images: Tensor, references: Tensor) -> Tensor:  # [N, C, H, W] each, 0 to 1, 11 or more pixels a side -> [N]
    """Structural similarity of each image (Wang et al. 2004: Gaussian window of 11, sigma 1.5), mean over channels."""
    near = torch.arange(_WINDOW, dtype=torch.float64, device=images.device) - _WINDOW // 2
    line = torch.exp(-near.square() / (2 * _SIGMA**2))
    down, across = (_band(line / line.sum(), side) for side in images.shape[2:])
    x, y = images.double(), references.double()

    def mean(values: Tensor) -> Tensor:
        return down @ values @ across.T

    mean_x, mean_y = mean(x), mean(y)
    of_x, of_y, of_both = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + _C1) * (2 * of_both + _C2)
    found = alike / ((mean_x**2 + mean_y**2 + _C1) * (of_x + of_y + _C2))
    return found.mean(dim=(1, 2, 3))


def _band(line: Tensor, side: int) -> Tensor:  # [w] -> [side - w + 1, side]
    """A window at every place where it fits, as a matrix."""
    places = side - len(line) + 1
    columns = torch.arange(places, device=line.device)[:, None] + torch.arange(len(line), device=line.device)
    return line.new_zeros(places, side).scatter_(1, columns, line.expand(places, -1))


def code_usage(counts: Tensor) -> dict[str, float]:  # [K] how often each code was seen
    """Which share of a codebook is used, and its perplexity: as many codes, equally often, are as hard to guess."""
    shares = counts.double() / counts.sum().clamp_min(1)
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
    return {"used": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}
