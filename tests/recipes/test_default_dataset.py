"""The generated dataset: the same bytes every time, honest held-out pictures, fair questions, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polymodal.errors import PolymodalError
from recipes.default.dataset import build_default, questions, scenes, words
from recipes.default.dataset.plan import KINDS
from recipes.default.dataset.questions import Scene, World
from recipes.default.dataset.sources import Source, caption_noun, drawn_shapes, read_openclipart

FILES = ["stage1.json", "stage2.json", "val.json", "heldout_photos.json"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default") / "tiny"
    build_default(folder, size="tiny", workers=1, progress=False)
    return folder


def load(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def pictures_of(record: dict[str, Any]) -> list[str]:
    image = record.get("image", [])
    return [image] if isinstance(image, str) else image


def digests(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_same_bytes_whatever_the_number_of_workers(tiny: Path, tmp_path: Path) -> None:
    build_default(tmp_path / "again", size="tiny", workers=2, progress=False)
    assert digests(tmp_path / "again") == digests(tiny)


def test_another_seed_gives_other_pictures(tiny: Path, tmp_path: Path) -> None:
    build_default(tmp_path / "other", size="tiny", seed=1, workers=1, progress=False)
    assert digests(tmp_path / "other")["stage2.json"] != digests(tiny)["stage2.json"]


@pytest.mark.parametrize("name", FILES)
def test_records_are_well_formed(tiny: Path, name: str) -> None:
    from PIL import Image

    records = load(tiny, name)
    assert len({r["id"] for r in records}) == len(records) > 0
    for record in records:
        turns = record["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert len(record["kinds"]) == len(turns) // 2
        files = pictures_of(record)
        assert turns[0]["value"].count("<image>") == len(files)
        assert not any("<image>" in t["value"] for t in turns[1:])
        assert all(t["value"].strip() for t in turns)
        for file in files:
            with Image.open(tiny / file) as image:
                assert image.size == (224, 224)


def test_captions_are_sentences(tiny: Path) -> None:
    for record in load(tiny, "stage1.json"):
        caption = record["conversations"][1]["value"]
        assert record["conversations"][0]["value"] == "<image>"
        assert caption[0].isupper() and caption.endswith(".") and "_" not in caption


def test_held_out_sources_are_never_trained_on(tiny: Path) -> None:
    trained = {key for name in FILES[:2] for r in load(tiny, name) for key in r["sources"]}
    judged = {key for name in FILES[2:] for r in load(tiny, name) for key in r["sources"]}
    assert judged
    assert not trained & judged
    trained_files = {f for name in FILES[:2] for r in load(tiny, name) for f in pictures_of(r)}
    judged_files = {f for name in FILES[2:] for r in load(tiny, name) for f in pictures_of(r)}
    assert not trained_files & judged_files


def test_every_kind_is_trained_and_judged(tiny: Path) -> None:
    trained = {kind for r in load(tiny, "stage2.json") for kind in r["kinds"]}
    assert trained >= {*KINDS, "dialogue"}
    assert {r["kind"] for r in load(tiny, "val.json")} == set(KINDS)


def test_val_answers_are_right_and_the_short_form_is_asked(tiny: Path) -> None:
    for record in load(tiny, "val.json"):
        asked, reply = (t["value"] for t in record["conversations"])
        accepted = [a.lower().rstrip(".") for a in record["answers"]]
        assert reply.lower().rstrip(".") in accepted
        assert asked.endswith(record["prompt"])
        assert (words.SHORT in asked) == (record["kind"] not in ("caption", "zh"))


def test_yes_and_no_are_balanced(tmp_path: Path) -> None:
    from recipes.default.dataset import plan, sources

    size = plan.Size({"shapes": 1}, 0, 0, 600, 20, 4, shapes_only=True)
    import random

    split = sources.hold_out(sources.drawn_shapes(), 0.12, random.Random(1))
    made = plan.compose(split, [""], [""], 3, size)
    answers: Counter[str] = Counter()
    for record in made.files["stage2.json"]:
        for kind, reply in zip(record["kinds"], record["conversations"][1::2], strict=True):
            if kind == "exists":
                answers[reply["value"].split(",")[0].rstrip(".")] += 1
    share = answers["Yes"] / answers.total()
    assert answers.total() > 300 and 0.42 < share < 0.58
    judged = Counter(r["conversations"][1]["value"] for r in made.files["val.json"] if r["kind"] == "exists")
    assert judged == {"Yes": 10, "No": 10}


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("disk gone")

    monkeypatch.setattr(scenes, "draw", fail)
    with pytest.raises(RuntimeError, match="disk gone"):
        build_default(tmp_path / "out", size="tiny", workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(PolymodalError, match="not empty"):
        build_default(tmp_path, size="tiny", workers=1, progress=False)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_force_replaces_a_data_set_and_leaves_no_trace_of_it(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    build_default(folder, size="tiny", seed=1, workers=1, progress=False)
    (folder / "mine.txt").write_text("goes")
    build_default(folder, size="tiny", workers=1, progress=False, force=True)
    assert digests(folder) == digests(tiny) and [p.name for p in tmp_path.iterdir()] == ["set"]


def test_missing_package_names_both_ways_to_install(tmp_path: Path) -> None:
    with pytest.raises(PolymodalError, match=r"apt-get install openclipart-png.*dpkg-deb -x"):
        build_default(tmp_path / "out", size="small", openclipart=tmp_path / "none", progress=False)


def test_unknown_size_names_the_sizes(tmp_path: Path) -> None:
    with pytest.raises(PolymodalError, match="tiny"):
        build_default(tmp_path / "out", size="tin", progress=False)


@pytest.mark.parametrize(
    ("caption", "noun"),
    [
        ("A red kangaroo.", "kangaroo"),
        ("A pair of closed scissors.", "scissors"),
        ("A peacock (a male peafowl).", "peacock"),
        ("A round tower with a pink flag.", "round tower"),
        ("Excited!", None),
    ],
)
def test_noun_of_a_caption(caption: str, noun: str | None) -> None:
    assert caption_noun(caption) == noun


def test_drawing_names_are_read_with_precision(tmp_path: Path) -> None:
    from PIL import Image

    names = [
        "tennis_racket_01",
        "cavallo_architetto_franc_05",
        "red_fedora",
        "dog_house_02",
        "apple_juice_box",
        "xk_01",
        "zinf",
    ]
    for number, name in enumerate(names):
        Image.new("RGBA", (30, 30), (number, 0, 0, 200)).save(tmp_path / f"{name}.png")
    captions = {s.key.split(":")[1]: s.caption for s in read_openclipart(tmp_path)}
    assert captions == {
        "tennis_racket_01": "A tennis racket.",
        "cavallo_architetto_franc_05": "A horse.",
        "red_fedora": "A red fedora.",
    }


@pytest.mark.parametrize(
    ("first", "second", "fair"),
    [
        ("owl", "bird", False),
        ("lion", "cat", False),
        ("dog", "cat", True),
        ("beagle", "dog", False),
        ("truck", "apple", True),
    ],
)
def test_no_is_only_asked_of_unrelated_things(first: str, second: str, fair: bool) -> None:
    assert words.related(first, second) is not fair
    assert words.related(second, first) is not fair


def test_accepted_answers_hold_synonyms_and_parents_but_not_near_names() -> None:
    assert {"ram", "sheep", "rams"} <= set(words.accepted("ram"))
    assert {"peacock", "peafowl"} <= set(words.names_of("peacock")) and "birds" not in words.names_of("peacock")
    assert "bird" in words.accepted("peacock") and "bird" in words.names_of("bird")
    assert {"locomotive", "train", "engine"} <= set(words.accepted("locomotive"))
    assert "cat" not in words.accepted("lion")


def test_every_parent_in_the_lexicon_ends_somewhere() -> None:
    for name in words.lexicon():
        assert name not in words.ancestors(name)


def source_of(noun: str, category: str, **more: Any) -> Source:
    made = {"zh": None, "colour": None, "photo": True, **more}
    return replace(drawn_shapes()[0], noun=noun, caption=f"A {noun}.", category=category, origin="stamps", **made)


def scene_of(source: Source, count: int = 1) -> Scene:
    picture = scenes.single("images/x.jpg", random.Random(0), 0, source)
    return Scene(picture, (source,), "counted" if count > 1 else "single", count)


def test_close_photographs_cover_the_frame_and_drawings_never_do() -> None:
    rng = random.Random(0)
    photo = source_of("cat", "animal")
    sizes = [scenes.single("x", rng, 0, photo, close=0.5).items[0].size for _ in range(200)]
    assert 60 < sum(size > 1 for size in sizes) < 140
    drawing = replace(photo, photo=False)
    assert all(scenes.single("x", rng, 0, drawing, close=1.0).items[0].size < 1 for _ in range(50))
    assert all(scenes.single("x", rng, 0, photo, close=1.0, side="left").items[0].size < 1 for _ in range(50))


@pytest.mark.parametrize("x", [0.3, 0.5, 0.7])
def test_what_is_larger_than_the_frame_covers_it(tmp_path: Path, x: float) -> None:
    from PIL import Image

    Image.new("RGBA", (50, 50), (200, 10, 10, 255)).save(tmp_path / "0.png")
    ground = scenes.Ground("plain", (255, 255, 255), (255, 255, 255), "white")
    drawn = scenes.draw(scenes.Picture("x.jpg", 0, ground, [scenes.Item(0, x, 1 - x, 1.3)]), tmp_path)
    assert drawn.size == (scenes.SIDE, scenes.SIDE) and drawn.getcolors() == [(scenes.SIDE**2, (200, 10, 10))]


def test_blurred_grounds_vary_around_their_colour(tmp_path: Path) -> None:
    import numpy as np

    ground = scenes.Ground("blurred", (120, 130, 140), (0, 0, 0), None)
    drawn = np.asarray(scenes.draw(scenes.Picture("x.jpg", 3, ground), tmp_path), dtype=float)
    assert abs(drawn.mean(axis=(0, 1)) - (120, 130, 140)).max() < 45 and drawn.std(axis=(0, 1)).min() > 10
    assert abs(np.diff(drawn, axis=0)).max() < 20


def test_chinese_questions_have_the_answer_that_the_plan_says() -> None:
    world = World((), {})
    cat = scene_of(source_of("cat", "animal", zh="一只猫。"))
    asked = {qa.question: qa for seed in range(300) if (qa := questions.ask_zh(random.Random(seed), cat, world))}
    assert asked["这是什么？"].accepted == ("猫", "一只猫") and asked["图中有猫吗？"].short == "有"
    assert asked["这是动物吗？"].short == "是" and asked["这是食物吗？"].short == "不是"
    choices = [qa for question, qa in asked.items() if "还是" in question]
    assert choices and all(qa.short == "动物" and "动物" in qa.question for qa in choices)
    assert all(qa.short == "没有" for question, qa in asked.items() if question.startswith("图中有狗"))
    three = questions.ask_zh(random.Random(0), scene_of(source_of("cat", "animal"), 3), world)
    assert three is not None and three.short == "三个" and "3" in three.accepted
    assert questions.ask_zh(random.Random(0), scene_of(source_of("wrench", "odds")), world) is None


def test_conversations_about_two_pictures_ask_what_each_shows() -> None:
    first, second = scene_of(source_of("cat", "animal")), scene_of(source_of("pizza", "food"))
    seen = set()
    for seed in range(60):
        rng = random.Random(seed)
        qa = questions.ask_compare(rng, first, second)
        assert qa is not None
        more = questions.ask_more_of_two(rng, first, second, qa)
        kinds = sorted(one.kind for one in more)
        # "Which picture shows" is asked once: as the first question or as one of the others.
        assert kinds == (["compare", "name"] if qa.short == "No" else ["name"])
        for one in [qa, *more]:
            if one.kind == "name":
                assert one.long == ("A cat." if "first" in one.question else "A pizza.")
            elif "shows a cat" in one.question or "shows a pizza" in one.question:
                assert one.short == ("First" if "cat" in one.question else "Second")
            seen.add(one.short)
    assert seen == {"No", "First", "Second", "Cat", "Pizza"}
    twice = questions.ask_compare(random.Random(0), first, first)
    assert twice is not None and twice.short == "Yes"
    assert [one.kind for one in questions.ask_more_of_two(random.Random(0), first, first, twice)] == ["name"]
