"""Questions about planned pictures, with a long answer, a short one, and every answer that is right.

Each kind is one function `(rng, scene, world) -> QA | None`; None means that the question does not suit the picture.
Answers come from the plan. Yes and no, left and right, first and second are drawn before the question, so that a model
that does not look cannot do better than chance by answering with the most frequent word.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from recipes.default.dataset import words
from recipes.default.dataset.scenes import Picture
from recipes.default.dataset.sources import Source


@dataclass(frozen=True)
class QA:
    """One question with its answers."""

    kind: str
    question: str
    long: str
    short: str
    accepted: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """A planned picture and what is in it."""

    picture: Picture
    objects: tuple[Source, ...]  # different things, left to right or top to bottom
    layout: str  # single | side | beside | above | counted | text
    count: int = 1
    side: str | None = None


@dataclass(frozen=True)
class World:
    """What questions may mention that is not in the picture."""

    nouns: tuple[str, ...]  # nouns that some training picture shows
    by_category: dict[str, tuple[str, ...]]


CATEGORY_PHRASES = {
    "animal": "an animal",
    "food": "food",
    "plant": "a plant",
    "vehicle": "a vehicle",
    "tool": "a tool",
    "clothing": "something to wear",
    "instrument": "a musical instrument",
    "building": "a building",
    "furniture": "furniture",
    "electronics": "an electronic device",
    "people": "a person",
    "shape": "a shape",
}
_CATEGORY_ANSWERS = {
    "animal": ["animal"],
    "food": ["food"],
    "plant": ["plant"],
    "vehicle": ["vehicle"],
    "tool": ["tool"],
    "clothing": ["clothing", "clothes", "something to wear"],
    "instrument": ["instrument", "musical instrument"],
    "building": ["building"],
    "furniture": ["furniture"],
    "electronics": ["electronic device", "electronics", "device"],
    "people": ["person", "people"],
    "shape": ["shape"],
}
_NOT_PEOPLE = {"skull", "eye", "ear", "nose", "mouth", "hand", "foot", "tooth", "brain", "bone", "ghost", "robot face"}


def category_phrase(source: Source) -> str | None:
    """The group that a thing belongs to, as it is said ("an animal", "something to wear").

    Args:
        source: What the picture shows.

    Returns:
        The phrase, or None where the group has no plain name.
    """
    return None if source.noun in _NOT_PEOPLE else CATEGORY_PHRASES.get(source.category or "")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def named_as(source: Source) -> str:
    """The noun phrase of an object as a part of a longer sentence ("a red circle", "a kangaroo")."""
    if source.origin == "shapes":
        return words.phrase(source.noun or "", source.colour or "")
    return words.phrase(source.noun) if source.noun else source.caption.rstrip(".").lower()


def the_thing(source: Source) -> str:
    adjective = f"{source.colour} " if source.origin == "shapes" else ""
    return f"the {adjective}{words.proper(source.noun or '')}"


def ask_name(rng: random.Random, scene: Scene, world: World) -> QA | None:
    """Ask "What is this?" on a picture of one kind of thing.

    Args:
        rng: Draws the wording.
        scene: The picture.
        world: Unused.

    Returns:
        The question, or None for scenes of several things.
    """
    if len(scene.objects) != 1 or scene.objects[0].noun is None:
        return None
    source = scene.objects[0]
    noun = source.noun or ""
    if scene.count > 1:
        question = rng.choice(["What are these?", "What things are in the picture?"])
        long = words.plural(noun) if source.origin != "shapes" else f"{source.colour} {words.plural(noun)}"
        short = words.plural(noun)
    else:
        question = rng.choice(
            [
                "What is this?",
                "What is in the picture?",
                "What do you see?",
                "What does the picture show?",
                "What object is this?",
                "What can you see here?",
                "Can you tell me what this is?",
                "Name the thing in the picture.",
            ]
        )
        long = named_as(source) if source.origin == "shapes" else source.caption
        short = noun
    answers = name_answers(source) if scene.count == 1 else words.names_of(noun)
    return QA("name", question, words.sentence(long), capital(words.proper(short)), tuple(answers))


def name_answers(source: Source) -> list[str]:
    """Every right answer to "What is this?": the noun's names and the caption's own ("anthurium", "brown hen").

    Args:
        source: What the picture shows.

    Returns:
        The answers, the noun first.
    """
    own = source.caption.rstrip(".!").lower()
    for start in ("a ", "an ", "the ", "some ", "our "):
        own = own.removeprefix(start)
    return list(dict.fromkeys([*words.names_of(source.noun or ""), own]))


def caption_of(scene: Scene) -> str:
    """The caption of a scene ("A cat and two apples.").

    Args:
        scene: The picture.

    Returns:
        One sentence.
    """
    if scene.picture.card:
        return (
            f'The word "{scene.picture.card.text}".'
            if scene.picture.card.text.isalpha()
            else f'The number "{scene.picture.card.text}".'
        )
    if scene.layout == "counted" and scene.count > 1:
        source = scene.objects[0]
        colour = (source.colour or "") if source.origin == "shapes" else ""
        return words.sentence(words.number_phrase(scene.count, source.noun or "", colour))
    if len(scene.objects) == 1:
        return scene.objects[0].caption
    names = [named_as(s) for s in scene.objects]
    return words.sentence(", ".join(names[:-1]) + " and " + names[-1])


def ask_caption(rng: random.Random, scene: Scene, world: World) -> QA | None:
    """Ask "Describe the picture.": the caption, sometimes with the ground or the places.

    Args:
        rng: Draws the wording and the amount of detail.
        scene: The picture.
        world: Unused.

    Returns:
        The question.
    """
    question = rng.choice(
        [
            "Describe the picture.",
            "What is shown in this image?",
            "Write a short caption.",
            "Describe the image briefly.",
            "Give a caption for the picture.",
            "What is in this picture? Describe it.",
        ]
    )
    caption = caption_of(scene)
    long = caption
    ground = scene.picture.ground.name
    if scene.layout in ("beside", "above") and len(scene.objects) == 2:
        first, second = (named_as(s) for s in scene.objects)
        relation = "to the left of" if scene.layout == "beside" else "above"
        long = words.sentence(f"{first} {relation} {second}") if rng.random() < 0.5 else caption
    elif ground and not scene.picture.card:
        long = words.sentence(f"{caption.rstrip('.!')} on {words.article(ground)} {ground} background")
    return QA("caption", question, long, caption, tuple(dict.fromkeys([long, caption])))


def ask_exists(rng: random.Random, scene: Scene, world: World) -> QA | None:
    """Ask "Is there a dog in the picture?", yes as often as no.

    Args:
        rng: Draws the answer first, then the thing.
        scene: The picture.
        world: The things to ask about when the answer is no.

    Returns:
        The question, or None when nothing in the picture has a noun.
    """
    present = [s.noun for s in scene.objects if s.noun]
    if not present or len(present) != len(scene.objects):
        return None
    yes = rng.random() < 0.5
    if yes:
        noun = rng.choice(present)
        parents = words.ancestors(noun)
        if parents and rng.random() < 0.3:
            noun = rng.choice(parents)
    else:
        category = next((s.category for s in scene.objects), None)
        pool = world.by_category.get(category or "", ()) if rng.random() < 0.4 else world.nouns
        for _ in range(20):
            noun = rng.choice(pool or world.nouns)
            if not any(words.related(noun, p) for p in present):
                break
        else:
            return None
    named = words.phrase(noun)
    verb = "Are there" if named.startswith("some ") else "Is there"
    named = "any " + named[5:] if named.startswith("some ") else named
    if verb == "Is there" and rng.random() < 0.3:
        question = rng.choice(
            [f"Does the picture show {named}?", f"Can you see {named}?", f"Do you see {named} in the image?"]
        )
        no, good = "No.", "Yes."
    else:
        question = f"{verb} {named} in the {rng.choice(['picture', 'image', 'photo'])}?"
        verb_short = "there are" if verb == "Are there" else "there is"
        no, good = f"No, {verb_short} not.", f"Yes, {verb_short}."
    return QA("exists", question, good if yes else no, "Yes" if yes else "No", ("yes",) if yes else ("no",))


def ask_count(rng: random.Random, scene: Scene, world: World) -> QA | None:
    """Ask "How many stars are there?"

    Args:
        rng: Draws the wording.
        scene: A counted scene.
        world: Unused.

    Returns:
        The question, or None for other scenes.
    """
    if scene.layout != "counted":
        return None
    source = scene.objects[0]
    noun = source.noun or ""
    if words.lexicon().get(noun) and words.lexicon()[noun].article != "a":
        return None
    many = words.proper(words.plural(noun))
    question = rng.choice(
        [
            f"How many {many} are there?",
            f"How many {many} do you see?",
            f"How many {many} are in the picture?",
            f"Count the {many}. How many are there?",
        ]
    )
    number = words.NUMBERS[scene.count]
    long = f"There is one {noun}." if scene.count == 1 else f"There are {number} {many}."
    return QA("count", question, long, capital(number), (number, str(scene.count)))


def ask_color(rng: random.Random, scene: Scene, world: World) -> QA | None:
    """Ask "What color is the car?" or the background's, only where the colour is plain.

    Args:
        rng: Draws the thing and the wording.
        scene: The picture.
        world: Unused.

    Returns:
        The question, or None when nothing is plainly coloured.
    """
    options: list[tuple[str, str]] = []
    same = len({s.noun for s in scene.objects}) < len(scene.objects)
    for source in scene.objects:
        if source.colour and source.noun and not same:
            many = scene.count > 1 or words.phrase(source.noun).startswith(("some ", "a pair"))
            noun = words.plural(source.noun) if scene.count > 1 else source.noun
            options += [(f"the {words.proper(noun)}" + ("|" if many else ""), source.colour)] * 2
    if scene.picture.ground.name and not (scene.picture.card and scene.picture.card.paper):
        options.append(("the background", scene.picture.ground.name))
    if not options:
        return None
    thing, colour = rng.choice(options)
    verb = "are" if thing.endswith("|") else "is"
    thing = thing.rstrip("|")
    question = rng.choice(
        [f"What color {verb} {thing}?", f"Which color {verb} {thing}?", f"Tell me the color of {thing}."]
    )
    accepted = (colour, *words.COLOUR_SYNONYMS.get(colour, []))
    return QA("color", question, words.sentence(f"{thing} {verb} {colour}"), capital(colour), accepted)


def ask_position(rng: random.Random, scene: Scene, world: World) -> QA | None:
    """Which half of the picture, or what is beside or above something.

    Args:
        rng: Draws the wording.
        scene: A scene with an object in one half, or several objects.
        world: Unused.

    Returns:
        The question, or None for other scenes.
    """
    if scene.side:
        source = scene.objects[0]
        if source.noun is None:
            return None
        first, second = ("left", "right") if scene.side in ("left", "right") else ("top", "bottom")
        if rng.random() < 0.5:
            first, second = second, first
        pair = words.phrase(source.noun).startswith(("some ", "a pair"))
        verb = "Are" if pair else "Is"
        question = (
            f"{verb} {the_thing(source)} on the {first} or the {second} of the picture?"
            if first in ("left", "right")
            else (f"{verb} {the_thing(source)} at the {first} or the {second} of the picture?")
        )
        preposition = "on" if scene.side in ("left", "right") else "at"
        long = f"{the_thing(source)} {verb.lower()} {preposition} the {scene.side}"
        return QA(
            "position",
            question,
            words.sentence(long),
            capital(scene.side),
            (scene.side, f"{preposition} the {scene.side}"),
        )
    if scene.layout not in ("beside", "above") or len(scene.objects) != 2 or not all(s.noun for s in scene.objects):
        return None
    first_source, second_source = scene.objects
    if words.related(first_source.noun or "", second_source.noun or ""):
        return None
    near, far = ("left", "right") if scene.layout == "beside" else ("top", "bottom")
    target, side = rng.choice([(first_source, near), (second_source, far)])
    other = second_source if target is first_source else first_source
    relation = {"left": "to the left of", "right": "to the right of", "top": "above", "bottom": "below"}[side]
    place = f"on the {side}" if side in ("left", "right") else f"at the {side}"
    if rng.random() < 0.5:
        question = rng.choice(
            [f"What is {relation} {the_thing(other)}?", f"What is {place}?", f"What is {place} of the picture?"]
        )
        return QA(
            "position",
            question,
            words.sentence(named_as(target)),
            capital(target.noun or ""),
            tuple(words.accepted(target.noun or "")),
        )
    pair = words.phrase(target.noun or "").startswith(("some ", "a pair"))
    verb = "Are" if pair else "Is"
    options = [near, far]
    rng.shuffle(options)
    preposition = "on" if near == "left" else "at"
    question = f"{verb} {the_thing(target)} {preposition} the {options[0]} or the {options[1]}?"
    return QA(
        "position",
        question,
        words.sentence(f"{the_thing(target)} {verb.lower()} {place}"),
        capital(side),
        (side, place),
    )


def ask_category(rng: random.Random, scene: Scene, world: World) -> QA | None:
    """Ask "Is this an animal, food or a vehicle?", the right one at any place.

    Args:
        rng: Draws the other choices and the order.
        scene: A picture of one thing.
        world: Unused.

    Returns:
        The question, or None when the category is not one of the clear ones.
    """
    if len(scene.objects) != 1:
        return None
    source = scene.objects[0]
    category = source.category
    if category not in CATEGORY_PHRASES or source.noun in _NOT_PEOPLE:
        return None
    others = rng.sample([c for c in CATEGORY_PHRASES if c != category], 2)
    choices = [category, *others]
    rng.shuffle(choices)
    a, b, c = (CATEGORY_PHRASES[x] for x in choices)
    question = rng.choice([f"Is this {a}, {b} or {c}?", f"What kind of thing is it: {a}, {b} or {c}?"])
    answers = _CATEGORY_ANSWERS[category]
    accepted = tuple(dict.fromkeys([*answers, CATEGORY_PHRASES[category]]))
    return QA(
        "category", question, words.sentence(f"it is {CATEGORY_PHRASES[category]}"), capital(answers[0]), accepted
    )


def ask_ocr(rng: random.Random, scene: Scene, world: World) -> QA | None:
    """Ask "What does the sign say?"

    Args:
        rng: Draws the wording.
        scene: A picture with a card.
        world: Unused.

    Returns:
        The question, or None for other scenes.
    """
    card = scene.picture.card
    if card is None:
        return None
    thing = "word" if card.text.isalpha() else "number"
    question = rng.choice(
        [
            "What does the sign say?",
            f"What {thing} is written here?",
            f"Which {thing} is in the picture?",
            "What is written in the picture?",
            f"Read the {thing}.",
            "What does the text say?",
        ]
    )
    return QA("ocr", question, f'It says "{card.text}".', card.text, (card.text, card.text.lower()))


def ask_zh(rng: random.Random, scene: Scene, world: World) -> QA | None:
    """A question in Chinese: name, colour, category, count, or whether something is there.

    Args:
        rng: Draws the question.
        scene: A picture of one kind of thing.
        world: Unused.

    Returns:
        The question, or None when the Chinese is not known.
    """
    if len(scene.objects) != 1:
        return None
    source = scene.objects[0]
    if scene.count > 1:
        number = words.ZH_NUMBERS[scene.count]
        question = rng.choice(["图中有几个物体？", "图片里有多少个？"])
        return QA("zh", question, f"{number}个。", f"{number}个", (f"{number}个", number, str(scene.count)))
    options: list[QA] = []
    if source.zh:
        noun = source.zh.rstrip("。")
        bare = noun.lstrip("一")[1:] if noun.startswith("一") and len(noun) > 2 else noun
        shape = words.ZH_SHAPES.get(source.noun or "", bare)
        short = shape if source.origin == "shapes" else bare
        question = rng.choice(["这是什么？", "图中是什么？", "图片里有什么？"])
        options.append(QA("zh", question, noun + "。", short, tuple(dict.fromkeys([short, noun, bare]))))
    if source.colour and source.origin == "shapes":
        colour = words.ZH_COLOURS[source.colour]
        options.append(QA("zh", "它是什么颜色的？", colour + "。", colour, (colour, colour[:-1])))
    if source.noun in words.ZH_NOUNS:
        if rng.random() < 0.5:
            options.append(QA("zh", f"图中有{words.ZH_NOUNS[source.noun]}吗？", "有。", "有", ("有", "是")))
        else:
            other = rng.choice([n for n in words.ZH_NOUNS if not words.related(n, source.noun)])
            options.append(QA("zh", f"图中有{words.ZH_NOUNS[other]}吗？", "没有。", "没有", ("没有", "不是")))
    if source.category in words.ZH_CATEGORIES and source.noun not in _NOT_PEOPLE:
        options.append(_zh_category(rng, source.category))
    return rng.choice(options) if options else None


def _zh_category(rng: random.Random, category: str) -> QA:
    """Which of three it is, or whether it is of one category."""
    right = words.ZH_CATEGORIES[category]
    wrong = rng.sample([name for name in words.ZH_CATEGORIES.values() if name != right], 2)
    if rng.random() < 0.3:
        yes = rng.random() < 0.5
        answer = "是" if yes else "不是"
        return QA("zh", f"这是{right if yes else wrong[0]}吗？", answer + "。", answer, (answer,))
    first, second, third = rng.sample([right, *wrong], 3)
    return QA("zh", f"这是{first}、{second}还是{third}？", right + "。", right, (right, f"是{right}", f"这是{right}"))


def ask_compare(rng: random.Random, first: Scene, second: Scene) -> QA | None:
    """A question about two pictures: which one shows it, or whether both show the same thing.

    Args:
        rng: Draws the question.
        first: The first picture, of one thing.
        second: The second picture, of one thing.

    Returns:
        The question, or None when a noun is missing or the things are related but not the same.
    """
    one, two = first.objects[0].noun, second.objects[0].noun
    if one is None or two is None or (one != two and words.related(one, two)):
        return None
    if one == two or rng.random() < 0.3:
        question = rng.choice(["Do both pictures show the same thing?", "Are the same things in both pictures?"])
        same = one == two
        return QA(
            "compare",
            question,
            "Yes, they do." if same else "No, they do not.",
            "Yes" if same else "No",
            ("yes",) if same else ("no",),
        )
    return _ask_place(rng, *rng.choice([("first", one), ("second", two)]))


def ask_more_of_two(rng: random.Random, first: Scene, second: Scene, asked: QA) -> list[QA]:
    """What else a training conversation asks about two pictures: what one shows, and the other sort of question.

    Args:
        rng: Draws the questions.
        first: The first picture, of one thing.
        second: The second picture, of one thing.
        asked: What `ask_compare` asked before.

    Returns:
        One or two questions.
    """
    nouns = {"first": first.objects[0].noun or "", "second": second.objects[0].noun or ""}
    place = rng.choice(list(nouns))
    shown = (first if place == "first" else second).objects[0]
    question = rng.choice([f"What is in the {place} picture?", f"What does the {place} picture show?"])
    caption = named_as(shown) if shown.origin == "shapes" else shown.caption
    more = [
        QA("name", question, words.sentence(caption), capital(words.proper(nouns[place])), tuple(name_answers(shown)))
    ]
    if nouns["first"] != nouns["second"] and asked.short in ("Yes", "No"):
        place = rng.choice(list(nouns))
        more.append(_ask_place(rng, place, nouns[place]))
    rng.shuffle(more)
    return more


def _ask_place(rng: random.Random, place: str, noun: str) -> QA:
    order = "the first or the second" if rng.random() < 0.5 else "the second or the first"
    question = f"Which picture shows {words.phrase(noun)}, {order}?"
    accepted = (place, f"the {place}", f"{place} picture", f"the {place} picture")
    return QA("compare", question, f"The {place} picture.", capital(place), accepted)


ASK: dict[str, Callable[[random.Random, Scene, World], QA | None]] = {
    "name": ask_name,
    "caption": ask_caption,
    "exists": ask_exists,
    "count": ask_count,
    "color": ask_color,
    "position": ask_position,
    "category": ask_category,
    "ocr": ask_ocr,
    "zh": ask_zh,
}


def turn(rng: random.Random, qa: QA) -> tuple[str, str]:
    """A training turn: half of the short-answer questions ask for a single word and get one.

    Args:
        rng: Draws the form.
        qa: The question.

    Returns:
        (what the user says, what the assistant says).
    """
    if qa.kind in ("caption", "zh") or rng.random() < 0.5:
        return qa.question, qa.long
    return f"{qa.question}\n{words.SHORT}", qa.short
