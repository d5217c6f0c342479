"""A pair stage from recipe to folder: it learns, its result is a stock model, its held-out scores are logged."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymodal.errors import ConfigError, MediaError
from polymodal.training import train
from polymodal.training.contrastive import task as task_module
from polymodal.training.contrastive.dataset import PairDataset, Plan
from polymodal.training.contrastive.step import pair_losses
from polymodal.training.contrastive.task import ContrastiveTask, load_start, make_pair_eval_dataset
from polymodal.training.process_group import World
from polymodal.training.recipes.contrastive import PairRecipe
from polymodal.training.reporting.log import read_log
from polymodal.training.run import make_trainer

Make = Callable[..., PairRecipe]
BERT = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
DINO = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 7}
FAMILIES: dict[str, dict[str, Any]] = {
    "siglip": {},
    "clip": {"objective": {"type": "clip", "label_smoothing": 0.1}, "init__model__family": "clip"},
    "pair": {
        "optim__learning_rate": 4e-3,
        "objective": {"type": "clip"},
        "init__model__family": "pair",
        "init__model__vision": DINO,
        "init__model__text": {**BERT, "num_attention_heads": 2, "max_position_embeddings": 8},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_and_transformers_scores_the_same(
    pair_plain: dict[str, Any], pair_recipe: Make, drawn: Path, family: str
) -> None:
    from PIL import Image
    from transformers import AutoModel, AutoProcessor

    recipe = pair_recipe(
        pair_plain,
        **FAMILIES[family],
        run__max_steps=80,
        run__eval_every=40,
        data__eval=pair_plain["data"]["mix"],
        batch__global_size=16,
    )
    final = train(recipe)
    lines, evals = read_log(final.parent / "log.jsonl"), read_log(final.parent / "eval.jsonl")
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert lines[-1]["terms"].keys() == {recipe.objective.type}
    assert lines[-1]["terms"][recipe.objective.type] == pytest.approx(lines[-1]["loss"])
    assert lines[-1]["metrics"]["logit_scale"] <= 100 * (1 + 1e-6)
    assert [look["step"] for look in evals] == [40, 80]
    assert (evals[-1]["images"], evals[-1]["captions"]) == (16, 32)
    chance = evals[-1]["chance"]
    for side in ("image_to_text", "text_to_image"):
        assert evals[-1]["recall"][f"{side}@1"] >= 2.5 * chance[f"{side}@1"]
        assert evals[-1]["recall"][f"{side}@10"] >= evals[-1]["recall"][f"{side}@1"]
    assert evals[-1]["loss"] < 0.7 * lines[0]["loss"]
    for name in ("loss.png", "report.html"):
        assert (final.parent / name).stat().st_size > 5000
    metadata = json.loads((final / "polymodal_pair.json").read_text())
    assert metadata["history"][-1]["steps"] == 80 and metadata["held_out"]["recall"] == evals[-1]["recall"]

    shown = [Image.open(drawn / f"{number}.png") for number in range(16)]
    captions = [record["captions"][0] for record in json.loads((drawn / "data.json").read_text())]
    stock, processor = AutoModel.from_pretrained(final), AutoProcessor.from_pretrained(final)
    padding = "max_length" if family == "siglip" else True
    inputs = processor(text=captions, images=shown, return_tensors="pt", padding=padding)
    with torch.no_grad():
        theirs = stock(**inputs)
    assert metadata["facts"]["logit_scale"] == pytest.approx(float(stock.logit_scale.exp().detach()))
    with torch.no_grad():
        loss = float(stock(**inputs, return_loss=True).loss)
    model, history = load_start(
        pair_recipe(pair_plain, objective=recipe.objective.model_dump(), init={"from": str(final)})
    )
    assert history == metadata["history"]
    model.eval()  # type: ignore[attr-defined]  # a module
    dataset = make_pair_eval_dataset(recipe, model, final.parent)
    assert dataset is not None
    firsts = np.array([own.start for own in dataset.prepared.captions])
    batch = dataset.batch(Plan(np.arange(16), firsts, None, dataset.length(firsts)))
    terms, image, text = pair_losses(model, [batch], nullcontext, 0)
    torch.testing.assert_close(image, theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text, theirs.text_embeds, atol=1e-5, rtol=0)
    if not recipe.objective.label_smoothing:
        assert float(terms[recipe.objective.type]) == pytest.approx(loss, rel=1e-4)


RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.mark.slow
def test_the_tiny_recipe_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images are drawn, a SigLIP is trained, and finds combinations that it never saw; then nothing is done again."""
    from transformers import AutoModel

    from polymodal.cli import main

    command = ["train", str(RECIPES / "siglip" / "tiny_pipeline.yaml"), f"output_dir={tmp_path}"]
    assert main([*command, "stages.model.run.threads=1"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    look = read_log(tmp_path / "model" / "eval.jsonl")[-1]
    assert look["recall"]["text_to_image@1"] >= 3 * look["chance"]["text_to_image@1"]
    assert type(AutoModel.from_pretrained(tmp_path / "model" / "final")).__name__ == "SiglipModel"
    stamp = (tmp_path / "model" / "final" / "polymodal_pair.json").stat().st_mtime_ns
    assert main([*command, "stages.model.run.threads=1"]) == 0
    assert (tmp_path / "model" / "final" / "polymodal_pair.json").stat().st_mtime_ns == stamp
    recipe = str(RECIPES / "siglip" / "tune.yaml")
    capsys.readouterr()
    assert main(["train", recipe, "objective.chunk=32", "--dry-run"]) == 0
    assert "chunk: 32" in capsys.readouterr().out
    assert main(["train", recipe, "objective.chank=32"]) != 0
    assert "did you mean" in (said := capsys.readouterr().err).lower() and "chunk" in said
    assert main(["data", "prep", recipe]) != 0
    assert "it has the key `objective`" in capsys.readouterr().err


def test_a_teacher_pulls_the_vision_encoder(pair_plain: dict[str, Any], pair_recipe: Make, tmp_path: Path) -> None:
    """Its distance is a named term that falls; kept or seen anew it says the same; it is not exported."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "teacher")
    tower = {"vision_tower": str(tmp_path / "teacher"), "type": "clip", "mm_vision_select_layer": -1}
    changes: dict[str, Any] = {
        "objective__distill": {"tower": tower, "weight": 2.0},
        "run__max_steps": 25,
        "batch__micro_size": 3,
        "run__feature_dtype": "float32",
    }
    kept = pair_recipe(pair_plain, **changes, run__feature_cache=str(tmp_path / "kept"))
    final = train(kept)
    lines = read_log(final.parent / "log.jsonl")
    assert lines[0]["terms"].keys() == {"siglip", "distill"}
    assert lines[-1]["terms"]["distill"] < 0.9 * lines[0]["terms"]["distill"]
    assert lines[0]["loss"] == pytest.approx(sum(lines[0]["terms"].values()))
    assert (tmp_path / "kept").is_dir()
    from safetensors.torch import load_file

    assert not [name for name in load_file(final / "model.safetensors") if "distill" in name]
    # Cut so little that nothing is cut: the teacher now sees every look, and says nearly the same.
    seen = pair_recipe(
        pair_plain,
        **changes | {"run__max_steps": 1},
        augment={"type": "crop_flip", "scale": [0.999999, 1.0], "ratio": [1.0, 1.0], "flip": 0.0},
        output_dir=str(tmp_path / "seen"),
    )
    first = read_log(train(seen).parent / "log.jsonl")[0]
    assert first["terms"]["distill"] == pytest.approx(lines[0]["terms"]["distill"], rel=0.02)
    frozen = {"train": [{"match": "text_model.*", "train": True}], "output_dir": str(tmp_path / "frozen")}
    with pytest.raises(ConfigError, match=r"objective\.distill: the vision encoder is not trained"):
        train(pair_recipe(pair_plain, **changes, **frozen))


def test_a_contrast_that_is_not_finite_names_the_pair_at_fault(
    pair_plain: dict[str, Any], pair_recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ContrastiveTask(pair_recipe(pair_plain, batch__micro_size=4), World())
    Path(task.recipe.output_dir).mkdir(parents=True)
    run = make_trainer(task)
    name = task.dataset.prepared.ids[int(task.steps.indices(0)[5])]
    embed = type(task.model).embed

    def broken(model: Any, batch: Any) -> Any:
        found = embed(model, batch)
        rows = torch.tensor([float("nan") if own == name else 1.0 for own in batch.ids])
        return replace(found, text=found.text * rows[:, None])

    monkeypatch.setattr(type(task.model), "embed", broken)
    batches = run.batches()
    run.step(batches)
    assert f"step 1: the loss is not finite (of record {name}), step left out" in capsys.readouterr().err
    assert run.losses.kinds == {} and run.losses.sources == {}


def own_images(drawn: Path, folder: Path) -> list[dict[str, Any]]:
    """A mixture of the drawn pairs with images that a test may break."""
    folder.mkdir()
    for image in drawn.glob("*.png"):
        (folder / image.name).write_bytes(image.read_bytes())
    return [{"path": str(drawn / "data.json"), "image_root": str(folder)}]


FROZEN = [{"match": "*", "train": True}, {"match": "vision_model.*", "train": False}]


@pytest.mark.parametrize("cache", ["off", "memory"])
@pytest.mark.parametrize("micro", [1, None])
def test_an_image_that_breaks_after_the_scan_gives_its_place_to_the_next_pair(
    pair_plain: dict[str, Any], pair_recipe: Make, drawn: Path, tmp_path: Path, cache: str, micro: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    mix = own_images(drawn, tmp_path / "own")
    changes = {"data__mix": mix, "train": FROZEN, "run__feature_cache": cache, "batch__micro_size": micro}
    recipe = pair_recipe(pair_plain, **changes, data__on_error="skip")
    broken: list[str] = []
    store = task_module.tower_store

    def break_one(recipe: Any, model: Any, dataset: PairDataset) -> Any:
        broken.append(dataset.prepared.ids[int(task_module.make_steps(recipe, dataset).indices(0)[2])])
        (tmp_path / "own" / f"{broken[0][1:]}.png").write_bytes(b"cut")
        return store(recipe, model, dataset)

    monkeypatch.setattr(task_module, "tower_store", break_one)
    stops = pair_recipe(pair_plain, **changes, output_dir=str(tmp_path / "stops"))
    with pytest.raises(MediaError, match=r"record r\d+: .*own/\d+\.png") as error:
        train(stops)
    assert f"record {broken[0]}: " in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(task_module, "tower_store", store)
    mended = (drawn / f"{broken[0][1:]}.png").read_bytes()
    (tmp_path / "own" / f"{broken[0][1:]}.png").write_bytes(mended)
    monkeypatch.setattr(task_module, "tower_store", break_one)
    final = train(recipe)
    assert all(line["loss"] > 0 for line in read_log(final.parent / "log.jsonl"))
    listed = [json.loads(line) for line in (final.parent / "skipped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in listed] == [broken[0]] and ".png" in listed[0]["error"]


def test_a_stand_in_is_a_whole_pair_and_held_out_scores_leave_the_broken_one_out(
    pair_plain: dict[str, Any], pair_recipe: Make, drawn: Path, tmp_path: Path
) -> None:
    mix = own_images(drawn, tmp_path / "own")
    recipe = pair_recipe(pair_plain, data__mix=mix, data__eval=mix, data__on_error="skip", batch__global_size=16)
    Path(recipe.output_dir).mkdir()
    run = make_trainer(ContrastiveTask(recipe, World()))
    dataset = run.task.held_out
    whole = run.task.evaluate(run.engine, 0)
    (tmp_path / "own" / "4.png").write_bytes(b"")
    texts = np.array([own.start for own in dataset.prepared.captions])
    batch = dataset.batch(Plan(np.array([3, 4]), texts[[3, 4]], None, 8))
    plain = dataset.batch(Plan(np.array([3, 5]), texts[[3, 5]], None, 8))
    assert batch.ids == ("r3", "r5") == plain.ids
    for name in ("input_ids", "image_ids", "pixel_values"):
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name
    line = run.task.evaluate(run.engine, 0)
    assert (whole["images"], whole["captions"]) == (16, 32) and (line["images"], line["captions"]) == (15, 30)


def test_only_what_the_steps_see_is_encoded(pair_plain: dict[str, Any], pair_recipe: Make, tmp_path: Path) -> None:
    recipe = pair_recipe(
        pair_plain, train=FROZEN, batch__global_size=3, run__max_steps=2, run__feature_cache=str(tmp_path / "cache")
    )
    train(recipe)
    index = next((tmp_path / "cache").glob("*/index.jsonl"))
    assert len(index.read_text().splitlines()) == 6
