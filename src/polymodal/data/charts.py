"""Histograms and bar charts as inline SVG, for pages that load nothing. Colours come from the page's style."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence

BINS = 24
BARS = 12
"""Most bars of a chart of names; the rest are summed."""


def histogram(title: str, values: Sequence[float], limit: float | None = None) -> str:
    """Draw how often values occur.

    Args:
        title: What the values are.
        values: At least one.
        limit: A value to mark with a line where it lies inside the chart.

    Returns:
        A `<figure>` with inline SVG.
    """
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    whole = all(float(value).is_integer() for value in (low, high))
    width = (high - low) / BINS or 1.0
    if whole:
        width = max(1, math.ceil((high - low + 1) / BINS))
    count = max(1, math.ceil((high - low + (1 if whole else 0)) / width))
    heights = [0] * count
    for value in ordered:
        heights[min(count - 1, int((value - low) / width))] += 1
    middle, upper = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    note = f"median {number(middle)}, 95% up to {number(upper)}, largest {number(high)}"
    top, left, bottom, chart_width, chart_height = 8, 4, 18, 340, 110
    step = (chart_width - 2 * left) / count
    parts = []
    for index, height in enumerate(heights):
        if height:
            size = max(1.5, height / max(heights) * chart_height)
            start, end = low + index * width, low + (index + 1) * width
            last = end - 1 if whole else end
            label = number(start) if whole and width == 1 else f"{number(start)} to {number(last)}"
            parts.append(
                f'<rect x="{left + index * step:.1f}" y="{top + chart_height - size:.1f}" height="{size:.1f}" '
                f'width="{max(1.0, min(step - 1, 40)):.1f}"><title>{label}: {height:,}</title></rect>'
            )
    base = top + chart_height
    parts.append(f'<line x1="0" x2="{chart_width}" y1="{base}" y2="{base}"/>')
    if limit is not None and low <= limit <= high:
        at = left + (limit - low) / width * step
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{base}" style="stroke:var(--bad)"/>')
    parts.append(f'<text x="{left}" y="{base + bottom - 4}">{number(low)}</text>')
    end = chart_width - left
    parts.append(f'<text x="{end}" y="{base + bottom - 4}" text-anchor="end">{number(high)}</text>')
    return _figure(title, note, chart_width, base + bottom, "".join(parts))


def bars(title: str, counts: Counter[str] | Counter[int]) -> str:
    """Draw counts of names or small numbers.

    Args:
        title: What is counted.
        counts: At least one.

    Returns:
        A `<figure>` with inline SVG.
    """
    entries = [(str(name) or "(none given)", count) for name, count in counts.most_common()]
    if all(isinstance(name, int) for name in counts) and len(entries) <= BARS:
        entries.sort(key=lambda entry: int(entry[0]))
    if len(entries) > BARS:
        rest = entries[BARS - 1 :]
        entries = [*entries[: BARS - 1], (f"{len(rest)} others", sum(count for _, count in rest))]
    total, most, row, width, left = sum(counts.values()), max(count for _, count in entries), 20, 340, 110
    room = width - left - 78
    parts = []
    for index, (name, count) in enumerate(entries):
        y = index * row
        label = name if len(name) <= 17 else name[:16] + "…"
        size = max(1.5, count / most * room)
        parts.append(
            f'<text x="{left - 6}" y="{y + 14}" text-anchor="end">{text(label)}<title>{text(name)}</title></text>'
            f'<rect x="{left}" y="{y + 3}" width="{size:.1f}" height="{row - 6}"></rect>'
            f'<text x="{left + size + 5:.1f}" y="{y + 14}">{count:,} ({percent(count, total)})</text>'
        )
    return _figure(title, "", width, row * len(entries) + 2, "".join(parts))


def _figure(title: str, note: str, width: int, height: int, body: str) -> str:
    under = f'<p class="soft">{note}</p>' if note else ""
    return (
        f"<figure><figcaption>{text(title)}</figcaption>{under}"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(title)}">{body}</svg></figure>'
    )


def percent(part: float, whole: float) -> str:
    """Write a share."""
    share = part / whole * 100 if whole else 0.0
    return f"{share:.1f}%" if 0 < share < 10 else f"{share:.0f}%"


def number(value: float) -> str:
    """Write a number short."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def text(value: str) -> str:
    """Escape text for HTML; what cannot be printed becomes a replacement character."""
    clean = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in value)
    return html.escape(clean, quote=True)
