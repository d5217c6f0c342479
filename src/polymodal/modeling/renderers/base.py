"""What is asked of a renderer, and what one is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from polymodal.utils.strict import Strict

MULTIPLE = 8
"""Widths and heights are multiples of it, since latents are that much smaller than images."""
LARGEST = 4096
"""Pixels of a side."""
MOST_PIXELS = 1 << 30
"""Pixels of all frames together; 3 GiB of RGB."""
LONGEST_PROMPT = 10_000
"""Characters."""

Output = Literal["image", "video", "audio"]


class RenderRequest(Strict):
    """What is to be drawn; whatever is None is the renderer's own choice.

    Attributes:
        prompt: What is to be seen.
        negative_prompt: What is not to be seen.
        width: Pixels, a multiple of 8.
        height: Pixels, a multiple of 8; both are given or neither.
        steps: Denoising steps.
        guidance: How closely the prompt is followed (classifier-free guidance); 1 turns it off.
        seed: The same request with the same seed gives the same pixels, another seed gives others.
        frames: Frames of a video.
        fps: Frames a second of a video.
        image: uint8 [H, W, 3]: the image to start from, for image to image.
        strength: How much of that image is drawn anew, above 0 to 1; 1 keeps nothing of it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    prompt: str = Field(max_length=LONGEST_PROMPT)
    negative_prompt: str = Field("", max_length=LONGEST_PROMPT)
    width: int | None = Field(None, ge=MULTIPLE, le=LARGEST, multiple_of=MULTIPLE)
    height: int | None = Field(None, ge=MULTIPLE, le=LARGEST, multiple_of=MULTIPLE)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance: float | None = Field(None, ge=0, le=100)
    seed: int = Field(0, ge=0, lt=2**63)
    frames: int | None = Field(None, ge=1, le=10_000)
    fps: float | None = Field(None, ge=0.01, le=240)
    image: np.ndarray | None = Field(None, repr=False)
    strength: float = Field(0.8, gt=0, le=1)

    @model_validator(mode="after")
    def _fits_together(self) -> RenderRequest:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; say what is to be drawn")
        if (self.width is None) != (self.height is None):
            raise ValueError("give width and height, or neither")
        if (pixels := (self.width or 0) * (self.height or 0) * (self.frames or 1)) > MOST_PIXELS:
            raise ValueError(f"{pixels:,} pixels in all frames, at most {MOST_PIXELS:,}; ask for fewer or smaller ones")
        if (image := self.image) is not None and (
            image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size
        ):
            raise ValueError(f"image is {image.dtype} {list(image.shape)}; it must be uint8 [H, W, 3]")
        return self


class Renderer(ABC):
    """Turns a request into an image, a video or a sound; a subclass gives `output` and `render`.

    Attributes:
        name: What it is called in error lines.
        output: What it gives.
        rate: Frames or samples a second of what it gives, where the request does not say.
        conversational: Whether it was taught to be asked as people ask, so that nobody needs to write it a prompt.
    """

    name: str
    output: Output
    rate: float = 8.0
    conversational: bool = False

    @abstractmethod
    def render(self, request: RenderRequest) -> np.ndarray:
        """Draw.

        Args:
            request: What is to be drawn.

        Returns:
            An image as uint8 [H, W, 3], a video as uint8 [T, H, W, 3], a sound as float32 [S].

        Raises:
            ConfigError: The renderer cannot draw such a request.
            PolymodalError: It does not answer, or its weights are damaged.
        """
