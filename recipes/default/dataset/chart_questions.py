"""What is asked about charts: every answer follows from the plan, and none from the question alone.

`compose` gives training conversations, `captions` short captions, `heldout` the validation questions.
"""

from __future__ import annotations

import random
from functools import partial

from recipes.default.dataset import charts, drawn, words
from recipes.default.dataset.charts import Chart
from recipes.default.dataset.drawn import listed
from recipes.default.dataset.questions import QA, capital

KIND = "chart"
FORMS = {
    "bar": ("bar chart", ("bar chart", "bar graph", "vertical bar chart", "bars")),
    "barh": ("bar chart", ("bar chart", "bar graph", "horizontal bar chart", "bars")),
    "line": ("line chart", ("line chart", "line graph", "line")),
    "pie": ("pie chart", ("pie chart", "pie", "pie graph")),
    "table": ("table", ("table",)),
}
ZH_FORMS = {"bar": "柱状图", "barh": "柱状图", "line": "折线图", "pie": "饼图", "table": "表格"}
PARTS = {"bar": "bar", "barh": "bar", "line": "point", "pie": "slice", "table": "row"}
# The most and the least, as one says of bars, points, slices and rows.
MOST = {
    "bar": (("highest", "tallest", "largest"), ("lowest", "shortest", "smallest")),
    "barh": (("longest", "largest"), ("shortest", "smallest")),
    "line": (("highest",), ("lowest",)),
    "pie": (("largest", "biggest"), ("smallest",)),
    "table": (("highest", "largest"), ("lowest", "smallest")),
}
ORDER = ["first", "second", "third", "fourth", "fifth"]


def caption(rng: random.Random, chart: Chart) -> str:
    """A sentence or two that describe the chart."""
    named = FORMS[chart.form][0]
    if chart.form in ("bar", "barh") and rng.random() < 0.3:
        named = ("vertical " if chart.form == "bar" else "horizontal ") + named
    text = f"{words.article(named)} {named}"
    if chart.title and rng.random() < 0.7:
        text += f' with the title "{chart.title}"'
    count = len(chart.labels)
    part = PARTS[chart.form]
    if chart.form == "line":
        trend = _trend(chart)
        text += f"; the {chart.colours[0]} line is {trend}" if trend else f" with a {chart.colours[0]} line"
    elif chart.named and rng.random() < 0.6:
        text += f" of {listed(chart.labels)}" if " title " not in text else f", of {listed(chart.labels)}"
    elif not chart.one_colour:
        text += f"; the {part}s are {listed(chart.colours)}"
    else:
        text += f"; it has {words.NUMBERS[count]} {part}s"
    return words.sentence(text)


def _trend(chart: Chart) -> str:
    if list(chart.values) == sorted(chart.values):
        return "rising"
    return "falling" if list(chart.values) == sorted(chart.values, reverse=True) else ""


def _bars(chart: Chart) -> bool:
    return chart.form in ("bar", "barh")


def _of(chart: Chart, place: int) -> str:
    """One bar, slice, point or row by its label."""
    part = PARTS[chart.form]
    return f"the {part} {'of' if part == 'bar' else 'for'} {chart.labels[place]}"


def _ends(rng: random.Random, chart: Chart, most: bool) -> tuple[str, int]:
    """A word for the most or the least, and where it is."""
    word = rng.choice(MOST[chart.form][not most])
    wanted = (max if most else min)(chart.values)
    return word, chart.values.index(wanted)


def ask_form(rng: random.Random, chart: Chart) -> QA:
    """Ask "What kind of chart is this?"."""
    named, accepted = FORMS[chart.form]
    others = [n for n in ("bar chart", "line chart", "pie chart", "table") if n != named]
    choices = rng.sample([named, *rng.sample(others, 2)], 3)
    asked = [f"{words.article(c)} {c}" for c in choices]
    question = rng.choice(
        [
            "What is this?",
            "What kind of figure is this?",
            "What type of chart or table is this?",
            f"Is this {asked[0]}, {asked[1]} or {asked[2]}?",
            f"Which one is it: {asked[0]}, {asked[1]} or {asked[2]}?",
        ]
    )
    with_article = tuple(f"{words.article(a)} {a}" for a in accepted)
    return QA(KIND, question, f"This is {words.article(named)} {named}.", capital(named), (*accepted, *with_article))


def ask_upright(rng: random.Random, chart: Chart) -> QA | None:
    """Ask whether bars stand or lie."""
    if not _bars(chart):
        return None
    first, second = rng.sample(["vertical", "horizontal"], 2)
    right = "vertical" if chart.form == "bar" else "horizontal"
    question = rng.choice([f"Are the bars {first} or {second}?", f"Is it a {first} or a {second} bar chart?"])
    return QA(KIND, question, f"The bars are {right}.", capital(right), (right,))


def ask_count(rng: random.Random, chart: Chart) -> QA | None:
    """Ask how many bars, slices, points or rows there are."""
    if chart.form == "line" and not chart.look["edge"]:
        return None
    part = PARTS[chart.form]
    below = " below the heading" if chart.form == "table" and chart.look["heading"] else ""
    question = rng.choice(
        [f"How many {part}s are there{below}?", f"How many {part}s do you see{below}?", f"Count the {part}s{below}."]
    )
    return drawn.number_qa(KIND, question, len(chart.labels), part)


def ask_end(rng: random.Random, chart: Chart, most: bool | None = None) -> QA | None:
    """Ask which is the highest or the lowest, by its label."""
    if not chart.named:
        return None
    word, place = _ends(rng, chart, rng.random() < 0.5 if most is None else most)
    label, part = chart.labels[place], PARTS[chart.form]
    thing = "item" if chart.topic in ("food", "drink", "name") else chart.topic
    question = rng.choice(
        [
            f"Which {thing} has the {word} {'number' if part in ('row', 'point') else part}?",
            f"Which one is the {word}?",
            f"What is the {word}?" if part != "bar" else f"What is the label of the {word} bar?",
        ]
    )
    return QA(KIND, question, f"{capital(label)} is the {word}.", capital(label), (label,))


def ask_end_color(rng: random.Random, chart: Chart) -> QA | None:
    """Ask which colour the highest or lowest one has."""
    if chart.one_colour or chart.form not in ("bar", "barh", "pie"):
        return None
    word, place = _ends(rng, chart, rng.random() < 0.6)
    thing = f"the {word} {PARTS[chart.form]}"
    question = rng.choice([f"What color is {thing}?", f"Which color is {thing}?", f"Tell me the color of {thing}."])
    return drawn.color_qa(KIND, question, thing, chart.colours[place])


def ask_color(rng: random.Random, chart: Chart) -> QA | None:
    """Ask which colour one has, or all have."""
    if chart.form == "table":
        if not chart.look["heading"]:
            return None
        thing, colour = "the heading", chart.colours[0]
    elif chart.form == "line":
        thing, colour = "the line", chart.colours[0]
    elif chart.one_colour:
        question = rng.choice(["What color are the bars?", "Which color do the bars have?"])
        qa = drawn.color_qa(KIND, question, "the bars", chart.colours[0])
        return QA(qa.kind, qa.question, f"The bars are {chart.colours[0]}.", qa.short, qa.accepted)
    else:
        place = rng.randrange(len(chart.labels))
        thing, colour = _of(chart, place), chart.colours[place]
        if not chart.named:
            if chart.form == "pie":
                return None
            thing = _nth(chart, place)
        elif chart.topic == "color":
            return None  # the label says it
    return drawn.color_qa(KIND, rng.choice([f"What color is {thing}?", f"Which color is {thing}?"]), thing, colour)


def _nth(chart: Chart, place: int) -> str:
    last = len(chart.labels) - 1
    ends = {"bar": ("on the left", "on the right"), "barh": ("at the top", "at the bottom")}[chart.form]
    return f"the bar {ends[place == last]}" if place in (0, last) else f"the {ORDER[place]} bar"


def ask_place(rng: random.Random, chart: Chart) -> QA | None:
    """Ask whether the highest is on the left or the right."""
    if not _bars(chart):
        return None
    word, place = _ends(rng, chart, rng.random() < 0.5)
    last = len(chart.labels) - 1
    if place not in (0, last):
        if last != 2:
            return None
        where = "in the middle"
    else:
        where = {"bar": ("on the left", "on the right"), "barh": ("at the top", "at the bottom")}[chart.form][
            place == last
        ]
    near, far = ("on the left", "on the right") if chart.form == "bar" else ("at the top", "at the bottom")
    first, second = rng.sample([near, far], 2)
    middle = ", in the middle" if last == 2 else ""
    question = f"Is the {word} bar {first}{middle} or {second}?"
    return QA(KIND, question, f"The {word} bar is {where}.", capital(where.split()[-1]), (where.split()[-1], where))


def ask_which(rng: random.Random, chart: Chart) -> QA | None:
    """Ask what a colour stands for."""
    if chart.one_colour or not chart.named or chart.topic == "color":
        return None
    place = rng.randrange(len(chart.labels))
    label, part = chart.labels[place], PARTS[chart.form]
    thing = f"the {chart.colours[place]} {part}"
    question = rng.choice(
        [f"What does {thing} show?", f"What is the label of {thing}?", f"What does {thing} stand for?"]
    )
    return QA(KIND, question, f"{capital(thing)} shows {label}.", capital(label), (label,))


def ask_compare(rng: random.Random, chart: Chart) -> QA | None:
    """Ask whether one is higher than another."""
    colours = not chart.one_colour and (not chart.named or rng.random() < 0.4)
    if not (chart.named or colours):
        return None
    names = chart.colours if colours else chart.labels
    gap = 0.18 * max(chart.values)
    pairs = [
        (a, b)
        for a in range(len(names))
        for b in range(len(names))
        if abs(chart.values[a] - chart.values[b]) >= gap and a != b
    ]
    if not pairs:
        return None
    yes, more = rng.random() < 0.5, rng.random() < 0.7
    a, b = rng.choice([(a, b) for a, b in pairs if (chart.values[a] > chart.values[b]) == (yes == more)])
    word = {
        "bar": ("higher", "lower"),
        "barh": ("longer", "shorter"),
        "line": ("higher", "lower"),
        "pie": ("larger", "smaller"),
        "table": ("higher", "lower"),
    }[chart.form][not more]
    part = PARTS[chart.form]
    if colours:
        question = f"Is the {names[a]} {part} {word} than the {names[b]} {part}?"
    elif chart.form in ("line", "table"):
        question = f"Is the number of {names[a]} {word} than that of {names[b]}?"
    else:
        question = rng.choice(
            [f"Is {names[a]} {word} than {names[b]}?", f"Is {_of(chart, a)} {word} than {_of(chart, b)}?"]
        )
    return drawn.yes_no(KIND, question, yes, "it is")


def ask_exists(rng: random.Random, chart: Chart) -> QA | None:
    """Ask whether there is a bar of a colour, or a label."""
    yes = rng.random() < 0.5
    part = PARTS[chart.form] if chart.form != "line" else "line"
    if chart.form != "table" and (not chart.named or rng.random() < 0.6):
        others = [name for name in drawn.SHADES if name not in chart.colours]
        colour = rng.choice(chart.colours if yes else others)
        return drawn.yes_no(KIND, f"Is there {words.article(colour)} {colour} {part}?", yes, "there is")
    if not chart.named:
        return None
    others = [name for name in drawn.split(charts.LABELS[chart.topic], chart.heldout) if name not in chart.labels]
    if not others:
        return None
    label = rng.choice(chart.labels if yes else others)
    thing = "table" if chart.form == "table" else "chart"
    question = rng.choice([f"Is {label} in the {thing}?", f"Does the {thing} show {label}?"])
    return drawn.yes_no(KIND, question, yes)


def ask_trend(rng: random.Random, chart: Chart) -> QA | None:
    """Ask whether a line rises or falls."""
    trend = _trend(chart) if chart.form == "line" else ""
    if not trend:
        return None
    if rng.random() < 0.5:
        first, second = rng.sample(["rising", "falling"], 2)
        return QA(KIND, f"Is the line {first} or {second}?", f"The line is {trend}.", capital(trend), (trend,))
    way = "up" if trend == "rising" else "down"
    first, second = rng.sample(["up", "down"], 2)
    return QA(
        KIND, f"Does the line go {first} or {second}?", f"The line goes {way}.", capital(way), (way, f"goes {way}")
    )


def ask_title(rng: random.Random, chart: Chart) -> QA | None:
    """Ask for the title."""
    if not chart.title:
        return None
    thing = "table" if chart.form == "table" else "chart"
    question = rng.choice(
        [
            f"What is the title of the {thing}?",
            "What is the title?",
            f"What is written above the {thing}?",
            f"What does the {thing} show, by its title?",
        ]
    )
    return QA(KIND, question, f'The title is "{chart.title}".', chart.title, (chart.title, chart.title.lower()))


def ask_value(rng: random.Random, chart: Chart) -> QA | None:
    """Ask for a number that is written there, or is found at the axis."""
    if not (chart.printed or chart.step):
        return None
    place = rng.randrange(len(chart.labels))
    value = str(chart.values[place])
    if chart.named:
        thing = chart.labels[place]
        question = rng.choice(
            [f"What is the value of {thing}?", f"Which number does {thing} have?", f"How much is {thing}?"]
        )
    elif not chart.one_colour:
        thing = f"the {chart.colours[place]} {PARTS[chart.form]}"
        question = rng.choice([f"Which number is at {thing}?", f"What is the value of {thing}?"])
    else:
        word, place = _ends(rng, chart, rng.random() < 0.5)
        value, thing = str(chart.values[place]), f"the {word} {PARTS[chart.form]}"
        question = f"What is the value of {thing}?"
    return QA(KIND, question, f"The value of {thing} is {value}.", value, (value,))


def ask_caption(rng: random.Random, chart: Chart) -> QA:
    """Ask for a description."""
    question = rng.choice(
        ["Describe the picture.", "Describe the chart.", "What does the picture show?", "What do you see?"]
    )
    text = caption(rng, chart)
    return QA("caption", question, text, text, (text,))


def ask_zh(rng: random.Random, chart: Chart) -> QA:
    """A question in Chinese: what it is, how many bars or slices, a colour, whether the line rises."""
    form = ZH_FORMS[chart.form]
    options = [QA("zh", rng.choice(["这是什么图？", "图中是什么？"]), f"这是{form}。", form, (form,))]
    if chart.form in ("bar", "barh", "pie"):
        part = "扇形" if chart.form == "pie" else "柱子"
        number = drawn.ZH_NUMBERS[len(chart.labels)]
        options.append(QA("zh", f"图中有几个{part}？", f"{number}个。", f"{number}个", (f"{number}个", number)))
    if chart.form in ("bar", "barh") and not chart.one_colour:
        word, most = rng.choice([("最高" if chart.form == "bar" else "最长", True), ("最短", False)])
        place = chart.values.index((max if most else min)(chart.values))
        colour = words.ZH_COLOURS[chart.colours[place]]
        options.append(QA("zh", f"{word}的柱子是什么颜色的？", f"{colour}。", colour, (colour, colour[:-1])))
    if trend := chart.form == "line" and _trend(chart):
        way = "上升" if trend == "rising" else "下降"
        options.append(QA("zh", "线是上升还是下降？", f"{way}。", way, (way,)))
    return rng.choice(options)


TOPICS: drawn.Topics = {
    "form": ask_form,
    "upright": ask_upright,
    "count": ask_count,
    "highest": partial(ask_end, most=True),
    "lowest": partial(ask_end, most=False),
    "end color": ask_end_color,
    "color": ask_color,
    "place": ask_place,
    "which": ask_which,
    "compare": ask_compare,
    "exists": ask_exists,
    "trend": ask_trend,
    "title": ask_title,
    "value": ask_value,
}

PAPER = drawn.Paper(KIND, charts.plan, TOPICS, {"caption": ask_caption, "zh": ask_zh}, caption)
compose, captions, heldout = PAPER.compose, PAPER.captions, PAPER.heldout
