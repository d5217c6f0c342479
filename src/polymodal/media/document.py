"""Pages of a document as images: PDF, TIFF of several pages, or one image; a page at a time, with limits.

    for page in open_pages("paper.pdf", "1-3,7", dpi=150, text=True):
        page.number, page.image, page.text

A PDF is drawn by pdfium in a process of its own (`media.pdf_process`), which gets no more than so much memory and time:
what hangs or crashes there is one error line here. Scripts in it are not run.
"""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image as PILImage

from polymodal.errors import ConfigError, MediaError, first_line
from polymodal.media.image import FORMATS, MAX_PIXELS, allowed_pixels, open_image, what_is_it
from polymodal.media.pdf_process import parse_pages
from polymodal.media.source import MAX_BYTES, describe, read_bytes
from polymodal.messages import Source
from polymodal.utils.extras import extra

MAX_PAGES = 100
"""The most pages that are opened at once unless the caller says otherwise."""
MAX_IMAGES = 10_000
"""Images that a TIFF may hold."""
MAX_SECONDS = 30.0
"""Seconds that a PDF may take to open, and each of its pages to draw, unless the caller says otherwise."""
MAX_MEMORY = 3 * 2**30
"""Bytes of memory that drawing a PDF may take."""
_CHILD = "from polymodal.media.pdf_process import main; main()"


@dataclass(frozen=True)
class Page:
    """A page of a document."""

    number: int  # From 1
    image: PILImage.Image  # RGB
    text: str | None = None  # The text layer, where it was asked for and there is one


def open_pages(
    source: Source,
    pages: str | None = None,
    *,
    dpi: float = 150.0,
    max_side: int | None = None,
    text: bool = False,
    password: str | None = None,
    max_pages: int = MAX_PAGES,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    limit: int = MAX_BYTES,
    name: str | None = None,
) -> Iterator[Page]:
    """Open the pages of a document one after another.

    Args:
        source: A PDF, a TIFF or another image: a path, bytes, a `data:` URL, or a place in an archive.
        pages: Which, from 1: "1-3,7", or "5-" for the fifth and all after it; all where None.
        dpi: Pixels an inch of a PDF's pages; images keep their own.
        max_side: The longer side of a PDF's page in pixels, at most.
        text: Also read a PDF's text layer.
        password: Of an encrypted PDF.
        max_pages: The most pages that may be asked for.
        max_pixels: The largest page, in pixels.
        max_seconds: How long a PDF may take to open, and each of its pages to draw.
        limit: The largest file, in bytes.
        name: What error lines call it.

    Returns:
        An iterator over the pages, in the order asked for; what is wrong with a PDF comes out as it goes on.

    Raises:
        MediaError: It is no document that can be read, there are no such pages, or it is beyond a limit.
        ConfigError: An argument makes no sense, or pypdfium2 is not installed.
    """
    if not 1 <= dpi <= 2400 or (max_side is not None and max_side < 1):
        raise ConfigError(f"dpi is {dpi}, max_side {max_side}; they must be from 1 to 2,400, and 1 or more")
    if max_pages < 1 or not 0 < max_seconds < math.inf:
        raise ConfigError(f"max_pages is {max_pages}, max_seconds {max_seconds}; they must be above 0")
    max_pixels = allowed_pixels(max_pixels)
    name = name or describe(source, "document")
    if isinstance(source, PILImage.Image):
        return iter([Page(1, open_image(source, max_pixels=max_pixels, name=name))])
    data = read_bytes(source, limit=limit, name=name)
    if b"%PDF-" not in data[:1024]:
        return _images(data, pages, max_pages, max_pixels, name)
    extra("pypdfium2", f"{name}: reading PDF needs", "polymodal[documents]")
    job = {
        "pages": pages, "dpi": dpi, "max_side": max_side, "text": text, "password": password, "max_pages": max_pages,
        "max_pixels": max_pixels, "memory": MAX_MEMORY + 2 * len(data), "seconds": max_seconds * (max_pages + 1),
    }  # fmt: skip
    return _pdf(data, job, max_seconds, name)


def _pdf(data: bytes, job: dict[str, Any], seconds: float, name: str) -> Iterator[Page]:
    """Let the other process draw, and end it where it takes too long or nobody wants more."""
    # Found as this process found it, and never in the folder that somebody works in.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=env,
    )
    assert child.stdin is not None and child.stdout is not None
    number, late = 0, threading.Event()

    def stop() -> None:
        late.set()
        child.kill()

    try:
        while True:
            timer = threading.Timer(seconds, stop)
            timer.start()
            try:
                if not number:
                    with contextlib.suppress(BrokenPipeError):
                        child.stdin.write(json.dumps(job).encode() + b"\n" + data)
                        child.stdin.close()
                line = child.stdout.readline()
                said = json.loads(line) if line.endswith(b"\n") else None
                size = 3 * said["height"] * said["width"] if said and "error" not in said else 0
                pixels = child.stdout.read(size)
                status = child.wait() if not line else 0
            finally:
                timer.cancel()
            if said and "error" in said:
                raise MediaError(f"{name}: {said['error']}", said.get("code", ""))
            if not line and not status and number:
                return
            if said is None or len(pixels) < size:
                after = f" after page {number}" if number else ""
                why = f"takes longer than {seconds:g} seconds" if late.is_set() else "crashed or needs too much memory"
                raise MediaError(f"{name}: drawing a page{after} {why}; draw it smaller, or give another file")
            number = said["number"]
            image = PILImage.frombytes("RGB", (said["width"], said["height"]), pixels)
            said_text = said["text"] and said["text"].replace("\r\n", "\n").replace("\r", "\n")
            yield Page(number, image, said_text or None)
    finally:
        child.kill()
        child.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        child.wait()


def _images(data: bytes, pages: str | None, max_pages: int, max_pixels: int, name: str) -> Iterator[Page]:
    """The images of a TIFF; of any other file the one that `open_image` gives."""
    try:
        first = open_image(data, max_pixels=max_pixels, name=name)  # says what is wrong with what is no image
    except MediaError as error:
        if error.code != "not-an-image":
            raise
        what = what_is_it(data, "a document")
        raise MediaError(f"{name}: {what}; allowed are PDF, {', '.join(FORMATS)}", error.code) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = PILImage.open(io.BytesIO(data), formats=FORMATS)
        total = _count(file, name) if file.format == "TIFF" else 1
    try:
        chosen = parse_pages(pages, total, max_pages)
    except MediaError as error:
        raise MediaError(f"{name}: {error}", error.code) from None
    for number in chosen:
        yield Page(number, first if number == 1 else _frame(file, number, max_pixels, name))


def _count(file: PILImage.Image, name: str) -> int:
    """The images of a TIFF; a chain of headers may be as long as the file, so counting ends too."""
    for number in range(1, MAX_IMAGES + 1):
        try:
            file.seek(number)
        except EOFError:
            return number
        except Exception:  # whoever asks for the damaged one is told so
            return number + 1
    raise MediaError(f"{name}: has more than {MAX_IMAGES:,} images; split it")


def _frame(file: PILImage.Image, number: int, max_pixels: int, name: str) -> PILImage.Image:
    """One image of a TIFF; its size is looked at before it is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage that matters an error comes
            file.seek(number - 1)
            if file.width * file.height > max_pixels:
                raise MediaError(
                    f"{name}: page {number}: {file.width}x{file.height} pixels (width x height), at most "
                    f"{max_pixels:,} are allowed; scale it down",
                    "too-many-pixels",
                )
            image = file.copy()
    except MediaError:
        raise
    except MemoryError as error:
        line = f"{name}: page {number}: too large for the memory there is; scale it down"
        raise MediaError(line, "too-many-pixels") from error
    except Exception as error:  # a decoder that is fed damaged bytes may raise anything
        raise MediaError(
            f"{name}: page {number} is damaged or cut off ({first_line(error)[:120]}); give a whole file"
        ) from error
    return open_image(image, max_pixels=max_pixels, name=f"{name}: page {number}")
