"""The page that `polymodal data check` writes: counts, faults with examples, charts and a few rows with their image."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from polymodal.data.check.check import Summary
from polymodal.data.check.fix import NAMES
from polymodal.data.check.rows import FAULTS
from polymodal.errors import PolymodalError
from polymodal.media.source import describe
from polymodal.media.thumbnail import thumbnail
from polymodal.messages import Audio, Media
from polymodal.utils.html import data_url, html_page

BINS = 24
BARS = 12
"""Most bars of a chart of names; the rest are summed."""
THUMBNAIL = 220
WIDTH = 340


@dataclass
class Chart:
    """A drawing in SVG units; colours come from the page's style."""

    title: str
    height: int
    note: str = ""
    width: int = WIDTH
    rects: list[tuple[Any, ...]] = field(default_factory=list)  # x, y, width, height, label
    lines: list[tuple[Any, ...]] = field(default_factory=list)  # x1, x2, y1, y2, class
    texts: list[tuple[Any, ...]] = field(default_factory=list)  # x, y, anchor, text, label


def to_html(summary: Summary, *, model: str, max_length: int, fixed: bool) -> str:
    """Write the report of a check."""
    rows, dropped = summary.rows, len(summary.dropped)
    warned, repaired = (sum(getattr(file, name) for file in summary.files) for name in ("warned", "repaired"))
    good = rows - dropped - warned
    tiles = [
        ("", f"{rows:,}", "rows"),
        ("good", f"{good:,}", "rows without a fault"),
        ("warn", f"{warned:,}", "rows to look at"),
        ("bad", f"{dropped:,}", f"rows to drop ({percent(dropped, rows)})"),
        *([("good", f"{repaired:,}", "rows repaired")] if repaired else []),
        ("", f"{len(summary.sizes):,}", "images decoded"),
        *_other_media(summary),
        ("", f"{sum(summary.tokens):,}", "tokens"),
        ("", percent(sum(summary.targets), sum(summary.tokens)), "of them trained"),
    ]
    codes = sorted(summary.counts, key=lambda code: (FAULTS[code].severity, -summary.counts[code], code))
    return html_page(
        "data/check/report.html.jinja",
        summary=summary,
        model=model,
        max_length=max_length,
        fixed=fixed,
        names=", ".join(file.path.name for file in summary.files),
        tiles=tiles,
        shares={
            kind: 100 * count / max(1, rows) for kind, count in (("good", good), ("warn", warned), ("bad", dropped))
        },
        faults=[(code, FAULTS[code], None if fixed else NAMES.get(code)) for code in codes],
        charts=_charts(summary, max_length) if summary.tokens else [],
        thumbnail=thumbnail_url,
        name=lambda medium: describe(medium.source) if isinstance(medium, Audio) else "",
    )


def _other_media(summary: Summary) -> list[tuple[str, str, str]]:
    found, tiles = summary.media, []
    for count, names, more in (
        (found["videos"], "videos", f"{found['video_frames']:,} frames, {found['video_seconds']:,.1f} s"),
        (found["sounds"], "sounds", f"{found['sound_seconds']:,.1f} s"),
        (found["documents"], "documents", f"{found['pages']:,} pages"),
    ):
        tiles += [("", f"{count:,}", f"{names} decoded ({more})")] if count else []
    return tiles


def _charts(summary: Summary, max_length: int) -> list[Chart]:
    charts = [
        histogram("Tokens of a row", summary.tokens, limit=max_length),
        histogram("Trained tokens of a row", summary.targets),
        bars("Images of a row", Counter(summary.images)),
        bars("Answers of a row", Counter(summary.turns)),
    ]
    if summary.sizes:
        charts += [
            histogram("Height of an image, pixels", [height for height, _ in summary.sizes]),
            histogram("Width of an image, pixels", [width for _, width in summary.sizes]),
            histogram("Width ÷ height", [width / height for height, width in summary.sizes]),
        ]
    if summary.tiles:
        charts.append(bars("Tiles of a row with images", Counter(summary.tiles)))
    if summary.videos:
        charts.append(histogram("Frames of a video", [frames for frames, _ in summary.videos]))
        charts.append(histogram("Seconds of a video", [seconds for _, seconds in summary.videos]))
    if summary.sounds:
        charts.append(histogram("Seconds of a sound", [seconds for seconds, _ in summary.sounds]))
        charts.append(bars("Samples a second of a sound", Counter(rate for _, rate in summary.sounds)))
    if summary.pages:
        charts.append(bars("Pages of a document", Counter(summary.pages)))
    charts.append(bars("Kinds", summary.kinds))
    if any(summary.sources):
        charts.append(bars("Sources", summary.sources))
    return charts


def histogram(title: str, values: Sequence[float], limit: float | None = None) -> Chart:
    """Draw how often values occur."""
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
    top, left, bottom, base = 8, 4, 18, 118
    step = (WIDTH - 2 * left) / count
    chart = Chart(title, base + bottom, note)
    for index, height in enumerate(heights):
        if height:
            size = max(1.5, height / max(heights) * (base - top))
            start, end = low + index * width, low + (index + 1) * width
            last = end - 1 if whole else end
            label = number(start) if whole and width == 1 else f"{number(start)} to {number(last)}"
            x, wide = round(left + index * step, 1), round(max(1.0, min(step - 1, 40)), 1)
            chart.rects.append((x, round(base - size, 1), wide, round(size, 1), f"{label}: {height:,}"))
    chart.lines.append((0, WIDTH, base, base, "axis"))
    if limit is not None and low <= limit <= high:
        at = round(left + (limit - low) / width * step, 1)
        chart.lines.append((at, at, top, base, "limit"))
    chart.texts.append((left, base + bottom - 4, "start", number(low), ""))
    chart.texts.append((WIDTH - left, base + bottom - 4, "end", number(high), ""))
    return chart


def bars(title: str, counts: Counter[str] | Counter[int]) -> Chart:
    """Draw counts of names or small numbers."""
    entries = [(str(name) or "(none given)", count) for name, count in counts.most_common()]
    if all(isinstance(name, int) for name in counts) and len(entries) <= BARS:
        entries.sort(key=lambda entry: int(entry[0]))
    if len(entries) > BARS:
        rest = entries[BARS - 1 :]
        entries = [*entries[: BARS - 1], (f"{len(rest)} others", sum(count for _, count in rest))]
    total, most, row, left = sum(counts.values()), max(count for _, count in entries), 20, 110
    chart = Chart(title, row * len(entries) + 2)
    for index, (name, count) in enumerate(entries):
        y = index * row
        size = round(max(1.5, count / most * (WIDTH - left - 78)), 1)
        chart.rects.append((left, y + 3, size, row - 6, ""))
        chart.texts.append((left - 6, y + 14, "end", name if len(name) <= 17 else name[:16] + "…", name))
        chart.texts.append((left + size + 5, y + 14, "start", f"{count:,} ({percent(count, total)})", ""))
    return chart


def percent(part: float, whole: float) -> str:
    """Write a share."""
    share = part / whole * 100 if whole else 0.0
    return f"{share:.1f}%" if 0 < share < 10 else f"{share:.0f}%"


def number(value: float) -> str:
    """Write a number short."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def thumbnail_url(medium: Media) -> str:
    """A small JPEG of a medium as a `data:` URL; "" of a sound and of what cannot be read."""
    try:
        image = thumbnail(medium, THUMBNAIL)
    except PolymodalError:
        return ""
    return "" if image is None else data_url(image, "jpeg", quality=80)
