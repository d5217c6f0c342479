"""The dataset of drawings: the same bytes every time, prompts that say the plan, held out whole combinations."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polymodal.data.load import load_records
from polymodal.errors import DataError
from recipes.default.dataset import sources, words
from recipes.default.dataset.sources import Source
from recipes.draw import names, wording
from recipes.draw.dataset import SIZES, Size, build_draw, compose, main
from recipes.draw.scenes import ATTRIBUTES, GROUNDS, LAYOUTS, Scene, Thing, clear, draw, held_out, random_scene
from recipes.draw.scenes import SIZES as OBJECT_SIZES

FILES = ("train.json", "train_text.json", "val_shapes.json", "val_tell.json")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draw") / "tiny"
    build_draw(folder, size="tiny", text=6, workers=1, progress=False)
    return folder


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def scenes(seed: int, count: int) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, 1 + i % 3, heldout=i % 2 == 0) for i in range(count)]


def test_same_bytes_whatever_the_number_of_workers(tiny: Path, tmp_path: Path) -> None:
    build_draw(tmp_path / "again", size="tiny", text=6, workers=2, progress=False)
    assert digests(tmp_path / "again") == digests(tiny)
    build_draw(tmp_path / "other", size="tiny", seed=1, workers=1, progress=False)
    assert digests(tmp_path / "other")["val_shapes.json"] != digests(tiny)["val_shapes.json"]
    written = load(tiny, "build.json")["sha256"]
    assert {name: written[name] for name in FILES} == {name: digests(tiny)[name] for name in FILES}


def test_rows(tiny: Path) -> None:
    wanted = SIZES["tiny"]
    kinds = Counter(row["kind"] for row in load(tiny, "train.json"))
    assert kinds == {"draw_shapes": wanted.draw, "tell_shapes": wanted.tell, "draw_ask": wanted.ask}
    assert [row["kind"] for row in load(tiny, "train_text.json")] == ["text"] * 6
    assert len(load(tiny, "val_shapes.json")) == sum(wanted.val)
    rows = [row for name in FILES for row in load(tiny, name)]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        said = [turn["value"] for turn in row["conversations"]]
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(said) // 2)
        assert sum(text.count("<image>") for text in said) == ("image" in row)
        if row["kind"].startswith("draw"):
            assert said[1] == "<image>" and len(said) == (4 if row["kind"] == "draw_ask" else 2)
        elif row["kind"] == "tell_shapes":
            assert said[0].startswith("<image>\n") and said[1][0].isupper() and said[1].endswith(".")
        if "image" in row:
            with Image.open(tiny / row["image"]) as image:
                assert (np.asarray(image) == draw(Scene.from_row(row, "row"))).all()
    assert len(load_records(tiny / "val_tell.json")) == sum(wanted.val)
    assert len(load_records(tiny / "train_text.json")) == 6


def test_held_out_combinations_are_never_drawn_in_training(tiny: Path) -> None:
    def combinations(scene: Scene) -> set[Any]:
        if len(scene.things) == 1:
            return set(scene.things)
        looks = [(thing.shape, thing.color) for thing in scene.things]
        return {frozenset(two) for two in itertools.combinations(looks, 2)}

    train = [Scene.from_row(row, "row") for row in load(tiny, "train.json") if "plan" in row]
    val = [Scene.from_row(row, "row") for row in load(tiny, "val_shapes.json")]
    trained = {one for scene in train for one in combinations(scene)}
    assert all(combinations(scene) - trained for scene in val) and len(set(val)) == len(val)
    assert all(map(held_out, val)) and not any(map(held_out, train))


def test_a_tenth_is_held_out_and_training_shows_every_value() -> None:
    rng = random.Random(3)
    free = [random_scene(rng, 1, heldout=False).things[0] for _ in range(2500)]
    values = {name: {getattr(thing, name) for thing in free} for name in ATTRIBUTES}
    assert {len(values[n]) for n in ("shape", "color", "size", "cell")} == {8, 11, 3, 9}
    every = [
        Scene((Thing(shape, color, size, cell),))
        for shape in words.SHAPES
        for color in words.COLOURS
        for size in OBJECT_SIZES
        for cell in values["cell"]
    ]
    assert 0.08 < sum(map(held_out, every)) / len(every) < 0.12
    # Whatever the order, the sizes and the places.
    one, two = Thing("circle", "red", "small", "left"), Thing("square", "blue", "large", "right")
    other = Scene((Thing("square", "blue", "medium", "top"), Thing("circle", "red", "large", "bottom")), "black")
    assert held_out(Scene((one, two))) == held_out(other)


def test_objects_stay_apart_and_can_be_seen() -> None:
    for scene in scenes(1, 300):
        assert tuple(thing.cell for thing in scene.things) in LAYOUTS
        assert all(clear(thing.color, scene.background) for thing in scene.things)
        ground = GROUNDS[scene.background]
        alone = [np.abs(draw(Scene((thing,), scene.background)).astype(int) - ground) for thing in scene.things]
        together = np.abs(draw(scene).astype(int) - ground)
        assert (together == sum(alone)).all() and all(one.any() for one in alone)


THING = re.compile(
    rf"(?:an?) (?:(small|little|tiny|medium-sized|large|big|huge) )?({'|'.join([*words.COLOURS, 'grey'])}) "
    rf"({'|'.join(words.SHAPES)})\b"
)
GROUND = re.compile(r",? ?\b(?:on|against|with) a (white|gr[ae]y|black|light blue) background,?")
OF_SIZE = {"little": "small", "tiny": "small", "big": "large", "huge": "large", "medium-sized": "medium", "": "medium"}
BY_RELATION = {  # what stands between the first and the second object -> whose cell is whose
    **dict.fromkeys(["left of", "to the left of"], ("left", "right")),
    **dict.fromkeys(["right of", "to the right of"], ("right", "left")),
    **dict.fromkeys(["above", "over"], ("top", "bottom")),
    **dict.fromkeys(["below", "under", "beneath"], ("bottom", "top")),
}
_BELOW_TWO, _ABOVE_TWO = ("top left", "top right", "bottom"), ("bottom left", "bottom right", "top")
THREE_BY_RELATION: dict[tuple[str, ...], tuple[str, ...]] = {
    ("and", "above"): _BELOW_TWO,
    ("left of", "both above"): _BELOW_TWO,
    ("below", "and"): ("bottom", "top left", "top right"),
    ("above", "and"): ("top", "bottom left", "bottom right"),
    ("left of", "both below"): _ABOVE_TWO,
    ("and", "below"): _ABOVE_TWO,
}


def understood(text: str) -> tuple[set[tuple[str, ...]], str]:
    """What a person takes a prompt to say: {(shape, color, size, cell)} and the background."""
    text = text[0].lower() + text[1:]
    ground = GROUND.search(text)
    text = GROUND.sub("", text).strip(" .?,")
    things = list(THING.finditer(text))
    after = [text[a.end() : b.start() if b else None] for a, b in zip(things, [*things[1:], None])]
    after = [part.strip(" ,") for part in after]
    cells: list[str] | tuple[str, ...]
    places = [re.search(r"^(?:in|at|on) the (.*?)(?: (?:corner|side|edge))?(?:,? and)?$", part) for part in after]
    if all(places):
        said = [place[1].replace("upper", "top").replace("lower", "bottom") for place in places if place]
        cells = [place.replace("middle", "center") for place in said]
    elif len(things) == 1:
        assert after == [""]
        cells = ["center"]
    elif len(things) == 2 and after[1] == "to its right":
        cells = ("left", "right")
    else:
        relations = tuple(part for part in after if part)
        cells = BY_RELATION[relations[0]] if len(things) == 2 else THREE_BY_RELATION[relations]
    looks = [(t[3], t[2].replace("grey", "gray"), OF_SIZE.get(t[1] or "", t[1])) for t in things]
    return {(*one, cell) for one, cell in zip(looks, cells, strict=True)}, ground[1] if ground else "white"


def test_every_wording_says_the_plan() -> None:
    rng = random.Random(5)
    for scene in scenes(2, 1500):
        wanted = {tuple(thing.values()) for thing in scene.plan()}
        for text in (wording.scene_phrase(scene), wording.request(wording.scene_phrase(scene, rng), rng)):
            found, ground = understood(text)
            assert found == wanted and ground.replace("grey", "gray") == scene.background, text
            assert "  " not in text and text == text.strip()


def test_every_template_is_used() -> None:
    rng = random.Random(6)
    said = {wording.request(wording.scene_phrase(scene, rng), rng) for scene in scenes(7, 3000)}
    for part in (" with ", "beneath", "to its right", "both above", "both below", "medium-sized", "grey", "upper left"):
        assert any(part in text for text in said), part
    for template in wording.REQUESTS:
        assert any(text.startswith(template.split("{")[0].strip()) for text in said)


def test_questions_about_a_drawing_are_answered_from_its_plan() -> None:
    rng = random.Random(8)
    scene = Scene((Thing("ring", "gray", "small", "center"),), "black")
    answers = dict(wording.follow_up(scene, rng) for _ in range(60))
    assert answers == {
        "What color is the background?": "Black.",
        "What color is the ring?": "Gray.",
        "Where is the ring?": "In the center.",
        "Which shape is gray?": "The ring.",
    }
    alike = Scene((Thing("star", "red", "small", "left"), Thing("star", "blue", "small", "right")))
    assert not any("the star?" in wording.follow_up(alike, rng)[0] for _ in range(60))


def named(noun: str, origin: str, number: int = 0, *, heldout: bool = False, colour: str | None = None) -> Source:
    caption = words.sentence(words.phrase(noun))
    key = f"{origin}:{noun}{number}"
    return Source(key, origin, "x", caption, noun, words.lexicon()[noun].category, key, colour=colour, heldout=heldout)


def test_what_is_held_out_of_named_things() -> None:
    nouns = list(words.lexicon())[:120]
    found = [named(noun, origin) for noun in nouns for origin in ("emoji", "openclipart")]
    found += [named(nouns[0], "emoji", 1, heldout=True), named("unicorn", "emoji", 2, heldout=True)]
    found += [
        Source(f"emoji:{i}", "emoji", "x", f"{who} {job}", None, None, f"named:{job}")
        for i, (who, job) in enumerate((w, f"job {n}") for n in range(60) for w in ("man", "woman"))
    ]
    found.append(Source("emoji:flag", "emoji", "x", "flag of Chad", None, None, "named:flags"))
    drawn = names.split(list(enumerate(found)))
    trained = {(d.name, d.source.origin) for d in drawn if not d.heldout}
    shown = {name for name, _ in trained}
    style = {(d.name, d.source.origin) for d in drawn if d.heldout == "style"}
    new = {d.name for d in drawn if d.heldout == "name"}
    assert 10 < len(style) < 45 and {origin for _, origin in style} == {"emoji", "openclipart"}
    assert not style & trained and {name for name, _ in style} <= shown
    assert 4 < len(new) < 30 and not new & shown and "unicorn" in new
    jobs = Counter(name.split(" ", 1)[1] for name in new if " job " in name)
    assert jobs and set(jobs.values()) == {2}  # the man and the woman
    first = next(d for d in drawn if d.source.key.endswith(f"{nouns[0]}1"))
    assert first.heldout == ("drawing" if (nouns[0], "emoji") in trained else "style")
    again = names.split(list(enumerate(found)))
    assert [d.heldout for d in again] == [d.heldout for d in drawn]


def test_rows_of_named_things() -> None:
    things = [
        names.Drawn(0, named("apple", "openclipart", colour="red")),
        names.Drawn(1, named("apple", "emoji", heldout=True), "style"),
        names.Drawn(2, named("heart", "emoji")),
        names.Drawn(3, Source("emoji:x", "emoji", "x", "grinning face", None, None, "named:grinning"), "name"),
        names.Drawn(4, named("apple", "emoji", 2, heldout=True), "style"),
    ]
    size = Size(4, 4, 4, (1, 1, 1), views=40)
    files, images = compose(things, size, 0, 0)
    assert len(images.views) == 2 * 40 + 3
    asked = {
        file: [row["conversations"][0]["value"] for row in rows if row["kind"] == "draw_name"]
        for file, rows in files.items()
    }
    apples = [text for text in asked["train.json"] if "apple" in text]
    assert any("red apple" in text for text in apples) and any("clip art" in text for text in apples)
    assert any("clip art" not in text for text in apples) and not any("emoji" in text for text in apples)
    # A drawn shape has this name too.
    assert all("emoji" in text for text in asked["train.json"] if "heart" in text) and len(asked["train.json"]) == 80
    (style,), (new,) = asked["val_names.json"], asked["val_names_new.json"]
    assert "emoji" in style and "grinning face" in new
    told = [row for row in files["val_tell.json"] if row["kind"] == "tell_name"]
    assert [(row["heldout"], row["conversations"][1]["value"]) for row in told] == [
        ("style", "An apple."),
        ("name", "Grinning face."),
        ("style", "An apple."),
    ]


def test_views_keep_to_a_white_ground(tmp_path: Path) -> None:
    sources.draw_shape("circle", "red").save(tmp_path / "0.png")
    drawn = names.Drawn(0, named("ball", "openclipart"))
    made = [names.draw_view(v, tmp_path, 64) for v in names.views(drawn, 6, random.Random(0))]
    assert len({image.tobytes() for image in made}) == 6
    for image in made:
        assert image.shape == (64, 64, 3) and (image[0, 0] == 255).all()
        coloured = image[(image < 200).any(-1)]
        assert len(coloured) > 64 * 64 * 0.15 and coloured[:, 0].mean() > 2 * coloured[:, 1:].mean()


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(DataError, match="pip install emoji"):
        names.named_emoji()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--size", "tinny"], "'tinny'"),
        (["--side", "30"], "30"),
        (["--workers", "0"], "workers"),
        (["--text", "-1"], "rows"),
    ],
)
def test_mistakes(flags: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "data"), "--size", "tiny", *flags]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and not (tmp_path / "data").exists()


def test_other_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--size", "tiny", "--side", "32", "--workers", "1"]
    assert main(["--output", str(tmp_path / "data"), *flags]) == 0
    assert "30 val_shapes" in capsys.readouterr().out
    with Image.open(tmp_path / "data" / load(tmp_path / "data", "val_shapes.json")[0]["image"]) as image:
        assert image.size == (32, 32)
    assert main(["--output", str(tmp_path / "data"), *flags]) == 2
