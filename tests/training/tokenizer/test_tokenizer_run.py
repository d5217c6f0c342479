"""A tokenizer learnt through the one trainer: it improves, resumes exactly, compares itself, and can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from polymodal.config import parse_config
from polymodal.errors import ConfigError, DataError, PolymodalError
from polymodal.modeling.tokenizers import load_image_tokenizer
from polymodal.training import train
from polymodal.training.optimizer import set_modes
from polymodal.training.process_group import World
from polymodal.training.recipes.load import dump_recipe, load_any_recipe
from polymodal.training.recipes.tokenizer import TokenizerRecipe
from polymodal.training.reporting.log import read_log
from polymodal.training.run import make_trainer, task_class
from polymodal.training.trainer import StopRequest


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` and `val/` with coloured discs and boxes of 16 pixels, and `rows.json` that shows some of them."""
    root = tmp_path_factory.mktemp("drawings")
    rng = np.random.default_rng(0)
    for part, count in (("train", 48), ("val", 16)):
        (root / part).mkdir()
        for number in range(count):
            image = Image.new("RGB", (16, 16), "white")
            left, top, size = [*rng.integers(0, 8, 2).tolist(), int(rng.integers(4, 9))]
            colour = ("red", "green", "blue", "black")[number % 4]
            pen = ImageDraw.Draw(image)
            (pen.ellipse if number % 2 else pen.rectangle)((left, top, left + size, top + size), fill=colour)
            image.save(root / part / f"{number:02d}.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A drawing."}]
    rows = [{"id": str(n), "image": f"train/{n % 6:02d}.png", "conversations": turns} for n in range(8)]
    (root / "rows.json").write_text(json.dumps(rows))
    return root


def recipe(drawings: Path, output: Path, **changes: Any) -> TokenizerRecipe:
    plain: dict[str, Any] = {
        "name": "tiny",
        "tokenizer": {"min_usage": 0, "shown": 3},
        "init": {
            "model": {
                "type": "image_vq", "image_size": 16, "patch_size": 4, "hidden_size": 24, "encoder_layers": 1,
                "decoder_layers": 1, "thin_size": 8, "quantizer": {"type": "vq", "codebook_size": 16},
            },
        },
        "data": {"mix": [{"path": str(drawings / "train")}], "eval": [{"path": str(drawings / "val")}]},
        "train": [{"match": "*", "train": True}],
        "optim": {"learning_rate": 4e-3, "warmup": 0.1},
        "batch": {"global_size": 16, "micro_size": 8},
        "run": {"max_steps": 30, "epochs": 100, "eval_every": 10, "log_every": 5, "precision": "fp32", "workers": 1},
        "output_dir": str(output),
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            plain[section] = {**plain[section], name: value}
        else:
            plain[section] = value
    return parse_config(TokenizerRecipe, plain, "test")


def test_it_learns_and_says_how_well(drawings: Path, tmp_path: Path) -> None:
    asked = recipe(drawings, tmp_path / "run", tokenizer={"min_usage": 0.1, "shown": 3, "baseline": True})
    final = train(asked)
    lines = read_log(tmp_path / "run/eval.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["psnr"] > lines[0]["psnr"] + 1
    assert lines[-1]["images"] == 16 and lines[-1]["codes"] == 16 and 0 < lines[-1]["used"] <= 1
    assert 1 <= lines[-1]["perplexity"] <= 16 and 0 < lines[-1]["ssim"] < 1
    assert set(read_log(tmp_path / "run/log.jsonl")[-1]["terms"]) == {"l1", "mse", "vq"}
    for step in (10, 20, 30):  # three originals above three reconstructions
        with Image.open(tmp_path / f"run/reconstructions/step-{step:07d}.png") as grid:
            assert grid.size == (3 * 18 + 2, 2 * 16 + 6)
    metadata = json.loads((final / "training.json").read_text())
    assert metadata["held_out"]["psnr"] == lines[-1]["psnr"] and metadata["k_means"]["codes"] == 16
    baseline = load_image_tokenizer(tmp_path / "run/baseline")
    tokenizer = load_image_tokenizer(final)
    assert baseline.grid == tokenizer.grid and baseline.codebook_size == tokenizer.codebook_size
    # What the log says is what the folder does.
    pixels = torch.stack(
        [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) / 255 for p in sorted((drawings / "val").iterdir())]
    )
    for model, scores in ((tokenizer, metadata["held_out"]), (baseline, metadata["k_means"])):
        errors = (model.decode(model.encode(pixels)) - pixels).square().flatten(1).mean(dim=1)
        assert float((-10 * errors.log10()).mean()) == pytest.approx(scores["psnr"], abs=0.01)


def test_a_run_that_was_stopped_ends_as_if_it_was_not(drawings: Path, tmp_path: Path) -> None:
    whole = load_image_tokenizer(train(recipe(drawings, tmp_path / "whole")))
    asked = recipe(drawings, tmp_path / "parts")
    trainer = make_trainer(task_class(asked)(asked, World()))
    set_modes(trainer.engine.inner)
    batches = trainer.batches()
    for _ in range(13):
        trainer.step(batches)
    batches.close()
    trainer.save()
    parts = load_image_tokenizer(train(asked))
    for (name, one), (_, other) in zip(whole.state_dict().items(), parts.state_dict().items(), strict=True):
        assert torch.equal(one, other), name  # the codebook's running means among them


def test_micro_batches_change_nothing_but_memory(drawings: Path, tmp_path: Path) -> None:
    found = []
    for micro in (16, 5):
        changes = {"batch": {"global_size": 16, "micro_size": micro}, "run__max_steps": 3}
        asked = recipe(drawings, tmp_path / str(micro), **changes)
        task: Any = task_class(asked)(asked, World())
        task.model.quantizer.begun.fill_(True)  # else it begins with the first micro-batch
        trainer = make_trainer(task)
        trainer.loop(StopRequest())
        found.append(task.model.state_dict())
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], atol=2e-4), name


def test_two_processes_equal_one(drawings: Path, tmp_path: Path, run_jobs: Callable[..., Any]) -> None:
    quantizer = {"type": "vq", "codebook_size": 16, "revive_below": 0}  # what is revived is drawn from the first's
    model = {**recipe(drawings, tmp_path).init.model.model_dump(mode="json"), "quantizer": quantizer}
    begun = train(recipe(drawings, tmp_path / "begun", init={"model": model}, run__max_steps=1))
    jobs = []
    for name, count in (("one", 1), ("two", 2)):
        path = tmp_path / f"{name}.yaml"
        asked = recipe(drawings, tmp_path / name, init={"from": str(begun)}, run__max_steps=4)
        path.write_text(dump_recipe(asked))
        jobs.append({"recipe": str(path), "order": str(tmp_path / f"{name}.order"), "moments": [None] * count})
    results = run_jobs(jobs)
    assert [statuses for statuses, _, _ in results] == [[0], [0, 0]], results
    one, two = (load_image_tokenizer(tmp_path / name / "final").state_dict() for name in ("one", "two"))
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-3), name
    scores = [read_log(tmp_path / name / "eval.jsonl")[-1] for name in ("one", "two")]
    assert scores[0]["images"] == scores[1]["images"] and scores[0]["psnr"] == pytest.approx(
        scores[1]["psnr"], abs=0.05
    )


def test_too_few_codes_fail_at_the_end_and_can_be_kept_all_the_same(drawings: Path, tmp_path: Path) -> None:
    model = {
        "type": "image_vq", "image_size": 16, "patch_size": 8, "hidden_size": 16, "encoder_layers": 0,
        "decoder_layers": 0, "thin_size": 8, "quantizer": {"type": "vq", "codebook_size": 512},
    }  # fmt: skip
    changes = {"init": {"model": model}, "run__max_steps": 2, "run__eval_every": 0}
    with pytest.raises(
        PolymodalError, match=r"tiny: [0-9.]+% of 512 codes are used .* fewer than tokenizer.min_usage 90.0%"
    ):
        train(recipe(drawings, tmp_path, tokenizer={"min_usage": 0.9}, **changes))
    assert not (tmp_path / "final").exists()
    final = train(recipe(drawings, tmp_path, tokenizer={"min_usage": 0, "save_dtype": "float16"}, **changes))
    assert load_image_tokenizer(final).codebook_size == 512


def test_fsq_and_going_on_from_a_folder(drawings: Path, tmp_path: Path) -> None:
    model = {
        "type": "image_vq", "image_size": 16, "patch_size": 8, "hidden_size": 16, "encoder_layers": 0,
        "decoder_layers": 0, "thin_size": 8, "quantizer": {"type": "fsq", "levels": [4, 4]},
    }  # fmt: skip
    first = train(recipe(drawings, tmp_path / "first", init={"model": model}, run__max_steps=2))
    train(recipe(drawings, tmp_path / "second", init={"from": str(first)}, run__max_steps=2))
    second = json.loads((tmp_path / "second/final/training.json").read_text())
    assert second["recipe"]["init"]["from"] == str(first) and second["held_out"]["codes"] == 16


def test_a_vq_model_of_diffusers_is_trained_further(drawings: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=16, sample_size=16,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "start")
    before = load_image_tokenizer(tmp_path / "start")
    after = load_image_tokenizer(
        train(recipe(drawings, tmp_path / "run", init={"from": str(tmp_path / "start")}, run__max_steps=2))
    )
    changed = [n for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])]
    assert any("encoder" in n for n in changed) and "model.quantize.embedding.weight" in changed


def test_images_of_records_are_each_taken_once(drawings: Path, tmp_path: Path) -> None:
    data = {
        "mix": [{"path": str(drawings / "rows.json")}, {"path": str(drawings / "train"), "max_samples": 4}],
        "eval": [{"path": str(drawings / "val"), "source": "a"}, {"path": str(drawings / "rows.json"), "source": "b"}],
        "tile_cache": str(tmp_path / "tiles"),
    }
    asked = recipe(drawings, tmp_path / "run", data=data)
    task: Any = task_class(asked)(asked, World())
    task.load_data()
    assert [len(span) for _, span in task.dataset.spans] == [6, 4]
    assert [(name, len(span)) for name, span in task.held_out.spans] == [("a", 16), ("b", 6)]
    again: Any = task_class(asked)(asked, World())
    again.load_data()
    assert again.fingerprint == task.fingerprint
    assert torch.equal(again.dataset.pixels([0, 9]), task.dataset.pixels([0, 9]))
    wanted = np.array(Image.open(drawings / "train/00.png")).transpose(2, 0, 1)
    assert np.array_equal(task.dataset.pixels([0])[0].numpy(), wanted)


def test_mistakes_are_one_line(drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="no image in it"):
        train(recipe(drawings, tmp_path / "1", data={"mix": [{"path": str(tmp_path / "empty")}]}, run__eval_every=0))
    with pytest.raises(PolymodalError, match=r"broken/a\.png"):
        train(recipe(drawings, tmp_path / "2", data={"mix": [{"path": str(tmp_path / "broken")}]}, run__eval_every=0))
    with pytest.raises(ConfigError, match=r"data\.eval: name held-out images"):
        recipe(drawings, tmp_path, data={"mix": [{"path": str(drawings / "train")}]})
    with pytest.raises(ConfigError, match=r"run\.engine fsdp2"):
        recipe(drawings, tmp_path, run__engine="fsdp2")
    mixed = {"mix": [{"path": str(tmp_path / "broken")}, {"path": str(drawings / "train")}], "on_error": "skip"}
    with pytest.raises(DataError, match="broken: no image in it"):
        train(recipe(drawings, tmp_path / "3", data=mixed, run__eval_every=0))
    codebook = {"model": {"type": "patch_codebook"}}
    with pytest.raises(ConfigError, match="image_vq"):
        recipe(drawings, tmp_path, init=codebook)


def test_the_recipe_is_told_by_its_key(drawings: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe(drawings, tmp_path)))
    found = load_any_recipe(path, ["tokenizer.l1=0.5", "run.epochs=2"])
    assert isinstance(found, TokenizerRecipe) and found.tokenizer.l1 == 0.5
