"""Compose training records about natural scenes: captions for the first stage, conversations for the second.

Only training sources are used, and nothing here is drawn from the streams that lead to what the model is judged on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from recipes.default.dataset import asking, chinese, differences, lettering, natural, plan, questions, scenes, words
from recipes.default.dataset.asking import turn
from recipes.default.dataset.natural import Box
from recipes.default.dataset.questions import QA, Scene, World
from recipes.default.dataset.studio import Look, Studio, View

Record = dict[str, Any]
Place = tuple[str, float, float, float, float]

# Shares of the conversations, and what each sort asks (the first nearly always).
SHARES = {
    "named": 0.26,
    "several": 0.12,
    "painted": 0.14,
    "counted": 0.11,
    "placed": 0.11,
    "odd": 0.02,
    "differ": 0.04,
    "compare": 0.05,
    "words": 0.13,
    "unsure": 0.02,
}
_TURNS = {
    "named": ["name", "caption", "exists", "exists", "color", "category", "zh", "zh"],
    "several": ["position", "position", "exists", "exists", "color", "caption", "category", "count", "zh", "zh"],
    "painted": ["color", "color", "color", "color", "exists", "caption", "position", "zh"],
    "counted": ["count", "count", "exists", "name", "color", "caption", "zh"],
    "placed": ["position", "position", "position", "exists", "color", "caption", "name", "zh"],
    "odd": ["odd", "count", "exists", "caption", "zh"],
    "words": ["ocr", "ocr", "text color", "caption", "zh"],
    "unsure": ["unsure", "zh"],
}


def _scene(make: Studio, sort: str) -> View:
    rng = make.rng
    if sort == "named":
        tint = rng.choice(list(words.COLOURS)) if rng.random() < 0.06 else None
        return make.single(make.pick(make.things), tint=tint) if tint else make.single()
    if sort == "several":
        return make.several(rng.choice([2, 3, 4, 5]))
    if sort == "painted":
        return make.several(rng.choice([1, 2, 2, 3, 3, 4]), painted=True)
    made: dict[str, Callable[[], View]] = {
        "counted": make.counted,
        "placed": make.placed,
        "odd": make.odd,
        "words": lambda: lettering.written(make),
        "unsure": make.unsure,
    }
    return made[sort]()


def _questions(make: Studio, sort: str, view: View, world: World, zh: chinese.Names) -> list[QA]:
    rng, wanted = make.rng, _TURNS[sort]
    kinds = [wanted[0]] if rng.random() < 0.85 else []
    kinds += rng.sample(wanted[1:], min(len(wanted) - 1, rng.randint(3, 5) - len(kinds)))
    rng.shuffle(kinds)
    planned = len(kinds)
    kinds += rng.sample(wanted, min(len(wanted), 3))  # where a question does not suit the scene
    asked: list[QA] = []
    for number, kind in enumerate(kinds):
        if number >= 3 and len(asked) >= planned:
            break
        qa = chinese.ask(rng, view, world, zh) if kind == "zh" else asking.ASK[kind](rng, view, world)
        if qa is None or any(qa.question == one.question for one in asked):
            continue
        if kind in ("name", "unsure") and any(one.kind == kind for one in asked):
            continue
        asked.append(qa)
    if not asked:
        first = asking.ASK["unsure" if sort == "unsure" else "caption"](rng, view, world)
        assert first is not None
        asked = [first]
    return asked


def conversation(make: Studio, sort: str, name: str, world: World, zh: chinese.Names) -> Record:
    """One record of a sort of SHARES; its images are added to the studio's."""
    rng = make.rng
    if sort in ("compare", "differ"):
        views, asked = (differences.compare if sort == "compare" else differences.differ)(make, zh)
    else:
        view = _scene(make, sort)
        views, asked = [view], _questions(make, sort, view, world, zh)
    kinds = [qa.kind for qa in asked]
    one = kinds[0] if len(set(kinds)) == 1 else "mixed"
    kind = sort if sort in ("compare", "differ") else one
    turns = [turn(rng, qa) for qa in asked]
    return plan.record_of(name, views, turns, kinds, kind=kind)  # type: ignore[arg-type]


def conversations(
    make: Studio,
    count: int,
    world: World,
    zh: chinese.Names | None = None,
    *,
    shares: Mapping[str, float] = SHARES,
    prefix: str = "rich",
) -> tuple[list[Record], dict[str, list[Place]]]:
    """So many conversations, shuffled, with what is where in their images (`make.pictures`)."""
    total = sum(shares.values())
    sorts = [sort for sort, share in shares.items() for _ in range(round(count * share / total))]
    records: list[Record] = []
    known: dict[str, list[Place]] = {}
    for number, sort in enumerate(sorts):
        mark = len(make.views)
        records.append(conversation(make, sort, f"{prefix}-{number:05d}", world, zh or words.ZH_NOUNS))
        known.update({view.picture.file: places(view, make.looks) for view in make.views[mark:]})
    make.rng.shuffle(records)
    return records, known


def captions(
    make: Studio,
    views: Mapping[str, int],
    scenes_: int,
    texts: int,
    zh: chinese.Names | None = None,
    *,
    prefix: str = "richcap",
) -> tuple[list[Record], dict[str, list[Place]]]:
    """Captions for the first stage: so many views of every training cut-out by origin, scenes of several, and texts."""
    rng, records = make.rng, list[Record]()
    known: dict[str, list[Place]] = {}
    jobs: list[int | str] = [i for i in make.pool for _ in range(views.get(make.sources[i].origin, 0))]
    jobs += [rng.choice(["several", "several", "painted", "counted", "placed"]) for _ in range(scenes_)]
    jobs += ["words"] * texts
    for number, job in enumerate(jobs):
        view = make.single(job) if isinstance(job, int) else _scene(make, job)
        kind, text = "caption", asking.caption_of(rng, view)
        if view.sheet:
            kind = "caption_ocr"
        elif rng.random() < 0.1 and (said := chinese.listed(view, zh or words.ZH_NOUNS)):
            kind, text = "caption_zh", said + "。"
        records.append(plan.record_of(f"{prefix}-{number:05d}", [view], [("", text)], [kind], kind=kind))  # type: ignore[list-item]
        known[view.picture.file] = places(view, make.looks)
    rng.shuffle(records)
    return records, known


def places(scene: View | Scene, looks: list[Look]) -> list[Place]:
    """What is where in a planned image, natural or plain: [(noun phrase, x0, y0, x1, y1)], shares of the side."""
    if isinstance(scene, View):
        found = [(spot.phrase, *spot.box) for spot in scene.spots]
        return found + [(_text_phrase(" ".join(s.lines)), *natural.sheet_box(s)) for s in scene.picture.sheets]
    image = scene.picture
    if image.card:
        return [(_text_phrase(image.card.text), *_card_box(image.card))]
    named = [questions.named_as(source) for source in scene.objects]
    if len(named) == 1:  # several of one kind
        named *= len(image.items)
    return [(name, *_item_box(item, looks[item.source].aspect)) for name, item in zip(named, image.items, strict=True)]


def _text_phrase(text: str) -> str:
    return f'the {"number" if text.isdigit() else "word" if text.isalpha() else "text"} "{text}"'


def _item_box(item: scenes.Item, aspect: float) -> Box:
    """As `scenes.draw` places a cut-out: inside the frame, or covering it."""
    w, h = item.size * min(1.0, aspect), item.size * min(1.0, 1 / aspect)
    left = min(max(item.x - w / 2, min(0.0, 1 - w)), max(0.0, 1 - w))
    top = min(max(item.y - h / 2, min(0.0, 1 - h)), max(0.0, 1 - h))
    ends = (left, top, left + w, top + h)
    return tuple(round(min(1.0, max(0.0, v)), 3) for v in ends)  # type: ignore[return-value]


def _card_box(card: scenes.Card) -> Box:
    """What of the frame a card takes: found by drawing it."""
    from PIL import Image, ImageChops

    blank = Image.new("RGB", (scenes.SIDE, scenes.SIDE), (1, 2, 3))
    drawn = blank.copy()
    scenes._draw_card(drawn, card)
    box = ImageChops.difference(blank, drawn).getbbox() or (0, 0, scenes.SIDE, scenes.SIDE)
    return tuple(round(v / scenes.SIDE, 3) for v in box)  # type: ignore[return-value]
