"""The generated pairs: the same bytes every time, true captions, held out as the default dataset does it."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from polymodal.data.load import load_records
from polymodal.errors import DataError, PolymodalError
from recipes.default.dataset import build_default, scenes, sources, words
from recipes.default.dataset.__main__ import main
from recipes.default.dataset.generate import Gathered, Packages
from recipes.default.dataset.pairs import build_pairs
from recipes.default.dataset.pairs import plan as planning
from recipes.default.dataset.pairs.captions import captions_of, confusable, full_caption, translations
from recipes.default.dataset.plan import Composer
from recipes.default.dataset.questions import Scene
from recipes.default.dataset.sources import Source, drawn_shapes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "tiny"
    build_pairs(folder, size="tiny", workers=1, progress=False)
    return folder


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def digests(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_same_bytes_whatever_the_number_of_workers(tiny: Path, tmp_path: Path) -> None:
    build_pairs(tmp_path / "again", size="tiny", workers=2, progress=False)
    assert digests(tmp_path / "again") == digests(tiny)
    build_pairs(tmp_path / "other", size="tiny", seed=1, workers=1, progress=False)
    assert digests(tmp_path / "other")["train.json"] != digests(tiny)["train.json"]


def test_records_are_pairs(tiny: Path) -> None:
    named: set[str] = set()
    for name in ("train.json", "train_words.json", "val.json", "val_known.json", "val_words.json"):
        records = load_records(tiny / name)
        assert len({r.id for r in records}) == len(records) > 3 and not named & {r.id for r in records}
        named |= {r.id for r in records}
        for record in records:
            (image,) = record.messages[0].media
            assert Path(image.source).is_file() and record.kind == "caption"  # type: ignore[arg-type]
            captions = record.extra["captions"]
            assert record.messages[1].text in captions
            assert len(set(captions)) == len(captions)
            for caption in captions:
                assert caption[0].isupper() and caption.endswith(".") and "  " not in caption and "_" not in caption


def test_held_out_as_the_default_data_set_holds_out(tiny: Path, tmp_path: Path) -> None:
    build_default(tmp_path / "default", size="tiny", workers=1, progress=False)
    assert load(tiny, "build.json")["heldout_sources"] == load(tmp_path / "default", "build.json")["heldout_sources"]
    trained = {key for r in load(tiny, "train.json") for key in r["sources"]}
    judged = {key for r in load(tiny, "val.json") for key in r["sources"]}
    known = {key for r in load(tiny, "val_known.json") for key in r["sources"]}
    assert known and known <= trained
    judged |= {key for task in load(tiny, "classes.json")["tasks"] for p in task["pictures"] for key in p["sources"]}
    for name in ("val.json", "heldout_photos.json"):
        judged |= {key for r in load(tmp_path / "default", name) for key in r["sources"]}
    assert judged and trained and not trained & judged


def test_the_same_photographs_are_held_out(tmp_path: Path) -> None:
    """With photographs there is more to hold out than the drawn share: their whole groups."""
    from recipes.default.dataset import plan as default_plan

    def stamp(noun: str, number: int) -> Source:
        return Source(
            f"stamps:{noun}-{number}", "stamps", f"/x/{noun}-{number}.png", words.sentence(words.phrase(noun)), noun,
            words.lexicon()[noun].category, f"stamps:{noun}{number // 2}", photo=True, pixels=200,
        )  # fmt: skip

    nouns = ["dog", "cat", "owl", "apple", "car", "rose", "hammer", "guitar", "house", "cup"]
    found = [stamp(noun, number) for noun in nouns for number in range(4)] + drawn_shapes()
    split = sources.hold_out(found, 0.12, random.Random("5/heldout"))
    small = default_plan.compose(split, [""], [""], 5, default_plan.SIZES["small"])
    made = planning.compose(Gathered(split, [""], [""], []), 5, "small")
    assert made.notes["heldout_sources"] == small.notes["heldout_sources"]
    photos = {key for r in small.files["heldout_photos.json"] for key in r["sources"]}
    task = next(t for t in made.files["classes.json"]["tasks"] if t["name"] == "photos")
    assert photos and {key for p in task["pictures"] for key in p["sources"]} == photos
    trained = {key for r in made.files["train.json"] for key in r["sources"]}
    assert not trained & {key for r in small.files["val.json"] for key in r["sources"]} and not trained & photos


def test_each_held_out_caption_fits_one_image(tiny: Path) -> None:
    for name in ("val.json", "val_known.json", "val_words.json"):
        captions = [r["captions"] for r in load(tiny, name)]
        assert all(len(own) == 1 for own in captions)
        assert len({own[0] for own in captions}) == len(captions)


def test_known_drawings_are_shown_as_training_never_shows_them(tiny: Path) -> None:
    told = {caption for r in load(tiny, "train.json") for caption in r["captions"]}
    known = load(tiny, "val_known.json")
    # Their grounds have names in this size, or the things stand together as they never do in training.
    named = [r for r in known if "background" in r["captions"][0]]
    assert named and not told & {r["captions"][0] for r in named}
    assert {r["layout"] for r in known} == {"single", "beside", "counted"}
    assert {r["layout"] for r in load(tiny, "train_words.json")} == {"text"}


def one(noun: str, ground: str | None, *, layout: str = "single", count: int = 1, side: str | None = None) -> Scene:
    entry = words.lexicon()[noun]
    thing = Source(f"emoji:{noun}", "emoji", noun, words.sentence(words.phrase(noun)), noun, entry.category, noun)
    white = scenes.Ground("plain", (255, 255, 255), (255, 255, 255), ground)
    return Scene(scenes.Picture("x.jpg", 0, white, [scenes.Item(0, 0.5, 0.5, 0.8)]), (thing,), layout, count, side)


def test_what_can_be_confused() -> None:
    assert confusable(one("beagle", None), one("dog", "red"))  # a beagle is a dog, and the first ground has no name
    assert not confusable(one("beagle", "blue"), one("dog", "red"))
    assert confusable(one("beagle", "red"), one("dog", "red"))
    assert not confusable(one("apple", None), one("dog", None))
    assert not confusable(one("dog", None, layout="counted", count=2), one("dog", None))
    left, right = one("dog", None, layout="side", side="left"), one("dog", None, layout="side", side="right")
    assert not confusable(left, right) and confusable(left, one("dog", None))


def test_captions_say_what_is_there() -> None:
    assert captions_of(one("beagle", "orange")) == [
        "A beagle.",
        "A beagle on an orange background.",
        "A beagle on orange.",
        "A drawing of a beagle.",
        "A beagle, a dog.",
        "A beagle, an animal.",
    ]
    assert full_caption(one("owl", "red", layout="side", side="top")) == "An owl at the top on a red background."
    assert full_caption(one("owl", None, layout="counted", count=3)) == "Three owls."
    assert "A pair of scissors." in captions_of(one("scissors", None))


def test_places_are_right() -> None:
    """The first name of "to the left of" lies left, of "above" above, and sides are where they are said to be."""
    make = Composer(random.Random(0), drawn_shapes(), [""], heldout=False, prefix="t", suffix="jpg")
    for layout, axis in (("beside", "x"), ("above", "y")):
        for _ in range(40):
            scene = make.make(layout)
            caption = full_caption(scene)
            places = [getattr(item, axis) for item in scene.picture.items]
            assert places == sorted(places)
            spots = [caption.lower().index(f"{s.colour} {s.noun}") for s in scene.objects]
            assert spots == sorted(spots) and len(set(spots)) == len(spots)
            assert any(said in caption for said in (" to the left of ", " above ", " from left ", " from top "))
    for _ in range(40):
        scene = make.make("side")
        item = scene.picture.items[0]
        where = {"left": item.x < 0.4, "right": item.x > 0.6, "top": item.y < 0.4, "bottom": item.y > 0.6}
        assert scene.side and where[scene.side] and f" the {scene.side}" in full_caption(scene)


def test_no_two_held_out_scenes_can_be_confused() -> None:
    split = [replace(s, heldout=i % 4 == 0) for i, s in enumerate(drawn_shapes())]
    make = Composer(random.Random(2), split, [""], heldout=True, prefix="v", suffix="jpg")
    kept: list[Scene] = []
    original = planning.full_caption
    try:
        planning.full_caption = lambda scene: kept.append(scene) or original(scene)  # type: ignore[func-returns-value]
        records = planning._held_out(make, "val", planning.SIZES["small"].held_out)
    finally:
        planning.full_caption = original
    assert len(records) == len(kept) == len(make.pictures) > 60
    assert not any(confusable(a, b) for a, b in combinations(kept, 2))
    assert [r["image"] for r in records] == [p.file for p in make.pictures]


def test_zero_shot_tasks(tiny: Path) -> None:
    from polymodal.evaluation.tasks.zero_shot import load_tasks

    tasks = {task.name: task for task in load_tasks(tiny / "classes.json")}
    assert set(tasks) == {"names", "categories", "photos"}
    trained = {r["noun"] for r in load(tiny, "train.json") if "noun" in r}
    names = tasks["names"]
    assert {words.phrase(noun) for noun in trained} >= set(names.classes)
    raw = load(tiny, "classes.json")["tasks"][0]["pictures"]
    for entry, labels, file in zip(raw, names.labels, names.images, strict=True):
        assert words.phrase(entry["noun"]) in {names.classes[i] for i in labels}
        assert Path(file).is_file()  # type: ignore[arg-type]


def test_other_languages_come_from_the_stamps_own_files(tmp_path: Path) -> None:
    (tmp_path / "owl.txt").write_text(
        "An owl.\nde.utf8=Eine Eule (ein Vogel).\nfr.utf8=Un hibou.\nzh_CN.utf8=猫头鹰。\n"
    )
    owl = Source("stamps:owl", "stamps", str(tmp_path / "owl.png"), "An owl.", "owl", "animal", "owl")
    assert translations(owl, ["fr", "de", "nl", "zh_CN"]) == ["Un hibou.", "Eine Eule.", "猫头鹰。"]
    assert translations(owl, []) == []
    assert translations(drawn_shapes()[0], ["de"]) == []
    with pytest.raises(DataError, match="'German'"):
        translations(owl, ["German"])


def test_a_share_of_the_stamps_pairs_is_translated(tmp_path: Path) -> None:
    (tmp_path / "owl.txt").write_text("An owl.\nde.utf8=Eine Eule.\n")
    owl = Source("stamps:owl", "stamps", str(tmp_path / "owl.png"), "An owl.", "owl", "animal", "owl")
    make = Composer(random.Random(0), [owl, *drawn_shapes()], [""], heldout=False, prefix="t", suffix="jpg")
    size = planning.PairSize({"stamps": 300}, {}, (0, 0), {})
    german = [r for r in planning._train(make, size, ("de",))[0] if r["captions"] == ["Eine Eule."]]
    assert 60 < len(german) < 120
    make = Composer(random.Random(0), [owl, *drawn_shapes()], [""], heldout=False, prefix="t", suffix="jpg")
    assert not any("Eule" in caption for r in planning._train(make, size, ())[0] for caption in r["captions"])


def test_failures_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PolymodalError, match="tiny"):
        build_pairs(tmp_path / "x", size="tin")
    with pytest.raises(DataError, match="not found: install it with"):
        build_pairs(tmp_path / "x", size="small", packages=Packages.under(tmp_path / "root"), progress=False)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("disk gone")

    monkeypatch.setattr(scenes, "draw", fail)
    with pytest.raises(RuntimeError, match="disk gone"):
        build_pairs(tmp_path / "out", size="tiny", workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pairs", "--output", str(tmp_path / "made"), "--size", "tiny", "--workers", "1"]
    assert main(command) == 0
    assert "held out for retrieval" in capsys.readouterr().out
    assert digests(tmp_path / "made") == digests(tiny)
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err
    default = ["default", "--output", str(tmp_path / "d"), "--size", "tiny", "--languages", "de"]
    assert main(default) == 2
    assert "--languages belongs to `pairs`" in capsys.readouterr().err
