"""An image of any kind to 8-bit RGB, with limits.

The size is read from the header and checked before a pixel is decoded. EXIF orientation is applied, the first frame of
an animation is taken, and transparency is composited on a background. Colour profiles are not applied (no vision
encoder was trained with them applied).

Depths beyond 8 bits have no one meaning, so the rule is fixed here:

- `I;16` (16-bit PNG and TIFF): 0..65535 becomes 0..255. Values that end below a quarter, as 12-bit data in 16-bit files
  do, come out dark, and a warning says so.
- `I` (32-bit): the same where any value is above 255, else taken as 0..255; values outside are clipped.
- `F` (float): 0..1 becomes 0..255 where all values lie in it; 0..255 is taken as it is; any other range is stretched
  from its smallest to its largest value. What is not finite counts as the smallest.
"""

import io
import math
import os
import re
import threading
import warnings
from typing import Any

import numpy as np
from PIL import ExifTags, ImageFile, UnidentifiedImageError
from PIL import Image as PILImage

from polymodal.config import MAX_PIXELS as MOST_PIXELS
from polymodal.errors import ConfigError, MediaError
from polymodal.media.source import MAX_BYTES, describe, isolated, read_bytes
from polymodal.messages import Source

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is opened. Pillow knows some forty more, most of them old and none of them needed from strangers."""

MAX_PIXELS = 64_000_000
"""The largest image unless the caller, or `--max-pixels`, says otherwise."""

PIXELS_SETTING = "POLYMODAL_MAX_PIXELS"
"""The variable of the environment that allows larger images, or fewer, in every verb; `--max-pixels` sets it."""

MAX_SCANS = 100  # of a progressive JPEG, which has about ten; each is another pass over all pixels
MAX_ASCII = 4 * 2**20  # bytes of a PPM in letters, which is read a number at a time
_BAND = 2**22  # pixels that are converted at once, so that no step needs the memory of the whole image again
_DARK = 2**14
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_BRANDS = {
    "an AVIF": (b"avif", b"avis"),
    "a HEIC": tuple(b"heic heix heim heis hevc hevx hevm hevs heif mif1 mif2 msf1".split()),
}
_LOCK = threading.Lock()

_UPRIGHT = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}


@isolated
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
    max_pixels = allowed_pixels(max_pixels)
    if isinstance(source, PILImage.Image):
        rgb = _decode(source, background, max_pixels, name)
    else:
        data = read_bytes(source, limit=limit, name=name)
        with warnings.catch_warnings():
            # Pillow warns of large images on stderr; here they are refused, or allowed by the caller's own limit.
            warnings.simplefilter("ignore")
            with _open(data, max_pixels, name) as image:
                _check_work(image, data, name)
                rgb = _decode(image, background, max_pixels, name)
    if highest := rgb.info.pop("highest", 0):
        warnings.warn(
            f"{name}: its values end at {highest:,} of 65,535, so it comes out nearly black; data of fewer bits in a "
            "16-bit file have to be scaled up first",
            stacklevel=2,
        )
    return rgb


def allowed_pixels(usual: int) -> int:
    """The largest image, in pixels: what the user allows, else what is usual."""
    given = os.environ.get(PIXELS_SETTING)
    if given is None:
        return usual
    if not given.isascii() or not given.isdigit() or len(given) > 12 or not 1 <= int(given) <= MOST_PIXELS:
        raise ConfigError(f"{PIXELS_SETTING} is {given[:40]!r}; it must be a whole number from 1 to {MOST_PIXELS:,}")
    return int(given)


def _open(data: bytes, max_pixels: int, name: str) -> PILImage.Image:
    """Read an image's header."""
    usual = PILImage.MAX_IMAGE_PIXELS
    try:
        if usual is None or max_pixels <= 2 * usual:
            return PILImage.open(io.BytesIO(data), formats=FORMATS)
        with _LOCK:  # Pillow has one limit for all threads; it is back before a pixel is decoded
            PILImage.MAX_IMAGE_PIXELS = max_pixels
            try:
                return PILImage.open(io.BytesIO(data), formats=FORMATS)
            finally:
                PILImage.MAX_IMAGE_PIXELS = usual
    except UnidentifiedImageError:
        raise MediaError(f"{name}: {what_is_it(data)}; allowed are {', '.join(FORMATS)}", "not-an-image") from None
    except PILImage.DecompressionBombError:
        most = min(max_pixels, 2 * (usual or max_pixels))
        raise MediaError(
            f"{name}: its header claims too many pixels, at most {most:,} are allowed; scale it down", "too-many-pixels"
        ) from None
    except Exception as error:  # a parser that is fed damaged bytes may raise anything
        raise _damaged(name, error) from error


def _check_work(image: PILImage.Image, data: bytes, name: str) -> None:
    """Refuse files that are small but take minutes to decode."""
    if image.format == "PPM" and data[:2] in (b"P1", b"P2", b"P3") and len(data) > MAX_ASCII:
        raise MediaError(
            f"{name}: a PPM in letters of {len(data):,} bytes, at most {MAX_ASCII:,} are read; save it as PNG"
        )
    scans, position = 0, 2
    while image.format in ("JPEG", "MPO") and (marker := _JPEG_MARKER.search(data, position)):
        if marker[1] == b"\xd9":  # what follows the end is another image
            break
        scans += marker[1] == b"\xda"
        if scans > MAX_SCANS:
            raise MediaError(
                f"{name}: a JPEG of more than {MAX_SCANS} scans, which takes minutes to decode; save it again"
            )
        position = marker.end() + max(int.from_bytes(data[marker.end() : marker.end() + 2]), 2)


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
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    rows = max(1, _BAND // image.width)
    bands = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    if len(bands) == 1:
        low, high = _range(image) if deep else (0.0, 0.0)
        rgb = _band_to_rgb(image, background, low, high)
    else:
        ranges = [_range(image.crop(band)) for band in bands] if deep else [(0.0, 0.0)]
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        rgb = PILImage.new("RGB", image.size)
        for band in bands:
            rgb.paste(_band_to_rgb(image.crop(band), background, low, high), band[:2])
    if deep and image.mode != "F" and 0 < high < _DARK and (image.mode != "I" or high > 255):
        rgb.info["highest"] = int(high)
    return rgb


def _range(image: PILImage.Image) -> tuple[float, float]:
    """The smallest and largest finite value of a deep grey."""
    values = np.asarray(image)
    if image.mode == "F":
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (math.inf, -math.inf)


def _band_to_rgb(image: PILImage.Image, background: tuple[int, int, int], low: float, high: float) -> PILImage.Image:
    """Convert a part of an image whose values go from `low` to `high`."""
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        image = _to_8_bits(image, low, high)
    elif image.mode == "La":
        image = image.convert("LA")  # Pillow has no way from La to RGBA
    if not image.has_transparency_data:
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = PILImage.new("RGBA", rgba.size, (*background, 255))
    return PILImage.alpha_composite(canvas, rgba).convert("RGB")


def _to_8_bits(image: PILImage.Image, low: float, high: float) -> PILImage.Image:
    """Bring deep greys to L, or LA where one grey value is marked as transparent."""
    values: Any = np.asarray(image)
    if image.mode == "F":
        low, high = (low, high) if low <= high else (0.0, 0.0)
        values = np.where(np.isfinite(values), values, low).astype(np.float64)
        if low >= 0 and high <= 1:
            values = values * 255
        elif low < 0 or high > 255:
            values = (values - low) * (255 / (high - low)) if high > low else values * 0
        values = np.rint(values)
    elif image.mode != "I" or high > 255:
        values = (np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257
    grey = PILImage.fromarray(np.clip(values, 0, 255).astype(np.uint8))
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
        raise MediaError(f"{name}: is {width}x{height} pixels (width x height); give an image with pixels")
    if width * height > max_pixels:
        allow = f", or allow it with --max-pixels {width * height}" if width * height <= MOST_PIXELS else ""
        raise MediaError(
            f"{name}: {width}x{height} pixels (width x height), at most {max_pixels:,} are allowed; scale it down"
            + allow,
            "too-many-pixels",
        )


def _damaged(name: str, error: Exception) -> MediaError:
    if isinstance(error, MemoryError):
        return MediaError(f"{name}: too large for the memory there is; scale it down", "too-many-pixels")
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return MediaError(f"{name}: is damaged or cut off ({reason}); give a whole file", "damaged-image")


def what_is_it(data: bytes, wanted: str = "an image") -> str:
    """Say what a file is instead, for the kinds that people mistake for images most."""
    head = data[:512].lstrip().lower()
    if data[4:8] == b"ftyp":
        box = data[8 : max(12, min(int.from_bytes(data[:4]), 512))]
        brands = {box[at : at + 4] for at in (0, *range(8, len(box), 4))}  # the second field is a version
        for kind, known in _BRANDS.items():
            if brands.intersection(known):
                return f"is {kind} image, convert it to JPEG or PNG"
        return f"is a video, not {wanted}"
    if head.startswith(b"%pdf"):
        return f"is a PDF document, not {wanted}"
    if head.startswith(b"<svg") or (head.startswith(b"<?xml") and b"<svg" in data[:4096].lower()):
        return "is an SVG drawing, convert it to PNG"
    if head.startswith((b"<!doctype html", b"<html")):
        return f"is a web page, not {wanted}"
    if data.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, fetch the file itself (git lfs pull)"
    return f"is not {wanted} that can be read"
