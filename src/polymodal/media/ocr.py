"""The text on a page: lines with their places and confidences, in reading order.

The models (PP-OCRv6: Chinese, English, Japanese and 50 languages in Latin letters) come in the wheel of rapidocr and
run on the CPU; nothing is fetched.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

from polymodal.utils.extras import extra

COLUMN = (3, 8.0)
"""What makes lines beside others a column of text, no cells of a table: so many, so much wider than high."""


class Line(NamedTuple):
    """A line of text on a page."""

    text: str
    confidence: float  # 0 to 1
    box: list[list[float]]  # Corners (x, y) in pixels: top left, top right, bottom right, bottom left of the writing


class _Placed(NamedTuple):
    """A line and its smallest and largest x, then y."""

    left: float
    right: float
    top: float
    bottom: float
    line: Line

    def span(self, down: bool) -> tuple[float, float]:
        """Where it begins and ends, across the page or down it."""
        return (self.top, self.bottom) if down else (self.left, self.right)


def load_engine() -> Callable[[Any], Any]:
    """The reader of rapidocr, with the models of its wheel."""
    extra("onnxruntime", "ocr needs", "polymodal[ocr]")
    engine: Callable[[Any], Any] = extra("rapidocr", "ocr needs", "polymodal[ocr]").RapidOCR(
        params={"Global.log_level": "error"}
    )
    return engine


def read_lines(engine: Callable[[Any], Any], pixels: Any) -> list[Line]:  # uint8 [H, W, 3], RGB
    """Read an image; its lines in reading order."""
    found = engine(pixels[:, :, ::-1])  # blue first, as OpenCV has it
    if found.boxes is None:
        return []
    rows = zip(found.txts, found.scores, found.boxes)
    return reading_order([
        Line(text, round(float(score), 4), [[round(float(x), 1), round(float(y), 1)] for x, y in box])
        for text, score, box in rows
    ])  # fmt: skip


def reading_order(lines: Sequence[Line]) -> list[Line]:
    """Columns from left to right, each from top to bottom; cells of a table row by row."""
    corners = [(line, [x for x, _ in line.box], [y for _, y in line.box]) for line in lines]
    out: list[Line] = []
    waiting = [[_Placed(min(x), max(x), min(y), max(y), line) for line, x, y in corners]]
    while waiting:
        group = waiting.pop()
        if parts := _cut(group):
            waiting += reversed(parts)
        else:
            out += _rows(group)
    return out


def _cut(group: list[_Placed]) -> list[list[_Placed]]:
    """Two parts of a page: its columns where a gutter parts it, else what is above and below its widest strip."""
    fewest, ratio = COLUMN
    if len(group) < 2 * fewest:
        return []
    height = median(placed.bottom - placed.top for placed in group)
    for gap, *columns in _gaps(group, down=False):
        wide = (median(placed.right - placed.left for placed in column) >= ratio * height for column in columns)
        if gap >= height and min(map(len, columns)) >= fewest and all(wide):
            return columns
    return next((strips for _, *strips in _gaps(group, down=True)), [])


def _gaps(group: list[_Placed], down: bool) -> Iterator[tuple[float, list[_Placed], list[_Placed]]]:
    """Blank strips through a group, across or down the page, the widest first, with what lies before and after."""
    group = sorted(group, key=lambda placed: placed.span(down))
    found, last = [], group[0].span(down)[1]
    for place, placed in enumerate(group):
        start, end = placed.span(down)
        if start > last:
            found.append((start - last, place))
        last = max(last, end)
    yield from ((gap, group[:place], group[place:]) for gap, place in sorted(found, reverse=True))


def _rows(group: list[_Placed]) -> list[Line]:
    """Lines from top to bottom; those whose middle lies beside the first of a row, from left to right."""
    rows: list[list[_Placed]] = []
    for placed in sorted(group, key=lambda placed: placed.top + placed.bottom):
        if rows and rows[-1][0].top <= (placed.top + placed.bottom) / 2 <= rows[-1][0].bottom:
            rows[-1].append(placed)
        else:
            rows.append([placed])
    return [placed.line for row in rows for placed in sorted(row)]


def reference_tokens(tokens: Iterable[str]) -> str:
    """What TextVQA's prompts say of the text on an image, as LLaVA-1.5 was trained and asked (arXiv:2310.03744)."""
    return f"\nReference OCR token: {', '.join(tokens)}"
