"""Natural scenes for training: planned from the seed alone, drawn alike everywhere, answered as they are planned."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from recipes.default.dataset import (
    asking,
    chinese,
    differences,
    grounds,
    lettering,
    natural,
    plan,
    rich,
    sources,
    studio,
    words,
)
from recipes.default.dataset.studio import Look, Studio


@pytest.fixture(scope="module")
def shown() -> list[sources.Source]:
    return sources.hold_out(sources.drawn_shapes(), 0.12, random.Random(0))


@pytest.fixture(scope="module")
def thumbs(tmp_path_factory: pytest.TempPathFactory, shown: list[sources.Source]) -> Path:
    folder = tmp_path_factory.mktemp("thumbs")
    for index, source in enumerate(shown):
        sources.draw_shape(*source.path.split("/")).resize((64, 64)).save(folder / f"{index}.png")
    noise = Image.effect_noise((300, 260), 60).convert("RGB")
    (folder / "photos").mkdir()
    noise.save(folder / "photos" / "a.jpg")
    (folder / "photos" / "b.jpg").write_bytes(b"no image")
    return folder


def make(shown: list[sources.Source], thumbs: Path, seed: str = "0") -> Studio:
    photos = grounds.shrink((thumbs / "photos").iterdir(), thumbs)
    return Studio(random.Random(seed), shown, [""], photos, studio.looks(thumbs, shown), "rich_")


def test_the_seed_alone_decides(shown: list[sources.Source], thumbs: Path) -> None:
    world = plan.world_of(shown)
    one, two = make(shown, thumbs), make(shown, thumbs)
    first, second = (rich.conversations(m, 60, world) for m in (one, two))
    assert first == second
    assert one.pictures == two.pictures
    assert first != rich.conversations(make(shown, thumbs, "1"), 60, world)
    for picture in one.pictures[:12]:
        assert pickle.loads(pickle.dumps(picture)).draw(thumbs).tobytes() == picture.draw(thumbs).tobytes()


def test_every_sort_gives_sound_records(shown: list[sources.Source], thumbs: Path) -> None:
    studio_ = make(shown, thumbs)
    shares = dict.fromkeys(rich.SHARES, 1.0)
    records, known = rich.conversations(studio_, 100, plan.world_of(shown), shares=shares)
    kinds = {kind for r in records for kind in r["kinds"]}
    assert kinds >= {
        "name",
        "caption",
        "exists",
        "count",
        "color",
        "position",
        "compare",
        "differ",
        "ocr",
        "unsure",
        "zh",
    }
    assert len({r["id"] for r in records}) == len(records) == 100
    held = {s.key for s in shown if s.heldout}
    for record in records:
        turns = record["conversations"]
        files = [record["image"]] if isinstance(record["image"], str) else record["image"]
        assert len(turns) == 2 * len(record["kinds"]) and all(t["value"].strip() for t in turns)
        assert turns[0]["value"].count("<image>") == len(files)
        assert not held & set(record["sources"])
        for file in files:
            for phrase, x0, y0, x1, y1 in known[file]:
                assert phrase and 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
    assert {v.picture.file for v in studio_.views} == set(known)
    for picture in studio_.pictures[::6]:
        assert (drawn := picture.draw(thumbs)).size == (224, 224) and drawn.mode == "RGB"


def test_a_thing_is_where_its_box_says(shown: list[sources.Source], thumbs: Path) -> None:
    make_ = make(shown, thumbs)
    red = next(i for i in make_.shapes if shown[i].colour == "red" and shown[i].noun == "square")
    thing, spot = make_.put(red, 0.3, 0.7, 0.3)
    image = natural.NaturalImage("a.jpg", 0, grounds.Back("plain", (255, 255, 255)), [thing]).draw(thumbs)
    x, y = (round(c * 224) for c in spot.centre)
    assert image.getpixel((x, y))[0] > 180 and image.getpixel((x, y))[1] < 90
    assert image.getpixel((200, 20)) == (255, 255, 255)
    plain = plan.Composer(random.Random(0), shown, [""], heldout=False, prefix="a", suffix="jpg")
    for layout, least in (("side", 1), ("beside", 2), ("counted", 1), ("text", 1)):
        scene = plain.make(layout)
        found = rich.places(scene, make_.looks)
        assert len(found) >= least and all(x0 < x1 and y0 < y1 for _, x0, y0, x1, y1 in found)


@pytest.mark.parametrize("colour", ["red", "blue", "white", "black"])
def test_painting_gives_the_named_colour(tmp_path: Path, colour: str) -> None:
    grey = Image.linear_gradient("L").resize((64, 64))
    Image.merge("RGBA", (grey, grey, grey, Image.new("L", (64, 64), 255))).save(tmp_path / "0.png")
    frame = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
    image = natural.NaturalImage("a.jpg", 0, grounds.Back("plain"), [natural.Thing(0, frame, tint=colour)]).draw(
        tmp_path
    )
    middle = image.getpixel((112, 112))
    nearest = min(words.COLOURS, key=lambda c: sum((a - b) ** 2 for a, b in zip(words.COLOURS[c], middle, strict=True)))
    assert nearest == colour


def test_counts_and_yes_and_no_are_balanced(shown: list[sources.Source], thumbs: Path) -> None:
    make_, world = make(shown, thumbs), plan.world_of(shown)
    counts = [sum(s.noun == v.kind for s in v.spots) for v in (make_.counted() for _ in range(300))]
    assert all(30 <= counts.count(n) <= 75 for n in range(1, 7))
    asked = [asking.ask_exists(make_.rng, make_.several(2), world) for _ in range(200)]
    yes = [qa.short for qa in asked if qa].count("Yes")
    assert 0.4 < yes / len(asked) < 0.6


def test_chinese_counts_with_the_right_measure_word() -> None:
    cat, horse, tulip = (
        studio.Spot(sources.Source(n, "stamps", "", "", n, c, n), (0, 0, 1, 1))
        for n, c in (("cat", "animal"), ("horse", "animal"), ("chick", "animal"))
    )
    names = {"cat": "猫", "horse": "马"}
    assert chinese.phrase(cat, names, 2) == "两只猫"
    assert chinese.phrase(horse, names) == "一匹马"
    assert chinese.phrase(tulip, names) is None


def test_many_words_are_written(shown: list[sources.Source], thumbs: Path) -> None:
    singles, signs = lettering.vocabulary()
    assert len(singles) >= 1500 and len(signs) >= 60
    assert all(word.isascii() and 1 <= len(word) <= 8 for word in singles)
    fewer, other = lettering.vocabulary(frozenset({"stop", "mango"}))
    assert {*singles} - {*fewer} == {"stop", "mango"} and "BUS STOP" not in other
    make_ = make(shown, thumbs)
    for _ in range(8):
        view = lettering.written(make_)
        qa = asking.ask_ocr(make_.rng, view, plan.world_of(shown))
        assert qa is not None and qa.short in " ".join(view.sheet.lines)
        assert view.picture.draw(thumbs).size == (224, 224)


def test_whole_photographs_fill_the_frame(shown: list[sources.Source], thumbs: Path) -> None:
    make_ = make([replace(s, photo=True) for s in shown], thumbs)
    make_.looks[make_.pool[0]] = Look(1.5, whole=True)
    view = make_.single(make_.pool[0])
    assert view.spots[0].box == (0, 0, 1, 1)


def test_sides_are_those_of_the_boxes(shown: list[sources.Source], thumbs: Path) -> None:
    make_, world, checked = make(shown, thumbs), plan.world_of(shown), 0
    for view in [make_.placed() for _ in range(80)]:
        qa = asking.ask_position(make_.rng, view, world)
        if qa is None or len(view.spots) != 1 or qa.short not in ("Left", "Right", "Top", "Bottom"):
            continue
        x, y = view.spots[0].centre
        assert {"Left": x < 0.4, "Right": x > 0.6, "Top": y < 0.4, "Bottom": y > 0.6}[qa.short], (qa, view.spots)
        checked += 1
    assert checked > 8


def test_what_differs_is_what_is_said(shown: list[sources.Source], thumbs: Path) -> None:
    make_, said = make(shown, thumbs), []
    for _ in range(40):
        (first, second), asked = differences.differ(make_, {})
        answer = next(qa.long for qa in asked if not qa.short)
        before, after = ({s.source.key for s in v.spots} for v in (first, second))
        assert first.picture.file != second.picture.file and first.picture.back == second.picture.back
        if "gone" in answer:
            (key,) = before - after
        elif answer.startswith("There "):
            (key,) = after - before
        else:
            assert before == after
            assert (first.picture.things == second.picture.things) == (answer == "Nothing is different.")
            continue
        assert next(s.noun for s in (*first.spots, *second.spots) if s.source.key == key) in answer
        said.append(answer)
    assert len(said) > 5
