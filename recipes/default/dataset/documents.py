"""Short documents in large type: receipts, forms, signs, tickets, invitations, lists, business cards, calendar pages.

A document is planned as marks (lines of text, rules, boxes, scribbles, small drawings) with its facts beside them, from
which the questions are answered. Held-out documents have words, names, shades and fonts that training never draws.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.default.dataset import drawn
from recipes.default.dataset.drawn import SIDE, Colour, Place, box, fit, ink_on, text_place
from recipes.default.dataset.marks import Mark, paint

if TYPE_CHECKING:
    from PIL import Image as Images

# For training | held out; `_` is a space.
WORDS = {
    "shop": "MARKET BAKERY CAFE BOOKS TOYS GROCER SHOP PIZZA PET_SHOP SHOES DELI FLOWERS CORNER_SHOP FOOD_HALL"
    " | PHARMACY STORE BISTRO HARDWARE KIOSK BUTCHER FISHMONGER ANTIQUES",
    "item": "Milk Bread Eggs Tea Rice Apples Cake Soup Juice Cheese Fish Salt Pears Water Beans Candy Soap Ham Corn"
    " Coffee Sugar | Butter Honey Onions Flour Nuts Plums Jam Garlic Yogurt",
    "form": "FORM APPLICATION REPORT ORDER CONTRACT REQUEST ENTRY_FORM CLUB_FORM | PERMIT INVOICE CLAIM QUESTIONS VISA",
    "sign": "STOP OPEN CLOSED EXIT NO_ENTRY PUSH PULL SALE FREE DANGER SLOW HELP TAXI BUS PARKING TOILET SCHOOL"
    " WET_FLOOR NO_DOGS KEEP_OUT HOTEL THIS_WAY NO_FISHING WELCOME PRIVATE LIBRARY STATION OFFICE BEACH"
    " | WARNING QUIET CAUTION DETOUR SILENCE HOSPITAL GATE CLINIC BEWARE RESERVED WATCH_YOUR_STEP",
    "event": "CONCERT MOVIE CIRCUS THEATER ZOO MUSEUM BUS TRAIN FAIR OPERA BALLET SHIP"
    " | FESTIVAL CINEMA RAFFLE MATCH CRUISE SHOW",
    "party": "PARTY BIRTHDAY WEDDING DINNER PICNIC DANCE LUNCH MY_PARTY"
    " | BREAKFAST REUNION BARBECUE CEREMONY ANNIVERSARY",
    "name": "Tom Ann Ben Eva Max Ida Kim Jack Nina Sara Lucy John Mary Peter Rosa Hugo"
    " | Leo Mia Sam Zoe Paul Emma Clara Felix",
    "family": "Hill King Reed Moss Lane Wood Bell Cole Page | Stone Marsh Young Brook Grant",
    "job": "Doctor Teacher Painter Baker Lawyer Driver Singer Dentist Farmer Nurse"
    " | Plumber Writer Cook Pilot Gardener",
    "list": "SHOPPING TO_BUY GROCERIES LIST MY_LIST BUY FOR_DINNER | NEEDED ERRANDS REMEMBER SUPPLIES",
    "month": "JANUARY MARCH APRIL JUNE JULY AUGUST OCTOBER DECEMBER | FEBRUARY SEPTEMBER NOVEMBER",
    "day": "Monday Tuesday Friday Sunday | Wednesday Thursday Saturday",
    "picture": "heart star sun balloon flower house | heart star sun balloon flower house",
}
FORMS = ["receipt", "form", "sign", "ticket", "invitation", "shopping list", "business card", "calendar page"]


@dataclass
class Document:
    """The plan of a document; positions are pixels of SIDE."""

    file: str
    heldout: bool
    form: str
    font: str
    side: int
    desk: Colour  # what it lies on
    seed: int
    marks: list[Mark] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    noun_places: list[Place] = field(default_factory=list)
    angle: float = 0.0

    @property
    def texts(self) -> list[Mark]:
        """Its lines, from the top, each row from the left."""
        return sorted((m for m in self.marks if m.what == "text"), key=lambda m: (round(m.y / 9), m.x))

    @property
    def lines(self) -> tuple[str, ...]:
        """What can be read, in reading order."""
        return tuple(m.text for m in self.texts)

    @property
    def places(self) -> tuple[Place, ...]:
        """Each word and thing with where it lies."""
        found = list(self.noun_places)
        for m in self.texts:
            found += drawn.each_word(text_place(m.text, m.x, m.y, m.size, m.font, m.align), m.font)
        return tuple(found)

    def draw(self, thumbs: Path) -> Images.Image:
        """Draw it."""
        return _draw(self)

    def write(self, text: str, x: float, y: float, size: float, room: float, **more: Any) -> None:
        """Put a line of text, made smaller where it does not fit the room."""
        font = more.pop("font", self.font)
        self.marks.append(Mark("text", x, y, text=text, size=fit([text], font, room, size), font=font, **more))

    def put(self, what: str, x: float, y: float, wide: float, high: float, noun: str = "", **more: Any) -> None:
        """Put something that is no text; `noun` names it for `places`."""
        self.marks.append(Mark(what, x, y, wide, high, **more))
        if noun:
            self.noun_places.append(box(noun, x, y, x + wide, y + high))


class _Hand:
    """Draws words, shades and the rest for one document."""

    def __init__(self, rng: random.Random, heldout: bool) -> None:
        self.rng, self.heldout = rng, heldout

    def word(self, kind: str) -> str:
        return self.rng.choice(drawn.split(WORDS[kind], self.heldout))

    def some(self, kind: str, count: int) -> list[str]:
        return self.rng.sample(drawn.split(WORDS[kind], self.heldout), count)

    def colour(self, *names: str) -> tuple[str, Colour]:
        name = self.rng.choice(names or tuple(drawn.SHADES))
        return name, drawn.shade(self.rng, name, self.heldout)

    def price(self, low: int = 1, high: int = 9) -> str:
        return f"{self.rng.randint(low, high)}.{self.rng.choice([0, 20, 25, 40, 50, 60, 75, 80, 90]):02d}"

    def paper(self) -> Colour:
        grey = self.rng.randint(240, 255)
        return self.rng.choice([(255, 255, 255), (grey, grey, grey), (255, 252, 240), (250, 250, 245)])

    def date(self) -> str:
        months = "Jan Feb Mar Apr May Jun Jul Aug | Sep Oct Nov Dec"
        day = self.rng.randint(1, 28)
        return f"{day} {self.rng.choice(drawn.split(months, self.heldout))}"


def _receipt(doc: Document, hand: _Hand) -> None:
    rng = hand.rng
    count = rng.randint(2, 4)
    left, right = rng.choice([(34, 190), (26, 198), (42, 182)])
    top, bottom = 8, 216
    doc.put("box", left, top, right - left, bottom - top, "receipt", fill=hand.paper(), colour=(205, 205, 205), thick=1)
    title, room = hand.word("shop"), right - left - 16
    doc.write(title, (left + right) / 2, 28, 28, room)
    doc.put("dashes", left + 8, 46, room, 0)
    names = hand.some("item", count)
    step = min(32.0, 104 / count)
    size = min(fit(names, doc.font, room * 0.56, step * 0.74), 22)
    cents = [rng.randint(1, 9) * 100 + rng.choice([0, 0, 20, 50, 50, 80]) for _ in names]
    prices = [f"{c / 100:.2f}" for c in cents]
    for place, (name, price) in enumerate(zip(names, prices, strict=True)):
        y = 62 + step * place
        doc.write(name, left + 8, y, size, room * 0.58, align="left")
        doc.write(price, right - 8, y, size, room * 0.4, align="right")
    total = f"{sum(cents) / 100:.2f}"
    doc.put("dashes", left + 8, 168, room, 0)
    doc.write("TOTAL", left + 8, 190, 23, room * 0.5, align="left")
    doc.write(total, right - 8, 190, 25, room * 0.48, align="right")
    doc.facts |= {"title": title, "items": names, "prices": prices, "total": total}


def _form(doc: Document, hand: _Hand) -> None:
    rng = hand.rng
    doc.put("box", 12, 8, 200, 208, "form", fill=hand.paper(), colour=(170, 170, 170), thick=1)
    title = hand.word("form")
    name, colour = hand.colour("black", "blue", "red", "green", "gray", "purple")
    if rng.random() < 0.5:
        doc.put("box", 12, 8, 200, 42, f"{name} heading", fill=colour, colour=colour)
        doc.write(title, 112, 29, 28, 184, colour=ink_on(colour))
        doc.facts["heading"] = name
    else:
        doc.write(title, 112, 29, 28, 184)
        doc.put("rule", 24, 48, 176, 0)
    who = hand.word("name")
    rows = [("Name", who)]
    rows.append(
        rng.choice([("Date", hand.date()), ("Age", str(rng.randint(8, 90))), ("City", rng.choice(_cities(hand)))])
    )
    doc.facts |= {"title": title, "name": who, rows[1][0].lower(): rows[1][1]}
    boxed = rng.random() < 0.5
    for place, (label, value) in enumerate(rows):
        y = 72 + 40 * place
        doc.write(f"{label}:", 22, y, 21, 66, align="left")
        if boxed:
            doc.put("box", 92, y - 16, 110, 32, colour=(120, 120, 120))
        else:
            doc.put("rule", 92, y + 15, 110, 0, colour=(120, 120, 120))
        doc.write(value, 98, y, 23, 100, align="left", colour=rng.choice([(20, 20, 20), (25, 45, 150)]))
    ticked = None
    if rng.random() < 0.5:
        ticked = rng.choice(["Yes", "No"])
        for x, word in ((28, "Yes"), (122, "No")):
            doc.put("box", x, 142, 24, 24, colour=(20, 20, 20))
            doc.write(word, x + 32, 155, 22, 54, align="left")
            if word == ticked:
                doc.put("tick", x + 2, 140, 22, 24, colour=(20, 20, 20), thick=4)
        doc.facts["ticked"] = ticked
    signed = rng.random() < 0.5
    if ticked is None or signed or rng.random() < 0.5:
        doc.put("rule", 92, 206, 110, 0, colour=(60, 60, 60))
        doc.write("Sign:", 22, 196, 20, 62, align="left")
    if signed:
        doc.put("scribble", 98, 172, 98, 32, "signature", colour=rng.choice([(20, 20, 90), (20, 20, 20)]), thick=2)
    doc.facts["signature"] = signed


def _cities(hand: _Hand) -> list[str]:
    return drawn.split("Rome Paris Oslo Lima Cairo Bern Milan | Berlin Madrid Kyiv Quito", hand.heldout)


def _sign(doc: Document, hand: _Hand) -> None:
    rng = hand.rng
    text = hand.word("sign")
    name, colour = hand.colour("red", "blue", "green", "yellow", "orange", "black", "brown")
    parts = text.split()
    shape = rng.choice(
        ["box", "box", "round", "octagon", "diamond", "triangle"]
        if len(parts) == 1 and len(text) < 6
        else ["box", "round"]
    )
    ink = ink_on(colour)
    high = {"box": rng.uniform(84, 170), "round": 190.0}.get(shape, 196.0)
    wide = 200.0 if shape == "box" else high
    left, top = 112 - wide / 2, 104 - high / 2
    doc.put("rule", 109, top + high - 4, 0, 224 - top - high + 4, colour=(120, 120, 120), thick=7)
    doc.put(
        shape, left, top, wide, high, f"{name} sign", fill=colour, colour=ink if rng.random() < 0.6 else colour, thick=5
    )
    room = {"box": 180.0, "round": 158.0, "octagon": 170.0, "diamond": 128.0, "triangle": 104.0}[shape]
    roomy = shape == "box" and high > 130
    picture = roomy and rng.random() < 0.5
    middle = 104 + (26 if shape == "triangle" else 0) + (high * 0.2 if picture else 0)
    size = min(fit(parts, doc.font, room, 54), high * (0.62 if not picture else 0.4) / len(parts))
    for place, part in enumerate(parts):
        y = middle + (place - (len(parts) - 1) / 2) * size * 1.12
        doc.write(part, 112, y, size, room, colour=ink)
    if picture:
        _picture(doc, hand, 112, top + high * 0.28, high * 0.42, ink, shaded=False)
    doc.facts |= {"title": text, "colour": name}
    if roomy and not picture:  # None where a picture was never possible: no fair question
        doc.facts["picture"] = ""


def _picture(
    doc: Document, hand: _Hand, x: float, y: float, size: float, ink: Colour | None = None, *, shaded: bool = True
) -> None:
    """A small drawing, round (x, y)."""
    what = hand.word("picture")
    name, colour = hand.colour("red", "blue", "green", "orange", "purple", "pink")
    if not shaded and ink is not None:
        colour = ink
    doc.put(what, x - size / 2, y - size / 2, size, size, what, fill=colour, colour=colour)
    doc.facts |= {"picture": what, "picture colour": name if shaded else ""}


def _ticket(doc: Document, hand: _Hand) -> None:
    rng = hand.rng
    name, colour = hand.colour("red", "blue", "green", "yellow", "orange", "pink", "purple")
    paper = tuple(round(255 - (255 - c) * 0.45) for c in colour) if name != "red" and rng.random() < 0.6 else colour
    top, bottom = 44, 182
    doc.put("box", 6, top, 212, bottom - top, "ticket", fill=paper, colour=paper)  # type: ignore[arg-type]
    for y in range(top + 4, bottom, 16):  # torn edges
        for x in (1, 213):
            doc.put("round", x, y, 10, 10, fill=doc.desk, colour=doc.desk)
    ink = ink_on(paper)  # type: ignore[arg-type]
    title = hand.word("event")
    doc.write(title, 90, top + 26, 32, 146, colour=ink)
    seat, row = rng.randint(1, 40), rng.randint(1, 9)
    doc.write(f"SEAT {seat}", 90, top + 64, 27, 146, colour=ink)
    if rng.random() < 0.6:
        doc.facts["row"] = str(row)
        doc.write(f"ROW {row}", 90, top + 96, 24, 146, colour=ink)
    else:
        price = hand.price(2, 20)
        doc.facts["price"] = price
        doc.write(f"${price}", 90, top + 98, 26, 146, colour=ink)
    doc.put("dashes", 170, top + 4, 0, bottom - top - 8, colour=ink)
    if rng.random() < 0.5:
        doc.put("bars", 180, top + 14, 26, bottom - top - 28, "barcode", colour=(10, 10, 10))
        doc.facts["picture"] = ""
    else:
        _picture(doc, hand, 193, top + 69, 32, ink, shaded=False)
    doc.facts |= {"title": title, "seat": str(seat), "colour": name}


def _invitation(doc: Document, hand: _Hand) -> None:
    rng = hand.rng
    name, colour = hand.colour("red", "blue", "green", "purple", "pink", "orange", "brown")
    paper = rng.choice([(255, 255, 255), (255, 250, 235), (252, 244, 250), (244, 250, 255)])
    doc.put("box", 10, 10, 204, 204, "invitation", fill=paper, colour=colour, thick=rng.choice([5, 8]))
    doc.put("box", 22, 22, 180, 180, colour=colour, thick=1)
    title = hand.word("party")
    shown = rng.random() < 0.5
    y = 52 if rng.random() < 0.5 else 44
    doc.write(title, 112, y, 34, 168, colour=colour)
    day, hour, who = hand.word("day"), f"{rng.randint(1, 9)} pm", hand.word("name")
    rows = [day, hour] if shown else [day, hour, rng.choice(["with", "for"]) + f" {who}"]
    if not shown:
        doc.facts["name"] = who
    for place, row in enumerate(rows):
        doc.write(row, 112, (86 if shown else 92) + (30 if shown else 40) * place, 26, 164)
    if shown:
        _picture(doc, hand, 112, 168, 50)
    doc.facts |= {"title": title, "day": day, "time": hour, "border": name, "picture": doc.facts.get("picture", "")}


def _list(doc: Document, hand: _Hand) -> None:
    rng = hand.rng
    paper = rng.choice([(255, 249, 180), (255, 255, 255), (255, 252, 235), (225, 240, 255)])
    doc.put("box", 22, 8, 180, 210, "list", fill=paper, colour=(200, 195, 170), thick=1)
    count = rng.randint(2, 5)
    title = hand.word("list")
    doc.write(title, 112, 28, 27, 164)
    if rng.random() < 0.7:
        doc.put("rule", 30, 46, 164, 0, colour=(190, 60, 60))
    items = hand.some("item", count)
    step = min(38.0, 164 / count)
    size = min(fit(items, doc.font, 120, step * 0.74), 26)
    look = rng.choice(["round", "box", "box", "dash"])
    ticked = []
    for place, item in enumerate(items):
        y = 52 + step * (place + 0.5)
        if look == "round":
            doc.put("round", 36, y - 5, 10, 10, fill=(30, 30, 30), colour=(30, 30, 30))
        elif look == "box":
            doc.put("box", 32, y - 9, 18, 18, colour=(40, 40, 40))
            if rng.random() < 0.4:
                doc.put("tick", 33, y - 12, 20, 20, colour=(20, 120, 40), thick=4)
                ticked.append(item)
        else:
            doc.put("rule", 34, y, 14, 0, colour=(30, 30, 30), thick=3)
        doc.write(item, 60, y, size, 136, align="left")
        if rng.random() < 0.02 or paper == (225, 240, 255):
            doc.put("rule", 30, y + step / 2, 164, 0, colour=(170, 180, 200), thick=1)
    doc.facts |= {"title": title, "items": items, "ticked items": ticked if look == "box" else None}


def _business(doc: Document, hand: _Hand) -> None:
    rng = hand.rng
    name, colour = hand.colour("red", "blue", "green", "black", "orange", "purple")
    dark = rng.random() < 0.35
    paper = colour if dark else hand.paper()
    ink = ink_on(paper)
    doc.put("box", 6, 44, 212, 136, "business card", fill=paper, colour=(190, 190, 190), thick=1)
    who = f"{hand.word('name')} {hand.word('family')}"
    job = hand.word("job")
    phone = f"{rng.randint(100, 999)} {rng.randint(100, 999)}"
    shown = rng.random() < 0.5
    left, room = (70, 142) if shown else (18, 190)
    doc.write(who, left, 76, 27, room, align="left", colour=ink)
    doc.write(job, left, 108, 22, room, align="left", colour=ink)
    doc.write(phone, left, 150, 23, room, align="left", colour=ink)
    if not dark and rng.random() < 0.6:
        doc.put("box", 6, 168, 212, 12, f"{name} stripe", fill=colour, colour=colour)
    if shown:
        _picture(doc, hand, 38, 86, 46, ink if dark else None, shaded=not dark)
    doc.facts |= {"title": who, "name": who, "job": job, "phone": phone, "picture": doc.facts.get("picture", "")}
    if dark:
        doc.facts["colour"] = name


def _calendar(doc: Document, hand: _Hand) -> None:
    rng = hand.rng
    name, colour = hand.colour("red", "blue", "green", "orange", "purple", "black")
    doc.put("box", 24, 14, 176, 200, "calendar page", fill=(255, 255, 255), colour=(150, 150, 150))
    doc.put("box", 24, 14, 176, 54, f"{name} heading", fill=colour, colour=colour)
    month, day = hand.word("month"), rng.randint(1, 30)
    doc.write(month, 112, 42, 32, 164, colour=ink_on(colour))
    doc.write(str(day), 112, 120, 100, 150, colour=colour if rng.random() < 0.3 else (20, 20, 20))
    weekday = hand.word("day")
    doc.write(weekday, 112, 190, 28, 160)
    for x in (62, 154):
        doc.put("round", x, 8, 10, 16, colour=(90, 90, 90), fill=(90, 90, 90))
    doc.facts |= {"title": month, "month": month.capitalize(), "date": str(day), "day": weekday, "heading": name}


_MAKERS = dict(zip(FORMS, (_receipt, _form, _sign, _ticket, _invitation, _list, _business, _calendar), strict=True))


def plan(file: str, rng: random.Random, fonts: list[str], heldout: bool) -> Document:
    """Draw a document's plan."""
    form = rng.choice(FORMS)
    grey = rng.randint(90, 215)
    tints = [(grey, grey, grey), (200, 180, 150), (150, 110, 75), (120, 150, 180), (190, 205, 190), (70, 75, 85)]
    kept = [(grey, grey, grey), (175, 190, 205), (165, 130, 100), (95, 110, 100)]
    desk = rng.choice(kept if heldout else tints)
    font = drawn.real_font(rng.choice(fonts))
    side = rng.choice([224, 256, 288, 320, 384, 448])
    document = Document(file, heldout, form, font, side, desk, rng.getrandbits(32))
    _MAKERS[form](document, _Hand(rng, heldout))
    if rng.random() < 0.3:
        document.angle = round(rng.uniform(-4, 4), 1)
    return document


def _draw(doc: Document) -> Images.Image:
    from PIL import Image, ImageDraw

    scale = doc.side / SIDE
    image = Image.new("RGB", (doc.side, doc.side), doc.desk)
    pen = ImageDraw.Draw(image)
    noise = random.Random(doc.seed)
    for m in doc.marks:
        paint(pen, m, scale, noise)
    if doc.angle:
        image = image.rotate(doc.angle, Image.Resampling.BICUBIC, fillcolor=doc.desk)
    return image
