"""Pixels: an image becomes the tiles that its plan says.

Everything here follows the integers of an `ImagePlan`; nothing is decided anew. Pillow resizes 8-bit RGB, padding is
put in as 8-bit colour, and numbers become floats last, so the tiles equal those of the transformers processors
(CLIP, SigLIP, BiT/DINOv2, LLaVA, LLaVA-NeXT, LLaVA-OneVision; the Pillow ones) within rounding.

Beside an image lies: the mean colour or `pad_color` for "pad"; black for "crop" and on the canvas of "anyres";
`background` for all tiles of "slice".
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from polymodal.config import RESAMPLE_FILTERS, ImageConfig
from polymodal.media_plan import Box, ImagePlan, Size

Colour = tuple[int, int, int]

_BLACK: Colour = (0, 0, 0)
# Above this many pixels only the part that ends on the canvas is computed (a centre crop of a very long image).
_LARGEST_RESIZED = 2**26


def make_tiles(image: PILImage.Image, plan: ImagePlan, config: ImageConfig) -> NDArray[np.float32]:  # -> [n, 3, H, W]
    """Make an image's tiles, ready for the encoder."""
    return normalise(tile_bytes(image, plan, config), config)


def tile_bytes(image: PILImage.Image, plan: ImagePlan, config: ImageConfig) -> NDArray[np.uint8]:  # -> [n, 3, H, W]
    """Make an image's tiles before normalising; a quarter of the memory, to be normalised on the device."""
    tiles = np.stack([np.asarray(tile) for tile in tile_images(image, plan, config)])
    return np.ascontiguousarray(tiles.transpose(0, 3, 1, 2))


def normalise(tiles: NDArray[np.uint8], config: ImageConfig) -> NDArray[np.float32]:  # [n, 3, H, W], in and out
    """Rescale 0..255 to 0..1, subtract the mean and divide by the deviation."""
    mean = np.asarray(config.image_mean, dtype=np.float64)[:, None, None]
    std = np.asarray(config.image_std, dtype=np.float64)[:, None, None]
    scaled = tiles.astype(np.float32)
    scaled *= (1 / (255 * std)).astype(np.float32)
    scaled -= (mean / std).astype(np.float32)
    return scaled


def tile_images(image: PILImage.Image, plan: ImagePlan, config: ImageConfig) -> list[PILImage.Image]:
    """Cut an image into its tiles, as images (what the model saw, for `inspect`)."""
    size = Size(image.height, image.width)
    if size != plan.source:
        raise ValueError(f"the plan is of an image of {plan.source}, this one is {size}")
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, got mode {image.mode}; open it with media.image.open_image")
    fill, whole_fill = _fills(plan, config)
    canvas = _place(image, plan.frame, plan.content_box, plan.canvas, fill, config)
    height, width = plan.tile.height, plan.tile.width
    places = [(row * height, column * width) for row in range(plan.grid.height) for column in range(plan.grid.width)]
    tiles = [canvas.crop(_corners(Box(top, left, height, width))) for top, left in places]
    if plan.overview_box is not None:
        overview = _place(image, plan.overview_frame, plan.overview_box, plan.tile, whole_fill, config)
        tiles.insert(0 if plan.overview == "first" else len(tiles), overview)
    return tiles


def pad_colour(config: ImageConfig) -> Colour:
    """Give the colour that "pad" puts beside an image: `pad_color`, else the mean, cut to integers as LLaVA does."""
    if config.pad_color is not None:
        return config.pad_color
    red, green, blue = (min(max(int(value * 255), 0), 255) for value in config.image_mean)
    return red, green, blue


def _fills(plan: ImagePlan, config: ImageConfig) -> tuple[Colour, Colour]:
    """Give the colours beside the image, on the canvas and on the overview tile."""
    how = config.image_aspect_ratio
    if how == "slice":
        return config.background, config.background
    padded = how == "pad" or (how == "anyres" and plan.overview == "none")  # one of several images, padded to a tile
    colour = pad_colour(config)
    return colour if padded else _BLACK, _BLACK if config.overview_aspect_ratio == "crop" else colour


def _place(
    image: PILImage.Image, frame: Box | None, content: Box, canvas: Size, fill: Colour, config: ImageConfig
) -> PILImage.Image:
    """Lay an image on its frame, resize it, and lay it on a canvas."""
    if frame is not None:
        framed = PILImage.new("RGB", (frame.width, frame.height), fill)
        framed.paste(image, (frame.left, frame.top))
        image = framed
    top, left = max(content.top, 0), max(content.left, 0)
    height, width = min(content.bottom, canvas.height) - top, min(content.right, canvas.width) - left
    resized = _resize(image, content, Box(top - content.top, left - content.left, height, width), config)
    if (height, width) == (canvas.height, canvas.width):
        return resized
    laid = PILImage.new("RGB", (canvas.width, canvas.height), fill)
    laid.paste(resized, (left, top))
    return laid


def resize_filter(config: ImageConfig) -> PILImage.Resampling:
    """Pillow's filter of the image rules."""
    return PILImage.Resampling(RESAMPLE_FILTERS[config.resample])


def _resize(image: PILImage.Image, content: Box, visible: Box, config: ImageConfig) -> PILImage.Image:
    """Resize to the size of `content` and keep the part of it that is `visible`."""
    resample = resize_filter(config)
    if content.size.area <= _LARGEST_RESIZED:
        resized = image.resize((content.width, content.height), resample)
        return resized if visible.size == content.size else resized.crop(_corners(visible))
    down, across = image.height / content.height, image.width / content.width
    part = (visible.left * across, visible.top * down, visible.right * across, visible.bottom * down)
    return image.resize((visible.width, visible.height), resample, box=part)


def _corners(box: Box) -> tuple[int, int, int, int]:
    """Give Pillow's order: left, top, right, bottom."""
    return box.left, box.top, box.right, box.bottom
