"""An image of any kind to 8-bit RGB, with limits.

The size is read from the header and checked before a pixel is decoded. EXIF orientation is applied, the first frame of
an animation is taken, and transparency is composited on a background. Colour profiles are not applied (no vision
encoder was trained with them applied).

Depths beyond 8 bits have no one meaning, so the rule is fixed here:

- `I;16` (16-bit PNG and TIFF): 0..65535 becomes 0..255.
- `I` (32-bit): the same where any value is above 255, else taken as 0..255; values outside are clipped.
- `F` (float): 0..1 becomes 0..255 where all values lie in it; 0..255 is taken as it is; any other range is stretched
  from its smallest to its largest value. What is not finite counts as the smallest.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import ExifTags, ImageFile, UnidentifiedImageError
from PIL import Image as PILImage

from polymodal.errors import MediaError
from polymodal.media.source import MAX_BYTES, describe, read_bytes
from polymodal.messages import Source

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is opened. Pillow knows some forty more, most of them old and none of them needed from strangers."""

MAX_PIXELS = 64_000_000
"""The largest image unless the caller says otherwise."""

_UPRIGHT = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}


def open_image(
    source: Source,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    limit: int = MAX_BYTES,
    name: str | None = None,
) -> PILImage.Image:
    """Open an image as upright RGB."""
    name = name or describe(source)
    if isinstance(source, PILImage.Image):
        return _decode(source, background, max_pixels, name)
    data = read_bytes(source, limit=limit, name=name)
    with warnings.catch_warnings():
        # Pillow warns of large images on stderr; here they are refused, or allowed by the caller's own limit.
        warnings.simplefilter("ignore")
        try:
            image = PILImage.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise MediaError(f"{name}: {_what_is_it(data)}; allowed are {', '.join(FORMATS)}", "not-an-image") from None
        except PILImage.DecompressionBombError:
            most = min(max_pixels, 2 * (PILImage.MAX_IMAGE_PIXELS or max_pixels))
            raise MediaError(
                f"{name}: its header claims too many pixels, at most {most:,} are allowed; scale it down",
                "too-many-pixels",
            ) from None
        except Exception as error:  # a parser that is fed damaged bytes may raise anything
            raise _damaged(name, error) from error
        with image:
            return _decode(image, background, max_pixels, name)


def _decode(image: PILImage.Image, background: tuple[int, int, int], max_pixels: int, name: str) -> PILImage.Image:
    """Check the size, decode, convert and turn upright."""
    _check_size(image, max_pixels, name)
    try:
        if isinstance(image, ImageFile.ImageFile) and getattr(image, "is_animated", False):
            image.seek(0)
        image.load()
        _check_size(image, max_pixels, name)  # a first frame may enlarge the screen that the header gave
        rgb, orientation = to_rgb(image, background), _orientation(image)
        return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
    except MediaError:
        raise
    except Exception as error:  # a decoder that is fed damaged bytes may raise anything
        raise _damaged(name, error) from error


def to_rgb(image: PILImage.Image, background: tuple[int, int, int]) -> PILImage.Image:
    """Convert any Pillow mode to RGB; see the module's text for depths beyond 8 bits."""
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    elif image.mode == "La":
        image = image.convert("LA")  # Pillow has no way from La to RGBA
    if not image.has_transparency_data:
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = PILImage.new("RGBA", rgba.size, (*background, 255))
    return PILImage.alpha_composite(canvas, rgba).convert("RGB")


def _to_8_bits(image: PILImage.Image) -> PILImage.Image:
    """Bring deep greys to L, or LA where one grey value is marked as transparent."""
    values: Any = np.asarray(image)
    if image.mode == "F":
        finite = np.isfinite(values)
        low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
        values = np.where(finite, values, low).astype(np.float64)
        if low >= 0 and high <= 1:
            values = values * 255
        elif low < 0 or high > 255:
            values = (values - low) * (255 / (float(high) - float(low))) if high > low else values * 0
    elif image.mode != "I" or values.max() > 255:
        values = values / 257
    grey = PILImage.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # of a 16-bit grey PNG
        grey.putalpha(PILImage.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8)))
    return grey


def _orientation(image: PILImage.Image) -> int:
    """Read the EXIF orientation; 1 (upright) where there is none or it is damaged, as every viewer does."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata does not make the image unreadable
        return 1
    return value if isinstance(value, int) else 1


def _check_size(image: PILImage.Image, max_pixels: int, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise MediaError(f"{name}: is {height}x{width} pixels (height x width); give an image with pixels")
    if width * height > max_pixels:
        raise MediaError(
            f"{name}: {height}x{width} pixels (height x width), at most {max_pixels:,} are allowed; scale it down",
            "too-many-pixels",
        )


def _damaged(name: str, error: Exception) -> MediaError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return MediaError(f"{name}: is damaged or cut off ({reason}); give a whole file", "damaged-image")


def _what_is_it(data: bytes) -> str:
    """Say what a file is instead, for the kinds that people mistake for images most."""
    head = data[:512].lstrip().lower()
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        if brand in (b"heic", b"heix", b"mif1", b"hevc", b"msf1"):
            return "is a HEIC image, convert it to JPEG or PNG"
        if brand in (b"avif", b"avis"):
            return "is an AVIF image, convert it to JPEG or PNG"
        return "is a video, not an image"
    if head.startswith(b"%pdf"):
        return "is a PDF document, not an image"
    if head.startswith(b"<svg") or (head.startswith(b"<?xml") and b"<svg" in data[:4096].lower()):
        return "is an SVG drawing, convert it to PNG"
    if head.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not an image"
    if data.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, fetch the file itself (git lfs pull)"
    return "is not an image that can be read"
