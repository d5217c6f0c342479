"""The page that `polymodal data check` writes: one HTML file with everything in it, no scripts, nothing loaded.

Every text of the data is escaped, and a content security policy keeps the page from loading anything even if an
escape were missed. Histograms are inline SVG; images are small JPEGs.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from polymodal.data.check.check import Shown, Summary
from polymodal.data.check.fix import NAMES
from polymodal.data.check.rows import FAULTS
from polymodal.errors import PolymodalError
from polymodal.media.image import open_image
from polymodal.utils.html import html_page

if TYPE_CHECKING:
    from polymodal.messages import Source


# ---- Histograms and bar charts as inline SVG, for pages that load nothing. Colours come from the page's style ----


BINS = 24
BARS = 12
"""Most bars of a chart of names; the rest are summed."""


def histogram(title: str, values: Sequence[float], limit: float | None = None) -> str:
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
    """Draw counts of names or small numbers."""
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


THUMBNAIL = 220

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #d9dee5; --paper: #fff; --card: #f6f8fa;
  --bar: #3b6fd4; --good: #1f8a4c; --warn: #b7791f; --bad: #c0392b }
@media (prefers-color-scheme: dark) { .mark { color: #14181e !important }
  :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #333b47; --paper: #14181e;
  --card: #1c222b; --bar: #6d9bf1; --good: #4cc27e; --warn: #e0ab4f; --bad: #ef7f72 } }
* { box-sizing: border-box }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem;
  margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.5rem; margin: 0 0 .25rem } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem }
.soft { color: var(--soft) } .num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1.25rem 0 }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums }
.good b { color: var(--good) } .warn b { color: var(--warn) } .bad b { color: var(--bad) }
.share { display: flex; height: 10px; border-radius: 5px; overflow: hidden; background: var(--line) }
.share i { display: block } .g { background: var(--good) } .w { background: var(--warn) } .b { background: var(--bad) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1rem }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem }
figcaption { font-weight: 600; margin-bottom: .2rem } figure p { margin: 0 0 .4rem; font-size: .85rem }
svg { width: 100%; height: auto; display: block } svg rect { fill: var(--bar) }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif } svg line { stroke: var(--line) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .92rem }
th { text-align: left; font-weight: 600; color: var(--soft) }
th, td { padding: .45rem .8rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
code { font: .87em ui-monospace, monospace; overflow-wrap: anywhere }
.mark { border-radius: 4px; padding: .05em .5em; font-size: .8rem; color: #fff; background: var(--soft) }
.mark.drop { background: var(--bad) } .mark.warn { background: var(--warn) } .mark.fix { background: var(--good) }
details summary { cursor: pointer; color: var(--soft) } details ul { margin: .3rem 0; padding-left: 1.1rem }
.shown { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem }
.shown figure { padding: 0; overflow: hidden } .shown div { padding: .6rem .8rem .8rem; font-size: .88rem }
.shown img { width: 100%; height: 10rem; object-fit: contain; display: block; background: #8882 }
.shown p { margin: 0 0 .3rem; overflow-wrap: anywhere } .answer { color: var(--good) }
"""


def to_html(summary: Summary, *, model: str, max_length: int, fixed: bool) -> str:
    """Write the report of a check."""
    names = ", ".join(file.path.name for file in summary.files)
    parts = [
        f"<h1>Data check: {text(names)}</h1>",
        f'<p class="soft">Tokens as <code>{text(model)}</code> counts them, at most {max_length:,} a row.</p>',
        _headline(summary),
        "<h2>What was found</h2>",
        _faults(summary, fixed),
        "<h2>Files</h2>",
        _files(summary, fixed),
    ]
    if summary.tokens:
        parts += ["<h2>What would be trained on</h2>", '<div class="charts">', *_charts(summary, max_length), "</div>"]
    if summary.shown:
        parts += ["<h2>A few rows, drawn by chance</h2>", '<div class="shown">']
        parts += [_shown(shown) for shown in summary.shown] + ["</div>"]
    return html_page(f"Data check: {names}", _STYLE, parts)


def _headline(summary: Summary) -> str:
    rows, dropped = summary.rows, len(summary.dropped)
    warned = sum(file.warned for file in summary.files)
    repaired = sum(file.repaired for file in summary.files)
    good = rows - dropped - warned
    tiles = [
        ("", f"{rows:,}", "rows"),
        ("good", f"{good:,}", "rows without a fault"),
        ("warn", f"{warned:,}", "rows to look at"),
        ("bad", f"{dropped:,}", f"rows to drop ({percent(dropped, rows)})"),
    ]
    if repaired:
        tiles.append(("good", f"{repaired:,}", "rows repaired"))
    tiles += [
        ("", f"{len(summary.sizes):,}", "images decoded"),
        ("", f"{sum(summary.tokens):,}", "tokens"),
        ("", f"{percent(sum(summary.targets), sum(summary.tokens))}", "of them trained"),
    ]
    cards = "".join(f'<div class="tile {kind}"><b>{value}</b>{label}</div>' for kind, value, label in tiles)
    widths = [(count / rows * 100 if rows else 0, kind) for count, kind in ((good, "g"), (warned, "w"), (dropped, "b"))]
    bar = "".join(f'<i class="{kind}" style="width:{width:.2f}%"></i>' for width, kind in widths)
    return f'<div class="share">{bar}</div><div class="tiles">{cards}</div>'


def _faults(summary: Summary, fixed: bool) -> str:
    if not summary.counts:
        return "<p>Nothing. Every row can be trained on.</p>"
    order = sorted(summary.counts, key=lambda code: (FAULTS[code].severity, -summary.counts[code], code))
    rows = []
    for code in order:
        fault = FAULTS[code]
        repair = NAMES.get(code)
        hint = f' <span class="mark fix">--fix: {text(repair)}</span>' if repair and not fixed else ""
        examples = "".join(
            f"<li><code>{text(where)}</code>{f' ({text(id)})' if id else ''}: {text(reason)}</li>"
            for where, id, reason in summary.examples[code]
        )
        more = summary.counts[code] - len(summary.examples[code])
        examples += f"<li>and {more:,} more</li>" if more else ""
        rows.append(
            f'<tr><td><span class="mark {fault.severity}">{fault.severity}</span></td>'
            f'<td class="num">{summary.counts[code]:,}</td>'
            f"<td><code>{code}</code><br>{text(fault.title)}</td>"
            f"<td>{text(fault.advice)}{hint}<details><summary>which rows</summary><ul>{examples}</ul></details></td>"
            "</tr>"
        )
    head = '<tr><th></th><th class="num">rows</th><th>fault</th><th>what to do</th></tr>'
    repairs = ", ".join(f"{text(name)} ({count:,})" for name, count in summary.repairs.most_common())
    return (
        f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
        '<p class="soft">Every dropped row is in <code>dropped.jsonl</code>, every row kept with a warning in '
        f"<code>warnings.jsonl</code>.{f' Repairs: {repairs}.' if repairs else ''}</p>"
    )


def _files(summary: Summary, fixed: bool) -> str:
    head = "".join(f'<th class="num">{name}</th>' for name in ("rows", "dropped", "warned", "repaired"))
    rows = "".join(
        f"<tr><td><code>{text(str(file.path))}</code></td>"
        + "".join(f'<td class="num">{n:,}</td>' for n in (file.rows, file.dropped, file.warned, file.repaired))
        + (f"<td><code>{text(str(file.fixed))}</code></td>" if fixed else "")
        + "</tr>"
        for file in summary.files
    )
    last = "<th>corrected file</th>" if fixed else ""
    return f'<div class="scroll"><table><tr><th>file</th>{head}{last}</tr>{rows}</table></div>'


def _charts(summary: Summary, max_length: int) -> list[str]:
    heights = [height for height, _ in summary.sizes]
    widths = [width for _, width in summary.sizes]
    ratios = [width / height for height, width in summary.sizes]
    charts = [
        histogram("Tokens of a row", summary.tokens, limit=max_length),
        histogram("Trained tokens of a row", summary.targets),
        bars("Images of a row", Counter(summary.images)),
        bars("Answers of a row", Counter(summary.turns)),
    ]
    if summary.sizes:
        charts += [
            histogram("Height of an image, pixels", heights),
            histogram("Width of an image, pixels", widths),
            histogram("Width ÷ height", ratios),
            bars("Tiles of a row with images", Counter(summary.tiles)),
        ]
    charts.append(bars("Kinds", summary.kinds))
    if any(summary.sources):
        charts.append(bars("Sources", summary.sources))
    return charts


def _shown(shown: Shown) -> str:
    thumb = thumbnail(shown.image)
    image = f'<img alt="" src="{thumb}">' if thumb else ""
    return (
        f'<figure title="{text(shown.where)}">{image}<div><p class="soft">{text(shown.id)}</p>'
        f'<p>{text(shown.question)}</p><p class="answer">{text(shown.answer)}</p></div></figure>'
    )


def thumbnail(source: Source) -> str:
    """A small JPEG of an image as a `data:` URL; "" where it cannot be opened."""
    try:
        image = open_image(source)
    except PolymodalError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
