"""Vectors to codes: a learned codebook whose entries are running means, or fixed levels per dimension (FSQ).

A quantizer owns the two linear layers around it, so that codes have few dimensions (8 use a codebook far better than
hundreds do; Yu et al. 2022, arXiv:2110.04627) whatever the width of encoder and decoder.

`VectorQuantizer` is that of VQ-VAE with running means (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1). A
step's vectors are remembered by `forward` and enter the codebook in `update`, so that its micro-batches and processes
meet one codebook and their number changes nothing. Entries that hardly any vector is nearest to are put where vectors
are far from theirs, drawn by squared distance as in k-means++. `FSQ` is that of Mentzer et al. 2023, arXiv:2309.15505.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from polymodal.errors import ConfigError
from polymodal.media_plan import Size

KEPT = 8192
"""Vectors of a step that dead entries are replaced from, at most."""

_REVIVED = 4
"""An entry starts again with so many times the count below which it is dead."""


class Quantized(NamedTuple):
    """What a quantizer makes of vectors."""

    vectors: Tensor  # [..., C] nearest to those given; their gradient is passed straight through
    ids: Tensor  # [...] int64
    loss: Tensor  # Scalar, commitment included; 0 where there is none


class Quantizer(nn.Module, ABC):
    """Vectors to codes and back.

    Attributes:
        codebook_size: K, the number of codes.
    """

    codebook_size: int

    @abstractmethod
    def forward(self, vectors: Tensor) -> Quantized:
        """Quantize vectors.

        Args:
            vectors: [..., C].

        Returns:
            The quantized vectors, their ids and the loss.
        """

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Give the vectors of codes.

        Args:
            ids: [...] from 0 to K - 1.

        Returns:
            [..., C].
        """

    def update(self) -> None:  # levels that are fixed learn nothing
        """Take up what was seen since the last update; called after every optimizer step."""


class VectorQuantizer(Quantizer):
    """A codebook of running means, the nearest entry by distance."""

    def __init__(
        self,
        width: int,  # C, of the vectors given
        codebook_size: int,
        code_dim: int = 8,
        decay: float = 0.99,  # Of the running means
        commitment: float = 0.25,
        revive_below: float = 0.05,  # Entries nearest to fewer vectors than this part of the mean are put elsewhere
        l2_norm: bool = False,  # Compare directions only
    ) -> None:
        super().__init__()
        self.codebook_size, self.decay, self.commitment = codebook_size, decay, commitment
        self.revive_below, self.l2_norm = revive_below, l2_norm
        self.project_in, self.project_out = nn.Linear(width, code_dim), nn.Linear(code_dim, width)
        self.codebook: Tensor
        self.counts: Tensor
        self.sums: Tensor
        self.begun: Tensor
        self.register_buffer("codebook", torch.randn(codebook_size, code_dim))
        self.register_buffer("counts", torch.zeros(codebook_size))  # Running means, as the next
        self.register_buffer("sums", torch.zeros(codebook_size, code_dim))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))
        self._seen: list[tuple[Tensor, Tensor]] = []  # Vectors and their ids since the last update

    def forward(self, vectors: Tensor) -> Quantized:
        """Quantize vectors [..., C]; in training, remember them for `update`."""
        with torch.autocast(vectors.device.type, enabled=False):
            codes = self._normed(self.project_in(vectors.float()))
            flat = codes.detach().flatten(0, -2)
            if self.training and not self.begun:
                self._begin(flat)
            ids = nearest(flat, self.codebook)
            if self.training:
                self._seen.append((flat, ids))
            ids = ids.view(codes.shape[:-1])
            entries = self.codebook[ids]
            # Before the straight-through line, after which the two are equal.
            loss = self.commitment * F.mse_loss(codes, entries)
            return Quantized(self.project_out(codes + (entries - codes).detach()), ids, loss)

    def lookup(self, ids: Tensor) -> Tensor:
        """Give the vectors [..., C] of codes [...]."""
        with torch.autocast(ids.device.type, enabled=False):
            found: Tensor = self.project_out(self.codebook[ids])
        return found

    @torch.no_grad()
    def update(self) -> None:
        """Move the running means, and the entries with them; then revive dead ones."""
        if not self._seen:
            return
        vectors, ids = torch.cat([v for v, _ in self._seen]), torch.cat([i for _, i in self._seen])
        self._seen = []
        counts = torch.zeros_like(self.counts).index_add_(0, ids, torch.ones_like(vectors[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, ids, vectors)
        _sum_over_processes(counts)
        _sum_over_processes(sums)
        if not bool(sums.isfinite().all()):
            return  # the trainer leaves such a step out, too
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        alive = self.counts >= self.revive_below * self.counts.mean()
        self.codebook[alive] = self._normed(self.sums[alive] / self.counts[alive, None].clamp_min(1e-12))
        if not bool(alive.all()):
            far = (vectors - self.codebook[ids]).square().sum(dim=1)
            self._replace(~alive, vectors, far, _REVIVED * self.revive_below * self.counts.mean())

    @torch.no_grad()
    def _begin(self, vectors: Tensor) -> None:
        """Make entries of the first vectors, and count each as often as it would be evenly."""
        everything = torch.ones_like(self.counts, dtype=torch.bool)
        size = torch.tensor(float(len(vectors)), device=vectors.device)
        _sum_over_processes(size)
        self._replace(everything, vectors, torch.ones_like(vectors[:, 0]), size / self.codebook_size)
        self.begun.fill_(True)

    def _replace(self, which: Tensor, vectors: Tensor, weights: Tensor, count: Tensor) -> None:
        """Put entries on vectors drawn by weight; several processes take those of the first."""
        wanted = int(which.sum())
        if len(vectors) > KEPT:
            some = torch.randperm(len(vectors), device=vectors.device)[:KEPT]
            vectors, weights = vectors[some], weights[some]
        weights = weights + 1e-12 + weights.mean() * 1e-3
        drawn = torch.multinomial(weights, min(wanted, len(vectors)))
        if wanted > len(drawn):  # more entries than vectors: some twice, with a little noise to part them
            drawn = torch.cat([drawn, torch.randint(len(vectors), (wanted - len(drawn),), device=vectors.device)])
        found = vectors[drawn] + 1e-3 * vectors.std(correction=0) * torch.randn_like(vectors[drawn])
        found = self._normed(found)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(found, 0)
        self.codebook[which], self.counts[which] = found, count
        self.sums[which] = found * count

    def _normed(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.l2_norm else vectors


class FSQ(Quantizer):
    """Finite scalar quantization: each dimension is rounded to one of a few levels; a code is their combination."""

    def __init__(self, width: int, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ConfigError(f"levels {list(levels)}: give 2 or more for each dimension")
        self.codebook_size = math.prod(levels)
        self.project_in, self.project_out = nn.Linear(width, len(levels)), nn.Linear(len(levels), width)
        places = [math.prod(levels[:number]) for number in range(len(levels))]
        self.levels: Tensor
        self.places: Tensor
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(self, vectors: Tensor) -> Quantized:
        """Round vectors [..., C]."""
        with torch.autocast(vectors.device.type, enabled=False):
            top = (self.levels - 1).float()
            # 0 .. levels - 1, every level with the same room: the ends are 1/2 wider than their centres.
            free = self.project_in(vectors.float()).sigmoid() * (top + 1) - 0.5
            levels = torch.minimum(free.round().clamp_min(0), top)
            ids = (levels.detach().long() * self.places).sum(dim=-1)
            rounded = free + (levels - free).detach()
            return Quantized(self.project_out(rounded / top * 2 - 1), ids, vectors.new_zeros((), dtype=torch.float32))

    def lookup(self, ids: Tensor) -> Tensor:
        """Give the vectors [..., C] of codes [...]."""
        with torch.autocast(ids.device.type, enabled=False):
            levels = self.levels_of(ids).float()
            found: Tensor = self.project_out(levels / (self.levels - 1) * 2 - 1)
        return found

    def levels_of(self, ids: Tensor) -> Tensor:
        """The level of each dimension, [..., d], of codes [...]."""
        return ids[..., None] // self.places % self.levels


def nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    """The entry [N] nearest to each vector: vectors [N, C], entries [K, C]; in float32."""
    return torch.cdist(vectors.float(), entries.float()).argmin(dim=1)


def check_ids(ids: Tensor, codebook_size: int, grid: Size) -> None:
    """Make sure that codes [N, rows * columns] are as many as an image has, and in range."""
    if ids.ndim != 2 or ids.shape[1] != grid.area:
        raise ConfigError(f"codes of shape {list(ids.shape)}: an image has {grid.area} of them; give [N, {grid.area}]")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= codebook_size):
        raise ConfigError(f"codes {int(ids.min())} to {int(ids.max())}: this tokenizer has 0 to {codebook_size - 1}")


def _sum_over_processes(tensor: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
