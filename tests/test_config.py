"""Ranges of configuration keys, and the one line that says what is wrong with a value."""

from __future__ import annotations

import math
from typing import Any

import pytest

from polymodal.config import (
    ImageConfig,
    LLMConfig,
    LoraRecipe,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
    parse_config,
)
from polymodal.errors import ConfigError
from polymodal.training.recipes.sections import OptimConfig

IMAGE: dict[str, Any] = {"tile_size": [336, 336], "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def refused(cls: type[Any], values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(cls, values, "model")
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_std", [0.5, 0.0, 0.5]),
        ("image_std", [-1.0, 0.5, 0.5]),
        ("image_std", [math.nan, 0.5, 0.5]),
        ("image_mean", [math.inf, 0.5, 0.5]),
        ("tile_size", [0, 336]),
        ("tile_size", [100_000, 100_000]),
        ("image_grid_pinpoints", [[0, 336]]),
        ("image_grid_pinpoints", [[336, 336]] * 400_000),
        ("image_grid_pinpoints", [[336_000, 336_000]]),
        ("anyres_max", 0),
        ("max_tiles", 0),
        ("max_tiles", 10**9),
        ("resize_short_side", 0),
        ("resize_short_side", 10**9),
        ("background", [0, 0, 256]),
        ("pad_color", [-1, 0, 0]),
        ("max_pixels", 0),
        ("max_pixels", 10**12),
    ],
)
def test_image_rules_have_ranges(key: str, value: Any) -> None:
    assert key in refused(ImageConfig, {**IMAGE, key: value})


def test_a_number_that_cannot_be_written_is_refused_all_the_same() -> None:
    assert "max_tiles" in refused(ImageConfig, {**IMAGE, "max_tiles": 10**5000})


def test_a_canvas_has_room() -> None:
    large = {**IMAGE, "image_aspect_ratio": "slice", "tile_size": [4096, 4096], "max_tiles": 9}
    assert "max_tiles asks for 150,994,944 pixels an image, at most 134,217,728" in refused(ImageConfig, large)
    assert parse_config(ImageConfig, {**large, "max_tiles": 8}, "model").max_tiles == 8


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (LoraRecipe, {"lora_alpha": math.nan}),
        (LoraRecipe, {"learning_rate": math.inf}),
        (OptimConfig, {"learning_rate": math.nan}),
        (OptimConfig, {"weight_decay": math.inf}),
        (ProjectorConfig, {"mm_projector_type": "qformer", "qformer": {"layer_norm_eps": math.inf}}),
    ],
)
def test_no_number_is_nan_or_infinite(cls: type[Any], values: dict[str, Any]) -> None:
    assert "finite number" in refused(cls, values)


@pytest.mark.parametrize("key", ["pool", "detail"])
def test_vision_sizes_are_positive(key: str) -> None:
    assert key in refused(VisionConfig, {"vision_tower": "x", "type": "efficientnet_lite0", key: 0})


def test_vision_and_image_come_together() -> None:
    vision, llm = {"vision_tower": "x", "type": "clip"}, {"model_name_or_path": "y"}
    assert "'image' is missing" in refused(ModelConfig, {"llm": llm, "vision": vision})
    assert "'vision' is missing" in refused(ModelConfig, {"llm": llm, "image": IMAGE})
    assert parse_config(ModelConfig, {"llm": llm, "vision": vision, "image": IMAGE}, "model").image is not None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rope_type": "yarn"}, "factor: Field required"),
        ({"rope_type": "yarn", "factor": 1}, "greater than 1"),
        ({"rope_type": "yarn", "factor": math.nan}, "finite"),
        ({"rope_type": "dynamic", "factor": 2}, "'linear', 'yarn' or 'llama3'"),
        ({"rope_type": "linear", "factor": 2, "beta_fast": 32}, "'beta_fast' is for rope_type 'yarn'"),
        ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}, "above it"),
        ({"rope_type": "yarn", "factor": 2, "beta_fasst": 32}, "beta_fast"),
    ],
)
def test_rope_scaling_is_checked(values: dict[str, Any], words: str) -> None:
    assert words in refused(LLMConfig, {"model_name_or_path": "x", "rope_scaling": values})
