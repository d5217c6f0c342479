"""Two images and what is asked about both: which shows it, and what differs between them."""

from __future__ import annotations

from dataclasses import replace

from recipes.default.dataset import chinese, questions, words
from recipes.default.dataset.natural import Thing
from recipes.default.dataset.questions import QA, capital
from recipes.default.dataset.studio import Spot, Studio, View, related
from recipes.default.dataset.where import are, the_thing

_ASKED = ("What is different?", "What is the difference between the two pictures?", "What has changed?")


def compare(make: Studio, zh: chinese.Names) -> tuple[list[View], list[QA]]:
    """Two images of one thing each, and two or three questions about both."""
    rng = make.rng
    for _ in range(300):
        first = make.pick()
        noun = make.sources[first].noun or ""
        second = rng.choice(make.by_noun[noun]) if rng.random() < 0.25 else make.pick()
        other = make.sources[second].noun or ""
        if noun == other or not related(noun, other):
            break
    views = [make.single(first), make.single(second)]
    one, two = views
    qa = questions.ask_compare(rng, one, two)  # type: ignore[arg-type]
    assert qa is not None
    asked = [qa, *questions.ask_more_of_two(rng, one, two, qa)]  # type: ignore[arg-type]
    if rng.random() < 0.4 and (more := chinese.ask_compare(rng, one, two, zh)):
        asked.append(more)
    rng.shuffle(asked)
    return views, asked


def differ(make: Studio, zh: chinese.Names) -> tuple[list[View], list[QA]]:
    """The same scene twice, with one thing more, gone, moved or recoloured, or with no difference."""
    rng = make.rng
    change = rng.choice(["more", "gone", "moved", "painted", "same"])
    while True:
        mark = len(make.views)
        first = make.several(rng.choice([2, 3, 3]), painted=change == "painted" or rng.random() < 0.3)
        if len(first.spots) > 1:
            break
        del make.views[mark:]
    things, spots = list(first.picture.things), list(first.spots)
    at = rng.randrange(len(spots))
    spot, thing = spots[at], things[at]
    if change in ("more", "gone"):
        fewer = things[:at] + things[at + 1 :], spots[:at] + spots[at + 1 :]
        if change == "gone":
            second = make.again(first, *fewer)
        else:
            second = make.again(first, things, spots)
            first.picture.things, first.spots = fewer
    elif change == "moved":
        moved = _moved(make, thing, spot, spots)
        if moved is None:
            change, second = "same", make.again(first, things, spots)
        else:
            things[at], spots[at] = moved
            second = make.again(first, things, spots)
    elif change == "painted":
        used = {s.colour for s in spots} | {first.picture.back.name}
        if spot.source.origin == "shapes" or spot.colour is None:
            at = next((k for k, s in enumerate(spots) if s.source.origin != "shapes" and s.colour), -1)
        if at < 0:
            change = "same"
        else:
            spot = spots[at]
            colour = rng.choice([c for c in words.COLOURS if c not in used])
            things[at] = make.paint(replace(things[at], tint=None, turned=0.0), colour)
            spots[at] = replace(spot, colour=colour, painted=colour != spot.source.colour)
        second = make.again(first, things, spots)
    else:
        second = make.again(first, things, spots)
    return [first, second], _asked(make, change, spot, spots[at] if change in ("moved", "painted") else spot, zh)


def _moved(make: Studio, thing: Thing, spot: Spot, spots: list[Spot]) -> tuple[Thing, Spot] | None:
    """The thing somewhere else, well away from where it was and from the others."""
    rng = make.rng
    x0, y0, x1, y1 = spot.box
    wide, high = x1 - x0, y1 - y0
    for _ in range(60):
        left, top = rng.uniform(0, max(0.0, 1 - wide)), rng.uniform(0, max(0.0, 1 - high))
        dx, dy = left - x0, top - y0
        if max(abs(dx), abs(dy)) < 0.25 or min(abs(dx), abs(dy)) > 0.6 * max(abs(dx), abs(dy)):
            continue
        box = (left, top, left + wide, top + high)
        if any(_overlap(box, s.box) > 0.15 for s in spots if s is not spot):
            continue
        new = replace(thing, quad=tuple((round(x + dx, 4), round(y + dy, 4)) for x, y in thing.quad))
        return new, replace(spot, box=new.box)
    return None


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    small = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(0.0, wide) * max(0.0, high) / max(1e-6, small)


def _asked(make: Studio, change: str, before: Spot, after: Spot, zh: chinese.Names) -> list[QA]:
    rng = make.rng
    thing, verb, short = the_thing(before), are(before), capital(words.proper(before.noun))
    accepted = tuple(words.accepted(before.noun))
    same = change == "same"
    whether = rng.choice(["Are the two pictures the same?", "Do both pictures show exactly the same?"])
    done = whether.startswith("Do")
    yes, no = ("Yes, they do.", "No, they do not.") if done else ("Yes, they are.", "No, they are not.")
    found = _says(change, before, after)
    asked = list[QA]()
    if same or rng.random() < 0.45:  # about a third is the same: yes as often as no
        asked.append(QA("differ", whether, yes if same else no, "Yes" if same else "No", ("yes",) if same else ("no",)))
    asked.append(QA("differ", rng.choice(_ASKED), words.sentence(found), "", (found,)))
    if change in ("more", "gone"):
        place = "second" if change == "more" else "first"
        other = "first" if change == "more" else "second"
        question = rng.choice(
            [
                f"What is missing in the {other} picture?",
                f"What is only in the {place} picture?",
                f"What does the {place} picture show that the {other} does not?",
            ]
        )
        asked.append(QA("differ", question, words.sentence(thing), short, accepted))
    elif change == "moved":
        asked.append(QA("differ", "Which thing has moved?", words.sentence(thing), short, accepted))
    elif change == "painted":
        place, colour = rng.choice([("first", before.colour), ("second", after.colour)])
        question = f"What color {verb} {thing} in the {place} picture?"
        long = words.sentence(f"{thing} {verb} {colour}")
        asked.append(QA("color", question, long, capital(colour or ""), (colour or "",)))
    rng.shuffle(asked)
    name = chinese.name_of(before, zh)
    if name and rng.random() < 0.35:
        said = {
            "same": "没有不同。",
            "more": f"第二张图多了{name}。",
            "gone": f"第二张图少了{name}。",
            "moved": f"{name}的位置变了。",
            "painted": f"{name}的颜色变了。",
        }[change]
        asked.append(QA("zh", "这两张图有什么不同？", said, said, (said,)))
    return asked


def _says(change: str, before: Spot, after: Spot) -> str:
    thing, verb = the_thing(before), are(before)
    have = "have" if verb == "are" else "has"
    if change == "same":
        return "Nothing is different"
    if change == "more":
        return f"there {verb} {before.phrase} in the second picture"
    if change == "gone":
        return f"{thing} {verb} gone in the second picture"
    if change == "painted":
        return f"{thing} {verb} {before.colour} in the first picture and {after.colour} in the second"
    (ax, ay), (bx, by) = before.centre, after.centre
    way = ("to the right" if bx > ax else "to the left") if abs(bx - ax) > abs(by - ay) else "down" if by > ay else "up"
    return f"{thing} {have} moved {way}"
