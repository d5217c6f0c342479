"""What is asked about documents: every answer follows from the plan, and none from the question alone.

`compose` gives training conversations, `captions` short captions, `heldout` the validation questions.
"""

from __future__ import annotations

import random

from recipes.default.dataset import documents, drawn, words
from recipes.default.dataset.documents import Document
from recipes.default.dataset.drawn import listed
from recipes.default.dataset.questions import QA, capital

KIND = "document"
ACCEPTED = {
    "receipt": ("receipt", "bill"),
    "form": ("form",),
    "sign": ("sign",),
    "ticket": ("ticket",),
    "invitation": ("invitation", "invitation card", "card"),
    "shopping list": ("shopping list", "list"),
    "business card": ("business card", "card"),
    "calendar page": ("calendar page", "calendar"),
}


ZH_FORMS = {
    "receipt": "收据",
    "form": "表格",
    "sign": "标志",
    "ticket": "票",
    "invitation": "请柬",
    "shopping list": "购物清单",
    "business card": "名片",
    "calendar page": "日历",
}


def _it(doc: Document, rng: random.Random) -> str:
    """The document, as a question names it: mostly not by its kind."""
    return f"the {doc.form}" if rng.random() < 0.5 else "it"


def caption(rng: random.Random, doc: Document) -> str:
    """A sentence that describes the document."""
    facts = doc.facts
    named = "words" if " " in facts["title"] else "word"
    text = f'{words.article(doc.form)} {doc.form} with the {named} "{facts["title"]}"'
    if doc.form == "sign":
        text = f'{words.article(facts["colour"])} {facts["colour"]} sign that says "{facts["title"]}"'
    elif doc.form == "receipt" and rng.random() < 0.6:
        text = f"a receipt of {facts['title']}; the total is {facts['total']}"
    elif doc.form == "shopping list" and rng.random() < 0.6:
        text = f"a shopping list: {listed([i.lower() for i in facts['items']])}"
    elif doc.form == "calendar page" and rng.random() < 0.6:
        text = f"a calendar page: {facts['day']}, {facts['month']} {facts['date']}"
    elif doc.form == "business card":
        text = f"a business card of {facts['name']}" + (f", {facts['job'].lower()}" if rng.random() < 0.5 else "")
    elif doc.form == "form" and rng.random() < 0.5:
        text += f", {'signed' if facts['signature'] else 'not signed'}"
    return words.sentence(text)


def ask_form(rng: random.Random, doc: Document) -> QA:
    """Ask "What kind of document is this?"."""
    accepted = ACCEPTED[doc.form]
    others = rng.sample([f for f in ACCEPTED if f != doc.form and not {*ACCEPTED[f]} & {*accepted}], 2)
    asked = [f"{words.article(c)} {c}" for c in rng.sample([doc.form, *others], 3)]
    question = rng.choice(
        [
            "What kind of document is this?",
            "What type of document is it?",
            "What is this?",
            f"Is this {asked[0]}, {asked[1]} or {asked[2]}?",
            f"What is it: {asked[0]}, {asked[1]} or {asked[2]}?",
        ]
    )
    with_article = tuple(f"{words.article(a)} {a}" for a in accepted)
    named = f"{words.article(doc.form)} {doc.form}"
    return QA(KIND, question, f"This is {named}.", capital(doc.form), (*accepted, *with_article))


def ask_whether(rng: random.Random, doc: Document) -> QA:
    """Ask "Is this a receipt?"."""
    yes = rng.random() < 0.5
    others = [f for f in ACCEPTED if not {*ACCEPTED[f]} & {*ACCEPTED[doc.form]}]
    named = doc.form if yes else rng.choice(others)
    return drawn.yes_no(KIND, f"Is this {words.article(named)} {named}?", yes, "it is")


def ask_title(rng: random.Random, doc: Document) -> QA:
    """Ask for the large letters, or what stands at the top."""
    title = doc.facts["title"]
    large = "What is written in large letters?"
    asked = {
        "sign": ["What does the sign say?", "What is written on the sign?", large, "What does it say?"],
        "business card": ["Whose card is this?", "What does the first line say?", "Which name is on the card?"],
        "calendar page": ["What is written at the top?", "What does the first line say?", "Which month is it?"],
        "receipt": [
            "What is the title?",
            "What does the first line say?",
            "What is written at the top?",
            "Which shop is it from?",
        ],
    }.get(doc.form, ["What is the title?", "What does the first line say?", "What is written at the top?", large])
    question = rng.choice(asked)
    accepted = tuple(dict.fromkeys([title, title.lower(), title.capitalize()]))
    return QA(KIND, question, f'It says "{title}".', title, accepted)


def ask_total(rng: random.Random, doc: Document) -> QA | None:
    """Ask for the total of a receipt."""
    if "total" not in doc.facts:
        return None
    total = doc.facts["total"]
    question = rng.choice(["What is the total?", "How much is the total?", "How much was paid?", "What is the sum?"])
    return QA(KIND, question, f"The total is {total}.", total, (total, f"${total}"))


def ask_price(rng: random.Random, doc: Document) -> QA | None:
    """Ask for a price."""
    if doc.form == "ticket" and "price" in doc.facts:
        price = doc.facts["price"]
        return QA(KIND, "How much is the ticket?", f"The ticket is ${price}.", f"${price}", (price, f"${price}"))
    if "prices" not in doc.facts:
        return None
    item, price = rng.choice(list(zip(doc.facts["items"], doc.facts["prices"], strict=True)))
    thing = item.lower()
    verb = "are" if thing.endswith("s") else "is"
    question = rng.choice(
        [f"How much {verb} the {thing}?", f"What does the receipt say for {thing}?", f"What is the price of {thing}?"]
    )
    return QA(KIND, question, f"The price of {thing} is {price}.", price, (price, f"${price}"))


def ask_count(rng: random.Random, doc: Document) -> QA | None:
    """Ask how many items or lines there are."""
    if "items" in doc.facts and (doc.form == "receipt" or rng.random() < 0.8):
        thing = "list" if doc.form == "shopping list" else "receipt"
        question = rng.choice(
            [f"How many items are on the {thing}?", "How many things are listed?", "How many items are there?"]
        )
        return drawn.number_qa(KIND, question, len(doc.facts["items"]), "item")
    rows = len({round(m.y / 9) for m in doc.texts})
    # Tickets, business cards and calendar pages have three lines each: the answer could be learned from the form.
    if doc.form not in ("sign", "invitation"):
        return None
    return drawn.number_qa(
        KIND, rng.choice(["How many lines of text are there?", "How many lines are written here?"]), rows, "line"
    )


def ask_listed(rng: random.Random, doc: Document) -> QA | None:
    """Ask whether something is on the list."""
    if "items" not in doc.facts:
        return None
    yes = rng.random() < 0.5
    others = [i for i in drawn.split(documents.WORDS["item"], doc.heldout) if i not in doc.facts["items"]]
    item = rng.choice(doc.facts["items"] if yes else others).lower()
    verb = "Are" if item.endswith("s") else "Is"
    question = f"{verb} {item} on the {'list' if doc.form == 'shopping list' else 'receipt'}?"
    return drawn.yes_no(KIND, question, yes, "they are" if verb == "Are" else "it is")


def ask_item(rng: random.Random, doc: Document) -> QA | None:
    """Ask for the first or the last item."""
    if "items" not in doc.facts:
        return None
    first = rng.random() < 0.5
    item = doc.facts["items"][0 if first else -1]
    place = "first" if first else "last"
    question = rng.choice(
        [f"What is the {place} item?", f"Which item is the {place} one?", f"What is {place} on the list?"]
    )
    return QA(KIND, question, f"The {place} item is {item.lower()}.", item, (item, item.lower()))


def ask_signature(rng: random.Random, doc: Document) -> QA | None:
    """Ask whether the form is signed."""
    if "signature" not in doc.facts:
        return None
    if rng.random() < 0.5:
        return drawn.yes_no(KIND, "Is there a signature?", doc.facts["signature"], "there is")
    return drawn.yes_no(KIND, rng.choice(["Is the form signed?", "Is it signed?"]), doc.facts["signature"], "it is")


def ask_picture(rng: random.Random, doc: Document) -> QA | None:
    """Ask whether there is a small picture."""
    if doc.facts.get("picture") is None:
        return None
    question = rng.choice(["Is there a small picture on {}?", "Is there a drawing on {}?"]).format(_it(doc, rng))
    return drawn.yes_no(KIND, question, bool(doc.facts["picture"]), "there is")


def ask_drawing(rng: random.Random, doc: Document) -> QA | None:
    """Ask what the small picture shows."""
    what = doc.facts.get("picture")
    if not what:
        return None
    question = rng.choice(
        ["What is the small picture on {}?", "What is drawn on {}?", "What does the drawing on {} show?"]
    )
    return QA(
        KIND,
        question.format(_it(doc, rng)),
        f"There is {words.article(what)} {what}.",
        capital(what),
        (what, f"a {what}"),
    )


def ask_name(rng: random.Random, doc: Document) -> QA | None:
    """Ask for a name."""
    name = doc.facts.get("name")
    if name is None:
        return None
    question = {"form": "Which name is on the form?", "invitation": "Which name is on the invitation?"}.get(
        doc.form, "What is the name on the card?"
    )
    return QA(
        KIND,
        rng.choice([question, "Which name is written here?"]),
        f"The name is {name}.",
        name,
        (name, name.lower(), name.split()[0]),
    )


def ask_date(rng: random.Random, doc: Document) -> QA | None:
    """Ask for a date, a day, a month or an hour."""
    facts = doc.facts
    options: list[tuple[str, str, tuple[str, ...]]] = []
    if doc.form == "calendar page":
        both = (f"{facts['month']} {facts['date']}", f"{facts['date']} {facts['month']}")
        options.append(("Which number is on the calendar page?", facts["date"], (facts["date"], *both)))
        options.append(("Which month is it?", facts["month"], (facts["month"],)))
        options.append(("Which number is written in large letters?", facts["date"], (facts["date"],)))
    elif "date" in facts:
        options.append(("What is the date on the form?", facts["date"], (facts["date"],)))
    if "day" in facts:
        options.append(
            (rng.choice(["Which day is it?", "Which day of the week is it?"]), facts["day"], (facts["day"],))
        )
    if "time" in facts:
        options.append(("At what time is it?", facts["time"], (facts["time"], facts["time"].split()[0])))
    if not options:
        return None
    question, answer, accepted = rng.choice(options)
    return QA(KIND, question, f"It is {answer}.", answer, accepted)


def ask_number(rng: random.Random, doc: Document) -> QA | None:
    """Ask for a seat, a row, a phone number, an age."""
    facts = doc.facts
    options = [(key, facts[key]) for key in ("seat", "row", "phone", "age") if key in facts]
    if not options:
        return None
    key, value = rng.choice(options)
    question = {"phone": "What is the phone number?", "age": "What is the age?"}.get(key, f"What is the {key} number?")
    thing = key if key == "age" else f"{key} number"
    return QA(KIND, question, f"The {thing} is {value}.", value, (value,))


def ask_color(rng: random.Random, doc: Document) -> QA | None:
    """Ask for the colour of a sign, a heading, a border, a picture."""
    facts = doc.facts
    options = [(f"the {doc.form}", facts["colour"])] if "colour" in facts and doc.form != "business card" else []
    if facts.get("heading"):
        options.append(("the heading", facts["heading"]))
    if facts.get("border"):
        options.append(("the border", facts["border"]))
    if facts.get("picture colour") and facts.get("picture"):
        options.append((f"the {facts['picture']}", facts["picture colour"]))
    if not options:
        return None
    thing, colour = rng.choice(options)
    return drawn.color_qa(KIND, rng.choice([f"What color is {thing}?", f"Which color is {thing}?"]), thing, colour)


def ask_ticked(rng: random.Random, doc: Document) -> QA | None:
    """Ask what is ticked."""
    if doc.facts.get("ticked"):
        right = doc.facts["ticked"]
        first, second = rng.sample(["Yes", "No"], 2)
        return QA(
            KIND, f'Which box is ticked, "{first}" or "{second}"?', f'The box "{right}" is ticked.', right, (right,)
        )
    if not doc.facts.get("ticked items") or len(doc.facts["ticked items"]) == len(doc.facts["items"]):
        return None
    yes = rng.random() < 0.5
    done = doc.facts["ticked items"]
    item = rng.choice(done if yes else [i for i in doc.facts["items"] if i not in done]).lower()
    return drawn.yes_no(KIND, f"Is the box of {item} ticked?", yes, "it is")


def ask_caption(rng: random.Random, doc: Document) -> QA:
    """Ask for a description."""
    question = rng.choice(
        ["Describe the picture.", "Describe the document.", "What does the picture show?", "What do you see?"]
    )
    text = caption(rng, doc)
    return QA("caption", question, text, text, (text,))


def ask_zh(rng: random.Random, doc: Document) -> QA:
    """A question in Chinese: what it is, what is written there, how many items, whether it is signed."""
    form, title = ZH_FORMS[doc.form], doc.facts["title"]
    options = [
        QA("zh", rng.choice(["这是什么？", "图中是什么？"]), f"这是{form}。", form, (form,)),
        QA("zh", rng.choice(["上面写着什么？", "标题是什么？"]), f"{title}。", title, (title, title.lower())),
    ]
    if "items" in doc.facts:
        number = drawn.ZH_NUMBERS[len(doc.facts["items"])]
        options.append(QA("zh", "上面有几样东西？", f"{number}样。", f"{number}样", (f"{number}样", number)))
    if "signature" in doc.facts:
        answer = "有" if doc.facts["signature"] else "没有"
        options.append(QA("zh", "有签名吗？", f"{answer}。", answer, (answer,)))
    return rng.choice(options)


TOPICS: drawn.Topics = {
    "form": ask_form,
    "whether": ask_whether,
    "title": ask_title,
    "total": ask_total,
    "price": ask_price,
    "count": ask_count,
    "listed": ask_listed,
    "item": ask_item,
    "signature": ask_signature,
    "picture": ask_picture,
    "drawing": ask_drawing,
    "name": ask_name,
    "date": ask_date,
    "number": ask_number,
    "color": ask_color,
    "ticked": ask_ticked,
}

PAPER = drawn.Paper(KIND, documents.plan, TOPICS, {"caption": ask_caption, "zh": ask_zh}, caption)
compose, captions, heldout = PAPER.compose, PAPER.captions, PAPER.heldout
