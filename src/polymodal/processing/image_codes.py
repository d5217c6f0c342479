"""Images as ids of the language model, and ids as images: what an assistant's images are made of.

The image tokenizer is handed in, since nothing here knows models. An image is fitted to its square
(`config.ImageOutputConfig`), encoded, and written as `<boi> ids <eoi>`. An image that was made of codes here is
remembered, so that in the next turn it is read as the very codes that it was made of.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from transformers import PreTrainedTokenizerBase

from polymodal.config import ImageConfig, ImageOutputConfig, VocabularyLayout
from polymodal.errors import DataError, PolymodalError
from polymodal.media.image import open_image
from polymodal.media_plan import Size, plan_image
from polymodal.messages import Source
from polymodal.processing.image_transform import tile_bytes

REMEMBERED = 256
"""Images of answers whose codes are kept."""


class ImageCodes:
    """An image tokenizer and the place of its codes among the ids."""

    def __init__(
        self,
        tokenizer: Any,  # A `modeling.tokenizers.ImageTokenizer`
        vocabulary: VocabularyLayout,
        config: ImageOutputConfig,
    ) -> None:
        self.tokenizer, self.vocabulary, self.config = tokenizer, vocabulary, config
        self.begin, self.end = vocabulary.specials["<boi>"], vocabulary.specials["<eoi>"]
        self.count: int = tokenizer.grid.area
        side = tokenizer.image_size
        self._rules = ImageConfig(
            image_aspect_ratio=config.image_aspect_ratio,
            tile_size=(side, side),
            image_mean=(0.0, 0.0, 0.0),
            image_std=(1.0, 1.0, 1.0),
            background=config.background,
            pad_color=config.background,
        )
        self._known: dict[bytes, list[int]] = {}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What codes depend on: every weight of the tokenizer, how images are fitted, and where the codes lie."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tokenizer.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        config = self.config.model_dump(mode="json", exclude={"image_tokenizer", "temperature", "guidance"})
        return {"weights": digest.hexdigest(), **config, "vocabulary": self.vocabulary.model_dump(mode="json")}

    def pixels(self, source: Source) -> PILImage.Image:
        """An image as the tokenizer gets it: upright, fitted to its square."""
        image = open_image(source, background=self.config.background, max_pixels=self._rules.max_pixels)
        plan = plan_image(Size(image.height, image.width), self._rules, Size(1, 1))
        return PILImage.fromarray(tile_bytes(image, plan, self._rules)[0].transpose(1, 2, 0))

    def encode(self, source: Source) -> list[int]:
        """An image as ids, with what begins and ends it."""
        image = self.pixels(source)
        ids = self._known.get(_key(image))
        return [self.begin, *(ids or self.vocabulary.image.encode(self._codes(image))), self.end]

    @torch.no_grad()
    def _codes(self, image: PILImage.Image) -> list[int]:
        array = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255)[None]
        codes = self.tokenizer.encode(array.to(self._device)).flatten().tolist()
        if len(codes) != self.count or not all(0 <= code < self.tokenizer.codebook_size for code in codes):
            raise PolymodalError(
                f"the image tokenizer gave {len(codes)} codes from {min(codes)} to {max(codes)}; "
                f"{self.count} below {self.tokenizer.codebook_size} were expected"
            )
        return [int(code) for code in codes]

    @torch.no_grad()
    def decode(self, ids: Sequence[int]) -> PILImage.Image:
        """The image of a block's ids; where some are still to come, the last one stands for them."""
        given = self.vocabulary.image.decode(ids) or [0]
        codes = [*given, *[given[-1]] * (self.count - len(given))]
        made = self.tokenizer.decode(torch.tensor([codes], device=self._device))[0].float().cpu()
        image = PILImage.fromarray((made.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
        if len(given) == self.count and image.size == (self.tokenizer.image_size, self.tokenizer.image_size):
            while len(self._known) >= REMEMBERED:
                self._known.pop(next(iter(self._known)), None)
            self._known[_key(image)] = list(ids)
        return image

    def verify(self, source: Source, block: Sequence[int], where: str) -> None:
        """Make sure that ids which were kept are those of this image: both must decode to the same."""
        kept, now = block[1:-1], self.encode(source)[1:-1]
        inside = all(self.vocabulary.image.offset <= i < self.vocabulary.image.end for i in kept)
        if len(kept) != self.count or not inside or self.decode(kept).tobytes() != self.decode(now).tobytes():
            raise DataError(f"{where}: the codes that were kept do not decode to its image; remove the index folder")

    @property
    def _device(self) -> torch.device:
        tensors = (value for value in self.tokenizer.state_dict().values() if isinstance(value, torch.Tensor))
        return next(tensors, torch.zeros(())).device


def empty_condition(tokenizer: PreTrainedTokenizerBase) -> int:
    """The one id that stands before an image which nothing was said about: rows without a condition, and guidance."""
    ids = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(i) for i in ids if i is not None), 0)


def _key(image: PILImage.Image) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()
