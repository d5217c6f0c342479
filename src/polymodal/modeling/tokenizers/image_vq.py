"""A learned image tokenizer: an encoder, a codebook and a decoder, all convolutions.

Cells of two by two pixels become channels at once, a few thin layers look at edges there, and everything wide runs on
the grid of codes, which is what makes it fast enough to train on a CPU. The decoder is the mirror image: context first,
then thin layers that join what neighbouring codes draw.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polymodal.media_plan import Size
from polymodal.modeling.tokenizers.config import FSQConfig, ImageVQConfig
from polymodal.modeling.tokenizers.quantizers import FSQ, Quantized, Quantizer, VectorQuantizer, check_ids

CELL = 2
"""Pixels of a side that become channels before the first layer."""


class ResidualBlock(nn.Module):
    """Look at the neighbours of each place, then mix its channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.look, self.mix = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.mix.weight)  # a block begins as nothing
        assert self.mix.bias is not None
        nn.init.zeros_(self.mix.bias)

    def forward(self, features: Tensor) -> Tensor:  # [N, C, H, W] -> the same
        """Add to the features."""
        found: Tensor = features + self.mix(F.gelu(self.look(self.norm(features))))
        return found


class ImageVQ(nn.Module):
    """See `ImageTokenizer`; `reconstruct` is what training runs."""

    def __init__(self, config: ImageVQConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        side = config.image_size // config.patch_size
        self.grid = Size(side, side)
        width, thin, fold = config.hidden_size, config.thin_size, config.patch_size // CELL
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(CELL),
            nn.Conv2d(3 * CELL**2, thin, 3, padding=1),
            *(ResidualBlock(thin) for _ in range(config.thin_layers)),
            nn.PixelUnshuffle(fold),
            nn.Conv2d(thin * fold**2, width, 1),
            *(ResidualBlock(width) for _ in range(config.encoder_layers)),
            nn.GroupNorm(1, width),
        )
        quantizer = config.quantizer
        self.quantizer: Quantizer
        if isinstance(quantizer, FSQConfig):
            self.quantizer = FSQ(width, quantizer.levels)
        else:
            self.quantizer = VectorQuantizer(width, **quantizer.model_dump(exclude={"type"}))
        self.codebook_size = self.quantizer.codebook_size
        self.decoder = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            *(ResidualBlock(width) for _ in range(config.decoder_layers)),
            nn.GroupNorm(1, width),
            nn.Conv2d(width, thin * fold**2, 1),
            nn.PixelShuffle(fold),
            *(ResidualBlock(thin) for _ in range(config.thin_layers)),
            nn.Conv2d(thin, 3 * CELL**2, 3, padding=1),
            nn.PixelShuffle(CELL),
        )

    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Quantized]:
        """Through the codes and back: pixels [N, 3, H, W] to the same, not clipped; codes [N, rows, columns]."""
        features = self.encoder(2 * pixels - 1)
        found: Quantized = self.quantizer(features.permute(0, 2, 3, 1))
        return self._draw(found.vectors), found

    forward = reconstruct

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], 0 to 1, to ids [N, rows * columns]."""
        found: Quantized = self.quantizer(self.encoder(2 * pixels - 1).permute(0, 2, 3, 1))
        return found.ids.flatten(1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids [N, rows * columns] to pixels [N, 3, H, W], 0 to 1."""
        check_ids(ids, self.codebook_size, self.grid)
        return self._draw(self.quantizer.lookup(ids.view(-1, self.grid.height, self.grid.width))).clamp(0, 1)

    def after_step(self) -> None:
        """Let the codebook take up what a training step saw."""
        self.quantizer.update()

    def _draw(self, vectors: Tensor) -> Tensor:  # [N, rows, columns, C] -> [N, 3, H, W]
        pixels: Tensor = self.decoder(vectors.permute(0, 3, 1, 2).contiguous())
        return pixels.float() / 2 + 0.5
