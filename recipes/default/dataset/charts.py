"""Charts with questions: bars upright and lying, lines, pies and small tables, drawn by matplotlib.

The model sees 224 pixels as a few dozen tokens, so labels are few and large, and most questions can be answered from
shape, place and colour. Words, titles, shades, grounds and fonts of the held-out charts are never drawn for training.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.default.dataset import drawn
from recipes.default.dataset.drawn import SIDE, Colour, Place, box, fit, ink_on, light, text_place

if TYPE_CHECKING:
    from PIL import Image as Images

FORMS = {"bar": 0.26, "barh": 0.18, "line": 0.2, "pie": 0.2, "table": 0.16}
# What the labels of a chart may be: for training | held out.
LABELS = {
    "month": "Jan Feb Mar Apr May Jun Jul Aug | Sep Oct Nov Dec",
    "day": "Mon Tue Fri Sun | Wed Thu Sat",
    "fruit": "apple pear plum lemon grape cherry peach kiwi | mango fig lime banana melon date",
    "animal": "cat dog cow pig hen duck goat frog bird lion fish bear | sheep wolf mouse snail fox",
    "city": "Rome Paris Oslo Lima Cairo Delhi Bern Milan Tokyo | Berlin Madrid Kyiv Quito Seoul Nice",
    "food": "rice bread fish egg soup cake cheese salad | pasta meat sushi curry toast",
    "drink": "tea milk juice water cola wine coffee | cocoa beer soda cider",
    "vehicle": "car bus bike train boat truck taxi | tram plane van jeep",
    "sport": "golf judo chess rugby ski swim run | tennis polo darts",
    "name": "Tom Ann Ben Eva Max Ida Kim Lou | Leo Mia Sam Zoe Lena Paul",
    "team": "A B C D E F | P Q R S T",
    "year": "2015 2016 2017 2018 2019 2020 | 2021 2022 2023 2024 2025",
    "color": "red blue green orange pink brown black | purple gray yellow",
}
TITLES = (
    "Sales Votes Points Visitors Rain Cost Sold Stock Score Trips Results Growth Profit Pets Income Tickets Hours Miles"
    " Our_pets Fruit_sold Best_city Bus_trips Lunch Summer Test_scores Library Snacks Rainfall Favorites Market Garden"
    " School_trip Sunshine Power_used Zoo Club Music Report | Prices Orders Goals Weight Speed Winter Popular Steps"
    " Minutes Members Harvest Savings Class_poll Paid Borrowed Temperature Customers Exports Absent"
)
TICK = 15.0  # size of the numbers at an axis
GROUNDS: tuple[list[Colour], list[Colour]] = (
    [(255, 255, 255)] * 5 + [(245, 245, 220), (235, 242, 250), (240, 240, 240), (25, 25, 35), (40, 44, 52)],
    [(255, 255, 255)] * 3 + [(255, 248, 235), (232, 245, 233), (228, 228, 235), (15, 32, 60)],
)


@dataclass(frozen=True)
class Chart:
    """The plan of a chart; sizes and positions are pixels of SIDE."""

    file: str
    heldout: bool
    form: str  # bar | barh | line | pie | table
    topic: str  # what the labels are, a key of LABELS
    labels: tuple[str, ...]
    values: tuple[int, ...]
    colours: tuple[str, ...]  # names, one each, or all the same
    shades: tuple[Colour, ...]
    title: str
    ground: Colour
    font: str
    side: int  # pixels of the file
    named: bool  # whether the labels are drawn
    printed: bool  # whether the numbers stand at the bars, points, slices or rows
    step: int  # between the numbers of the axis, all of which are levels of values; 0 where it has none
    look: dict[str, float]  # drawn at random: width of bars, edges, grid, where a pie starts
    places: tuple[Place, ...] = ()
    lines: tuple[str, ...] = ()
    texts: tuple[tuple[str, float, float, float, Colour], ...] = field(default=(), repr=False)

    def draw(self, thumbs: Path) -> Images.Image:
        """Draw it."""
        return _draw(self)

    @property
    def one_colour(self) -> bool:
        """Whether everything is of one colour."""
        return len(set(self.colours)) == 1


def _values(rng: random.Random, form: str, count: int, levels: range) -> list[int]:
    if form == "pie":
        while True:
            values = rng.sample(range(2, 13), count)
            whole, ordered = sum(values), sorted(values)
            clear = ordered[-1] - ordered[-2] >= 0.07 * whole and ordered[1] - ordered[0] >= 0.03 * whole
            if ordered[0] >= 0.1 * whole and clear:
                return values
    if form == "line":
        values = sorted(rng.sample(levels, count))
        turn = rng.random()
        if turn < 0.4:
            return values[::-1]
        if turn < 0.8:
            return values
    return rng.sample(levels, count)


def plan(file: str, rng: random.Random, fonts: list[str], heldout: bool) -> Chart:
    """Draw a chart's plan."""
    form = rng.choices(list(FORMS), list(FORMS.values()))[0]
    count = rng.randint(3, 5) if form == "line" else rng.randint(2, 5)
    font = drawn.real_font(rng.choice(fonts))
    pool: list[str] = []
    while len(pool) < min(count, 3):
        topic = rng.choice([name for name in LABELS if form != "line" or name in ("month", "day", "year")])
        pool = drawn.split(LABELS[topic], heldout)
        if form == "bar":  # labels stand beside each other: short ones where there are many
            pool = [word for word in pool if drawn.width_of(word, font) * 15 <= 170 / count]
    count = min(count, len(pool))
    labels = rng.sample(pool, count)
    if form == "line" or (topic in ("month", "day", "year") and rng.random() < 0.7):
        labels.sort(key=pool.index)
    ground = rng.choice(GROUNDS[heldout])
    clear = 75 if form in ("line", "table") else 40
    usable = [n for n, shades in drawn.SHADES.items() if min(abs(light(s) - light(ground)) for s in shades) > clear]
    several = form == "pie" or (form in ("bar", "barh") and rng.random() < 0.72)
    names = rng.sample(usable, count) if several else [rng.choice(usable)] * count
    if topic == "color" and form != "table":
        if {*labels} <= {*usable}:
            names = labels
        else:
            topic, labels = "team", drawn.split(LABELS["team"], heldout)[:count]
    shades = {name: drawn.shade(rng, name, heldout) for name in names}
    scale = rng.choice([1, 1, 1, 10, 5, 100 if form in ("table", "barh") else 2])
    printed = form == "table" or rng.random() < (0.25 if form == "pie" else 0.5)
    axis = form in ("bar", "line") and not printed and rng.random() < 0.5
    values = [value * scale for value in _values(rng, form, count, range(1, 6) if axis else range(2, 11))]
    look = {
        "width": rng.uniform(0.55, 0.88),
        "edge": float(rng.random() < 0.35),
        "grid": float(rng.random() < 0.35),
        "frame": rng.random(),
        "start": rng.uniform(0, 360),
        "thick": rng.uniform(3, 6),
        "legend": float(rng.random() < 0.4),
        "heading": float(rng.random() < 0.6),
        "zebra": float(rng.random() < 0.5),
        "letters": rng.uniform(0.85, 1.0),
        "hole": float(rng.random() < 0.2),
    }
    chart = Chart(
        file=file,
        heldout=heldout,
        form=form,
        topic=topic,
        labels=tuple(labels),
        values=tuple(values),
        colours=tuple(names),
        shades=tuple(shades[name] for name in names),
        title=rng.choice(drawn.split(TITLES, heldout)) if rng.random() < 0.72 else "",
        ground=ground,
        font=font,
        side=rng.choice([224, 256, 288, 320, 384, 448]),
        named=form == "table" or rng.random() < 0.85,
        printed=printed,
        step=scale if axis else 0,
        look=look,
    )
    if form == "pie" and chart.named and min(_around(chart, place) for place in range(count)) < 14:
        look["legend"] = 1.0
    return _lay_out(chart)


@dataclass(frozen=True)
class _Frame:
    """Where the bars, points or rows lie."""

    left: float
    right: float
    top: float
    bottom: float
    label: float  # size of the labels' letters
    number: float


def _frame(chart: Chart) -> tuple[_Frame, float]:
    """The room of the chart, and the size of its title."""
    title = fit([chart.title], chart.font, 204, 30 * chart.look["letters"]) if chart.title else 0.0
    top = 14 + (title * 1.25 if title else 0)
    count, named = len(chart.labels), chart.named
    if chart.form == "barh":
        label = fit(chart.labels, chart.font, 76, min(26, (206 - top) / count * 0.6)) if named else 0
        left = 16 + max(drawn.width_of(t, chart.font) for t in chart.labels) * label if named else 14
        number = min(22, (206 - top) / count * 0.5) if chart.printed else 0
        most = max(drawn.width_of(str(v), chart.font) for v in chart.values) * number
        return _Frame(left, 214 - most, top, 212, label, number), title
    left = 13.0
    if chart.step:
        left += 5 + drawn.width_of(str(max(chart.values)), chart.font) * TICK
    slot = (211 - left) / count
    label = fit(chart.labels, chart.font, slot * 0.86, 24 * chart.look["letters"]) if named else 0
    number = fit([str(v) for v in chart.values], chart.font, slot * 0.8, 22) if chart.printed else 0
    top += number * 1.15 if number else TICK / 2 * bool(chart.step)
    return _Frame(left, 211, top, 214 - label * 1.25, label, number), title


def _marks(chart: Chart) -> list[tuple[float, float, float, float]]:
    """The bars (left, top, right, bottom), or the points as boxes around them."""
    frame, _ = _frame(chart)
    count, most = len(chart.values), max(chart.values)
    marks = []
    for place, value in enumerate(chart.values):
        if chart.form == "barh":
            slot = (frame.bottom - frame.top) / count
            half = slot * chart.look["width"] / 2
            middle = frame.top + slot * (place + 0.5)
            end = frame.left + (frame.right - frame.left) * value / most
            marks.append((frame.left, middle - half, end, middle + half))
            continue
        slot = (frame.right - frame.left) / count
        middle = frame.left + slot * (place + 0.5)
        high = frame.bottom - (frame.bottom - frame.top) * value / most
        if chart.form == "line":
            high = min(high, frame.bottom - 6 - frame.number * 1.1)  # clear of the axis, with room for a number
            marks.append((middle - 5, high - 5, middle + 5, high + 5))
        else:
            half = slot * chart.look["width"] / 2
            marks.append((middle - half, high, middle + half, frame.bottom))
    return marks


def _levels(chart: Chart) -> list[tuple[int, float]]:
    """The numbers of the axis and their heights, or heights of lines without a number."""
    frame, _ = _frame(chart)
    high, most = frame.bottom - frame.top, max(chart.values)
    if chart.step:
        return [(level, frame.bottom - high * level / most) for level in range(chart.step, most + 1, chart.step)]
    return [(0, frame.bottom - high * part / 4) for part in range(1, 5)]


def _pie(chart: Chart) -> tuple[float, float, float, list[tuple[float, float]]]:
    """Middle, radius, and the slices' angles (from, to) in degrees, clockwise from the right."""
    _, title = _frame(chart)
    top = title * 1.3 + (8 if title else 4)
    legend = chart.named and chart.look["legend"]
    around = chart.named and not legend
    y = (top + 220) / 2
    radius = min((220 - top) / 2 - (22 if around else 2), 60 if legend else 92)
    x = 8 + radius if legend else 112
    whole, angle, slices = sum(chart.values), chart.look["start"], []
    for value in chart.values:
        slices.append((angle, angle + 360 * value / whole))
        angle += 360 * value / whole
    return x, y, radius, slices


def _at(x: float, y: float, radius: float, slice_: tuple[float, float]) -> tuple[float, float]:
    middle = math.radians(sum(slice_) / 2)
    return x + radius * math.cos(middle), y + radius * math.sin(middle)


def _around(chart: Chart, place: int) -> float:
    """The size of a label beside its slice, by the room between the pie and the edge of the image."""
    _, _, radius, slices = _pie(chart)
    aside = abs(math.cos(math.radians(sum(slices[place]) / 2)))
    return fit([chart.labels[place]], chart.font, 2 * (108 - (radius + 12) * aside) / (1 + 0.9 * aside), 20)


def _lay_out(chart: Chart) -> Chart:
    """Place the texts, and say what lies where."""
    frame, title_size = _frame(chart)
    ink = ink_on(chart.ground)
    texts: list[tuple[str, float, float, float, Colour]] = []
    places: list[Place] = []
    if chart.title:
        texts.append((chart.title, 112, 8 + title_size * 0.55, title_size, ink))
    if chart.form == "table":
        chart_texts, marks = _table(chart)
        texts += chart_texts
        places += marks
    elif chart.form == "pie":
        x, y, radius, slices = _pie(chart)
        beside = x + radius + 12
        size = fit(chart.labels, chart.font, 208 - beside, 22) if chart.look["legend"] else 0
        for place, (label, value) in enumerate(zip(chart.labels, chart.values, strict=True)):
            inside = _at(x, y, radius * 0.65, slices[place])
            thing = f"{chart.colours[place]} slice"
            places.append(box(thing, *(inside[0] - 14, inside[1] - 14, inside[0] + 14, inside[1] + 14)))
            if chart.printed:
                texts.append((str(value), *inside, 18, ink_on(chart.shades[place])))
            if chart.named and chart.look["legend"]:
                row = y + (place - (len(chart.labels) - 1) / 2) * min(34, 190 / len(chart.labels))
                texts.append((label, beside + 14 + drawn.width_of(label, chart.font) * size / 2, row, size, ink))
            elif chart.named:
                around, letters = _at(x, y, radius + 12, slices[place]), _around(chart, place)
                aside = math.cos(math.radians(sum(slices[place]) / 2))
                half = drawn.width_of(label, chart.font) * letters / 2
                texts.append((label, around[0] + half * aside * 0.9, around[1], letters, ink))
    else:
        for place, (left, top, right, bottom) in enumerate(_marks(chart)):
            middle, label = (left + right) / 2, chart.labels[place]
            if chart.form == "line":
                places.append(box("point", left, top, right, bottom))
            else:
                places.append(box(f"{chart.colours[place]} bar", left, top, right, bottom))
            value, flat = str(chart.values[place]), chart.form == "barh"
            if chart.printed and flat:
                x = right + 4 + drawn.width_of(value, chart.font) * frame.number / 2
                texts.append((value, x, (top + bottom) / 2, frame.number, ink))
            elif chart.printed:
                aside, high = _beside_line(chart, place) if chart.form == "line" else (0.0, -1.0)
                y = (top if high < 0 else bottom) + high * frame.number * 0.62
                texts.append((value, middle + aside * frame.number, y, frame.number, ink))
            if chart.named and flat:
                x = left - 6 - drawn.width_of(label, chart.font) * frame.label / 2
                texts.append((label, x, (top + bottom) / 2, frame.label, ink))
            elif chart.named:
                texts.append((label, middle, frame.bottom + frame.label * 0.72, frame.label, ink))
        if chart.step:
            wide = drawn.width_of(str(max(chart.values)), chart.font) * TICK
            texts += [(str(level), frame.left - 5 - wide / 2, y, TICK, ink) for level, y in _levels(chart)]
        if chart.form == "line":
            points = [((a + c) / 2, (b + d) / 2) for a, b, c, d in _marks(chart)]
            xs, ys = [x for x, _ in points], [y for _, y in points]
            places.append(box(f"{chart.colours[0]} line", min(xs), min(ys), max(xs), max(ys)))
    for text, x, y, size, _ in texts:
        places += drawn.each_word(text_place(text, x, y, size, chart.font), chart.font)
    # As one reads: rows from the top, each from the left.
    lines = tuple(text for text, *_ in sorted(texts, key=lambda t: (round(t[2] / 14), t[1])))
    return replace(chart, texts=tuple(texts), places=tuple(places), lines=lines)


def _beside_line(chart: Chart, place: int) -> tuple[float, float]:
    """Where a point's number stays clear of the line: sideways, above (-1) or below (1), in sizes of its letters."""
    here, last = chart.values[place], len(chart.values) - 1
    before = place > 0 and chart.values[place - 1] > here
    after = place < last and chart.values[place + 1] > here
    if before and after:
        return 0.0, 1.0
    return 0.6 * (before and place < last) - 0.6 * (after and place > 0), -1.0


def _rows(chart: Chart) -> tuple[float, float, int]:
    """Top of a table, height of its rows, and how many they are."""
    _, title = _frame(chart)
    top = 12 + title * 1.3
    count = len(chart.labels) + int(chart.look["heading"])
    high = min((214 - top) / count, 56)
    return top, high, count


def _table(chart: Chart) -> tuple[list[tuple[str, float, float, float, Colour]], list[Place]]:
    top, high, _ = _rows(chart)
    ink, texts = ink_on(chart.ground), []
    heading = [(chart.topic.capitalize(), "Number")] if chart.look["heading"] else []
    rows = [*heading, *zip(chart.labels, map(str, chart.values), strict=True)]
    size = min(fit([a for a, _ in rows], chart.font, 98, high * 0.62), fit([b for _, b in rows], chart.font, 84, 26))
    for place, (first, second) in enumerate(rows):
        y = top + high * (place + 0.5)
        colour = ink_on(chart.shades[0]) if heading and place == 0 else ink
        texts += [(first, 64, y, size, colour), (second, 166, y, size, colour)]
    places = [box("table", 10, top, 214, top + high * len(rows))]
    if heading:
        places.append(box(f"{chart.colours[0]} row", 10, top, 214, top + high))
    return texts, places


@functools.lru_cache(maxsize=1)
def _canvas() -> tuple[Any, Any]:
    """One figure for all charts: making one takes longer than drawing."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # not what a user's matplotlibrc says
    figure = Figure(figsize=(SIDE / 100, SIDE / 100), dpi=100)
    return figure, FigureCanvasAgg(figure)


def _draw(chart: Chart) -> Images.Image:
    from matplotlib import patches
    from matplotlib.font_manager import FontProperties
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Affine2D
    from PIL import Image

    figure, canvas = _canvas()
    figure.clear()
    figure.set_dpi(100 * chart.side / SIDE)
    figure.set_facecolor(_share(chart.ground))
    down = Affine2D().translate(0, -SIDE).scale(1 / SIDE, -1 / SIDE) + figure.transFigure
    ink = _share(ink_on(chart.ground))
    pale = _share(tuple(round(0.75 * g + 0.25 * i) for g, i in zip(chart.ground, ink_on(chart.ground), strict=True)))

    def line(xs: list[float], ys: list[float], colour: Any, wide: float, **more: Any) -> None:
        figure.add_artist(Line2D(xs, ys, color=colour, linewidth=wide, transform=down, **more))

    def block(left: float, top: float, right: float, bottom: float, colour: Any, edge: Any, wide: float) -> None:
        shape = patches.Rectangle((left, top), right - left, bottom - top)
        shape.set(facecolor=colour, edgecolor=edge, linewidth=wide, transform=down)
        figure.add_artist(shape)

    frame, _ = _frame(chart)
    edge, wide = (ink, 1.0) if chart.look["edge"] else ("none", 0.0)
    if chart.form == "table":
        top, high, count = _rows(chart)
        for place in range(count):
            head = chart.look["heading"] and place == 0
            colour = _share(chart.shades[0]) if head else pale if chart.look["zebra"] and place % 2 else "none"
            block(10, top + high * place, 214, top + high * (place + 1), colour, ink, 0.9 if edge == ink else 0.5)
        line([116, 116], [top, top + high * count], ink, 0.7)
    elif chart.form == "pie":
        x, y, radius, slices = _pie(chart)
        for place, (start, stop) in enumerate(slices):
            shape = patches.Wedge((x, y), radius, start, stop, width=radius * 0.62 if chart.look["hole"] else None)
            shape.set(facecolor=_share(chart.shades[place]), edgecolor=_share(chart.ground), transform=down)
            shape.set_linewidth(1.5 if chart.look["edge"] else 0.5)
            figure.add_artist(shape)
            if chart.named and chart.look["legend"]:
                row = y + (place - (len(slices) - 1) / 2) * min(34, 190 / len(slices))
                left = x + radius + 10
                block(left, row - 6, left + 12, row + 6, _share(chart.shades[place]), "none", 0)
    else:
        if chart.look["grid"] and chart.form == "barh":
            for part in range(1, 5):
                at = frame.left + (frame.right - frame.left) * part / 4
                line([at, at], [frame.top, frame.bottom], pale, 0.6, zorder=0.5)
        elif chart.look["grid"] or chart.step:
            for _, at in _levels(chart):
                line([frame.left, frame.right], [at, at], pale, 0.6, zorder=0.5)
        marks = _marks(chart)
        if chart.form == "line":
            xs, ys = [(a + c) / 2 for a, _, c, _ in marks], [(b + d) / 2 for _, b, _, d in marks]
            marker = {"marker": "o", "markersize": chart.look["thick"] * 1.8} if chart.look["edge"] else {}
            line(xs, ys, _share(chart.shades[0]), chart.look["thick"] * 0.72, solid_joinstyle="round", **marker)
        else:
            for mark, colour in zip(marks, chart.shades, strict=True):
                block(*mark, _share(colour), edge, wide)
        line([frame.left] * 2, [frame.top, frame.bottom], ink, 0.9)
        if chart.form != "barh":
            line([frame.left, frame.right], [frame.bottom] * 2, ink, 0.9)
        if chart.look["frame"] < 0.3 and not chart.printed:
            block(frame.left, frame.top, frame.right, frame.bottom, "none", ink, 0.7)
    properties = FontProperties(fname=chart.font)
    for text, x, y, size, colour in chart.texts:
        letters = figure.text(x, y, text, transform=down, color=_share(colour), fontproperties=properties)
        letters.set(size=size * 0.72, ha="center", va="center_baseline")
    canvas.draw()
    pixels = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    return pixels.convert("RGB")


def _share(colour: Any) -> tuple[float, ...]:
    return tuple(c / 255 for c in colour)
