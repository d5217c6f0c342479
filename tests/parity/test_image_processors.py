"""Tiles and token counts equal those of the transformers (Pillow) image processors and processors."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from polymodal.config import ImageConfig
from polymodal.media_plan import Size, plan_image
from polymodal.modeling.vlm import lay_out
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.processing.image_transform import make_tiles

NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SMALL_PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
ONEVISION_PINPOINTS = [[h * 48, w * 48] for h in range(1, 7) for w in range(1, 7)]
SHAPES = [(64, 64), (37, 91), (91, 37), (5, 200), (200, 5), (113, 112), (333, 500), (480, 41), (6, 7)]

PROCESSORS: dict[str, Any] = {
    "clip": CLIPImageProcessorPil(),
    "clip_odd": CLIPImageProcessorPil(size={"shortest_edge": 63}, crop_size={"height": 63, "width": 63}),
    "dinov2": BitImageProcessorPil(
        size={"shortest_edge": 64},
        crop_size={"height": 56, "width": 56},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ),
    "crop_larger_than_resize": BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 57, "width": 57}),
    "siglip": SiglipImageProcessorPil(size={"height": 96, "width": 80}),
    "vit": ViTImageProcessorPil(size={"height": 64, "width": 64}),
    "blip": BlipImageProcessorPil(size={"height": 64, "width": 64}),
    "lanczos": SiglipImageProcessorPil(size={"height": 64, "width": 64}, resample=1),
    "unnormalised": SiglipImageProcessorPil(size={"height": 64, "width": 64}, do_normalize=False),
    "llava": LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    "llava_pad": LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_pad=True),
    "llava_next": LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=SMALL_PINPOINTS
    ),
    "onevision": LlavaOnevisionImageProcessorPil(
        size={"height": 48, "width": 48}, image_grid_pinpoints=ONEVISION_PINPOINTS, image_mean=[0.5, 0.4, 0.3]
    ),
}


def images(height: int, width: int) -> list[PILImage.Image]:
    """Random noise, which shows any difference in resampling, and a gradient, which shows any shift."""
    noise = np.random.default_rng(height * 10_007 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows, columns = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
    ramp = np.stack(np.broadcast_arrays(rows, columns, 255 - rows), axis=-1).astype(np.uint8)
    return [PILImage.fromarray(noise), PILImage.fromarray(ramp)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels(name: str, shape: tuple[int, int]) -> None:
    processor = PROCESSORS[name]
    config = image_config_from_hf(processor.to_dict())
    plan = plan_image(Size(*shape), config, Size(4, 4))
    for image in images(*shape):
        theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
        ours = make_tiles(image, plan, config)
        assert ours.dtype == np.float32
        assert ours.shape == theirs.reshape(-1, *theirs.shape[-3:]).shape
        np.testing.assert_allclose(ours, theirs.reshape(ours.shape), atol=1e-5, rtol=0)


def test_a_long_crop_is_the_same_when_only_its_middle_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = image_config_from_hf(PROCESSORS["clip"].to_dict())
    plan = plan_image(Size(21, 500), config, Size(4, 4))
    image = images(21, 500)[0]
    whole = make_tiles(image, plan, config)
    monkeypatch.setattr("polymodal.processing.image_transform._LARGEST_RESIZED", 100)
    part = make_tiles(image, plan, config)
    # Pillow takes the box in single precision: a level or two of 255 may differ.
    assert np.abs(whole - part).max() < 2.01 / 255 / min(config.image_std)


def random_sizes(count: int) -> list[Size]:
    draw = random.Random(7)
    sizes = [Size(draw.randint(1, 3000), draw.randint(1, 3000)) for _ in range(count)]
    sizes += [Size(draw.randint(1, 40), draw.randint(500, 6000)) for _ in range(count // 4)]
    sizes += [Size(size.width, size.height) for size in sizes[-(count // 4) :]]
    return [*sizes, Size(1, 1), Size(1, 6000), Size(6000, 1), Size(336, 336), Size(337, 335)]


def anyres(tile: int, pinpoints: list[list[int]], most: int | None = None) -> ImageConfig:
    return ImageConfig(
        image_aspect_ratio="anyres",
        tile_size=(tile, tile),
        image_grid_pinpoints=tuple((h, w) for h, w in pinpoints),
        mm_patch_merge_type="spatial_unpad",
        anyres_max=most,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )


def next_count(size: Size) -> int:
    """Ask LLaVA-NeXT's processor, without the tokenizer that it would want."""
    stub: Any = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=NEXT_PINPOINTS),
        patch_size=14,
        num_additional_image_tokens=0,
        _get_unpadded_features=lambda *args: LlavaNextProcessor._get_unpadded_features(stub, *args),
    )
    return int(LlavaNextProcessor._get_number_of_features(stub, size.height, size.width, 336, 336))


def onevision_count(size: Size, pinpoints: list[list[int]], most: int) -> int:
    stub: Any = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        num_image_tokens=729,
        vision_aspect_ratio=f"anyres_max_{most}",
        _get_unpadded_features=lambda *args: LlavaOnevisionProcessor._get_unpadded_features(stub, *args),
    )
    return int(LlavaOnevisionProcessor._get_number_of_features(stub, size.height, size.width, 384, 384))


def test_llava_next_counts() -> None:
    image = anyres(336, NEXT_PINPOINTS)
    for size in random_sizes(800):
        assert plan_image(size, image, Size(24, 24)).num_tokens == next_count(size), size


@pytest.mark.parametrize("most", [1, 4, 9])
def test_onevision_counts(most: int) -> None:
    pinpoints = [[h * 384, w * 384] for h in range(1, 7) for w in range(1, 7)]
    image = anyres(384, pinpoints, most)
    shrunk = 0
    for size in random_sizes(400):
        plan = plan_image(size, image, Size(27, 27))
        assert plan.num_tokens == onevision_count(size, pinpoints, most), size
        shrunk += plan.kept is not None and plan.unpadded != plan.kept.size
    assert shrunk > 20  # the rule was really met


@pytest.mark.parametrize("family", ["llava_next", "onevision"])
def test_token_order(family: str) -> None:
    """Lay numbered features out by the plan and by the reference: same tokens, same order."""
    tile, side, pinpoints = (56, 4, SMALL_PINPOINTS) if family == "llava_next" else (48, 3, ONEVISION_PINPOINTS)
    image = anyres(tile, pinpoints, None if family == "llava_next" else 4)
    stub: Any = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(image_size=tile, patch_size=tile // side), image_grid_pinpoints=pinpoints
        )
    )
    newline = torch.tensor([-1.0, -2.0])
    for size in random_sizes(60):
        plan = plan_image(size, image, Size(side, side))
        if plan.unpadded is not None and plan.unpadded.area == 0:
            continue  # the reference cannot lay out an empty field
        features = torch.arange(plan.num_tiles * side * side * 2, dtype=torch.float32).view(plan.num_tiles, -1, 2)
        sizes = [[size.height, size.width]]
        if family == "llava_next":
            theirs, counts = LlavaNextModel.pack_image_features(stub, [features], sizes, "default", newline)
        else:
            theirs, counts = LlavaOnevisionModel.pack_image_features(stub, [features], sizes, newline, "anyres_max_4")
        assert counts.tolist() == [plan.num_tokens]
        torch.testing.assert_close(lay_out(features, plan, newline), theirs[0])
