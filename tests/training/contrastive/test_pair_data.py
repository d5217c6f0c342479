"""Pairs from records, what is drawn for them, how images are kept and cut; and what is said of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymodal.errors import PolymodalError
from polymodal.modeling.dual_encoders.registry import build_pair_model
from polymodal.training import train
from polymodal.training.contrastive import augment
from polymodal.training.contrastive.dataset import PairDataset, PairSteps
from polymodal.training.contrastive.images import ImageMetadata, Images, crops, open_images, source_name
from polymodal.training.contrastive.task import load_start, make_pair_dataset
from polymodal.training.recipes.contrastive import AugmentConfig, PairRecipe
from polymodal.training.steps import Order

Make = Callable[..., PairRecipe]


def dataset_of(recipe: PairRecipe) -> PairDataset:
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return make_pair_dataset(recipe, load_start(recipe)[0], folder, None)


def changed(drawn: Path, tmp_path: Path, edit: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """A mixture of the drawn records after an edit."""
    records = json.loads((drawn / "data.json").read_text())
    edit(records)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(records))
    return [{"path": str(path), "image_root": str(drawn)}]


def test_numbers_are_even_and_depend_on_seed_epoch_sample_and_view() -> None:
    keys = augment.sample_keys([str(i) for i in range(2000)])
    zeros = np.zeros(2000, dtype=np.int64)
    base = augment.uniforms(1, zeros, keys, zeros, range(augment.COUNT))
    assert base.shape == (2000, augment.COUNT) and base.min() >= 0 and base.max() < 1
    assert abs(base.mean() - 0.5) < 0.01 and abs(base.var() - 1 / 12) < 0.005
    assert np.abs(np.corrcoef(base[:, :6].T) - np.eye(6)).max() < 0.1
    others = (
        augment.uniforms(2, zeros, keys, zeros, [0]),
        augment.uniforms(1, zeros + 1, keys, zeros, [0]),
        augment.uniforms(1, zeros, keys, zeros + 1, [0]),
        augment.uniforms(1, zeros, augment.sample_keys([f"{i}." for i in range(2000)]), zeros, [0]),
        base[:, 1:2],
    )
    for other in others:
        assert abs(np.corrcoef(base[:, 0], other[:, 0])[0, 1]) < 0.1
    # A sample's numbers do not depend on who else is asked for, nor on which of them are.
    some = augment.uniforms(1, zeros[:3], keys[5:8], zeros[:3], [7])
    assert np.array_equal(some[:, 0], base[5:8, 7])
    # A generator must give the same on every machine and in every version.
    for epoch, view, place in ((0, 0, 0), (3, 1, 2)):
        drawn = augment.uniforms(7, zeros[:1] + epoch, keys[:1], zeros[:1] + view, [place])
        assert drawn[0, 0] == chained(int(keys[0]), [7, epoch, view, place])


def chained(state: int, counts: list[int]) -> float:
    """SplitMix64 in whole numbers of Python: each count moves the state on and is mixed in."""
    mask = (1 << 64) - 1
    for count in counts:
        state = (state + 0x9E3779B97F4A7C15 * (count + 1)) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return (state >> 11) / 2**53


def test_crops_have_the_area_and_shape_that_were_asked_for() -> None:
    cuts = AugmentConfig(type="crop_flip", scale=(0.3, 0.6), ratio=(0.5, 2.0))
    numbers = np.random.default_rng(0).random((400, 4 * augment.TRIES))
    boxes = np.array([augment.crop_box(row, 60, 90, cuts) for row in numbers])
    left, top, right, bottom = boxes.T
    assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-12
    areas, ratios = (right - left) * (bottom - top), (right - left) * 90 / ((bottom - top) * 60)
    assert 0.3 - 1e-9 <= areas.min() < 0.32 and 0.58 < areas.max() <= 0.6 + 1e-9
    assert 0.5 - 1e-9 <= ratios.min() < 0.6 and 1.7 < ratios.max() <= 2 + 1e-9
    assert left.max() > 0.4 and left.min() < 0.02
    # A strip that no such shape fits into is shown whole.
    assert augment.crop_box(numbers[0], 2, 500, cuts) == (0, 0, 1, 1)


def test_views_count_how_often_a_sample_was_seen_in_its_epoch() -> None:
    order = np.array([3, 1, 3, 3, 0, 1])
    assert augment.views_of(order).tolist() == [0, 0, 1, 2, 0, 1]
    steps = PairSteps(Order([(range(4), 2.5)], seed=3), 4)
    shown: dict[tuple[int, int], list[int]] = {}
    for step in range(5):  # two epochs of ten; the third step spans both
        for index, epoch, view in zip(steps.indices(step), *steps.places(step), strict=True):
            shown.setdefault((int(epoch), int(index)), []).append(int(view))
    assert {epoch for epoch, _ in shown} == {0, 1} and sum(map(len, shown.values())) == 20
    assert all(sorted(views) == list(range(len(views))) for views in shown.values())


def test_one_caption_is_drawn_each_epoch(
    pair_plain: dict[str, Any], pair_recipe: Make, drawn: Path, tmp_path: Path
) -> None:
    """Captions of a list, and of several records of one image, also under another name; templates around them."""
    import shutil

    def edit(records: list[dict[str, Any]]) -> None:
        shutil.copy(drawn / "0.png", tmp_path / "copy.png")
        extra = json.loads(json.dumps(records[0]))
        extra |= {"id": "again", "captions": ["red : top"], "image": str(tmp_path / "copy.png")}
        records.append(extra)

    mix = [{**changed(drawn, tmp_path, edit)[0], "image_root": "/"}]
    records = json.loads(Path(mix[0]["path"]).read_text())
    for record in records[:-1]:
        record["image"] = str(drawn / record["image"])
    Path(mix[0]["path"]).write_text(json.dumps(records))
    recipe = pair_recipe(pair_plain, data__mix=mix, text__templates=["{}", "top {}"])
    dataset = dataset_of(recipe)
    pairs = dataset.prepared
    assert len(pairs.ids) == 16 and len(pairs.captions[0]) == 6 and len(pairs.captions[1]) == 4
    assert len(np.unique(pairs.image_ids)) == 16
    zero = np.zeros(200, dtype=np.int64)
    texts = dataset.plan(zero, np.arange(200), zero).texts
    counts = np.bincount(texts, minlength=6)
    assert len(counts) == 6 and counts.min() > 15
    again = dataset.plan(zero[:5], np.arange(100, 105), zero[:5]).texts
    assert np.array_equal(again, texts[100:105])
    tokenizer = load_start(recipe)[0].tokenizer
    assert tokenizer.decode(pairs.text(3)) == "top top left : red"


def test_a_batch_is_right(pair_plain: dict[str, Any], pair_recipe: Make, drawn: Path) -> None:
    dataset = dataset_of(pair_recipe(pair_plain))
    zero = np.zeros(3, dtype=np.int64)
    batch = dataset.batch(dataset.plan(np.array([2, 5, 2]), zero, zero))
    assert batch.ids == ("r2", "r5", "r2")
    assert batch.image_ids[0] == batch.image_ids[2] != batch.image_ids[1]
    # SigLIP reads its padding: every text is as long as its text encoder.
    assert batch.input_ids.shape == (3, 8) and batch.pixel_values is not None
    assert batch.pixel_values.dtype == torch.uint8 and batch.pixel_values.shape == (3, 3, 28, 28)
    own = batch.attention_mask.sum(1).tolist()
    assert all(batch.input_ids[row, n:].eq(1).all() and n in (3, 4) for row, n in enumerate(own))
    assert torch.equal(batch.pixel_values[0], batch.pixel_values[2])
    clip = dataset_of(pair_recipe(pair_plain, objective__type="clip", init__model__family="clip"))
    plan = clip.plan(np.array([2, 5, 2]), zero, zero)
    # CLIP's text ends with its end token, and a step is padded to its own longest text.
    assert plan.length == max(len(clip.prepared.text(t)) for t in plan.texts) <= 5
    assert all(clip.prepared.text(t)[-1] == 0 for t in plan.texts)


def test_what_is_cut_is_the_image_at_that_place() -> None:
    """An image whose colours are its coordinates: the cut's corners say where it was cut."""
    from PIL import Image

    from polymodal.config import ImageConfig

    across = np.linspace(0, 255, 240)[None].repeat(120, 0)
    down = np.linspace(0, 255, 120)[:, None].repeat(240, 1)
    shown = Image.fromarray(np.stack([across, down, down * 0], axis=-1).round().astype(np.uint8))
    image = ImageConfig(
        image_aspect_ratio="squash", tile_size=(40, 40), image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)
    )
    cuts = AugmentConfig(type="crop_flip", scale=(0.3, 0.6))
    images = open_images(image, cuts, "memory")
    assert crops(cuts) and isinstance(images, Images) and images.store is not None
    images.store.add([("k", images.raster(shown, True)[None])])
    images.metadata[source_name(shown)] = ImageMetadata("k", 120, 240)
    numbers = np.random.default_rng(1).random(4 * augment.TRIES)
    left, top, right, bottom = augment.crop_box(numbers, 120, 240, cuts)
    tile = images.tile(shown, numbers).astype(float) / 255
    assert tile[0, 20, 0] == pytest.approx(left, abs=0.02) and tile[0, 20, -1] == pytest.approx(right, abs=0.02)
    assert tile[1, 0, 20] == pytest.approx(top, abs=0.02) and tile[1, -1, 20] == pytest.approx(bottom, abs=0.02)
    mirrored = images.tile(shown, numbers, mirrored=True)
    assert np.array_equal(mirrored[:, :, ::-1], images.tile(shown, numbers))


def test_a_image_that_changed_is_noticed(
    pair_plain: dict[str, Any], pair_recipe: Make, tmp_path: Path, drawn: Path
) -> None:
    from PIL import Image

    for number in range(16):
        Image.open(drawn / f"{number}.png").save(tmp_path / f"{number}.png")
    mix = [{"path": str(drawn / "data.json"), "image_root": str(tmp_path)}]
    recipe = pair_recipe(pair_plain, data__mix=mix)
    dataset = dataset_of(recipe)
    Image.new("RGB", (30, 30), (1, 2, 3)).save(tmp_path / "4.png")
    zero = np.zeros(1, dtype=np.int64)
    with pytest.raises(PolymodalError, match=r"4\.png.*changed on disk"):
        dataset.batch(dataset.plan(zero + 4, zero, zero))
    assert dataset_of(recipe).prepared.fingerprint != dataset.prepared.fingerprint


def _no_caption(records: list[dict[str, Any]]) -> None:
    records[3]["captions"] = ["fine", "  "]


def _no_list(records: list[dict[str, Any]]) -> None:
    records[3]["captions"] = "one text"


def _empty_answer(records: list[dict[str, Any]]) -> None:
    del records[3]["captions"]
    records[3]["conversations"][1]["value"] = " "


def _two_answers(records: list[dict[str, Any]]) -> None:
    del records[3]["captions"]
    records[3]["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "More."}]


def _no_image(records: list[dict[str, Any]]) -> None:
    del records[3]["image"]
    records[3]["conversations"][0]["value"] = "Hello."


def _missing_file(records: list[dict[str, Any]]) -> None:
    records[3]["image"] = "nowhere.png"


FAULTS = {
    "caption is empty": _no_caption,
    "`captions` must be a list": _no_list,
    r"record 3: turn 2 \(assistant\) says nothing": _empty_answer,
    "has 2 of them": _two_answers,
    "one image": _no_image,
    "nowhere.png": _missing_file,
}


@pytest.mark.parametrize("needle", FAULTS)
def test_records_that_are_no_pairs_stop_or_are_listed(
    pair_plain: dict[str, Any], pair_recipe: Make, drawn: Path, tmp_path: Path, needle: str
) -> None:
    mix = changed(drawn, tmp_path, FAULTS[needle])
    with pytest.raises(PolymodalError, match=needle) as error:
        dataset_of(pair_recipe(pair_plain, data__mix=mix))
    assert "\n" not in str(error.value) and ("r3" in str(error.value) or "record 3" in str(error.value))
    recipe = pair_recipe(pair_plain, data__mix=mix, data__on_error="skip")
    assert len(dataset_of(recipe).prepared.ids) == 15
    (listed,) = (Path(recipe.output_dir) / "skipped.jsonl").read_text().splitlines()
    assert json.loads(listed)["error"]


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"objective__type": "byol"}, r"objective\.type.*'byol'"),
        ({"objective__type": "blip2"}, "objective 'blip2' is none for two encoders"),
        ({"batch__global_size": 1}, r"batch\.global_size.*greater than 1"),
        ({"init__model__tokenizer": "nowhere/at/all"}, "tokenizer nowhere/at/all: cannot be opened"),
        ({"init__model__pad_token": "<no>"}, "pad_token '<no>' is no token of it"),
        ({"init__model__vision__hiden_size": 8}, "unknown key 'hiden_size'.*hidden_size"),
        ({"init__model__text__vocab_size": 4}, "has 12 tokens, the text encoder knows 4"),
        ({"init__model__image__image_aspect_ratio": "pad"}, "a stock image processor cannot do that"),
        ({"init__model__image__tile_size": [28, 42]}, "28x42: the vision encoder takes square tiles"),
        ({"init__model__family": "pair", "init__model__vision": {"hidden_size": 8}}, "name the encoder's model_type"),
        ({"run__eval_every": 2}, r"name held-out files in data\.eval"),
        ({"run__feature_cache": "memory"}, "the vision encoder is trained; set it to off"),
        ({"train": [{"match": "vision_tower.*", "train": True}]}, r"vision_tower\.\*"),
        ({"augment": {"type": "crop_flip", "scale": [0.9, 0.2]}}, "least and the largest part"),
        ({"augment": {"type": "crop_flip"}, "run__feature_cache": "memory"}, r"use data\.tile_cache"),
        ({"text__templates": ["an image"]}, "must hold {} once"),
        ({"run__compile": "on"}, r"run\.compile: not for a pair stage"),
        ({"init": {"from": "nowhere"}}, "nowhere"),
    ],
)
def test_mistakes_are_one_line(
    pair_plain: dict[str, Any], pair_recipe: Make, changes: dict[str, Any], needle: str
) -> None:
    with pytest.raises(PolymodalError, match=needle) as error:
        train(pair_recipe(pair_plain, **changes))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_padding_is_refused(
    pair_plain: dict[str, Any], pair_recipe: Make, drawn: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(drawn / "tokenizer")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "bare")
    bare = {"init__model__tokenizer": str(tmp_path / "bare")}
    with pytest.raises(PolymodalError, match=r"has no pad token; name one .* init\.model\.pad_token"):
        load_start(pair_recipe(pair_plain, **bare))
    recipe = pair_recipe(pair_plain, **bare, init__model__pad_token="<|pad|>")
    assert load_start(recipe)[0].tokenizer.pad_token_id == 1


def test_another_tile_than_the_encoders_is_refused(
    pair_plain: dict[str, Any], pair_recipe: Make, tmp_path: Path
) -> None:
    recipe = pair_recipe(pair_plain)
    assert recipe.init.model is not None
    model: Any = build_pair_model(recipe.init.model, recipe.objective)
    (tmp_path / "model").mkdir()
    model.save(tmp_path / "model")
    image = {**pair_plain["init"]["model"]["image"], "tile_size": [32, 32]}
    with pytest.raises(PolymodalError, match="32x32: the vision encoder takes 28x28"):
        load_start(pair_recipe(pair_plain, init={"from": str(tmp_path / "model"), "image": image}))
    assert load_start(pair_recipe(pair_plain, init={"from": str(tmp_path / "model")}))[0].image == model.image


def test_data_of_one_image_are_refused(
    pair_plain: dict[str, Any], pair_recipe: Make, drawn: Path, tmp_path: Path
) -> None:
    def edit(records: list[dict[str, Any]]) -> None:
        del records[1:]

    with pytest.raises(PolymodalError, match="all pairs are of one image"):
        dataset_of(pair_recipe(pair_plain, data__mix=changed(drawn, tmp_path, edit)))
