"""Pages of documents as images; PDFs are made by Pillow or byte by byte."""

from __future__ import annotations

import io
import random
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.errors import ConfigError, MediaError, PolymodalError
from polymodal.media import document
from polymodal.media.document import Page, open_pages
from polymodal.media.pdf_process import parse_pages
from tests.media.makers import HELVETICA, encrypted, many_pages, one_page, pdf, stream

pypdfium2 = pytest.importorskip("pypdfium2")

COLOURS = [(255, 0, 0), (0, 200, 0), (0, 0, 255)]


def scans(form: str) -> bytes:
    """Three pages of 300x400 pixels, each of one colour; a PDF of Pillow's has 72 pixels an inch."""
    images, out = [PILImage.new("RGB", (300, 400), colour) for colour in COLOURS], io.BytesIO()
    images[0].save(out, form, save_all=True, append_images=images[1:])
    return out.getvalue()


def opened(*args: Any, **options: Any) -> list[Page]:
    return list(open_pages(*args, **options))


@pytest.mark.parametrize("form", ["PDF", "TIFF"])
@pytest.mark.parametrize(
    ("pages", "numbers"), [(None, [1, 2, 3]), ("2", [2]), ("2-", [2, 3]), ("3, 1-2,3", [3, 1, 2, 3])]
)
def test_pages_come_in_the_order_asked_for(form: str, pages: str | None, numbers: list[int], tmp_path: Path) -> None:
    (tmp_path / "scan").write_bytes(scans(form))
    found = opened(tmp_path / "scan", pages, dpi=72)
    assert [page.number for page in found] == numbers
    for page in found:
        assert page.image.mode == "RGB" and page.image.size == (300, 400) and page.text is None
        middle = np.asarray(page.image)[200, 150].astype(int)
        assert np.abs(middle - COLOURS[page.number - 1]).max() <= 3


@pytest.mark.parametrize(
    ("options", "size"),
    [({"dpi": 72}, (300, 400)), ({"dpi": 144}, (600, 800)), ({"dpi": 300, "max_side": 100}, (75, 100))],
)
def test_size_follows_dpi_and_the_longer_side(options: dict[str, Any], size: tuple[int, int]) -> None:
    assert opened(scans("PDF"), "1", **options)[0].image.size == size


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ("0", "there are pages 1 to 3, '0' is not among them"),
        ("2-4", "'2-4' is not among them"),
        ("3-2", "'3-2' is not among them"),
        ("1-999999999", "'1-999999999' is not among them"),
        ("", "is no page or range"),
        ("1,,2", "is no page or range"),
        ("-2", "is no page or range"),
        ("٣", "is no page or range"),
        ("1,1,1,1,1,1", "has 3 pages, at most 5 are opened at once"),
    ],
)
def test_pages_that_there_are_not(pages: str, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        parse_pages(pages, 3, 5)
    with pytest.raises(MediaError, match="document of .* bytes: .*" + message):
        opened(scans("TIFF"), pages, max_pages=5)


def test_the_text_layer_and_what_is_drawn() -> None:
    data = one_page(b"BT /F1 24 Tf 10 40 Td (Hello) Tj 0 -30 Td (World) Tj ET", resources=HELVETICA)
    page = opened(data, text=True)[0]
    assert page.text is not None and page.text.split() == ["Hello", "World"] and "\r" not in page.text
    assert page.image.size == (417, 209) and 0.005 < np.mean(np.asarray(page.image) < 128) < 0.2
    assert opened(data)[0].text is None and opened(one_page(b""), text=True)[0].text is None


def test_one_image_is_a_document_of_one_page() -> None:
    image, out = PILImage.new("RGB", (8, 5), "red"), io.BytesIO()
    image.save(out, "PNG")
    for source in (image, out.getvalue()):
        assert [(page.number, page.image.size) for page in opened(source)] == [(1, (8, 5))]


def test_ten_thousand_pages_are_not_all_opened() -> None:
    data = many_pages(10_000)
    with pytest.raises(MediaError, match=r'has 10,000 pages, at most 100 are .* \(--pages, pages\), such as "1-100"'):
        opened(data)
    assert [page.number for page in opened(data, "9999-", dpi=72)] == [9999, 10_000]


def test_an_encrypted_file_needs_its_password() -> None:
    for wrong in (None, "other"):
        with pytest.raises(MediaError, match="is encrypted; give its password, or save it without"):
            opened(encrypted(b"secret"), password=wrong)
    assert opened(encrypted(b"secret"), password="secret", dpi=72)[0].image.size == (72, 72)
    assert opened(encrypted(b""), dpi=72)[0].image.size == (72, 72)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%PDF-1.4\n", "is damaged or cut off"),
        (scans("PDF")[:4000], "is damaged or cut off"),
        (pdf([b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [] /Count 0 >>"]), "has no pages"),
        (one_page(b"", b"0 0 1000000 1000000"), r"page 1: 2083334x2083334 pixels .*, at most 64,000,000 are allowed"),
        (scans("TIFF")[:400_000], "is damaged or cut off"),
        (b"nothing" * 50, "is not a document that can be read; allowed are PDF, PNG"),
        (b"\0\0\0\x18ftypisom" + bytes(500), "is a video, not a document; allowed are PDF, PNG"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(data: bytes, message: str) -> None:
    with pytest.raises(MediaError, match=message) as caught:
        opened(data, name="a.pdf")
    assert str(caught.value).startswith("a.pdf: ") and "\n" not in str(caught.value)


def test_a_drawing_without_end_is_ended() -> None:
    entries = b"/Type /XObject /Subtype /Form /BBox [0 0 200 100] /Resources << /XObject << /X %d 0 R >> >> "
    forms = [stream(b"/X Do " * 50, entries % (6 + level)) for level in range(29)]
    forms.append(stream(b"0 0 10 10 re f", entries % 5))
    start = time.monotonic()
    with pytest.raises(MediaError, match="drawing a page takes longer than 2 seconds"):
        opened(one_page(b"/X Do", resources=b"/XObject << /X 5 0 R >>", more=forms), max_seconds=2)
    assert time.monotonic() - start < 8


def test_an_image_that_inflates_to_gigabytes_stays_bounded() -> None:
    pack = zlib.compressobj(9)
    body = b"".join(pack.compress(bytes(2**24)) for _ in range(8)) + pack.flush()
    entries = (
        b"/Type /XObject /Subtype /Image /Width 60000 /Height 60000 /BitsPerComponent 8 /ColorSpace /DeviceRGB "
        b"/Filter [/FlateDecode /FlateDecode] "
    )
    data = one_page(b"/I Do", resources=b"/XObject << /I 5 0 R >>", more=[stream(zlib.compress(body), entries)])
    try:
        assert opened(data, max_seconds=20)[0].image.size == (417, 209)
    except MediaError as error:
        assert "memory" in str(error) or "longer" in str(error)


def test_limits(tmp_path: Path) -> None:
    data = scans("PDF")
    with pytest.raises(MediaError, match=r"625x834 pixels \(width x height\), at most 1,000 are allowed"):
        opened(data, max_pixels=1000)
    with pytest.raises(MediaError, match="page 2: 300x400 pixels"):
        frames, out = [PILImage.new("L", (9, 9)), PILImage.new("L", (300, 400))], io.BytesIO()
        frames[0].save(out, "TIFF", save_all=True, append_images=frames[1:])
        opened(out.getvalue(), max_pixels=1000)
    with pytest.raises(MediaError, match="at most 100 are allowed"):
        opened(data, limit=100)
    for options in ({"dpi": 0}, {"dpi": 10**6}, {"max_side": 0}, {"max_pages": 0}, {"max_seconds": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            opened(data, **options)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MAX_MEMORY", 2**26)
    with pytest.raises(MediaError, match="memory"):
        opened(scans("PDF"), dpi=600)


def test_a_chain_of_tiff_headers_ends() -> None:
    entries = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 1)]
    size, out = 2 + 12 * len(entries) + 4, bytearray(b"II*\0" + struct.pack("<I", 16) + bytes(8))
    for number in range(10_001):
        out += struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        out += struct.pack("<I", 16 + (number + 1) * size if number < 10_000 else 0)
    with pytest.raises(MediaError, match="has more than 10,000 images"):
        opened(bytes(out))
    out[16 + 2 * size - 4 : 16 + 2 * size] = struct.pack("<I", 16)  # back to the first
    assert [page.number for page in opened(bytes(out))] == [1, 2]
    out[16 + 2 * size - 4 : 16 + 2 * size] = struct.pack("<I", 9)  # to nowhere
    assert [page.number for page in opened(bytes(out), "1-2")] == [1, 2]


def test_who_wants_no_more_pages_leaves_no_process_behind() -> None:
    import psutil

    before = psutil.Process().children()  # what other tests have begun
    pages = open_pages(scans("PDF"))
    assert next(pages).number == 1
    assert len(psutil.Process().children()) == len(before) + 1
    pages.close()  # type: ignore[attr-defined]  # a generator
    assert psutil.Process().children() == before


def test_where_pdfium_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(
        ConfigError, match=r"needs pypdfium2, which is not installed: pip install 'polymodal\[documents\]'"
    ):
        opened(scans("PDF"))
    assert len(opened(scans("TIFF"))) == 3


@pytest.mark.filterwarnings("error")
def test_random_damage_gives_pages_or_one_line() -> None:
    chance = random.Random(3)
    seeds = [
        scans("TIFF"),
        scans("PDF"),
        one_page(b"BT /F1 24 Tf 10 40 Td (Hello) Tj ET", resources=HELVETICA),
        encrypted(b""),
    ]
    for _ in range(16):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 20)):
            place = chance.randrange(9, len(data))
            data[place : place + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 4))
        try:
            pages = opened(bytes(data), text=True, max_seconds=10)
        except PolymodalError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
        else:
            assert len(pages) <= 100
