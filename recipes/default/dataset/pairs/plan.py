"""Compose the pairs: which pictures are made for training, for retrieval and for zero-shot classification.

Sources are held out as in the default data set of the same seed and size, so nothing that judges a model in one of them
is learned from in the other. Held-out pairs are chosen so that each caption fits one picture only: no two of them could
be confused by what is said (`captions.confusable`); otherwise recall@1 would mark right answers wrong.

There are three sorts of held-out pairs, each in its own file, since they ask for different things: drawings that
training never shows, new pictures of the drawings that it does show, and written words. Training pictures of words lie
in a file of their own too: a tower that cannot read learns nothing from them.
"""

from __future__ import annotations

import random
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from recipes.default.dataset import plan as planning
from recipes.default.dataset import questions, scenes, words
from recipes.default.dataset.generate import Gathered
from recipes.default.dataset.pairs.captions import captions_of, confusable, full_caption, translations
from recipes.default.dataset.plan import IMAGE, Composer
from recipes.default.dataset.questions import Scene
from recipes.default.dataset.scenes import Picture

Record = dict[str, Any]

TEMPLATES = ["{}.", "A picture of {}.", "A photo of {}.", "A drawing of {}."]
"""Prompts of a class, whose name comes with its article; their embeddings are averaged, as CLIP does."""


@dataclass(frozen=True)
class PairSize:
    """How many pictures of each sort a size has.

    Attributes:
        views: Training views of every cut-out, by origin.
        scenes: Training pictures of the other layouts.
        words: Training pictures of written words, and held-out ones.
        held_out: Pairs for retrieval of each layout, at most; fewer where no more can be told apart. As many for the
            drawings that training never shows as for those that it does.
    """

    views: dict[str, int]
    scenes: dict[str, int]
    words: tuple[int, int]
    held_out: dict[str, int]


SIZES: dict[str, PairSize] = {
    "full": PairSize(
        {"stamps": 16, "openclipart": 10, "emoji": 10, "shapes": 20},
        {"side": 3000, "beside": 6000, "above": 3000, "counted": 4000},
        (5000, 150),
        {"single": 250, "side": 100, "beside": 250, "above": 100, "counted": 150},
    ),
    "small": PairSize(
        {"stamps": 1, "openclipart": 1, "emoji": 1, "shapes": 2},
        {"side": 40, "beside": 80, "above": 40, "counted": 60},
        (40, 10),
        {"single": 40, "side": 10, "beside": 30, "above": 10, "counted": 20},
    ),
    "tiny": PairSize(
        {"shapes": 1},
        {"side": 6, "beside": 10, "above": 6, "counted": 10},
        (6, 4),
        {"single": 8, "beside": 8, "counted": 4},
    ),
}
_TRIES = 60
"""Scenes drawn for each held-out pair that is wanted, until one fits."""
_TRANSLATED = 0.3
"""Share of the training views with a translation that carry it in place of the English captions."""


@dataclass
class PairPlan:
    """Everything that will be written."""

    pictures: list[Picture] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def compose(gathered: Gathered, seed: int, size: str, languages: tuple[str, ...] = ()) -> PairPlan:
    """Plan the whole data set.

    Args:
        gathered: Measured sources, already split, and fonts.
        seed: Makes everything.
        size: How much of it; a name of `SIZES`.
        languages: Codes of other languages that a share of the stamps' captions are in.

    Returns:
        The plan: pictures, and the content of the files.
    """
    wanted, default = SIZES[size], planning.SIZES[size]
    # The photographs of the default data set are drawn first, as it does: their near duplicates are held out with them.
    photos_wanted = 0 if default.shapes_only else default.photos
    sources, photos = planning.choose_photos(gathered.sources, photos_wanted, random.Random(f"{seed}/photos"))
    plan = PairPlan()

    def composer(name: str, *, heldout: bool) -> Composer:
        fonts = gathered.heldout_fonts if heldout else gathered.fonts
        rng = random.Random(f"{seed}/pairs-{name}")
        return Composer(rng, sources, fonts, heldout=heldout, prefix=f"{name}_", suffix="jpg")

    makes = {name: composer(name, heldout=name not in ("train", "known")) for name in ("train", "val", "known", "zs")}
    train, val, known, classes = makes.values()
    plan.files["train.json"], shown = _train(train, wanted, languages)
    plan.files["train_words.json"] = _written(train, "words", wanted.words[0])
    plan.files["val.json"] = _held_out(val, "val", wanted.held_out)
    plan.files["val_known.json"] = _held_out(known, "known", wanted.held_out, shown)
    plan.files["val_words.json"] = _held_out(val, "val-words", {"text": wanted.words[1]})
    if default.shapes_only:
        photos = {sources[i].key for i in classes.shapes[: default.photos]}
    plan.files["classes.json"] = _classes(classes, photos)
    for made in makes.values():
        plan.pictures += made.pictures
    plan.notes["heldout_sources"] = sorted(s.key for s in sources if s.heldout)
    plan.notes["training_sources"] = sum(not s.heldout for s in sources)
    return plan


def _record(name: str, scene: Scene, captions: list[str], said: str, **more: Any) -> Record:
    keys = sorted({source.key for source in scene.objects})
    origins = sorted({key.split(":")[0] for key in keys})
    return {
        "id": name,
        "image": scene.picture.file,
        "conversations": [{"from": "human", "value": IMAGE}, {"from": "gpt", "value": said}],
        "kind": "caption",
        "captions": captions,
        "layout": scene.layout,
        **more,
        "source": "mixed" if len(origins) > 1 else (origins or ["text"])[0],
        "sources": keys,
    }


def _train(make: Composer, size: PairSize, languages: tuple[str, ...]) -> tuple[list[Record], set[tuple[Any, ...]]]:
    """Training pictures of things, and what they show (`_shown`).

    The conversation says the fullest caption, which is what a captioner is to learn; contrast draws among all.
    """
    records: list[Record] = []
    shown: set[tuple[Any, ...]] = set()

    def add(scene: Scene, captions: list[str], said: str) -> None:
        thing = scene.objects[0] if scene.layout == "single" else None
        more = {"noun": thing.noun, "category": thing.category} if thing is not None and thing.noun else {}
        records.append(_record(f"train-{len(records):05d}", scene, captions, said, **more))
        shown.add(_shown(scene))

    for index in make.pool:
        source = make.sources[index]
        other = translations(source, languages)
        for _ in range(size.views.get(source.origin, 0)):
            scene = make.single(index)
            if other and make.rng.random() < _TRANSLATED:
                captions = [make.rng.choice(other)]
                add(scene, captions, captions[0])
            else:
                add(scene, captions_of(scene), full_caption(scene))
    for layout, count in size.scenes.items():
        for _ in range(count):
            scene = make.make(layout)
            add(scene, captions_of(scene), full_caption(scene))
    make.rng.shuffle(records)
    return records, shown


def _written(make: Composer, prefix: str, count: int) -> list[Record]:
    """Training pictures of written words."""
    scenes_ = [make.make("text") for _ in range(count)]
    return [
        _record(f"{prefix}-{number:05d}", scene, captions_of(scene), full_caption(scene))
        for number, scene in enumerate(scenes_)
    ]


def _shown(scene: Scene) -> tuple[Any, ...]:
    """What a picture shows, apart from sizes and exact places."""
    keys = tuple(source.key for source in scene.objects)
    return (scene.layout, keys, scene.count, scene.side, scene.picture.ground.name)


def _held_out(
    make: Composer, prefix: str, layouts: dict[str, int], shown: Container[tuple[Any, ...]] = ()
) -> list[Record]:
    """Pairs of which no caption fits another picture, nor shows what training's do (`shown`)."""
    records: list[Record] = []
    kept: list[Scene] = []
    for layout, count in layouts.items():
        found = 0
        for _ in range(count * _TRIES):
            if found == count:
                break
            mark = len(make.pictures)
            scene = make.make(layout)
            if _shown(scene) in shown or any(confusable(scene, other) for other in kept):
                del make.pictures[mark:]
                continue
            kept.append(scene)
            caption = full_caption(scene)
            records.append(_record(f"{prefix}-{len(records):04d}", scene, [caption], caption))
            found += 1
    return records


def _classes(make: Composer, photos: set[str]) -> dict[str, Any]:
    """Zero-shot tasks: name a held-out picture among all names of training, its group among the groups."""
    nouns = sorted({s.noun for s in make.sources if s.noun and not s.heldout})
    groups = sorted({g for s in make.sources if not s.heldout and (g := questions.category_phrase(s))})
    pictures: dict[str, list[Record]] = {"names": [], "categories": [], "photos": []}
    for index in make.nouned:
        source = make.sources[index]
        right = {source.noun, *words.accepted(source.noun or "")}
        names = [i for i, noun in enumerate(nouns) if noun in right]
        group = questions.category_phrase(source)
        if not names and group not in groups:
            continue
        picture = make.add(Scene(_clean(make, index), (source,), "single")).picture
        entry = {"image": picture.file, "noun": source.noun, "sources": [source.key]}
        number = f"{len(make.pictures) - 1:04d}"
        if names:
            pictures["names"].append({"id": f"names-{number}", **entry, "labels": names})
        if group in groups:
            pictures["categories"].append({"id": f"categories-{number}", **entry, "labels": [groups.index(group)]})
        if names and source.key in photos:
            pictures["photos"].append({"id": f"photos-{number}", **entry, "labels": names})
    classes = {"names": [words.phrase(n) for n in nouns], "categories": groups}
    classes["photos"] = classes["names"]
    tasks = [{"name": name, "classes": classes[name], "pictures": shown} for name, shown in pictures.items() if shown]
    return {"templates": TEMPLATES, "tasks": tasks}


def _clean(make: Composer, index: int) -> Picture:
    """One thing, large, on white, or on light blue where it is white itself: as the held-out photographs are shown."""
    source = make.sources[index]
    picture = scenes.single(make.file(), make.rng, index, source)
    white, blue = (255, 255, 255), (205, 225, 245)
    pale = source.luminance > 205 or source.colour == "white"
    picture.ground = scenes.Ground("plain", blue, blue, None) if pale else scenes.Ground("plain", white, white, "white")
    picture.items = [scenes.Item(index, 0.5, 0.5, 0.88)]
    return picture
