"""The judge of drawn shapes: right about true drawings, about wrong ones, and about spoilt ones."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from polymodal.errors import ConfigError, DataError
from recipes.default.dataset.words import COLOURS, SHAPES
from recipes.draw.judge import MARKS, chance, judge, look, main, table, through_tokenizer, verdict
from recipes.draw.scenes import CELLS, GROUNDS, SIZES, Scene, Thing, clear, draw, random_scene

PAIR = Scene((Thing("circle", "red", "medium", "left"), Thing("square", "blue", "large", "right")), "gray")


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, 1 + i % 3, heldout=i % 2 == 0) for i in range(count)]


def wrong(scene: Scene, shown: Scene) -> set[str]:
    return {mark for mark, right in verdict(scene, look(draw(shown))).items() if not right}


@pytest.mark.parametrize("side", [64, 32, 128])
def test_true_drawings_are_all_right(side: int) -> None:
    for scene in scenes(150):
        seen = look(draw(scene, side))
        assert seen.nearest == scene and seen.mse < 0.5
        assert verdict(scene, seen) == dict.fromkeys(MARKS, True)


def test_the_search_finds_the_nearest_of_all() -> None:
    noise = np.random.default_rng(0)
    every = [
        Scene((Thing(shape, color, size, cell),), ground)
        for ground in GROUNDS
        for color in COLOURS
        if clear(color, ground)
        for shape in SHAPES
        for size in SIZES
        for cell in ("center", "top left")
    ]
    drawn = np.stack([draw(scene, 32) for scene in every]).astype(np.float32)
    for spoilt in (60, 250):
        image = draw(every[7 * spoilt], 32) + noise.normal(0, spoilt, (32, 32, 3))
        image = image.clip(0, 255).astype(np.uint8)
        errors = ((drawn - image) ** 2).mean((1, 2, 3))
        found = look(image).by_count[1]
        assert ((draw(found, 32).astype(np.float32) - image) ** 2).mean() <= errors.min() + 0.2
        if found.things[0].cell in ("center", "top left"):
            assert found == every[int(errors.argmin())]


@pytest.mark.parametrize(
    ("change", "mark"),
    [
        ({"shape": "star"}, "shape"),
        ({"color": "green"}, "color"),
        ({"size": "small"}, "size"),
        ({"cell": "right"}, "position"),
    ],
)
def test_the_wrong_attribute_is_found(change: dict[str, str], mark: str) -> None:
    scene = Scene((Thing("circle", "red", "medium", "left"),))
    shown = Scene((replace(scene.things[0], **change),))
    assert wrong(scene, shown) == {mark, "all"} and wrong(shown, scene) == {mark, "all"}


def test_pairs() -> None:
    a, b = PAIR.things
    assert wrong(PAIR, Scene(PAIR.things, "white")) == {"background", "all"}
    swapped = Scene((replace(b, cell="left"), replace(a, cell="right")), "gray")
    assert wrong(PAIR, swapped) == {"position", "all"}
    assert wrong(PAIR, Scene((replace(a, color="blue"), replace(b, color="red")), "gray")) >= {"all"}
    assert wrong(PAIR, Scene((a, replace(b, color="green")), "gray")) == {"color", "all"}
    # One too many, one too few, none.
    third = Scene((Thing("star", "black", "small", "top left"), Thing("ring", "red", "small", "right"),
                   Thing("cross", "pink", "small", "bottom left")), "gray")  # fmt: skip
    assert wrong(PAIR, third) >= {"count", "all"} and wrong(PAIR, Scene((a,), "gray")) >= {"count", "all"}
    assert wrong(PAIR, Scene((), "gray")) >= {"count", "all"}


def test_mild_noise_and_blur_change_nothing() -> None:
    noise = np.random.default_rng(0)
    made = scenes(200, seed=1)
    for scene in made:
        image = draw(scene)
        assert look((image + noise.normal(0, 25, image.shape)).clip(0, 255).astype(np.uint8)).nearest == scene
    blurred = [Image.fromarray(draw(scene)).filter(ImageFilter.GaussianBlur(0.8)) for scene in made]
    right = [look(np.asarray(image)).nearest == scene for scene, image in zip(made, blurred)]
    assert sum(right) >= 0.98 * len(made)


def test_chance_is_low() -> None:
    made = sorted(scenes(90, seed=2), key=lambda scene: len(scene.things))
    drawn = chance(made, [look(draw(scene)) for scene in made])
    assert len(drawn) == 20 * 90
    share = {mark: np.mean([one[mark] for one in drawn]) for mark in MARKS}
    assert share["all"] < 0.01 and 0 < share["shape"] < 0.15 and share["background"] < 0.6 and share["count"] < 0.4


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({}, "plan"),
        ({"plan": [{"shape": "circle"}]}, "color"),
        ({"plan": [{**PAIR.plan()[0], "cell": "middle"}]}, "'middle'"),
        ({"plan": PAIR.plan(), "background": ["gray"]}, "background"),
        ({"plan": [PAIR.plan()[0]] * 2}, "layout"),
    ],
)
def test_plans_that_cannot_be_drawn(row: dict[str, object], word: str) -> None:
    with pytest.raises(DataError, match=word):
        Scene.from_row(row, "drawn.json: row 0")


def test_plans_come_back_whatever_their_order() -> None:
    row = {"plan": PAIR.plan()[::-1], "background": "gray"}
    assert Scene.from_row(row, "row") == PAIR
    assert set(CELLS) >= {thing.cell for thing in PAIR.things}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six drawings; the last shows another's scene."""
    made = scenes(6, seed=3)
    rows = []
    for number, scene in enumerate(made):
        shown = made[0] if number == 5 else scene
        Image.fromarray(draw(shown)).save(tmp_path / f"{number}.png")
        prompt = f"Prompt {number}"
        rows.append({"file": f"{number}.png", "prompt": prompt, "plan": scene.plan(), "background": scene.background})
    (tmp_path / "drawn.json").write_text(json.dumps(rows))
    return tmp_path


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--grid", str(folder / "grid.png"), "--cells", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines}
    assert cells["drawn"][0] == "6" and cells["drawn"][-1].startswith("83.3% (")
    assert cells["drawn, 3 objects"][-1].startswith("50.0% (") and cells["true drawings"][-1].startswith("100.0% (")
    assert cells["chance"][0] == "30" and "tokenizer's ceiling" not in cells
    judged = json.loads((folder / "judged.json").read_text())
    assert [row["right"]["all"] for row in judged] == [True] * 5 + [False] and judged[2]["prompt"] == "Prompt 2"
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > 4 * 128


@pytest.mark.parametrize("spoil", ["missing", "no image", "oblong", "odd", "empty", "no json"])
def test_command_mistakes(spoil: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if spoil == "missing":
        (folder / "3.png").unlink()
    elif spoil == "no image":
        (folder / "3.png").write_bytes(b"nothing")
    elif spoil in ("oblong", "odd"):
        Image.new("RGB", (64, 32) if spoil == "oblong" else (33, 33)).save(folder / "3.png")
    else:
        (folder / "drawn.json").write_text("[]" if spoil == "empty" else "{")
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("3.png" in error or "drawn.json" in error)


class Blocks:
    """A tokenizer that keeps one code a block of pixels: its mean colour."""

    image_size = 64

    def __init__(self, block: int) -> None:
        self.block = block

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.avg_pool2d(pixels, self.block) * 255).round().long().flatten(1)

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        side = self.image_size // self.block
        small = ids.view(len(ids), 3, side, side).float() / 255
        return torch.nn.functional.interpolate(small, scale_factor=float(self.block))


def test_the_tokenizers_ceiling(folder: Path) -> None:
    kept, lost = judge(folder, Blocks(1)), judge(folder, Blocks(16))
    ceilings = [next(line for line in text.splitlines() if "ceiling |" in line) for text in (kept, lost)]
    assert "100.0%" in ceilings[0].split("|")[-2] and "100.0%" not in ceilings[1].split("|")[-2]
    made = [draw(scene) for scene in scenes(5)]
    assert all((a == b).all() for a, b in zip(made, through_tokenizer(Blocks(1), made, batch=2), strict=True))
    with pytest.raises(ConfigError, match="64"):
        list(through_tokenizer(Blocks(1), [draw(PAIR, 32)]))


def test_rows_of_the_dataset_give_chance_and_ceiling(folder: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "Draw."}], "plan": s.plan(), "background": s.background}
        for s in scenes(6)
    ]
    file = folder / "val.json"
    file.write_text(json.dumps(rows))
    names = [line.split("|")[1].strip() for line in judge(file, Blocks(2), save_grid=folder / "g.png").splitlines()]
    assert "chance" in names and "tokenizer's ceiling" in names and "drawn" not in names
    assert not (folder / "judged.json").exists() and (folder / "g.png").is_file()


def test_chance_bears_no_interval() -> None:
    text = table({"chance": [dict.fromkeys(MARKS, True)], "drawn": [dict.fromkeys(MARKS, False)] * 3, "none": []})
    assert "(" not in text.splitlines()[2] and "(0.0 to" in text.splitlines()[3] and len(text.splitlines()) == 4
