"""Questions about natural scenes: as `questions`, for several things, their colours, places and sizes.

Each kind is one function `(rng, view, world) -> QA | None`. Which thing, colour, side or number is right was drawn when
the scene was planned, or is drawn here before the wording, so that no answer is likelier than another by itself.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from recipes.default.dataset import grounds, questions, words
from recipes.default.dataset.questions import QA, World, capital
from recipes.default.dataset.studio import Spot, View, related
from recipes.default.dataset.where import RELATION, are, ask_position, place_phrase, relation, thing_qa

UNSURE_ASKED = (
    *("What is this?", "What is in the picture?", "What do you see?", "What does the picture show?"),
    *("What object is this?", "Can you tell me what this is?", "Name the thing in the picture."),
)
UNSURE = ("I am not sure.",) * 6 + ("I am not sure what this is.", "I am not sure. It is hard to tell.")


def turn(rng: random.Random, qa: QA) -> tuple[str, str]:
    """A training turn, as `questions.turn`; what has no short answer is answered in a sentence."""
    return questions.turn(rng, qa) if qa.short else (qa.question, qa.long)


def joined(phrases: list[str], last: str = " and ") -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + last + phrases[-1]


def groups(view: View) -> list[tuple[Spot, int]]:
    """The different things of a scene in order, with how many of each."""
    counted = Counter(s.phrase for s in view.spots)
    first = {s.phrase: s for s in reversed(view.spots)}
    return [(first[phrase], n) for phrase, n in counted.items()]


def list_phrase(view: View) -> str:
    """The things in a row: "two red cups, a dog and a key"."""
    return joined([words.number_phrase(n, s.noun, s.colour or "" if s.painted else "") for s, n in groups(view)])


def name_qa(spot: Spot, question: str) -> QA:
    """The thing's name as the answer, whatever was asked for it."""
    accepted = tuple(questions.name_answers(spot.source))
    return QA("name", question, words.sentence(spot.phrase), capital(words.proper(spot.noun)), accepted)


def ask_name(rng: random.Random, view: View, world: World) -> QA | None:
    """Ask "What is this?" of one thing, "What are these?" of several alike."""
    kinds = groups(view)
    if len(kinds) != 1:
        return None
    spot, count = kinds[0]
    if count > 1:
        question = rng.choice(["What are these?", "What things are in the picture?", "What are the things shown here?"])
        adjective = f"{spot.colour} " if spot.painted else ""
        many = words.proper(words.plural(spot.noun))
        accepted = tuple(words.names_of(spot.noun))
        return QA("name", question, words.sentence(adjective + many), capital(many), accepted)
    question = rng.choice(
        [
            *("What is this?", "What is this?", "What is in the picture?", "What do you see?"),
            *("What does the picture show?", "What object is this?", "What can you see here?", "What is shown here?"),
            *("Can you tell me what this is?", "Name the thing in the picture.", "What is in the photo?"),
        ]
    )
    qa = name_qa(spot, question)
    own = spot.source.caption
    return qa if spot.painted else QA(qa.kind, question, own, qa.short, qa.accepted)


def ask_caption(rng: random.Random, view: View, world: World) -> QA | None:
    """Ask "Describe the picture.": the things, sometimes with the ground or the places."""
    question = rng.choice(
        [
            *("Describe the picture.", "What is shown in this image?", "Write a short caption.", "Describe the photo."),
            *("Describe the image briefly.", "Give a caption for the picture.", "What can be seen in this image?"),
            "What is in this picture? Describe it.",
        ]
    )
    return QA("caption", question, caption_of(rng, view), "", ())


def caption_of(rng: random.Random, view: View) -> str:
    """One sentence about a scene."""
    if view.sheet:
        return text_caption(view.sheet.lines)
    if len(view.spots) == 1 and not view.spots[0].painted:
        text = view.spots[0].source.caption.rstrip(".!")
    else:
        text = list_phrase(view)
    if view.cell:
        return words.sentence(f"{text} {place_phrase(view.cell)}")
    back = view.picture.back
    if len(view.spots) == 2 and rng.random() < 0.5:
        side = relation(*view.spots)
        if side:
            return words.sentence(f"{view.spots[0].phrase} {RELATION[side]} {view.spots[1].phrase}")
    if back.name and rng.random() < 0.6:
        return words.sentence(f"{text} on {words.article(back.name)} {back.name} background")
    if back.style in grounds.PHRASES and back.blur < 3 and rng.random() < 0.5:
        return words.sentence(f"{text} {grounds.PHRASES[back.style]}")
    return words.sentence(text)


def text_caption(lines: tuple[str, ...]) -> str:
    text = " ".join(lines)
    kind = "number" if text.isdigit() else "word" if text.isalpha() else "text"
    return f'The {kind} "{text}".'


def ask_exists(rng: random.Random, view: View, world: World) -> QA | None:
    """Ask "Is there a dog in the picture?", yes as often as no."""
    if not view.spots:
        return None
    present = [s.noun for s in view.spots]
    yes = rng.random() < 0.5
    spot = rng.choice(view.spots)
    adjective = ""
    if spot.painted and spot.colour and rng.random() < 0.4:
        # The thing is there either way: only its colour tells.
        of_noun = {s.colour for s in view.spots if s.noun == spot.noun}
        others = [c for c in words.COLOURS if c not in of_noun]
        noun, adjective = spot.noun, spot.colour if yes else rng.choice(others)
    elif yes:
        noun = spot.noun
        parents = words.ancestors(noun)
        if parents and rng.random() < 0.3:
            noun = rng.choice(parents)
    else:
        pool = world.by_category.get(spot.source.category or "", ()) if rng.random() < 0.4 else world.nouns
        for _ in range(30):
            noun = rng.choice(pool or world.nouns)
            maybe = grounds.outdoors(view.picture.back) and noun in grounds.OUTDOORS
            if not maybe and not any(related(noun, p) for p in present):
                break
            pool = world.nouns
        else:
            return None
    named = words.phrase(noun, adjective)
    many = named.startswith("some ")
    named = "any " + named[5:] if many else named
    if not many and rng.random() < 0.35:
        asked = ["Does the picture show {}?", "Can you see {}?", "Do you see {} in the image?", "Is {} shown here?"]
        return _yes_no(rng.choice(asked).format(named), yes, "Yes.", "No.")
    verb = "there are" if many else "there is"
    question = f"{'Are' if many else 'Is'} there {named} in the {rng.choice(['picture', 'image', 'photo'])}?"
    return _yes_no(question, yes, f"Yes, {verb}.", f"No, {verb} not.")


def _yes_no(question: str, yes: bool, good: str, bad: str, kind: str = "exists") -> QA:
    return QA(kind, question, good if yes else bad, "Yes" if yes else "No", ("yes",) if yes else ("no",))


def ask_count(rng: random.Random, view: View, world: World) -> QA | None:
    """Ask "How many dogs are there?" of one kind among others, or of everything."""
    if view.layout == "several" and len(view.spots) > 1:
        count = len(view.spots)
        things = rng.choice(["things", "objects", "different things"])
        return _count_qa(rng, count, things, f"There are {words.NUMBERS[count]} {things}.")
    if view.kind is None:
        return None
    kinds = [(s, n) for s, n in groups(view) if s.noun == view.kind] or groups(view)
    spot, count = kinds[0] if rng.random() < 0.75 else rng.choice(groups(view))
    noun = words.proper(spot.noun)
    if words.lexicon().get(spot.noun) and words.lexicon()[spot.noun].article != "a":
        return None
    colour = f"{spot.colour} " if spot.painted and rng.random() < 0.4 else ""
    many = colour + words.plural(noun)
    long = f"There is one {colour}{noun}." if count == 1 else f"There are {words.NUMBERS[count]} {many}."
    return _count_qa(rng, count, many, long)


def _count_qa(rng: random.Random, count: int, many: str, long: str) -> QA:
    asked = ["How many {} are there?", "How many {} do you see?", "How many {} are in the picture?"]
    asked += ["Count the {}. How many are there?", "How many {} does the image show?"]
    number = words.NUMBERS[count]
    return QA("count", rng.choice(asked).format(many), long, capital(number), (number, str(count)))


def ask_color(rng: random.Random, view: View, world: World) -> QA | None:
    """Ask "What color is the cup?" among others, "Which thing is red?", or the background's color."""
    counts = Counter(s.noun for s in view.spots)
    plain = [s for s, _ in groups(view) if s.colour and sum(o.noun == s.noun for o, _ in groups(view)) == 1]
    colours = Counter(s.colour for s, _ in groups(view) if s.colour)
    known = len(plain) == len(groups(view))
    background = view.picture.back.name
    if background and (not plain or rng.random() < 0.2):
        return _color_qa(rng, "the background", "is", background)
    if not plain:
        return None
    spot = rng.choice(plain)
    if spot.colour in ("white", "black", "gray") and not spot.painted and rng.random() < 0.5:
        return None  # many things are
    if known and len(plain) > 1 and colours[spot.colour] == 1 and rng.random() < 0.25:
        question = rng.choice([f"Which thing is {spot.colour}?", f"What is {spot.colour}?"])
        qa = thing_qa("color", spot, question)
        return replace(qa, long=words.sentence(f"the {words.proper(spot.noun)}"))  # without the colour
    noun = words.proper(spot.noun)
    if counts[spot.noun] > 1:
        return _color_qa(rng, f"the {words.plural(noun)}", "are", spot.colour or "")
    return _color_qa(rng, f"the {noun}", are(spot), spot.colour or "")


def _color_qa(rng: random.Random, thing: str, verb: str, colour: str) -> QA:
    draw = rng.random()
    if draw < 0.2:
        other = rng.choice([c for c in words.COLOURS if c != colour])
        first, second = rng.sample([colour, other], 2)
        question = f"{capital(verb)} {thing} {first} or {second}?"
    else:
        asked = ["What color {1} {0}?", "What color {1} {0}?", "Which color {1} {0}?", "Tell me the color of {0}."]
        question = rng.choice([*asked, "What is the color of {0}?"]).format(thing, verb)
    accepted = (colour, *words.COLOUR_SYNONYMS.get(colour, []))
    return QA("color", question, words.sentence(f"{thing} {verb} {colour}"), capital(colour), accepted)


def ask_category(rng: random.Random, view: View, world: World) -> QA | None:
    """Ask "Is this an animal, food or a vehicle?" of one thing, "Which of them is an animal?" of several."""
    if len(groups(view)) == 1 and len(view.spots) == 1:
        if view.spots[0].source.category == "animal" and rng.random() < 0.5:
            return None  # most things are animals
        scene = questions.Scene(view.picture, view.objects, "single")  # type: ignore[arg-type]
        return questions.ask_category(rng, scene, world)
    phrases = Counter(questions.category_phrase(s.source) for s in view.spots)
    clear = [s for s in view.spots if (p := questions.category_phrase(s.source)) and phrases[p] == 1]
    if not clear or phrases[None]:
        return None
    spot = rng.choice(clear)
    phrase = questions.category_phrase(spot.source)
    return thing_qa("category", spot, rng.choice([f"Which of these things is {phrase}?", f"Which thing is {phrase}?"]))


def ask_odd(rng: random.Random, view: View, world: World) -> QA | None:
    """Ask "Which is the odd one out?"."""
    kinds = sorted(groups(view), key=lambda g: g[1])
    if view.layout != "odd" or len(kinds) != 2 or kinds[0][1] != 1:
        return None
    asked = ["Which is the odd one out?", "Which thing is different from the others?", "What does not belong here?"]
    return thing_qa("odd", kinds[0][0], rng.choice(asked))


def ask_ocr(rng: random.Random, view: View, world: World) -> QA | None:
    """Ask "What does the sign say?", "What is the first word?"."""
    sheet = view.sheet
    if sheet is None:
        return None
    text = " ".join(sheet.lines)
    parts = text.split(" ")
    if len(parts) > 1 and rng.random() < 0.5:
        place, part = rng.choice([("first", parts[0]), ("last", parts[-1])])
        place = "second" if place == "last" and len(parts) == 2 and rng.random() < 0.5 else place
        word = "word" if part.isalpha() else "number" if part.isdigit() and not text.isdigit() else "word"
        asked = [f"What is the {place} word?", f"Read the {place} word.", f"What does the {place} word say?"]
        if word == "number" and sum(p.isdigit() for p in parts) == 1:
            asked = ["What number is written?", "Which number do you see?"]
        return _says(rng.choice(asked), part)
    asked = ["What is written in the picture?", "What does the text say?", "What is written here?", "Read the text."]
    if sheet.paper:
        asked += [f"What does the {'card' if sheet.shape == 'card' else 'sign'} say?", "What does the sign say?"]
    if len(parts) == 1:
        thing = "number" if text.isdigit() else "word"
        asked += [f"What {thing} is written here?", f"Which {thing} is in the picture?", f"Read the {thing}."]
        asked += [f"What {thing} is written?", f"What {thing} do you see?"]
    return _says(rng.choice(asked), text)


def _says(question: str, text: str) -> QA:
    return QA("ocr", question, f'It says "{text}".', text, (text, text.lower()))


def ask_text_color(rng: random.Random, view: View, world: World) -> QA | None:
    """The color of the letters or of the card."""
    sheet = view.sheet
    names = {rgb: name for name, rgb in words.COLOURS.items()}
    if sheet is None:
        return ask_color(rng, view, world)
    options = [("the text", sheet.ink)]
    if sheet.paper:
        options.append(("the card" if sheet.shape == "card" else "the sign", sheet.paper))
    options = [(thing, rgb) for thing, rgb in options if rgb in names]
    if not options:
        return None
    thing, rgb = rng.choice(options)
    return _color_qa(rng, thing, "is", names[rgb])


def ask_unsure(rng: random.Random, view: View, world: World) -> QA | None:
    """Ask "What is this?" of nothing that has a name."""
    answer = rng.choice(UNSURE)
    return QA("unsure", rng.choice(UNSURE_ASKED), answer, "I am not sure", ("I am not sure",))


ASK: dict[str, Callable[[random.Random, View, World], QA | None]] = {
    "name": ask_name,
    "caption": ask_caption,
    "exists": ask_exists,
    "count": ask_count,
    "color": ask_color,
    "text color": ask_text_color,
    "position": ask_position,
    "category": ask_category,
    "odd": ask_odd,
    "ocr": ask_ocr,
    "unsure": ask_unsure,
}
