"""Pages of HTML that stand alone: one file, in which nothing runs and which loads nothing.

A page is a Jinja template beside the module that fills it, built on `page.html.jinja` here. Every value is escaped.
"""

from __future__ import annotations

import base64
import io
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL import Image

# Control characters, halves of surrogate pairs, and marks that turn the direction of the text after them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).resolve().parent.parent)
    return Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip


def html_page(template: str, **values: Any) -> str:
    """Fill the template of a page, such as "viewer/view.html.jinja"."""
    return _UNPRINTABLE.sub("\ufffd", _templates().get_template(template).render(values))


def notebook_view(value: Any) -> str:
    """What a notebook shows of a value: `viewer.notebook`, which stands on a higher floor, draws it."""
    view: str = import_module("polymodal.viewer.notebook").shown(value)
    return view


def data_url(image: bytes | Image.Image, kind: str, **options: Any) -> str:
    """An image as a URL that holds it; `kind` is its type, "png", "jpeg" or "webp"."""
    if not isinstance(image, bytes):
        buffer = io.BytesIO()
        image.save(buffer, kind.upper(), optimize=True, **options)
        image = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"
