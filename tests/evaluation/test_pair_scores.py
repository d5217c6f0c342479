"""Retrieval and zero-shot scores of stock folders: as `transformers` scores them, with honest intervals and errors."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from polymodal.cli import main
from polymodal.config import ImageConfig
from polymodal.data.load import load_records
from polymodal.errors import CheckpointError, ConfigError, DataError
from polymodal.evaluation.embedder import load_embedder
from polymodal.evaluation.tasks import retrieval, zero_shot
from polymodal.metrics.intervals import mean_interval
from polymodal.metrics.retrieval import recall
from polymodal.modeling.dual_encoders.clip_siglip import build_dual_encoder
from polymodal.modeling.dual_encoders.config import ObjectiveConfig, PairModelConfig

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "brown", "gray"]
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = ["clip", "siglip", "pair"]


def write_model(folder: Path, family: str) -> Path:
    """A random tiny dual encoder with a tokenizer of words, as a stock folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "of", "picture", ".", "photo", *COLOURS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]",
        cls_token="[CLS]", sep_token="[SEP]",
    ).save_pretrained(folder / "tokenizer")  # fmt: skip
    torch.manual_seed(0)
    image = ImageConfig(
        image_aspect_ratio="squash", tile_size=(16, 16), image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25)
    )
    vision: dict[str, Any] = {**SMALL, "patch_size": 8}
    text: dict[str, Any] = {**SMALL, "max_position_embeddings": 12}
    if family == "pair":
        vision["model_type"], text["model_type"] = "vit", "bert"
    settings = PairModelConfig(
        family=family,  # type: ignore[arg-type]
        vision=vision,
        text=text,
        projection_dim=8,
        tokenizer=str(folder / "tokenizer"),
        image=image,
    )
    objective = ObjectiveConfig(type="siglip" if family == "siglip" else "clip")
    model = build_dual_encoder(settings, objective)
    (folder / family).mkdir()
    model.save(folder / family)
    return folder / family


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows, shown = [], []
    noise = np.random.default_rng(0)
    for number, colour in enumerate(COLOURS):
        PILImage.fromarray(noise.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        captions = [f"A {colour}.", f"An image of a {colour}."][: 1 + number % 2]
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": captions[0]}]
        rows.append({"id": colour, "image": f"{number}.png", "conversations": turns, "captions": captions})
        shown.append({"image": f"{number}.png", "labels": [number] if number else [0, 1]})
    (folder / "val.json").write_text(json.dumps(rows))
    task = {"name": "colours", "classes": [f"a {colour}" for colour in COLOURS], "images": shown}
    (folder / "classes.json").write_text(json.dumps({"templates": ["{}.", "a photo of {}."], "tasks": [task]}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_and_recall_are_those_of_transformers(models: dict[str, Path], data: Path, family: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = models[family]
    pairs = retrieval.pairs_of(load_records(data / "val.json"))
    embedder = load_embedder(folder)
    image, text = embedder.images(pairs.images, batch_size=3), embedder.texts(pairs.texts, batch_size=5)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    processor = (CLIPImageProcessorPil if family == "clip" else SiglipImageProcessorPil).from_pretrained(folder)
    pixels = processor([PILImage.open(p) for p in pairs.images], return_tensors="pt")["pixel_values"]  # type: ignore[arg-type]
    padding: dict[str, Any] = {"padding": "max_length", "max_length": 12} if family == "siglip" else {"padding": True}
    tokens = tokenizer(list(pairs.texts), return_tensors="pt", **padding)
    if family == "siglip":
        tokens = {"input_ids": tokens["input_ids"]}
    with torch.no_grad():
        seen = model(pixel_values=pixels, **tokens)
    assert torch.allclose(image, seen.image_embeds, atol=1e-5)
    assert torch.allclose(text, seen.text_embeds, atol=1e-5)
    expected = recall(seen.image_embeds @ seen.text_embeds.T, torch.tensor(pairs.image_of_text))
    found = retrieval.retrieval(embedder, pairs, batch_size=4)
    assert {f"{row.way}@{row.k}": row.score for row in found.recalls} == pytest.approx(expected)
    assert (found.images, found.texts, found.shared) == (8, 12, 0)
    for row in found.recalls:
        assert 0 <= row.low <= row.score <= row.high <= 1
    assert {row.chance for row in found.recalls if row.way == "text_to_image"} == {1 / 8, 5 / 8, 1.0}


def test_zero_shot_averages_prompts_and_takes_several_right_classes(models: dict[str, Path], data: Path) -> None:
    embedder = load_embedder(models["clip"])
    tasks = zero_shot.load_tasks(data / "classes.json")
    row = zero_shot.zero_shot_scores(embedder, tasks)[0]
    prompts = [f"{t}a {colour}." for colour in COLOURS for t in ("", "a photo of ")]
    classes = embedder.texts(prompts).unflatten(0, (8, 2)).mean(1)
    image = embedder.images(tasks[0].images)
    nearest = (image @ torch.nn.functional.normalize(classes, dim=-1).T).argmax(1).tolist()
    right = sum(near in labels for near, labels in zip(nearest, tasks[0].labels, strict=True))
    assert (row.top1, row.images, row.classes) == (right / 8, 8, 8)
    assert row.chance1 == pytest.approx((2 + 7) / 64)
    assert row.top5 >= row.top1 and row.top1_interval[0] <= row.top1 <= row.top1_interval[1]


def test_the_command_line_prints_and_writes(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    folder = tmp_path / "out"
    command = ["eval", str(models["siglip"]), "--device", "cpu", "--json", str(out), "--output", str(folder)]
    assert main([*command, "--task", "retrieval", "--data", str(data / "val.json"), "--limit", "4"]) == 0
    assert "4 images, 6 texts" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["recalls"]) == 6
    assert main([*command, "--task", "zero-shot", "--data", str(data / "classes.json"), "--limit", "5"]) == 0
    assert "| colours | 5 | 8 |" in capsys.readouterr().out
    assert json.loads(out.read_text())["tasks"][0]["images"] == 5
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} == {
        "results.json", "report.html", "retrieval/samples.jsonl", "zero-shot/samples.jsonl"
    }  # fmt: skip


def test_a_linear_probe_reads_classes_from_the_vectors(models: dict[str, Path], tmp_path: Path) -> None:
    """Bright and dark images can be told apart in any tower's vectors; with labels exchanged all are wrong."""
    noise, shown = np.random.default_rng(0), []
    for number in range(24):
        values = noise.integers(0, 60, (16, 16, 3), dtype=np.uint8) + 190 * (number % 2)
        PILImage.fromarray(values.astype(np.uint8)).save(tmp_path / f"{number}.png")
        shown.append({"image": f"{number}.png", "labels": [number % 2]})
    wrong = [{**entry, "labels": [1 - entry["labels"][0]]} for entry in shown[16:]]
    tasks = [
        {"name": name, "classes": ["dark", "bright"], "train": shown[:16], "images": images}
        for name, images in (("right", shown[16:]), ("wrong", wrong))
    ]
    (tmp_path / "classes.json").write_text(json.dumps({"tasks": tasks}))
    command = [
        "eval",
        str(models["clip"]),
        "--device",
        "cpu",
        "--tasks",
        "linear-probe",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main([*command, "--data", str(tmp_path / "classes.json")]) == 0
    found = json.loads((tmp_path / "o" / "results.json").read_text())["tasks"]["linear-probe"]
    assert [row["score"] for row in found["kinds"]] == [1.0, 0.0]
    assert found["figures"] == {"linear probe": 0.5, "k-NN": 0.5} and found["n"] == 16


def test_a_linear_probe_needs_images_to_learn_from(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "eval",
        str(models["clip"]),
        "--device",
        "cpu",
        "--tasks",
        "linear-probe",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main([*command, "--data", str(data / "classes.json")]) == 2
    assert "task colours: a linear probe learns from images" in capsys.readouterr().err
    content = json.loads((data / "classes.json").read_text())
    content["tasks"][0]["train"] = content["tasks"][0]["images"]
    for image in data.glob("*.png"):
        (tmp_path / image.name).write_bytes(image.read_bytes())
    (tmp_path / "classes.json").write_text(json.dumps(content))
    assert main([*command, "--data", str(tmp_path / "classes.json")]) == 2
    assert "0.png has several labels; a linear probe takes one" in capsys.readouterr().err


def test_results_in_the_same_form_as_every_task(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("clip", "siglip"):
        for task, file in (("retrieval", "val.json"), ("zero-shot", "classes.json")):
            flags = ["--data", str(data / file), "--device", "cpu", "--output", str(tmp_path / name)]
            assert main(["eval", str(models[name]), "--tasks", task, *flags]) == 0
    document = json.loads((tmp_path / "clip" / "results.json").read_text())
    assert document["model"] == str(models["clip"]) and document["versions"]["torch"]
    found = retrieval.retrieval(load_embedder(models["clip"]), retrieval.pairs_of(load_records(data / "val.json")))
    task = document["tasks"]["retrieval"]
    assert task["figures"] == {f"{row.way}@{row.k}": pytest.approx(row.score) for row in found.recalls}
    assert task["score"] == found.recalls[0].score and task["n"] == found.images + found.texts
    assert task["interval"][0] <= task["score"] <= task["interval"][1] and len(task["kinds"]) == 2
    (row,) = zero_shot.zero_shot_scores(load_embedder(models["clip"]), zero_shot.load_tasks(data / "classes.json"))
    task = document["tasks"]["zero-shot"]
    assert task["figures"] == {"top1": pytest.approx(row.top1), "top5": pytest.approx(row.top5)} and task["n"] == 8
    assert tuple(task["interval"]) == pytest.approx(row.top1_interval)
    capsys.readouterr()
    assert main(["eval", "diff", str(tmp_path / "clip"), str(tmp_path / "siglip")]) == 0
    said = capsys.readouterr().out
    assert "| retrieval | 20 |" in said and "| zero-shot | 8 |" in said and "changed: model" in said
    flags = ["--data", str(data / "val.json"), "--device", "cpu", "--output", str(tmp_path / "clip")]
    assert main(["eval", str(models["siglip"]), "--tasks", "retrieval", *flags]) == 2
    assert "another model" in capsys.readouterr().err
    assert main(["eval", "rescore", str(tmp_path / "clip" / "retrieval")]) == 2
    assert "unknown metric 'recall@1'" in capsys.readouterr().err


def test_the_published_folder_is_stock_half_precision_and_scores_the_same(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    script = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "vit_small" / "publish.py"))
    script["main"](str(models["siglip"]), str(tmp_path / "out"))
    assert "MB, cosines moved by 0.0" in capsys.readouterr().out
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    pairs = retrieval.pairs_of(load_records(data / "val.json"))
    before, after = (load_embedder(folder).images(pairs.images) for folder in (models["siglip"], tmp_path / "out"))
    assert torch.allclose(before, after, atol=2e-3)
    # Its images are normalised as CLIP's, whose mean colour every engine can pad with.
    published = load_embedder(tmp_path / "out")
    assert published.image.image_mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert tuple(int(value * 255) for value in published.image.image_mean) == (122, 116, 104)
    assert load_embedder(models["siglip"]).image.image_mean != published.image.image_mean
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="more than the package may carry"):
        patch.setitem(script["main"].__globals__, "LARGEST", 1000)
        script["main"](str(models["siglip"]), str(tmp_path / "large"))
    assert not (tmp_path / "large").exists()


def test_records_of_one_image_are_put_together(data: Path) -> None:
    records = load_records(data / "val.json")
    pairs = retrieval.pairs_of([*records, *records[:2]])
    assert len(pairs.images) == 8 and len(pairs.texts) == 12
    assert retrieval.pairs_of(records, limit=3).image_of_text == (0, 1, 1, 2)


def test_a_text_of_several_images_is_counted(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    rows = json.loads((data / "val.json").read_text())[:3]
    for row in rows:
        row["captions"] = ["A red."]
        row["image"] = str(row["image"])
    (tmp_path / "val.json").write_text(json.dumps(rows))
    records = load_records(tmp_path / "val.json", data)
    found = retrieval.retrieval(load_embedder(models["clip"]), retrieval.pairs_of(records))
    assert found.shared == 2 and "2 of them repeated" in retrieval.table(found)
    assert {row.score for row in found.recalls if row.way == "image_to_text" and row.k == 1} == {0.0}


def test_models_that_cannot_compare_images_with_texts(tmp_path: Path, models: dict[str, Path]) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=16, patch_size=8)).save_pretrained(tmp_path / "tower")
    with pytest.raises(ConfigError, match="without a text tower"):
        load_embedder(tmp_path / "tower")
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "polymodal.json").write_text("{}")
    with pytest.raises(ConfigError, match="--task questions"):
        load_embedder(tmp_path / "chat")
    with pytest.raises(CheckpointError, match="no such model folder"):
        load_embedder(tmp_path / "nothing")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "llama" / "preprocessor_config.json").write_bytes(
        (models["clip"] / "preprocessor_config.json").read_bytes()
    )
    with pytest.raises(ConfigError, match="llama"):
        load_embedder(tmp_path / "llama")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": []}, "`tasks`"),
        ({"templates": ["a photo"]}, "must hold {} once"),
        ({"classes": []}, r"tasks\[0\]: `classes`"),
        ({"images": []}, "`images`"),
        ({"image": {"image": "../x.png", "labels": [0]}}, "leaves the folder"),
        ({"image": {"image": "0.png", "labels": [8]}}, "classes are numbered 0 to 7"),
        ({"image": {"image": "0.png", "labels": []}}, r"images\[0\]: `labels`"),
        ({"image": {"labels": [0]}}, "`image`"),
    ],
)
def test_task_files_that_cannot_be_used(data: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = json.loads((data / "classes.json").read_text())
    for key, value in change.items():
        if key == "image":
            content["tasks"][0]["images"][0] = value
        else:
            (content["tasks"][0] if key in ("classes", "images") else content)[key] = value
    (tmp_path / "classes.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        zero_shot.load_tasks(tmp_path / "classes.json")


def test_records_that_are_no_pairs(data: Path, models: dict[str, Path]) -> None:
    from dataclasses import replace

    record = load_records(data / "val.json")[0]
    with pytest.raises(DataError, match="found 0 media"):
        retrieval.pairs_of([replace(record, messages=record.messages[1:])])
    with pytest.raises(DataError, match="the caption is empty"):
        retrieval.pairs_of([replace(record, extra={"captions": [" "]})])
    with pytest.raises(DataError, match="among 1 images"):
        retrieval.retrieval(load_embedder(models["clip"]), retrieval.pairs_of([record]))


def test_the_interval_of_groups() -> None:
    hits = (np.random.default_rng(3).random(400) < 0.3).astype(float)
    assert mean_interval(hits, np.ones(400)) == pytest.approx(mean_interval(hits), abs=0.01)
    # Captions of an image that hit together are worth one observation: the interval is wider than for single ones.
    grouped = mean_interval(hits * 5, np.full(400, 5.0))
    single = mean_interval(np.repeat(hits, 5), np.ones(2000))
    assert grouped[1] - grouped[0] > 1.8 * (single[1] - single[0])
