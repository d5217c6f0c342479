"""Whole runs on images in their own shape: packed, from the cache, in several processes, saved and opened again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from polymodal import Image, user
from polymodal.backends.local import LocalBackend, processor_of
from polymodal.checkpoints.model_folder import load_model
from polymodal.errors import ConfigError
from polymodal.generation.params import GenerationParams
from polymodal.media_plan import Size, plan_image
from polymodal.modeling.build import build_model
from polymodal.processing.collate import collate_packed
from polymodal.training import train
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import read_log

EVERYTHING = [{"match": "*", "train": True}]
Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def naflex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SigLIP 2 of the NaFlex kind: 16 patches of 7 pixels, in any shape."""
    folder = tmp_path_factory.mktemp("naflex")
    widths = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    Siglip2VisionModel(Siglip2VisionConfig(**widths, num_patches=16, patch_size=7)).save_pretrained(folder)
    return folder


@pytest.fixture
def native(plain: dict[str, Any], naflex: Path) -> dict[str, Any]:
    """The tiny recipe on that tower; a row of tokens ends with a newline."""
    model = plain["init"]["model"]
    model["vision"] = {"vision_tower": str(naflex), "type": "siglip2"}
    model["image"] |= {"image_aspect_ratio": "native", "mm_patch_merge_type": "spatial_unpad"}
    plain["train"] = [{"match": "projector.*", "train": True}, {"match": "image_newline", "train": True}]
    return plain


def curve(folder: Path | str) -> list[float]:
    return [line["loss"] for line in read_log(Path(folder) / "log.jsonl")]


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "pixel_shuffle2_mlp2x_gelu"])
@torch.no_grad()
def test_planned_tokens_are_the_tokens_made_for_500_sizes(
    native: dict[str, Any], recipe_of: Make, projector: str
) -> None:
    native["init"]["model"]["projector"]["mm_projector_type"] = projector
    config = recipe_of(native).init.model
    assert config is not None and config.image is not None
    model, tokenizer = build_model(config)
    processor = processor_of(model, tokenizer, config)
    drawn, grids = random.Random(0), set()
    for _ in range(25):
        sizes = [(drawn.randint(1, 120), drawn.randint(1, 120)) for _ in range(20)]
        samples = [processor([user(Image(PILImage.new("RGB", size)), "What?")], pixels="uint8") for size in sizes]
        batch = collate_packed(samples)
        made = model.project_images(model.encode_images(batch.pixel_values), batch.plans)
        for size, tokens, plan, sample in zip(sizes, made, batch.plans, samples, strict=True):
            assert len(tokens) == plan.num_tokens == sample.slots[0].length == len(sample.input_ids.eq(
                model.image_token_id).nonzero())  # fmt: skip
            assert plan == plan_image(Size(size[1], size[0]), config.image, processor.tokens)
            grids.add(plan.tokens)
    assert len(grids) > 30


def test_a_packed_run_learns_and_equals_the_padded_one(native: dict[str, Any], recipe_of: Make, tmp_path: Path) -> None:
    native["train"] = EVERYTHING
    native["optim"] = {"learning_rate": 3e-3, "eps": 1e-3}  # a tiny eps would turn rounding into whole steps
    usual = recipe_of(native, run__max_steps=20, output_dir=str(tmp_path / "usual"))
    packed = recipe_of(
        native, run__max_steps=20, batch__packing="pack", batch__micro_tokens=160, output_dir=str(tmp_path / "packed")
    )
    again = [load_model(train(recipe)).model.state_dict() for recipe in (usual, packed)]
    assert curve(usual.output_dir) == pytest.approx(curve(packed.output_dir), rel=1e-4)
    assert all(line["padding"] == 0 for line in read_log(Path(packed.output_dir) / "log.jsonl"))
    assert all(torch.allclose(again[0][name], weight, atol=1e-4) for name, weight in again[1].items())
    losses = curve(packed.output_dir)
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


def test_a_run_from_the_cache_equals_one_without(native: dict[str, Any], recipe_of: Make, tmp_path: Path) -> None:
    kept = str(tmp_path / "cache")
    without = recipe_of(native, output_dir=str(tmp_path / "without"))
    within = recipe_of(
        native, run__feature_cache=kept, run__feature_dtype="float32", output_dir=str(tmp_path / "within")
    )
    train(without)
    train(within)
    assert curve(within.output_dir) == pytest.approx(curve(without.output_dir), rel=1e-5)
    native["init"]["model"]["image"] |= {"image_aspect_ratio": "squash", "mm_patch_merge_type": "flat"}
    native["train"] = native["train"][:1]
    # The same tower in the same folder, a row a tile.
    train(recipe_of(native, run__feature_cache=kept, run__feature_dtype="float32", output_dir=str(tmp_path / "tiles")))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_warm_starts_are_refused(native: dict[str, Any], recipe_of: Make) -> None:
    with pytest.raises(ConfigError, match="warm_start compares tiles of one size, and image_aspect_ratio is 'native'"):
        train(recipe_of(native, run__feature_cache="memory", warm_start={"steps": 3}))


def test_two_processes_equal_one(native: dict[str, Any], run_jobs: Callable[..., Any], tmp_path: Path) -> None:
    """The tower's layers are sharded, so each process must run them as often, whatever its images."""
    import yaml

    native["train"] = EVERYTHING
    native["optim"] = {"learning_rate": 5e-3, "eps": 1e-3}
    native["batch"] = {"global_size": 4, "micro_size": 2, "group_by_length": False}
    jobs = []
    for name, engine in (("one", "auto"), ("ddp", "ddp"), ("fsdp2", "fsdp2")):
        native["output_dir"], native["run"]["engine"] = str(tmp_path / name), engine
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(native))
        processes = 1 if name == "one" else 2
        job = {"recipe": str(tmp_path / f"{name}.yaml"), "order": str(tmp_path / f"{name}.order")}
        jobs.append({**job, "moments": [None] * processes})
    assert [statuses for statuses, _, _ in run_jobs(jobs)] == [[0], [0, 0], [0, 0]]
    for name in ("ddp", "fsdp2"):
        assert curve(tmp_path / name) == pytest.approx(curve(tmp_path / "one"), abs=1e-4)


def test_the_folder_opens_again_and_answers_alike(native: dict[str, Any], recipe_of: Make, tmp_path: Path) -> None:
    config = recipe_of(native).init.model
    assert config is not None
    torch.manual_seed(0)
    model, tokenizer = build_model(config)
    first = LocalBackend(model, tokenizer, config, "first")
    first.save(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config.image == config.image
    second = LocalBackend(loaded.model, loaded.tokenizer, loaded.config, "second")
    wide, high = PILImage.new("RGB", (90, 30), "red"), PILImage.new("RGB", (20, 70), "blue")
    messages = [user(Image(wide), Image(high), "What?")]
    assert first.generate(messages).text == second.generate(messages).text
    batch = second.generate_batch([messages, [user(Image(high), "And?")]], GenerationParams())
    assert batch == [first.generate(messages).text, first.generate([user(Image(high), "And?")]).text]
    with pytest.raises(ConfigError, match="give messages in their place"):
        first(input_ids=torch.zeros(1, 3, dtype=torch.int64), pixel_values=torch.zeros(1, 3, 28, 28))


def test_a_stage_goes_on_in_the_images_own_shape(
    native: dict[str, Any], tiny: Path, recipe_of: Make, tmp_path: Path
) -> None:
    """From padded tiles of CLIP to native images, as LLaVA-NeXT goes from tiles to AnyRes."""
    image = dict(native["init"]["model"]["image"])
    native["init"]["model"]["vision"] = {"vision_tower": str(tiny / "tower"), "type": "clip"}
    native["init"]["model"]["image"] |= {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
    rules = native["train"]
    native["train"] = rules[:1]
    final = train(recipe_of(native, output_dir=str(tmp_path / "before")))
    after = {**json.loads(json.dumps(native)), "init": {"from": str(final), "image": image}, "train": rules}
    final = train(recipe_of(after, output_dir=str(tmp_path / "after")))
    loaded = load_model(final)
    assert loaded.config.image is not None and loaded.config.image.image_aspect_ratio == "native"
    assert loaded.model.image_newline is not None
