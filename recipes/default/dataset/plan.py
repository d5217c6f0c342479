"""Compose the data set: which pictures are made, and which conversations are held about them.

Two stages, as LLaVA has them (Liu et al., 2023): short captions first, to align the projector with the language model,
then conversations of several turns about one picture, so that its tokens are paid for once. Held-out sources are used
for the validation questions and the held-out photographs, and nowhere else.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from typing import Any

from recipes.default.dataset import questions, scenes, smalltalk, words
from recipes.default.dataset.questions import QA, Scene, World
from recipes.default.dataset.scenes import Picture
from recipes.default.dataset.sources import Source

Record = dict[str, Any]
IMAGE = "<image>"


@dataclass(frozen=True)
class Size:
    """How many records of each sort a size has."""

    views: dict[str, int]  # stage 1: views of every training cut-out, by origin
    stage1_scenes: int
    stage1_text: int
    stage2: int
    per_kind: int  # validation questions of each kind
    photos: int
    shapes_only: bool = False
    clipart: int = 100_000  # at most so many openclipart drawings and emoji, for `small`


SIZES: dict[str, Size] = {
    "full": Size({"stamps": 7, "openclipart": 4, "emoji": 4, "shapes": 3}, 1800, 3200, 7600, 120, 40),
    "small": Size({"stamps": 1, "openclipart": 1, "emoji": 1, "shapes": 1}, 60, 30, 260, 8, 40, clipart=60),
    "tiny": Size({"shapes": 1}, 6, 4, 24, 3, 8, shapes_only=True),
}
# Shares of the stage-2 pictures.
_LAYOUTS = {"single": 0.31, "side": 0.08, "beside": 0.11, "above": 0.06, "counted": 0.12, "text": 0.14, "compare": 0.12}
_CLOSE = 0.25
"""Share of the training photographs that fill the frame."""
KINDS = ["name", "caption", "exists", "count", "color", "position", "category", "compare", "ocr", "zh"]


@dataclass
class Plan:
    """Everything that will be written."""

    pictures: list[Picture] = field(default_factory=list)
    scenes: dict[str, Scene] = field(default_factory=dict)  # by file, those of the training images
    files: dict[str, list[Record]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Composer:
    """Draws scenes from a pool of sources and keeps the list of pictures."""

    def __init__(
        self, rng: random.Random, sources: list[Source], fonts: list[str], *, heldout: bool, prefix: str, suffix: str
    ) -> None:
        """Keep the pool.

        Args:
            rng: Draws everything.
            sources: All sources; positions are the names of the thumbs.
            fonts: Fonts for words.
            heldout: Use the held-out sources instead of the training ones.
            prefix: Start of the picture names.
            suffix: Ending of the picture names.
        """
        self.rng, self.sources, self.fonts = rng, sources, fonts
        self.prefix, self.suffix = prefix, suffix
        self.close = 0.0 if heldout else _CLOSE
        self.pictures: list[Picture] = []
        self.scenes: dict[str, Scene] = {}  # by file
        self.pool = [i for i, s in enumerate(sources) if s.heldout == heldout]
        self.nouned = [i for i in self.pool if sources[i].noun]
        by_category: dict[str, list[int]] = {}
        for i in self.nouned:
            by_category.setdefault(sources[i].category or "", []).append(i)
        self.by_category = by_category
        self.shapes = [i for i in self.pool if sources[i].origin == "shapes"]
        self.coloured = [i for i in self.nouned if sources[i].colour]
        self.countable = [
            i
            for i in self.nouned
            if sources[i].origin == "shapes"
            or (
                words.lexicon()[sources[i].noun or ""].article == "a"
                and not sources[i].caption.startswith(("Two ", "Some "))
                and " of " not in sources[i].caption
            )
        ]

    def file(self) -> str:
        """The next picture's name.

        Returns:
            Path inside the data set.
        """
        return f"images/{self.prefix}{len(self.pictures):05d}.{self.suffix}"

    def add(self, scene: Scene) -> Scene:
        """Keep a scene's picture.

        Args:
            scene: The scene.

        Returns:
            The same scene.
        """
        self.pictures.append(scene.picture)
        self.scenes[scene.picture.file] = scene
        return scene

    def pick(self, pool: list[int]) -> int:
        """Draw a source, half of the time by category first, so that small categories are seen.

        Args:
            pool: Positions to draw from.

        Returns:
            A position.
        """
        if pool is self.nouned and self.rng.random() < 0.5:
            return self.rng.choice(self.by_category[self.rng.choice(sorted(self.by_category))])
        return self.rng.choice(pool)

    def single(self, index: int | None = None) -> Scene:
        """A scene of one object.

        Args:
            index: The source, or None to draw one.

        Returns:
            The scene.
        """
        if index is None:
            index = self.pick(self.nouned)
        source = self.sources[index]
        picture = scenes.single(self.file(), self.rng, index, source, close=self.close)
        return self.add(Scene(picture, (source,), "single"))

    def make(self, layout: str) -> Scene:
        """A scene of the named layout.

        Args:
            layout: single, side, beside, above, counted, text or color.

        Returns:
            The scene.
        """
        rng = self.rng
        if layout == "side":
            index = self.pick(self.nouned)
            side = rng.choice(["left", "right", "top", "bottom"])
            source = self.sources[index]
            return self.add(
                Scene(scenes.single(self.file(), rng, index, source, side=side), (source,), "side", side=side)
            )
        if layout in ("beside", "above"):
            for _ in range(200):
                shaped = bool(self.shapes) and rng.random() < 0.25
                number = 3 if rng.random() < 0.15 else 2
                indices = [rng.choice(self.shapes) if shaped else self.pick(self.nouned) for _ in range(number)]
                chosen = [self.sources[i] for i in indices]
                names = [s.noun or "" for s in chosen]
                if all(not words.related(a, b) for k, a in enumerate(names) for b in names[:k]):
                    break
            picture = scenes.pair(self.file(), rng, indices, chosen, vertical=layout == "above")
            return self.add(Scene(picture, tuple(chosen), layout))
        if layout == "counted":
            index = rng.choice(self.shapes) if self.shapes and rng.random() < 0.4 else rng.choice(self.countable)
            source = self.sources[index]
            count = rng.randint(1, 4)
            return self.add(Scene(scenes.counted(self.file(), rng, index, source, count), (source,), "counted", count))
        if layout == "text":
            word = (
                rng.choice(list(words.fixes()["written words"]))
                if rng.random() < 0.75
                else str(rng.randint(0, 10 ** rng.randint(1, 3) - 1))
            )
            word = rng.choice([word.upper(), word.upper(), word.lower(), word.capitalize()])
            picture = scenes.lettered(self.file(), rng, word, rng.choice(self.fonts))
            return self.add(Scene(picture, (), "text"))
        if layout == "color":
            return self.single(rng.choice(self.shapes if rng.random() < 0.4 and self.shapes else self.coloured))
        return self.single()

    def comparison(self) -> tuple[Scene, Scene, QA]:
        """Two pictures of one thing each and a question about both.

        Returns:
            (first, second, question).
        """
        kept = len(self.pictures)
        for _ in range(300):
            first = self.single()
            same = self.rng.random() < 0.25
            second_index = None
            if same:
                alike = [i for i in self.nouned if self.sources[i].noun == first.objects[0].noun]
                second_index = self.rng.choice(alike)
            second = self.single(second_index)
            qa = questions.ask_compare(self.rng, first, second)
            if qa is not None:
                return first, second, qa
            del self.pictures[kept:]
        raise AssertionError("no two unrelated pictures in the pool")


def record_of(name: str, scenes_: list[Scene], turns: list[tuple[str, str]], kinds: list[str], **more: Any) -> Record:
    conversation = []
    for number, (asked, answered) in enumerate(turns):
        marks = f"{IMAGE}\n" * len(scenes_) if number == 0 else ""
        conversation += [
            {"from": "human", "value": (marks + asked).rstrip("\n") if marks else asked},
            {"from": "gpt", "value": answered},
        ]
    record: Record = {"id": name}
    if scenes_:
        files = [s.picture.file for s in scenes_]
        record["image"] = files[0] if len(files) == 1 else files
    record["conversations"] = conversation
    record.update(more)
    record["kinds"] = kinds
    keys = sorted({o.key for s in scenes_ for o in s.objects})
    origins = sorted({key.split(":")[0] for key in keys})
    # `source` groups losses, so it is one word; `sources` says exactly which pictures were used.
    record["source"] = "mixed" if len(origins) > 1 else (origins or ["text" if scenes_ else "smalltalk"])[0]
    record["sources"] = keys
    return record


def _stage1(make: Composer, size: Size) -> list[Record]:
    records: list[Record] = []

    def add(scene: Scene, caption: str, kind: str) -> None:
        records.append(record_of(f"stage1-{len(records):05d}", [scene], [("", caption)], [kind], kind=kind))

    for index in make.pool:
        source = make.sources[index]
        for view in range(size.views.get(source.origin, 0)):
            scene = make.single(index)
            if view == 1 and source.zh and source.origin == "stamps":
                add(scene, source.zh.rstrip("。") + "。", "caption_zh")
            else:
                add(scene, source.caption, "caption")
    for _ in range(size.stage1_scenes):
        scene = make.make(make.rng.choice(["beside", "above", "counted"]))
        add(scene, questions.caption_of(scene), "caption")
    for _ in range(size.stage1_text):
        scene = make.make("text")
        add(scene, questions.caption_of(scene), "caption_ocr")
    make.rng.shuffle(records)
    return records


_TURNS = {
    "single": ["name", "caption", "exists", "exists", "color", "category", "zh", "zh"],
    "side": ["position", "name", "exists", "color", "caption"],
    "beside": ["position", "position", "exists", "exists", "color", "caption"],
    "above": ["position", "position", "exists", "exists", "color", "caption"],
    "counted": ["count", "count", "name", "exists", "color", "caption", "zh"],
    "text": ["ocr", "ocr", "color", "caption"],
}


def stage2(make: Composer, size: Size, world: World) -> list[Record]:
    rng = make.rng
    records: list[Record] = []
    layouts = [name for name, share in _LAYOUTS.items() for _ in range(max(1, round(share * size.stage2)))]
    layouts += ["dialogue"] * max(0, size.stage2 - len(layouts))
    for layout in layouts:
        name = f"stage2-{len(records):05d}"
        if layout == "dialogue":
            if rng.random() < 0.75:
                turns = smalltalk.conversation(rng)
                records.append(record_of(name, [], turns, ["dialogue"] * len(turns), kind="dialogue"))
            else:
                scene = make.single()
                thing = scene.objects[0].caption
                turns = [
                    rng.choice(
                        [
                            ("Hello! What do you see here?", f"Hello! I see {thing[0].lower() + thing[1:]}"),
                            ("Hi! I have a picture for you.", f"Thank you! It shows {thing[0].lower() + thing[1:]}"),
                            (
                                "What do you think of this picture?",
                                f"It is a nice picture. It shows {thing[0].lower() + thing[1:]}",
                            ),
                        ]
                    ),
                    rng.choice(
                        [
                            ("Thank you!", "You are welcome!"),
                            ("Great, thanks.", "You are welcome. Do you have another question?"),
                            ("Well done!", "Thank you!"),
                        ]
                    ),
                ]
                records.append(record_of(name, [scene], turns, ["dialogue"] * 2, kind="dialogue"))
            continue
        if layout == "compare":
            first, second, qa = make.comparison()
            asked_of_both = [qa, *questions.ask_more_of_two(rng, first, second, qa)]
            turns = [questions.turn(rng, one) for one in asked_of_both]
            records.append(record_of(name, [first, second], turns, [one.kind for one in asked_of_both], kind="compare"))
            continue
        scene = make.make("color" if layout == "single" and rng.random() < 0.3 else layout)
        wanted = _TURNS[layout]
        kinds = [wanted[0]] if rng.random() < 0.75 else []
        kinds += rng.sample(wanted[1:], min(len(wanted) - 1, rng.randint(3, 5) - len(kinds)))
        rng.shuffle(kinds)
        turns, kept, asked = [], [], set()
        for kind in kinds:
            answer = questions.ASK[kind](rng, scene, world)
            if answer is None or answer.question in asked or (kind == "name" and "name" in kept):
                continue
            asked.add(answer.question)
            turns.append(questions.turn(rng, answer))
            kept.append(kind)
        if not turns:
            answer = questions.ask_caption(rng, scene, world)
            assert answer is not None
            turns, kept = [questions.turn(rng, answer)], ["caption"]
        records.append(record_of(name, [scene], turns, kept, kind="mixed" if len(set(kept)) > 1 else kept[0]))
    rng.shuffle(records)
    return records


VAL_LAYOUTS = {
    "name": ["single"],
    "category": ["single"],
    "zh": ["single", "single", "counted"],
    "count": ["counted"],
    "color": ["color"],
    "ocr": ["text"],
    "caption": ["single"],
    "position": ["side", "beside", "above"],
    "exists": ["single", "beside", "counted"],
}


def heldout_questions(make: Composer, size: Size, world: World, *, distinct: bool = False) -> list[Record]:
    """Questions of every kind; where `distinct`, none of a kind is about what another of it was about."""
    rng = make.rng
    records: list[Record] = []
    for kind in KINDS:
        taken: dict[str, int] = {}
        asked: set[str] = set()
        kept = 0
        for _ in range(size.per_kind * 60):
            if kept == size.per_kind:
                break
            mark = len(make.pictures)
            if kind == "compare":
                first, second, qa = make.comparison()
                shown = [first, second]
            else:
                scene = make.make(rng.choice(VAL_LAYOUTS[kind]))
                shown = [scene]
                found = questions.ASK[kind](rng, scene, world)
                if found is None:
                    del make.pictures[mark:]
                    continue
                qa = found
            # No answer may be so frequent that a model does well without looking.
            few = {"exists": 2, "count": 4, "compare": 4, "position": 6}.get(kind, 8)
            cap = -(-size.per_kind // few)
            objects = ",".join(o.key for s in shown for o in s.objects)
            key = (objects or qa.short.lower()) if distinct else qa.short + "|" + objects + qa.question
            if taken.get(qa.short, 0) >= cap or key in asked:
                del make.pictures[mark:]
                continue
            taken[qa.short] = taken.get(qa.short, 0) + 1
            asked.add(key)
            prompt = qa.question if kind in ("caption", "zh") else f"{qa.question}\n{words.SHORT}"
            reply = qa.long if kind == "caption" else qa.short
            more = {"kind": kind, "prompt": prompt, "answers": list(qa.accepted)}
            records.append(record_of(f"val-{kind}-{kept:03d}", shown, [(prompt, reply)], [kind], **more))
            kept += 1
    return records


PHOTO_RULE = (
    "Held-out photographs are drawn by the seed, without looking at any model's answers, among the stamps that are "
    "photographs (no drawing's folder; many distinct colours) of animals, food, vehicles, plants, instruments, tools, "
    "clothing, kitchen things, toys or buildings, at most one per noun, whose noun is also a right name for another "
    "training picture (stamp, drawing or emoji); the picture itself and its near duplicates never occur in training. "
    "A source too small to be seen (under 60 pixels) is not drawn, nor are seven that do not show what the caption "
    "says. Answers are the lexicon's synonyms and hypernyms and the caption's own words."
)
# Looked at by eye: the caption's thing cannot be told from the picture, or the name is too vague to be marked.
_UNFIT_PHOTOS = re.compile(
    r"German_Christmas_toy|plants/eggplant|lettuce_bolted|plastic_poo|appooppanthady|albino_peahen|fireworks"
)
_PHOTO_CATEGORIES = {
    "animal",
    "food",
    "vehicle",
    "plant",
    "instrument",
    "tool",
    "clothing",
    "kitchen",
    "sport and toys",
    "building",
}
_PHOTO_SHARE = {"animal": 20, "food": 6, "plant": 4, "vehicle": 3}


def choose_photos(sources: list[Source], count: int, rng: random.Random) -> tuple[list[Source], set[str]]:
    """Draw the held-out photographs (see PHOTO_RULE) and hold out their groups.

    Args:
        sources: All measured sources.
        count: How many.
        rng: Draws them.

    Returns:
        (the sources with the new groups held out, the keys of the photographs).
    """
    names: dict[str, set[str]] = {}
    for s in sources:
        if s.noun and not s.heldout:
            for word in words.accepted(s.noun):
                names.setdefault(word, set()).add(s.group)
    candidates = [
        s
        for s in sources
        if s.photo
        and s.noun
        and not _UNFIT_PHOTOS.search(s.key)
        and s.category in _PHOTO_CATEGORIES
        and s.pixels >= 60
        and names.get(s.noun, set()) - {s.group}
    ]
    rng.shuffle(candidates)
    chosen: list[Source] = []
    for limited in (True, False):
        for s in candidates:
            full = limited and sum(c.category == s.category for c in chosen) >= _PHOTO_SHARE.get(s.category or "", 2)
            alike = any(c.noun == s.noun or c.group == s.group for c in chosen)
            if len(chosen) < count and not full and not alike:
                chosen.append(s)
    groups = {s.group for s in chosen}
    return [replace(s, heldout=s.heldout or s.group in groups) for s in sources], {s.key for s in chosen}


def world_of(sources: list[Source]) -> World:
    """What some training picture shows."""
    shown = [s for s in sources if s.noun and not s.heldout]
    by_category = {
        c: tuple(sorted({s.noun for s in shown if s.noun and s.category == c}))
        for c in sorted({s.category for s in sources if s.category})
    }
    return World(tuple(sorted({s.noun for s in shown if s.noun})), by_category)


def compose(sources: list[Source], fonts: list[str], heldout_fonts: list[str], seed: int, size: Size) -> Plan:
    """Plan the whole data set.

    Args:
        sources: Measured sources, already split.
        fonts: Fonts for training words.
        heldout_fonts: Fonts for held-out words.
        seed: Makes everything.
        size: How much of it.

    Returns:
        The plan: pictures and records.
    """
    sources, photos = choose_photos(sources, 0 if size.shapes_only else size.photos, random.Random(f"{seed}/photos"))
    plan = Plan()
    suffix = "jpg"
    world = world_of(sources)

    def composer(name: str, *, heldout: bool) -> Composer:
        used = heldout_fonts if heldout else fonts
        kept = [replace(s, heldout=True) if s.key in photos else s for s in sources]
        return Composer(random.Random(f"{seed}/{name}"), kept, used, heldout=heldout, prefix=name + "_", suffix=suffix)

    for file, name, heldout in (("stage1.json", "s1", False), ("stage2.json", "s2", False), ("val.json", "val", True)):
        make = composer(name, heldout=heldout)
        if name == "s1":
            plan.files[file] = _stage1(make, size)
        elif name == "s2":
            plan.files[file] = stage2(make, size, world)
        else:
            plan.files[file] = heldout_questions(make, size, world)
        plan.pictures += make.pictures
        plan.scenes |= {} if heldout else make.scenes
    make = composer("photo", heldout=True)
    chosen = [i for i, s in enumerate(sources) if s.key in photos]
    if size.shapes_only:
        chosen = make.rng.sample(make.shapes, min(size.photos, len(make.shapes)))
    records: list[Record] = []
    for index in chosen:
        scene = make.single(index)
        white = scenes.Ground("plain", (255, 255, 255), (255, 255, 255), "white")
        grey = scenes.Ground("plain", (205, 225, 245), (205, 225, 245), None)
        source = sources[index]
        scene.picture.ground = grey if source.luminance > 205 or source.colour == "white" else white
        scene.picture.items = [scenes.Item(index, 0.5, 0.5, 0.88)]
        answers = questions.name_answers(source)
        short = words.sentence(words.proper(source.noun or "")).rstrip(".")
        prompt = "What is this?"
        more = {"kind": "name", "prompt": prompt, "answers": answers, "caption": source.caption}
        records.append(record_of(f"photo-{len(records):02d}", [scene], [(prompt, short)], ["name"], **more))
    plan.files["heldout_photos.json"] = records
    plan.pictures += make.pictures
    plan.notes["heldout_photos_rule"] = "drawn shapes, no photographs, in this size" if size.shapes_only else PHOTO_RULE
    plan.notes["heldout_sources"] = sorted(s.key for s in sources if s.heldout)
    plan.notes["training_sources"] = sum(not s.heldout for s in sources)
    return plan
