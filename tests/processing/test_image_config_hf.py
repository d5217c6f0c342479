"""Hugging Face preprocessor files are read exactly or refused. (Pixels: tests/parity/test_image_processors.py.)"""

from __future__ import annotations

from typing import Any

import pytest

from polymodal.errors import ConfigError
from polymodal.processing.image_config_hf import image_config_from_hf

CLIP: dict[str, Any] = {
    "feature_extractor_type": "CLIPFeatureExtractor",  # as older files have it
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 336,
}
SIGLIP: dict[str, Any] = {
    "image_processor_type": "SiglipImageProcessor",
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 3,
    "size": {"height": 384, "width": 384},
}
DINO: dict[str, Any] = CLIP | {
    "feature_extractor_type": None,
    "image_processor_type": "BitImageProcessorFast",
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
}
LLAVA: dict[str, Any] = CLIP | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
NEXT: dict[str, Any] = CLIP | {
    "image_processor_type": "LlavaNextImageProcessor",
    "aspect_ratio_setting": "anyres",
    "do_pad": True,
    "image_grid_pinpoints": [[336, 672], [672, 336]],
    "size": {"shortest_edge": 336},
}
ONEVISION: dict[str, Any] = SIGLIP | {
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "image_grid_pinpoints": [[384, 384], [384, 768]],
    "do_pad": True,
}


def test_clip() -> None:
    image = image_config_from_hf(CLIP)
    assert (image.image_aspect_ratio, image.tile_size, image.resize_short_side) == ("crop", (336, 336), None)
    assert image.image_mean == (0.48145466, 0.4578275, 0.40821073)


def test_siglip() -> None:
    image = image_config_from_hf(SIGLIP)
    assert (image.image_aspect_ratio, image.tile_size, image.resample) == ("squash", (384, 384), "bicubic")


def test_dinov2() -> None:
    image = image_config_from_hf(DINO)
    assert (image.image_aspect_ratio, image.tile_size, image.resize_short_side) == ("crop", (224, 224), 256)


def test_llava() -> None:
    assert image_config_from_hf(LLAVA).image_aspect_ratio == "pad"
    assert image_config_from_hf(LLAVA | {"do_pad": False}).image_aspect_ratio == "crop"


def test_llava_next() -> None:
    image = image_config_from_hf({"image_processor": NEXT, "processor_class": "LlavaNextProcessor"})
    assert (image.image_aspect_ratio, image.mm_patch_merge_type, image.anyres_max) == ("anyres", "spatial_unpad", None)
    assert (image.tile_size, image.image_grid_pinpoints) == ((336, 336), ((336, 672), (672, 336)))


def test_onevision() -> None:
    assert image_config_from_hf(ONEVISION).anyres_max == 9
    assert image_config_from_hf(ONEVISION, vision_aspect_ratio="anyres_max_4").anyres_max == 4


def test_what_is_not_normalised() -> None:
    image = image_config_from_hf(SIGLIP | {"do_normalize": False})
    assert (image.image_mean, image.image_std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("preprocessor", "line"),
    [
        ({}, "names no image_processor_type"),
        ({"image_processor_type": "SiglopImageProcessor"}, "did you mean 'SiglipImageProcessor'"),
        (SIGLIP | {"do_flip_channels": True}, "do_flip_channels .* is not understood"),
        (SIGLIP | {"do_resize": False}, "do_resize .False. cannot be expressed"),
        (SIGLIP | {"do_rescale": False}, "do_rescale"),
        (SIGLIP | {"rescale_factor": 0.5}, "rescale_factor"),
        (SIGLIP | {"resample": 0}, "resample .0. cannot be expressed"),
        (SIGLIP | {"size": {"longest_edge": 384}}, "size"),
        (SIGLIP | {"size": None}, "size is missing"),
        (SIGLIP | {"size": {"shortest_edge": 384}}, "tiles need one size"),
        (SIGLIP | {"image_mean": [0.5]}, "image_mean .* must be three numbers"),
        (SIGLIP | {"image_std": None}, "image_std"),
        (SIGLIP | {"image_std": [0.5, 0, 0.5]}, "image_std.1: Input should be greater than 0"),
        (SIGLIP | {"image_mean": [float("nan")] * 3}, "image_mean.0: Input should be a finite number"),
        (SIGLIP | {"image_std": ["a", "b", "c"]}, "a value of another kind"),
        (SIGLIP | {"rescale_factor": float("nan")}, "rescale_factor"),
        (SIGLIP | {"rescale_factor": "1/255"}, "a value of another kind"),
        (SIGLIP | {"resample": [3]}, "a value of another kind"),
        (SIGLIP | {"size": {"height": "x", "width": 3}}, "a value of another kind"),
        (SIGLIP | {"size": {"height": 100_000, "width": 100_000}}, "tile_size.0: Input should be less than"),
        (SIGLIP | {"size": 0}, "tile_size.0: Input should be greater than"),
        (NEXT | {"image_grid_pinpoints": [[336, 336, 336]]}, "a value of another kind"),
        (NEXT | {"image_grid_pinpoints": [[336, 672]] * 400_000}, "image_grid_pinpoints: Tuple should have at most"),
        (NEXT | {"image_grid_pinpoints": 5}, "a value of another kind"),
        (SIGLIP | {"do_pad": True}, "do_pad"),
        (SIGLIP | {"do_center_crop": True, "crop_size": 300}, "crop_size"),
        (SIGLIP | {"image_grid_pinpoints": [[1, 1]]}, "image_grid_pinpoints"),
        (CLIP | {"crop_size": None}, "crop_size is missing"),
        (LLAVA | {"size": 384}, "crop_size .* cannot be expressed after a resize"),
        (NEXT | {"image_grid_pinpoints": None}, "image_grid_pinpoints is missing"),
        (NEXT | {"aspect_ratio_setting": "pad"}, "aspect_ratio_setting"),
        (ONEVISION | {"size": {"height": 384, "width": 300}}, "the tile must be square"),
    ],
)
def test_refused(preprocessor: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        image_config_from_hf(preprocessor)


def test_refused_aspect_ratios() -> None:
    with pytest.raises(ConfigError, match="only LLaVA-OneVision has one"):
        image_config_from_hf(NEXT, vision_aspect_ratio="anyres_max_9")
    with pytest.raises(ConfigError, match="must be anyres_max_N"):
        image_config_from_hf(ONEVISION, vision_aspect_ratio="pad")
