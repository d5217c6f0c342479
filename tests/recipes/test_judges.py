"""What the default model is judged by: names by eye, the same images every time, copies told from other images."""

from __future__ import annotations

import functools
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from polymodal.errors import DataError
from polymodal.evaluation.tasks.questions import KIND_METRICS
from polymodal.metrics.text import mentions
from recipes.default import grid
from recipes.default.dataset import judges, sees, sources, unsure
from recipes.default.dataset.__main__ import main


def photograph(name: str) -> Image.Image:
    """Soft blots and a few edges, another image for every name."""
    rng = random.Random(name)
    cells = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (7, 9, 3), dtype="uint8")
    image = Image.fromarray(cells).resize((320, 240), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).rectangle((40, 60, rng.randint(80, 280), 150), fill=(rng.randint(0, 255), 90, 40))
    return image


@functools.cache
def webp(name: str) -> bytes:
    photograph(name).save(file := io.BytesIO(), "WEBP", quality=90)
    return file.getvalue()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages with drawn images in them, and a default dataset that holds one stamp out."""
    (tmp_path / "rcc").mkdir()
    (tmp_path / "rcc" / "erase.rcc").touch()
    listed = [one for section in ("animals", "photos") for images, _ in judges.listed(section) for one in images]

    def read_rcc(path: Path) -> dict[str, bytes]:
        found = {}
        for image in listed:
            activity, _, name = image.partition("/")
            if activity == path.stem:
                found[f"gcompris/{activity}/resource/{name}.webp"] = webp(image)
        return found

    monkeypatch.setattr(judges, "read_rcc", read_rcc)
    monkeypatch.setattr(sources, "read_openclipart", lambda folder: [])
    lists = {
        "right": {"photos:erase/camels": "camel", "stamps:held": "beagle", "stamps:taught": "tiger"},
        "wrong": {"openclipart:saw": "can opener"},
        "dim": {"openclipart:ornament": "-"},
        "also": {"can opener": "tin opener"},
    }
    monkeypatch.setattr(sees, "listed", lists.__getitem__)
    for name in (
        "usr/share/tuxpaint/stamps/held",
        "usr/share/openclipart/png/saw",
        "usr/share/openclipart/png/ornament",
    ):
        file = tmp_path / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        photograph(name).convert("RGBA").save(file)
    monkeypatch.setattr(judges, "EXAMPLES", tmp_path / "none")
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "build.json").write_text(json.dumps({"heldout_sources": ["stamps:held"]}))
    return tmp_path


def build(folder: Path, output: str = "judges") -> Path:
    places = judges.Packages.under(folder)
    judges.build_judges(folder / output, default=folder / "default", packages=places, gcompris=folder / "rcc")
    return folder / output


def rows(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_names_are_written_for_every_image_and_no_two_photographs_are_of_one_noun() -> None:
    assert len(judges.listed("animals")) == 33
    for section in ("animals", "photos"):
        images = [image for one, _ in judges.listed(section) for image in one]
        assert len(images) == len(set(images))
        assert all(answers and all(a == a.strip() and a for a in answers) for _, answers in judges.listed(section))
    assert all(not image.startswith("erase/") for images, _ in judges.listed("photos") for image in images)


def test_the_files_hold_what_they_say(packages: Path) -> None:
    made = build(packages)
    animals, photos, seen, doubts = (rows(made, name) for name in ("animals", "photos", "sees", "unsure"))
    assert len(animals) == 33 and len(photos) == judges.PHOTOS
    best = [row["answers"][0] for row in photos]
    assert not any(b in row["answers"] for row in photos for b in best if b != row["answers"][0])
    # A stamp that training shows is not asked about; a beagle is a dog.
    assert {row["sources"][0]: row["kind"] for row in seen} == {
        "photos:erase/camels": "sees",
        "stamps:held": "sees",
        "openclipart:saw": "mistaken",
    }
    assert all(mentions("A dog.", row["answers"]) for row in seen if row["sources"] == ["stamps:held"])
    assert all(mentions("A tin opener.", row["answers"]) for row in seen if row["sources"] == ["openclipart:saw"])
    kinds = [row["kind"] for row in doubts]
    assert kinds.count("unsure") == judges.NOTHING + judges.BLURRED + 1 and kinds.count("clear") == 2
    for row in (*animals, *photos, *seen, *doubts):
        with Image.open(made / row["image"]) as image:
            assert max(image.size) <= judges.SIDE
        assert KIND_METRICS[row["kind"]] == "contains"
        assert mentions(row["conversations"][1]["value"], row["answers"])


def test_the_same_bytes_every_time(packages: Path) -> None:
    one, two = build(packages), build(packages, "again")
    files = sorted(path.relative_to(one) for path in one.rglob("*.*"))
    assert files == sorted(path.relative_to(two) for path in two.rglob("*.*"))
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_copies_of_what_is_judged_are_left_out_and_other_images_are_not(packages: Path) -> None:
    left_out = judges.judged(packages / "rcc", packages / "usr/share/openclipart/png")
    keys = {one.key for one in left_out}
    assert {"photos:erase/camels", "openclipart:saw", "openclipart:ornament"} <= keys and "stamps:held" not in keys
    original = photograph("erase/camels")
    original.resize((150, 110)).save(small := io.BytesIO(), "JPEG", quality=60)
    for copy in (Image.open(small), ImageOps.mirror(original), original.crop((2, 2, 318, 238))):
        assert judges.is_judged("icons:another", copy, left_out)
    assert judges.is_judged("photos:erase/camels", photograph("cropped beyond recognition"), left_out)
    others = [photograph(f"other {number}") for number in range(40)]
    assert not any(judges.is_judged("icons:another", image, left_out) for image in others)


def test_half_of_the_unlabelled_drawings_is_for_judging_and_variants_stay_together() -> None:
    groups = [sees.group_of(f"openclipart:tools/thing_{'abcdefghij'[n % 10]}{'klmnop'[n // 10]}") for n in range(60)]
    assert 15 < sum(map(sees.judge_half, groups)) < 45
    assert sees.group_of("openclipart:a/glue_bw_02") == sees.group_of("openclipart:b/glue_01")


def test_without_a_default_dataset_or_the_package_it_says_so(
    packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="no default dataset"):
        judges.build_judges(packages / "out", default=packages / "none", gcompris=packages / "rcc")
    with pytest.raises(DataError, match="gcompris-qt-data"):
        judges.animals(packages / "none")
    assert main(["judges", "--output", str(packages / "out"), "--default", str(packages / "none")]) == 2
    assert "no default dataset" in capsys.readouterr().err


def test_how_often_not_sure_was_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [
        {"kind": "unsure", "answer": "I am not sure.", "references": ["not sure"]},
        {"kind": "unsure", "answer": "A dog.", "references": ["not sure"]},
        {"kind": "clear", "answer": "A beagle.", "references": ["dog", "beagle"]},
        {"kind": "clear", "answer": "I can't tell what it is.", "references": ["cat"]},
        {"kind": "clear", "answer": "A cat.", "references": ["owl"]},
        {"kind": "clear", "answer": None, "references": ["owl"]},
    ]
    file = tmp_path / "samples.jsonl"
    file.write_text("\n".join(map(json.dumps, samples)))
    assert unsure.main([str(file)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2].startswith("| nothing to name | 2 | 50.0%") and "| 0.0% (" in table[2]
    assert table[3].startswith("| clear | 4 | 25.0%") and "| 33.3% (" in table[3]
    file.write_text('{"kind": "name"}')
    assert unsure.main([str(file)]) == 2 and "no answer to unsure.json" in capsys.readouterr().err


def test_nothing_to_name_is_another_image_every_time() -> None:
    rng = random.Random(0)
    made = [unsure.nothing(rng) for _ in range(12)]
    assert all(image.mode == "RGB" and image.size == (unsure.SIDE, unsure.SIDE) for image in made)
    assert len({image.tobytes() for image in made}) == 12
    assert unsure.nothing(random.Random(1)).tobytes() == unsure.nothing(random.Random(1)).tobytes()


def test_the_grid_shows_only_what_may_be_given_away(tmp_path: Path) -> None:
    photograph("one").save(tmp_path / "one.png")
    asked = [{"from": "human", "value": "<image>\nWhat is it?\nAnswer the question using a single word or phrase."}]
    base = {"image": "one.png", "conversations": [*asked, {"from": "gpt", "value": "Owl"}], "answers": ["owl"]}
    records = [
        {**base, "kind": "name", "sources": ["emoji:1f989"], "source": "emoji"},
        {**base, "kind": "name", "sources": ["stamps:owl"], "source": "stamps"},
        {**base, "kind": "compare", "sources": ["emoji:1f989", "stamps:owl"], "source": "mixed"},
        {**base, "kind": "ocr", "sources": [], "source": "text"},
        {**base, "kind": "caption", "sources": ["emoji:1f989"], "source": "emoji"},
    ]
    (tmp_path / "val.json").write_text(json.dumps(records))
    rows = grid.choose([tmp_path / "val.json"], 40)
    shown = [row for row in rows if row["image"] == [str(tmp_path / "one.png")]]
    assert [row["kind"] for row in shown] == ["name", "ocr"]
    assert all(Path(row["image"][0]).parent.name == "pictures" for row in rows if row not in shown)


def test_the_grid_is_green_where_right_and_red_where_wrong(tmp_path: Path) -> None:
    Image.new("RGB", (64, 32), "white").save(tmp_path / "white.png")
    asked = "What is the longest question that anybody ever asked about a plain white image of no size at all, and why?"
    for right, colour, other in ((True, grid.GREEN, grid.RED), (False, grid.RED, grid.GREEN)):
        files = (tmp_path / "white.png", tmp_path / "white.png")
        sheet = grid.draw([grid.Cell(files, asked, "An owl.", right, "owl")] * 9)
        assert sheet.width == grid.WIDTH and sheet.height > 2 * grid.SIDE
        found = {colour for _, colour in sheet.getcolors(1 << 20)}
        assert colour in found and other not in found


@pytest.mark.skipif(not (judges.GCOMPRIS / "erase.rcc").is_file(), reason="needs Debian's gcompris-qt-data")
def test_every_judged_photograph_is_in_the_package() -> None:
    photographs = [*judges.animals(), *judges.photos()]
    assert len({one.key for one in photographs}) == 33 + judges.PHOTOS
    assert min(min(one.open().size) for one in photographs) >= 120
