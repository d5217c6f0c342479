"""What tokenizers of media are: arrays to ids and back, without a word of text."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from polymodal.media_plan import Size
from polymodal.utils.modules import ModuleLike


class ImageTokenizer(ModuleLike, Protocol):
    """Images to codes and back.

    Attributes:
        codebook_size: K, the number of codes.
        image_size: Side of the square images that it takes, in pixels.
        grid: Rows and columns of an image's codes.
    """

    codebook_size: int
    image_size: int
    grid: Size

    def encode(self, pixels: Tensor) -> Tensor:
        """Give the codes of images.

        Args:
            pixels: [N, 3, H, W], 0 to 1.

        Returns:
            [N, rows * columns] int64, row by row, from 0 to K - 1.
        """
        ...

    def decode(self, ids: Tensor) -> Tensor:
        """Draw images; any codes in range draw something.

        Args:
            ids: [N, rows * columns], from 0 to K - 1.

        Returns:
            Pixels [N, 3, H, W], 0 to 1.
        """
        ...


class AudioTokenizer(ModuleLike, Protocol):
    """Sounds to codes and back.

    Attributes:
        codebook_size: K, the number of codes of each codebook.
        num_codebooks: C; the first is the coarsest.
        sampling_rate: Of the sounds, in Hz.
        frame_rate: Frames of codes a second.
    """

    codebook_size: int
    num_codebooks: int
    sampling_rate: int
    frame_rate: float

    def encode(self, waveform: Tensor) -> Tensor:
        """Give the codes of sounds.

        Args:
            waveform: [N, S], one channel, -1 to 1.

        Returns:
            [N, F, C] int64, from 0 to K - 1.
        """
        ...

    def decode(self, ids: Tensor) -> Tensor:
        """Make sounds; any codes in range sound.

        Args:
            ids: [N, F, C], from 0 to K - 1.

        Returns:
            A waveform [N, S], S being F frames or a little less.
        """
        ...
