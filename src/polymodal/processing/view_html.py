"""A view as one HTML file: no scripts, nothing loaded from elsewhere, every text escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from polymodal.utils.html import html_page
from polymodal.viewer.view import Cell, View, plan_facts

if TYPE_CHECKING:
    from PIL import Image

_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2rem }
img { max-width: 100%; height: auto; border: 1px solid #8884 }
table { border-collapse: collapse; font-size: .9rem } td { padding: .15rem 1rem .15rem 0; vertical-align: top }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/2 ui-monospace, monospace }
.tokens span { border-radius: 3px; padding: .15em .05em; margin-right: 1px; color: #111; unicode-bidi: isolate }
.text { background: #e4e7eb } .media { background: #e2c6f5 } .trained { background: #bfe8c5 }
.special { font-style: italic; outline: 1px dashed #666 }
.legend span { border-radius: 3px; padding: .1em .5em; margin-right: .5em; color: #111 }
"""


def to_html(view: View, drawings: Sequence[Image.Image]) -> str:
    """Write a view as a page.

    Args:
        view: The view.
        drawings: One drawing a picture, from `view_picture.draw_plan`.

    Returns:
        The whole HTML document.
    """
    counts = view.counts
    legend = " ".join(f'<span class="{kind}">{kind} {count}</span>' for kind, count in counts.items())
    parts = [
        f"<h1>What the model sees: {sum(counts.values())} tokens</h1>",
        f'<p class="legend">{legend}</p>',
        '<div class="tokens">' + "".join(_span(cell) for cell in view.cells) + "</div>",
    ]
    for number, (plan, drawing) in enumerate(zip(view.plans, drawings, strict=True), start=1):
        rows = "".join(
            f"<tr><td>{html.escape(label)}</td><td>{html.escape(value)}</td></tr>"
            for label, value in plan_facts(plan).items()
        )
        parts.append(f"<h2>Image {number}</h2>")
        parts.append(f'<p><img alt="tiles of image {number}" src="{_data_url(drawing)}"></p><table>{rows}</table>')
    return html_page("What the model sees", _STYLE, parts)


def _span(cell: Cell) -> str:
    last = cell.start + len(cell.ids) - 1
    where = f"position {cell.start}" if last == cell.start else f"positions {cell.start} to {last}"
    same = cell.ids[:1] if len(set(cell.ids)) == 1 else cell.ids
    title = html.escape(f"{where}, id {' '.join(str(i) for i in same)}", quote=True)
    text = f"{cell.text}: {len(cell.ids)} tokens" if cell.kind == "media" else cell.text
    # A line break is shown and kept; a NUL is not allowed in HTML at all.
    body = html.escape(text, quote=True).replace("\x00", "\ufffd").replace("\n", "⏎\n")
    return f'<span class="{cell.kind}{" special" if cell.special else ""}" title="{title}">{body}</span>'


def _data_url(drawing: Image.Image) -> str:
    buffer = io.BytesIO()
    drawing.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
