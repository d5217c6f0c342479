"""A small image of any medium, for reports."""

import numpy as np
from PIL import Image as PILImage

from polymodal.media.document import open_pages
from polymodal.media.image import open_image
from polymodal.media.video import sample_frames
from polymodal.messages import Audio, Document, Media, Video

FRAMES = 4
"""Frames of a video, side by side."""


def thumbnail(medium: Media, side: int) -> PILImage.Image | None:
    """The image itself, a strip of frames or a document's first page, at most `side` pixels high; None of a sound."""
    if isinstance(medium, Audio):
        return None
    if isinstance(medium, Video):
        segment = None if medium.start is None and medium.end is None else (medium.start or 0.0, medium.end)
        frames = sample_frames(medium.source, FRAMES, segment=segment, max_side=side)
        image = PILImage.fromarray(np.concatenate(list(frames.array), axis=1))
    elif isinstance(medium, Document):
        image = next(iter(open_pages(medium.source, medium.pages or "1", dpi=72))).image
    else:
        image = open_image(medium.source)
    image = image.convert("RGB")
    image.thumbnail((2 * side if isinstance(medium, Video) else side, side))
    return image
