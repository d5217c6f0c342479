"""A document is read page by page: each page becomes an image, and a text beside it where that was asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from polymodal.errors import MediaError
from polymodal.media.document import Page, open_pages
from polymodal.media.ocr import load_engine, read_lines, reference_tokens
from polymodal.media.source import describe
from polymodal.messages import Document, Image, Message, Part, Text

MAX_PAGES = 20
"""The most pages of a conversation unless the caller says otherwise."""
MAX_SIDE = 3072
"""The longer side of a page, in pixels, at most."""


def expand_documents(messages: Sequence[Message], *, max_pages: int = MAX_PAGES) -> list[Message]:
    """Give a conversation with the pages of its documents in their place; none is drawn where they are too many."""
    # Of each page an `Image`; before it a `Text` that numbers it where there are several, after it what was read on it.
    expanded, left, engine = [], max_pages, None
    for message in messages:
        parts: list[Part] = []
        for part in message.parts:
            if not isinstance(part, Document):
                parts.append(part)
                continue
            pages = _pages(part, left)
            left -= len(pages)
            if part.text == "ocr":
                engine = engine or load_engine()
            parts += _parts(part, pages, engine)
        expanded.append(replace(message, parts=tuple(parts)))
    return expanded


def unread(messages: Sequence[Message]) -> list[Message]:
    """A conversation whose documents are looked at alone: nothing of what can be read on their pages."""
    return [
        replace(each, parts=tuple(replace(p, text="none") if isinstance(p, Document) else p for p in each.parts))
        for each in messages
    ]


def _pages(part: Document, most: int) -> list[Page]:
    """The pages of a document, drawn once it is known that they are not too many."""
    if most < 1:
        raise MediaError(f"{describe(part.source)}: no page is left for it; choose pages of each (--pages, pages)")
    found = []
    for page in open_pages(part.source, part.pages, max_side=MAX_SIDE, text=part.text == "layer", max_pages=most):
        image = page.image
        if max(image.size) > MAX_SIDE:  # a TIFF's, which has its own size
            image = image.copy()
            image.thumbnail((MAX_SIDE, MAX_SIDE))
        found.append(replace(page, image=image))
    return found


def _parts(part: Document, pages: Sequence[Page], engine: Any) -> Iterator[Part]:
    for page in pages:
        if len(pages) > 1:
            yield Text(f"{'' if page is pages[0] else chr(10)}Page {page.number}:\n")
        yield Image(page.image)
        if part.text == "layer" and page.text:
            yield Text(f"\n{page.text.strip()}\n")
        if part.text == "ocr":
            words = [word for line in read_lines(engine, np.asarray(page.image)) for word in line.text.split()]
            yield Text(f"{reference_tokens(words)}\n" if words else "\n")
