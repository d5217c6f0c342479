"""Images of every kind to RGB, and images that are none."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from polymodal.errors import ConfigError, MediaError
from polymodal.media import image as image_module
from polymodal.media.image import FORMATS, open_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: PILImage.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def noise(height: int = 9, width: int = 13) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that only claims a size: header, one short chunk of data, end."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats(format: str, tmp_path: Path) -> None:
    data = encode(noise(), format, **({"lossless": True} if format == "WEBP" else {}))
    file = tmp_path / "picture"  # the ending of the name plays no part
    file.write_bytes(data)
    url = f"data:image/x;base64,{base64.b64encode(data).decode()}"
    for source in (file, str(file), data, url, noise()):
        image = open_image(source)
        assert image.mode == "RGB"
        assert image.tobytes() == noise().tobytes()


def test_jpeg_and_its_many_modes() -> None:
    for mode in ("RGB", "L", "CMYK"):
        flat = PILImage.new("RGB", (16, 16), (200, 200, 200)).convert(mode)
        image = open_image(encode(flat, "JPEG"))
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - 200).max() < 4


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame(format: str) -> None:
    frames = [PILImage.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    data = encode(
        frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
    )
    assert open_image(data).getpixel((4, 4)) == RED
    already_open = PILImage.open(io.BytesIO(data))
    already_open.seek(2)
    assert open_image(already_open).getpixel((4, 4)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation(format: str, orientation: int) -> None:
    """Corners after opening: what is at the top left, top right and bottom left of the upright image."""
    corners = {"tl": (0, 0), "tr": (31, 0), "bl": (0, 15), "br": (31, 15)}
    colours = {"tl": RED, "tr": GREEN, "bl": BLUE, "br": WHITE}
    stored = PILImage.new("RGB", (32, 16))
    for corner, colour in colours.items():
        x, y = corners[corner]
        stored.paste(colour, ((x // 16) * 16, (y // 8) * 8, (x // 16) * 16 + 16, (y // 8) * 8 + 8))
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"exif": exif}
    if format == "WEBP":
        options["lossless"] = True
    if format == "JPEG":
        options |= {"quality": 95, "subsampling": 0}
    image = open_image(encode(stored, format, **options))
    # EXIF: which stored corner is shown at the top left, and which at the top right.
    shown = {1: "tl tr", 2: "tr tl", 3: "br bl", 4: "bl br", 5: "tl bl", 6: "bl tl", 7: "br tr", 8: "tr br"}
    first, second = shown[orientation].split()
    assert image.size == ((32, 16) if orientation < 5 else (16, 32))
    for corner, at in ((first, (1, 1)), (second, (image.width - 2, 1))):
        seen, expected = np.asarray(image.getpixel(at)).astype(int), np.asarray(colours[corner])
        assert np.abs(seen - expected).max() < 12
    # An image that was opened by somebody else is turned in the same way.
    theirs = PILImage.open(io.BytesIO(encode(stored, format, **options)))
    assert open_image(theirs).tobytes() == image.tobytes()


def test_damaged_exif_does_not_matter() -> None:
    assert open_image(encode(noise(), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).tobytes() == noise().tobytes()


ALL_MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
ALL_MODES += ["I", "I;16", "I;16L", "I;16B", "I;16N", "F"]


@pytest.mark.parametrize("mode", ALL_MODES)
def test_every_mode_gives_rgb(mode: str) -> None:
    image = open_image(PILImage.new(mode, (7, 5)))
    assert (image.mode, image.size) == ("RGB", (7, 5))
    # Turned as its EXIF says, and on the background where it is transparent.
    turned = PILImage.new(mode, (7, 5))
    turned.getexif()[0x0112] = 6
    if mode == "La":
        turned.paste(PILImage.new("LA", (7, 5), (80, 255)).convert("La").crop((0, 0, 3, 5)), (0, 0))
    elif mode == "RGBa":
        turned.paste(PILImage.new("RGBA", (7, 5), (80, 80, 80, 255)).convert("RGBa").crop((0, 0, 3, 5)), (0, 0))
    elif mode in ("RGBA", "LA", "PA"):
        opaque = {"RGBA": (80, 80, 80, 255), "LA": (80, 255), "PA": (0, 255)}
        turned.paste(PILImage.new(mode, (3, 5), opaque[mode]), (0, 0))
    opened = open_image(turned, background=(10, 200, 30))
    assert (opened.mode, opened.size) == ("RGB", (5, 7))
    if mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        # A quarter turn to the right takes the left part, which is not transparent, to the top.
        assert opened.getpixel((2, 6)) == (10, 200, 30)
        assert opened.getpixel((2, 0)) != (10, 200, 30)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_keep_grey(mode: str) -> None:
    value = 255 if mode == "1" else 130
    image = open_image(
        PILImage.new("RGB", (4, 4), (value, value, value)).convert(mode, palette=PILImage.Palette.ADAPTIVE)
    )
    assert np.abs(np.asarray(image).astype(int) - value).max() <= 2


def test_lab() -> None:
    image = open_image(PILImage.new("LAB", (4, 4), (255, 128, 128)))
    assert np.asarray(image).min() > 250


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparency_shows_the_background(mode: str) -> None:
    rgba = PILImage.new("RGBA", (4, 4), (0, 0, 0, 0))
    rgba.paste((0, 0, 0, 255), (0, 0, 2, 4))
    if mode == "La":
        layered = rgba.convert("LA").convert("La")
    elif mode == "PA":
        layered = PILImage.new("PA", (4, 4), (0, 0))
        layered.putpalette([0, 0, 0])
        layered.putalpha(rgba.getchannel("A"))
    else:
        layered = rgba.convert(mode)
    assert layered.mode == mode
    image = open_image(layered, background=(10, 200, 30))
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((3, 3)) == (10, 200, 30)


def test_half_transparency_is_mixed() -> None:
    image = open_image(PILImage.new("RGBA", (2, 2), (255, 0, 0, 128)), background=(0, 0, 255))
    assert np.abs(np.asarray(image)[0, 0].astype(int) - (128, 0, 127)).max() <= 1


@pytest.mark.parametrize("mode", ["P", "RGB", "L", "1"])
def test_one_transparent_colour(mode: str) -> None:
    image = PILImage.new("RGB", (4, 4), (0, 0, 0))
    image.paste(WHITE, (0, 0, 2, 4))
    stored = image.convert(mode, palette=PILImage.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)
    key: Any = (0, 0, 0) if mode == "RGB" else stored.getpixel((3, 3))
    opened = open_image(encode(stored, "PNG", transparency=key), background=GREEN)
    assert opened.getpixel((0, 0)) == WHITE
    assert opened.getpixel((3, 3)) == GREEN


def test_transparent_gif() -> None:
    image = PILImage.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 2, 4))
    opened = open_image(encode(image, "GIF"), background=BLUE)
    assert (opened.getpixel((0, 0)), opened.getpixel((3, 3))) == (RED, BLUE)


def grey(values: Any, dtype: Any, mode: str | None = None) -> list[int]:
    array = np.asarray([values], dtype=dtype)
    image = PILImage.fromarray(array)
    if mode is not None:
        assert image.mode == mode
    opened = np.asarray(open_image(image))
    assert (opened == opened[..., :1]).all()
    return [int(v) for v in opened[0, :, 0]]


def test_deep_greys_are_scaled() -> None:
    assert grey([0, 257, 32896, 65535], np.uint16, "I;16") == [0, 1, 128, 255]
    assert grey([0, 257, 32896, 65535], np.dtype(">u2"), "I;16B") == [0, 1, 128, 255]
    assert grey([0, 128, 255], np.int32, "I") == [0, 128, 255]
    assert grey([-5, 0, 32896, 70000], np.int32, "I") == [0, 0, 128, 255]
    assert grey([0.0, 0.5, 1.0], np.float32, "F") == [0, 128, 255]
    assert grey([0.0, 100.0, 255.0], np.float32, "F") == [0, 100, 255]
    assert grey([-1000.0, 0.0, 1000.0], np.float32, "F") == [0, 128, 255]
    assert grey([float("nan"), 0.0, 1.0, float("inf")], np.float32, "F") == [0, 0, 255, 0]
    assert grey([-7.0, -7.0], np.float32, "F") == [0, 0]
    assert grey([float("nan")], np.float32, "F") == [0]


def test_deep_greys_from_files() -> None:
    deep = PILImage.fromarray(np.asarray([[0, 32896, 65535]], dtype=np.uint16))
    for format in ("PNG", "TIFF", "PPM"):
        assert [p[0] for p in np.asarray(open_image(encode(deep, format)))[0]] == [0, 128, 255]
    clear = open_image(encode(deep, "PNG", transparency=65535), background=RED)
    assert [tuple(int(v) for v in p) for p in np.asarray(clear)[0]] == [(0, 0, 0), (128, 128, 128), RED]


def test_one_pixel() -> None:
    assert open_image(encode(PILImage.new("RGB", (1, 1), RED))).getpixel((0, 0)) == RED


def test_the_result_shares_no_memory() -> None:
    source = noise()
    opened = open_image(source)
    opened.paste(RED, (0, 0, 9, 9))
    assert source.tobytes() == noise().tobytes()


def refused(source: Any, **options: Any) -> str:
    with warnings.catch_warnings(), pytest.raises(MediaError) as caught:
        warnings.simplefilter("error")
        open_image(source, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_huge_header_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    assert "claims too many pixels, at most 64,000,000 are allowed" in refused(png_header(30_000, 30_000))
    # Between Pillow's warning and its error, and below both.
    assert "12000x10000 pixels (width x height), at most 64,000,000" in refused(png_header(12_000, 10_000))
    assert "50x60 pixels (width x height), at most 2,999 are allowed" in refused(png_header(50, 60), max_pixels=2999)


def test_a_large_image_in_memory_is_refused() -> None:
    assert "at most 50 are allowed" in refused(PILImage.new("RGB", (8, 8)), max_pixels=50)
    assert "image in memory: is 5x0 pixels" in refused(PILImage.new("RGB", (5, 0)))


def test_a_gif_frame_larger_than_its_screen() -> None:
    data = bytearray(encode(PILImage.new("RGB", (300, 300), RED), "GIF"))
    data[6:10] = struct.pack("<HH", 2, 2)  # the screen claims 2x2, the frame is 300x300
    assert "at most 1,000 are allowed" in refused(bytes(data), max_pixels=1000)


@pytest.mark.parametrize("format", FORMATS)
def test_cut_off(format: str) -> None:
    data = encode(noise(64, 64), format)
    line = refused(data[: len(data) // 2], name="cut.file")
    assert line.startswith("cut.file: is damaged or cut off (")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"hello, I am text", "is not an image that can be read"),
        (b"\x00" * 1000, "is not an image that can be read"),
        (b"%PDF-1.7 ...", "is a PDF document"),
        (b"<?xml version='1.0'?><svg></svg>", "is an SVG drawing"),
        (b"<svg></svg>", "is an SVG drawing"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIC image, convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypheim\0\0\0\0", "is a HEIC image"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "is an AVIF image"),
        (b"\0\0\0\x1cftypisom\0\0\0\0isomMiHBheic", "is a HEIC image"),
        (b"\0\0\0\x18ftypqt  \0\0\0\0qt  mdatheic", "is a video"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "is an AVIF image"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "is a video"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n", "damaged or cut off|is not an image"),
    ],
)
def test_not_a_image(data: bytes, what: str) -> None:
    line = refused(data)
    assert any(part in line for part in what.split("|"))
    if "damaged" not in line:
        assert line.endswith("allowed are PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM")


def test_formats_that_are_not_allowed() -> None:
    for format in ("ICO", "PCX", "TGA", "EPS", "PDF"):
        assert "allowed are PNG" in refused(encode(noise(32, 32), format))


def test_names_in_errors(tmp_path: Path) -> None:
    file = tmp_path / "note.png"
    file.write_text("hello")
    assert refused(file).startswith(f"{file}: is not an image")
    assert refused("data:image/png;base64,aGVsbG8=").startswith("data: URL: is not an image")
    assert refused(b"hello", name="image 2").startswith("image 2: is not an image")
    assert "no such file" in refused(tmp_path / "none.png")
    assert "is a directory" in refused(tmp_path)
    (tmp_path / "empty.png").touch()
    assert "is empty (0 bytes)" in refused(tmp_path / "empty.png")
    assert "remote fetch is off" in refused("https://example.org/a.png")
    assert "at most 10 are allowed" in refused(encode(noise()), limit=10)


SEEDS = [encode(noise(16, 16), format) for format in FORMATS]
SEEDS += [encode(noise(16, 16).convert("P"), "PNG"), encode(noise(16, 16).convert("RGBA"), "TIFF")]
SEEDS += [encode(noise(16, 16), "TIFF", compression="tiff_lzw"), encode(noise(16, 16).convert("1"), "TIFF")]


@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
    st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_give_a_image_or_one_line(data: bytes, changes: list[tuple[float, int]], cut: float) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    damaged = damaged[: max(1, int(len(damaged) * max(cut, 0.3)))]
    try:
        image = open_image(bytes(damaged), max_pixels=1_000_000)
    except MediaError as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= 1_000_000


def test_the_user_may_allow_a_larger_image(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = encode(PILImage.new("L", (300, 200)), "PNG")
    assert "or allow it with --max-pixels 60000" in refused(photo, max_pixels=50_000)
    monkeypatch.setenv("POLYMODAL_MAX_PIXELS", "60000")
    assert open_image(photo, max_pixels=50_000).size == (300, 200)
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 10_000)  # Pillow's own limit, which is twice this
    assert open_image(photo, max_pixels=50_000).size == (300, 200)
    assert PILImage.MAX_IMAGE_PIXELS == 10_000
    monkeypatch.setenv("POLYMODAL_MAX_PIXELS", "59999")
    assert "at most 59,999 are allowed" in refused(photo)
    assert "--max-pixels" not in refused(png_header(30_000, 30_000))  # no more than 400 million are ever opened
    for wrong in ("0", "-1", "1e8", "many", "9" * 5000, "400000001", "²"):
        monkeypatch.setenv("POLYMODAL_MAX_PIXELS", wrong)
        with pytest.raises(ConfigError, match="must be a whole number from 1 to 400,000,000"):
            open_image(photo)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_few_bits_in_many_are_warned_about(mode: str) -> None:
    values = np.asarray([[0, 4095]], dtype=np.uint16 if mode == "I;16" else np.int32)
    with pytest.warns(UserWarning, match=r"scan.png: its values end at 4,095 of 65,535, so it comes out nearly black"):
        opened = open_image(encode(PILImage.fromarray(values), "TIFF"), name="scan.png")
    assert opened.getpixel((1, 0)) == (16, 16, 16)
    assert opened.info.get("highest") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(PILImage.fromarray(np.asarray([[0, 30000]], dtype=np.uint16)))
        open_image(PILImage.fromarray(np.asarray([[0, 200]], dtype=np.int32)))
        open_image(PILImage.fromarray(np.zeros((1, 2), dtype=np.uint16)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK", "I;16", "I", "F", "1", "PA", "La", "I;16B"])
def test_large_images_are_converted_in_bands(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step holds a part of the image only, and the parts come out as the whole would."""
    grey = np.linspace(0, 60_000, 40 * 30).reshape(40, 30)
    types = {"I;16": np.uint16, "I;16B": np.dtype(">u2"), "I": np.int32, "F": np.float32}
    image = PILImage.fromarray(grey.astype(types[mode])) if mode in types else noise(40, 30)
    if mode in ("PA", "La"):
        image = PILImage.new(mode, (30, 40))
    elif mode == "P":
        image = image.quantize(16)
        image.info["transparency"] = 3
    elif mode not in types:
        image.putalpha(PILImage.fromarray((grey / 256).astype(np.uint8)))
        image = image.convert(mode) if mode not in ("CMYK", "1") else image.convert("RGB").convert(mode)
    whole = open_image(image, background=RED).tobytes()
    seen: list[int] = []
    band = image_module._band_to_rgb

    def watched(part: PILImage.Image, *rest: Any) -> PILImage.Image:
        seen.append(part.width * part.height)
        return band(part, *rest)

    monkeypatch.setattr(image_module, "_BAND", 100)
    monkeypatch.setattr(image_module, "_band_to_rgb", watched)
    assert open_image(image, background=RED).tobytes() == whole
    assert max(seen) <= 100 and sum(seen) == 1200


def test_files_that_take_minutes_to_decode_are_refused() -> None:
    photo = encode(noise(64, 64), "JPEG", progressive=True)
    scan = photo[photo.rindex(b"\xff\xda") : -2]
    assert open_image(photo[:-2] + scan * 20 + photo[-2:]).size == (64, 64)
    assert "a JPEG of more than 100 scans" in refused(photo[:-2] + scan * 3000 + photo[-2:])
    # What stands behind the end, or inside a segment, is no scan of this image.
    assert open_image(photo + b"\xff\xda\0\x02" * 3000).size == (64, 64)
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 4 * 3000) + b"\xff\xda\0\x02" * 3000
    assert open_image(photo[:2] + comment + photo[2:]).size == (64, 64)
    assert open_image(b"P3\n2 1\n255\n1 2 3 4 5 6\n").getpixel((1, 0)) == (4, 5, 6)
    assert "a PPM in letters of" in refused(b"P3\n1000 1000\n255\n" + b"1 2 3 " * 1_000_000)
    assert open_image(encode(noise(1200, 1200), "PPM")).size == (1200, 1200)
