"""Pixels: a picture becomes the tiles that its plan says.

Everything here follows the integers of an `ImagePlan`; nothing is decided anew. Pillow resizes 8-bit RGB, padding is
put in as 8-bit colour, and numbers become floats last, so the tiles equal those of the transformers processors
(CLIP, SigLIP, BiT/DINOv2, LLaVA, LLaVA-NeXT, LLaVA-OneVision; the Pillow ones) within rounding.

Beside a picture lies: the mean colour or `pad_color` for "pad"; black for "crop" and on the canvas of "anyres";
`background` for all tiles of "slice".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PILImage

from polymodal.config import RESAMPLE_FILTERS
from polymodal.media_plan import Box, ImagePlan, Size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from polymodal.config import ImageConfig

Colour = tuple[int, int, int]

_BLACK: Colour = (0, 0, 0)
_LARGEST_RESIZED = 2**26
"""Above this many pixels only the part that ends on the canvas is computed (a centre crop of a very long picture)."""


def make_tiles(picture: PILImage.Image, plan: ImagePlan, image: ImageConfig) -> NDArray[np.float32]:  # -> [n, 3, H, W]
    """Make a picture's tiles, ready for the encoder."""
    return normalise(tile_bytes(picture, plan, image), image)


def tile_bytes(picture: PILImage.Image, plan: ImagePlan, image: ImageConfig) -> NDArray[np.uint8]:  # -> [n, 3, H, W]
    """Make a picture's tiles before normalising; a quarter of the memory, to be normalised on the device."""
    tiles = np.stack([np.asarray(tile) for tile in tile_pictures(picture, plan, image)])
    return np.ascontiguousarray(tiles.transpose(0, 3, 1, 2))


def normalise(tiles: NDArray[np.uint8], image: ImageConfig) -> NDArray[np.float32]:
    """Rescale 0..255 to 0..1, subtract the mean and divide by the deviation."""
    # tiles [n, 3, H, W] -> [n, 3, H, W]
    mean = np.asarray(image.image_mean, dtype=np.float64)[:, None, None]
    std = np.asarray(image.image_std, dtype=np.float64)[:, None, None]
    scaled = tiles.astype(np.float32)
    scaled *= (1 / (255 * std)).astype(np.float32)
    scaled -= (mean / std).astype(np.float32)
    return scaled


def tile_pictures(picture: PILImage.Image, plan: ImagePlan, image: ImageConfig) -> list[PILImage.Image]:
    """Cut a picture into its tiles, as pictures (what the model saw, for `inspect`)."""
    size = Size(picture.height, picture.width)
    if size != plan.source:
        raise ValueError(f"the plan is of a picture of {plan.source}, this one is {size}")
    if picture.mode != "RGB":
        raise ValueError(f"expected an RGB picture, got mode {picture.mode}; open it with media.image.open_image")
    fill, whole_fill = _fills(plan, image)
    canvas = _place(picture, plan.frame, plan.content_box, plan.canvas, fill, image)
    tiles = [canvas.crop(_corners(box)) for box in _grid_boxes(plan)]
    if plan.overview_box is not None:
        overview = _place(picture, plan.overview_frame, plan.overview_box, plan.tile, whole_fill, image)
        tiles.insert(0 if plan.overview == "first" else len(tiles), overview)
    return tiles


def pad_colour(image: ImageConfig) -> Colour:
    """Give the colour that "pad" puts beside a picture: `pad_color`, else the mean, cut to integers as LLaVA does."""
    if image.pad_color is not None:
        return image.pad_color
    red, green, blue = (min(max(int(value * 255), 0), 255) for value in image.image_mean)
    return red, green, blue


def _fills(plan: ImagePlan, image: ImageConfig) -> tuple[Colour, Colour]:
    """Give the colours beside the picture, on the canvas and on the overview tile."""
    if image.image_aspect_ratio == "slice":
        return image.background, image.background
    whole = _BLACK if image.overview_aspect_ratio == "crop" else pad_colour(image)
    padded = image.image_aspect_ratio == "pad"
    if image.image_aspect_ratio == "anyres":
        padded = plan.overview == "none"  # one of several pictures, padded to a tile
    return (pad_colour(image) if padded else _BLACK), whole


def _place(
    picture: PILImage.Image, frame: Box | None, content: Box, canvas: Size, fill: Colour, image: ImageConfig
) -> PILImage.Image:
    """Lay a picture on its frame, resize it, and lay it on a canvas."""
    if frame is not None:
        framed = PILImage.new("RGB", (frame.width, frame.height), fill)
        framed.paste(picture, (frame.left, frame.top))
        picture = framed
    visible = Box(
        max(content.top, 0),
        max(content.left, 0),
        min(content.bottom, canvas.height) - max(content.top, 0),
        min(content.right, canvas.width) - max(content.left, 0),
    )
    resized = _resize(picture, content, visible, image)
    if visible == Box(0, 0, canvas.height, canvas.width):
        return resized
    laid = PILImage.new("RGB", (canvas.width, canvas.height), fill)
    laid.paste(resized, (visible.left, visible.top))
    return laid


def resize_filter(image: ImageConfig) -> PILImage.Resampling:
    """Pillow's filter of the picture rules."""
    return PILImage.Resampling(RESAMPLE_FILTERS[image.resample])


def _resize(picture: PILImage.Image, content: Box, visible: Box, image: ImageConfig) -> PILImage.Image:
    """Resize to `content` and keep the part that is `visible`."""
    resample = resize_filter(image)
    top, left = visible.top - content.top, visible.left - content.left
    if content.size.area <= _LARGEST_RESIZED:
        resized = picture.resize((content.width, content.height), resample)
        return resized if visible == content else resized.crop(_corners(Box(top, left, *_sides(visible))))
    down, across = picture.height / content.height, picture.width / content.width
    part = (left * across, top * down, (left + visible.width) * across, (top + visible.height) * down)
    return picture.resize((visible.width, visible.height), resample, box=part)


def _grid_boxes(plan: ImagePlan) -> list[Box]:
    """List the tiles' places on the canvas, row by row."""
    height, width = plan.tile.height, plan.tile.width
    return [
        Box(row * height, column * width, height, width)
        for row in range(plan.grid.height)
        for column in range(plan.grid.width)
    ]


def _sides(box: Box) -> tuple[int, int]:
    return box.height, box.width


def _corners(box: Box) -> tuple[int, int, int, int]:
    """Give Pillow's order: left, top, right, bottom."""
    return box.left, box.top, box.right, box.bottom
