"""The sources that join later: named right, held out with what they show again, the first ones as they were."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from polymodal.errors import DataError
from recipes.default.dataset import build_more, clipart, icons, judges, more, photos, words
from recipes.default.dataset.sources import Source, measure

SHAPE = '<rect x="4" y="4" width="24" height="24" fill="red"/>'


def drawing(colour: str = "red", size: tuple[int, int] = (80, 60), ground: str | None = None) -> Image.Image:
    image = Image.new("RGBA", size, ground or (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((8, 8, size[0] - 8, size[1] - 8), fill=colour)
    return image


def webp(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "WEBP", lossless=True)
    return stream.getvalue()


@pytest.fixture
def npm(tmp_path: Path) -> Path:
    root = tmp_path / "npm"

    def write(path: str, content: object) -> None:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")

    chars = {"1f431": "cat-face", "1f595": "middle-finger", "1f469-200d-1f373": "woman-cook", "1f9e9": "puzzle-piece"}
    for style in icons.STYLES:
        write(
            f"{style}/icons.json",
            {"icons": {slug: {"body": SHAPE} for slug in chars.values()}, "width": 32, "height": 32},
        )
        write(f"{style}/chars.json", {} if style == "fluent-emoji" else chars)
    write(
        "flag/icons.json", {"icons": {"it-4x3": {"body": SHAPE}, "it-1x1": {"body": SHAPE}}, "width": 32, "height": 32}
    )
    for language, names in {
        "en": {"🐱": "cat face", "🖕": "middle finger", "🧩": "puzzle piece"},
        "zh": {"🐱": "猫脸", "🧩": "拼图"},
    }.items():
        annotations = {char: {"tts": [name]} for char, name in names.items()}
        write(
            f"cldr-annotations-full/annotations/{language}/annotations.json",
            {"annotations": {"annotations": annotations}},
        )
        territories = {"IT": {"en": "Italy", "zh": "意大利"}[language]}
        write(
            f"cldr-localenames-full/main/{language}/territories.json",
            {"main": {language: {"localeDisplayNames": {"territories": territories}}}},
        )
    return root


def test_icons_are_named_by_cldr_in_every_style(npm: Path) -> None:
    found = icons.read_icons(npm)
    assert {s.key for s in found} == {f"icons:{style}/{code}" for style in icons.STYLES for code in ("1f431", "1f9e9")}
    assert {s.noun for s in found} == {"cat", "puzzle piece"}  # no finger, no joined sequence
    assert {s.group for s in found} == {"emoji:1f431", "emoji:1f9e9"}
    assert {s.zh_noun for s in found} == {"猫", "拼图"}


def test_flags_have_their_country_in_both_languages(npm: Path) -> None:
    (flag,) = icons.read_flags(npm)
    assert (flag.caption, flag.zh, flag.noun, flag.group) == (
        "The flag of Italy.",
        "意大利的国旗。",
        "flag",
        "flags:italy",
    )


def test_icons_are_drawn(npm: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="resvg-py draws the icons and is not installed")
    source = measure(icons.read_icons(npm)[0], tmp_path / "0.png", None)
    assert source is not None and source.colour == "red" and not source.rectangular
    with Image.open(tmp_path / "0.png") as image:
        assert max(image.size) >= 140


def test_a_missing_package_is_told_with_what_gets_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotations.json not found: .*get_packages.sh data/packages more"):
        icons.read_icons(tmp_path)


def test_the_first_readers_know_none_of_the_later_nouns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert words.find_noun(["jaguar"]) is None
    assert words.find_noun(["jaguar"], more=True) == ("jaguar", 0, 1)
    first = words.first_lexicon()
    assert list(words.lexicon())[: len(first)] == list(first)
    # As the validation questions have it since the first version.
    assert words.accepted("fireman") == ["fireman", "firemen", "firefighter", "firefighters", "person", "persons"]
    with_more = {n: (words.accepted(n), words.names_of(n), words.phrase(n), words.plural(n)) for n in first}
    monkeypatch.setattr(words, "lexicon", words.first_lexicon)
    assert with_more == {n: (words.accepted(n), words.names_of(n), words.phrase(n), words.plural(n)) for n in first}


def test_every_table_names_nouns_of_the_lexicon() -> None:
    known = {*words.lexicon(), "-"}
    tables = words.fixes("names_more.txt")
    assert {said.partition(" | ")[0] for table in tables.values() for said in table.values()} <= known
    assert set(words.zh_nouns()) <= {*words.lexicon(), *words.SHAPES}
    assert all("\u4e00" <= name[-1] <= "\u9fff" or name == "DNA" for name in words.zh_nouns().values())


@pytest.fixture
def gcompris(monkeypatch: pytest.MonkeyPatch) -> Path:
    entries = {
        "lang": {
            "lang/resource/words_sample/cow.webp": webp(drawing("brown")),
            "lang/resource/words_sample/knee.webp": b"",
        },
        "categorization": {
            "categorization/resource/images/tools/hammer7.webp": webp(drawing("gray", ground="white")),
            "categorization/resource/images/monuments/tajMahal.webp": webp(drawing("white", ground="blue")),
        },
        "details": {
            "details/resource/image/TajMahal_background.webp": webp(drawing("white", ground="black")),
            "details/resource/image/TajMahal_0.webp": b"",
        },
        "erase": {"erase/resource/gorilla.webp": webp(drawing("black", ground="green"))},
    }
    for language, name in {"en": "cow", "zh_CN": "牛"}.items():
        entries["lang"][f"lang/resource/content-{language}.json"] = json.dumps({"cow.ogg": name}).encode()
    monkeypatch.setattr(photos, "_entries", lambda file: entries.get(file.stem, {}))
    return Path("rcc")


def test_photographs_fill_their_frame_and_one_subject_is_one_group(gcompris: Path, tmp_path: Path) -> None:
    found = {s.key: s for s in photos.read_photos(gcompris)}
    assert set(found) == {"photos:categorization/hammer7", "photos:categorization/tajMahal", "photos:details/TajMahal"}
    assert found["photos:categorization/hammer7"].noun == "hammer"
    assert found["photos:categorization/tajMahal"].group == found["photos:details/TajMahal"].group
    kept = measure(found["photos:categorization/hammer7"], tmp_path / "0.png", None)
    assert kept is not None and kept.photo and kept.rectangular and kept.colour is None


def test_cards_are_cut_out_and_what_is_hard_to_name_is_left(gcompris: Path) -> None:
    (cow,) = photos.read_cards(gcompris)
    assert (cow.key, cow.caption, cow.zh_noun, cow.rectangular) == ("cards:lang/cow", "A cow.", "牛", False)


def test_the_photographs_for_judging_are_no_source(gcompris: Path) -> None:
    assert set(photos.erase_photos(gcompris)) == {"gorilla"}
    assert not any("erase" in s.path for s in [*photos.read_photos(gcompris), *photos.read_cards(gcompris)])


def source(key: str, noun: str, group: str, **more_of_it: object) -> Source:
    return Source(key, key.split(":")[0], "", words.sentence(words.phrase(noun)), noun, "tool", group, **more_of_it)  # type: ignore[arg-type]


def test_what_shows_something_held_out_again_is_held_out(tmp_path: Path) -> None:
    first = [source("emoji:1f431", "cat", "emoji:1f431", heldout=True), source("emoji:1f436", "dog", "emoji:1f436")]
    new = [
        source("icons:noto/1f431", "cat", "emoji:1f431"),
        source("icons:noto/1f436", "dog", "emoji:1f436"),
        source("openclipart2:a", "cat", "openclipart:a"),  # the same drawing as the emoji of the cat
        source("cards:x", "cow", "cards:x"),  # for judging
    ]
    images = ["red", "blue", "green", "yellow", "red", "black"]
    thumbs = [tmp_path / f"{i}.png" for i in range(len(images))]
    for thumb, colour in zip(thumbs, images, strict=True):
        drawing(colour, ground="white").save(thumb)
    split = more.split(first, new, thumbs, [False, False, False, True], seed=0)
    assert [s.heldout for s in split] == [True, False, True, True]
    assert [replace(s, heldout=False) for s in split] == new
    assert more.split(first, new, thumbs, [False] * 4, seed=0)[3].heldout is False


@pytest.mark.parametrize("size", [(160, 120), (40, 30)])
def test_a_copy_of_what_is_judged_is_left_out(tmp_path: Path, size: tuple[int, int]) -> None:
    shown = drawing("black", ground="white").convert("RGB")
    left_out = [judges.LeftOut("photos:cow", judges.hash_of(shown))]
    shown.resize(size).convert("RGBA").save(tmp_path / "0.png")
    assert build_more.is_judged(("cards:x", tmp_path / "0.png"), left_out)
    drawing("white", ground="black").save(tmp_path / "1.png")
    assert not build_more.is_judged(("cards:x", tmp_path / "1.png"), left_out)


def test_drawings_that_the_first_reader_leaves(tmp_path: Path) -> None:
    files = {
        "animals/cat_author_01": "red",
        "animals/dolphin_author_01": "blue",
        "animals/contour_fox": "black",
        "tools/weapons/ak47_01": "gray",
        "recreation/games/cards/simple/simple_h_5": "pink",
        "signs_and_symbols/flags/europe/france/france_alsace": "orange",
        "transportation/roadsigns/bus_lane": "green",
        "computer/icons/flat-theme/action/pen_width3": "brown",
    }
    for name, colour in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        drawing(colour).save(tmp_path / f"{name}.png")
    found = {s.key: (s.noun, s.caption, s.group) for s in clipart.read_more_openclipart(tmp_path)}
    assert found == {
        "openclipart2:animals/contour_fox": ("fox", "A fox.", "openclipart:contour_fox"),
        "symbols:recreation/games/cards/simple/simple_h_5": (
            "playing card",
            "The five of hearts.",
            "openclipart:recreation/games/cards/simple/simple_h_5",
        ),
        "symbols:signs_and_symbols/flags/europe/france/france_alsace": ("flag", "The flag of Alsace.", "flags:alsace"),
        "symbols:transportation/roadsigns/bus_lane": (
            "road sign",
            "A road sign.",
            "openclipart:transportation/roadsigns/bus_lane",
        ),
    }


def test_backgrounds_are_one_file_each_without_letters(tmp_path: Path) -> None:
    for name in ("wallpapers/Path/contents/images/a.jpg", "wallpapers/Path/contents/images/b.jpg",
                 "wallpapers/Path/contents/screenshot.jpg", "wallpapers/FlyingKonqui/contents/images/a.jpg",
                 "backgrounds/mate/nature/Dune.jpg", "backgrounds/mate/desktop/Stripes.png"):  # fmt: skip
        file = tmp_path / "usr/share" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"0" * (20 if file.name == "b.jpg" else 10))
    found = [file.relative_to(tmp_path / "usr/share").as_posix() for file in photos.backgrounds(tmp_path)]
    assert found == ["backgrounds/mate/nature/Dune.jpg", "wallpapers/Path/contents/images/b.jpg"]


def test_a_piece_of_a_background_follows_from_its_seed(tmp_path: Path) -> None:
    image = Image.linear_gradient("L").resize((400, 300)).convert("RGB")
    image.save(tmp_path / "sky.jpg")
    pieces = [photos.background_crop(tmp_path / "sky.jpg", seed, 64) for seed in (1, 1, 2)]
    assert pieces[0].size == (64, 64) and pieces[0].mode == "RGB"
    assert pieces[0].tobytes() == pieces[1].tobytes() != pieces[2].tobytes()
