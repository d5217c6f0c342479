"""Documents in a conversation: their pages in order, the text beside them, limits before anything is drawn."""

from __future__ import annotations

import importlib.util
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.errors import MediaError, PolymodalError
from polymodal.messages import Document, Image, Message, Text, Video, assistant, user
from polymodal.processing import document_pages
from polymodal.processing.document_pages import expand_documents

COLOURS = [(1, 2, 3), (40, 50, 60), (7, 8, 9)]


def tiff(colours: list[tuple[int, int, int]], size: tuple[int, int] = (20, 10)) -> bytes:
    first, *rest = [PILImage.new("RGB", size, colour) for colour in colours]
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=rest)
    return buffer.getvalue()


def seen(message: Message) -> list[Any]:
    """Texts, and the colours of images."""
    found: list[Any] = []
    for part in message.parts:
        if isinstance(part, Text):
            found.append(part.text)
        else:
            assert isinstance(part, Image) and isinstance(part.source, PILImage.Image)
            found.append(part.source.getpixel((0, 0)))
    return found


def test_pages_stand_where_the_document_stood() -> None:
    messages = [user("Read: ", Document(tiff(COLOURS)), "What?"), assistant("A"), user(Document(tiff(COLOURS), "3,1"))]
    one, same, other = expand_documents(messages)
    assert seen(one) == [
        "Read: ",
        "Page 1:\n",
        COLOURS[0],
        "\nPage 2:\n",
        COLOURS[1],
        "\nPage 3:\n",
        COLOURS[2],
        "What?",
    ]
    assert same == messages[1]
    assert seen(other) == ["Page 3:\n", COLOURS[2], "\nPage 1:\n", COLOURS[0]]
    (alone,) = expand_documents([user(Document(tiff(COLOURS), "2"), "What?")])
    assert seen(alone) == [COLOURS[1], "What?"]  # one page needs no number
    untouched = [user(Image("absent.png"), Video("absent.mp4"))]
    assert expand_documents(untouched) == untouched


def test_what_ocr_reads_stands_behind_its_page_as_in_textvqa(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def engine(pixels: np.ndarray) -> Any:  # reads the red of a page; nothing on the second
        red = int(pixels[0, 0, 2])
        boxes = [[[0, y], [9, y], [9, y + 4], [0, y + 4]] for y in (0, 6)]
        return SimpleNamespace(boxes=None if red == 40 else boxes, txts=(f"red {red}", "two"), scores=(0.9, 0.9))

    monkeypatch.setattr(document_pages, "load_engine", lambda: loaded.append(1) or engine)
    (message,) = expand_documents(
        [user(Document(tiff(COLOURS[:2]), text="ocr"), Document(tiff(COLOURS[2:]), text="ocr"))]
    )
    assert seen(message) == [
        "Page 1:\n", COLOURS[0], "\nReference OCR token: red, 1, two\n", "\nPage 2:\n", COLOURS[1], "\n",
        COLOURS[2], "\nReference OCR token: red, 7, two\n",
    ]  # fmt: skip
    assert loaded == [1]


@pytest.mark.skipif(importlib.util.find_spec("pypdfium2") is None, reason="needs the extra `documents`")
def test_the_text_layer_of_a_pdf(tmp_path: Any) -> None:
    page = b"BT /F1 24 Tf 20 100 Td (Total 42) Tj ET"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(page), page), b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]  # fmt: skip
    body = b"%PDF-1.4\n" + b"".join(b"%d 0 obj%s endobj\n" % (n, o) for n, o in enumerate(objects, 1))
    (tmp_path / "a.pdf").write_bytes(body + b"trailer<</Root 1 0 R/Size 6>>\n%%EOF")
    without, with_text = (
        expand_documents([user(Document(tmp_path / "a.pdf", text=text), "?")])[0]
        for text in ("none", "layer")  # type: ignore[arg-type]
    )
    assert [type(part) for part in without.parts] == [Image, Text]
    assert with_text.text == "\nTotal 42\n?" and len(with_text.parts) == 3


def test_too_many_pages_are_refused_before_they_are_drawn(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long.tif").write_bytes(tiff([(0, 0, 0)] * 21))
    monkeypatch.setattr("polymodal.media.document._frame", None)  # whoever draws a page fails
    with pytest.raises(MediaError, match=r"long.tif: has 21 pages, at most 20 .*; choose \(--pages, pages\), such as"):
        expand_documents([user(Document(tmp_path / "long.tif"))])
    monkeypatch.undo()
    three = Document(tiff(COLOURS))
    with pytest.raises(MediaError, match="has 3 pages, at most 2 are opened at once"):
        expand_documents([user(three), user(three)], max_pages=5)  # together
    with pytest.raises(MediaError, match="no page is left for it"):
        expand_documents([user(three, Document(tmp_path / "long.tif", "1"))], max_pages=3)
    for source, words in ((tmp_path / "absent.pdf", "absent.pdf: no such file"), (tmp_path / "long.tif", "pages 'x'")):
        with pytest.raises(PolymodalError, match=words):
            expand_documents([user(Document(source, "x"))])


def test_a_page_of_a_size_of_its_own_is_scaled_down() -> None:
    (message,) = expand_documents([user(Document(tiff(COLOURS[:1], (6144, 60))))])
    assert message.parts[0].source.size == (3072, 30)  # type: ignore[union-attr]
