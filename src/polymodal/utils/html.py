"""A page of HTML that stands alone: one file, in which nothing runs and which loads nothing."""

from __future__ import annotations

import html
from collections.abc import Iterable

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may do with the page, whatever its text says: show it, with the images inside it."""


def html_page(title: str, style: str, parts: Iterable[str]) -> str:
    """Write a page."""
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>",
        *(part for part in parts if part),
        "</body></html>\n",
    ]
    return "\n".join(lines).replace("\x00", "\ufffd")
