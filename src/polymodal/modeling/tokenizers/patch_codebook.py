"""The baseline that every learned tokenizer must beat: k-means over patches; a patch's code is the nearest centroid.

It needs no network and no training loop, is the same for the same images and seed, and decodes to centroids. Lloyd's
algorithm from a k-means++ start (Arthur and Vassilvitskii 2007); a centroid that loses all its patches is put on the
patch that is farthest from its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polymodal.errors import DataError
from polymodal.media_plan import Size
from polymodal.modeling.tokenizers.config import PatchCodebookConfig
from polymodal.modeling.tokenizers.quantizers import check_ids, nearest

CHUNK = 8192
"""Patches whose distances to all centroids are held at once."""


class PatchCodebook(nn.Module):
    """See `ImageTokenizer`."""

    def __init__(self, config: PatchCodebookConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size, self.image_size = config.codebook_size, config.image_size
        self.patch_size = config.patch_size
        side = config.image_size // config.patch_size
        self.grid = Size(side, side)
        self.codebook: Tensor
        self.register_buffer("codebook", torch.zeros(config.codebook_size, 3 * config.patch_size**2))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], 0 to 1, to ids [N, rows * columns]."""
        patches = self.patches(pixels.float())
        ids = torch.cat([nearest(part, self.codebook) for part in patches.split(CHUNK)])
        return ids.view(len(pixels), self.grid.area)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids [N, rows * columns] to pixels [N, 3, H, W], 0 to 1."""
        check_ids(ids, self.codebook_size, self.grid)
        rows = self.codebook[ids].transpose(1, 2)
        return F.fold(rows, self.image_size, self.patch_size, stride=self.patch_size).clamp(0, 1)

    def patches(self, pixels: Tensor) -> Tensor:  # [N, 3, H, W] -> [N * rows * columns, 3 * P * P]
        """Cut images into patches, row by row."""
        cut: Tensor = F.unfold(pixels, self.patch_size, stride=self.patch_size)
        return cut.transpose(1, 2).flatten(0, 1)

    @torch.no_grad()
    def fit(self, pixels: Tensor, *, seed: int = 0, rounds: int = 30, most: int = 200_000) -> PatchCodebook:
        """Learn the centroids of images [N, 3, H, W], 0 to 1; of more than `most` patches, some are drawn."""
        patches = self.patches(pixels.float())
        draw = torch.Generator().manual_seed(seed)
        if len(patches) > most:
            patches = patches[torch.randperm(len(patches), generator=draw)[:most]]
        found = kmeans(patches, self.codebook_size, draw, rounds)
        self.codebook.copy_(found)
        return self


def kmeans(points: Tensor, count: int, draw: torch.Generator, rounds: int = 30) -> Tensor:  # [n, d] -> [count, d]
    """Find centroids; stops early where nothing moves."""
    if len(points) < count:
        raise DataError(f"{len(points):,} patches for a codebook of {count:,}: give more images, or a smaller codebook")
    centroids = _spread(points, count, draw)
    before: Tensor | None = None
    for _ in range(rounds):
        found = [torch.cdist(part, centroids).min(dim=1) for part in points.split(CHUNK)]
        ids, distances = torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])
        if before is not None and torch.equal(ids, before):
            break
        before = ids
        counts = torch.bincount(ids, minlength=count)
        sums = torch.zeros_like(centroids).index_add_(0, ids, points)
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), centroids)
        if empty := int((counts == 0).sum()):
            centroids[counts == 0] = points[distances.topk(empty).indices]
    return centroids


def _spread(points: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Choose first centroids among a sample of the points, each far from those before it (k-means++)."""
    some = points[torch.randperm(len(points), generator=draw)[: max(20 * count, 4096)]]
    chosen = [int(torch.randint(len(some), (1,), generator=draw))]
    far = (some - some[chosen[0]]).square().sum(dim=1)
    while len(chosen) < count:
        weights = far if float(far.sum()) > 0 else torch.ones_like(far)  # fewer different points than centroids
        chosen.append(int(torch.multinomial(weights, 1, generator=draw)))
        far = torch.minimum(far, (some - some[chosen[-1]]).square().sum(dim=1))
    return some[chosen].clone()
