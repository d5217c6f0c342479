"""Exact plans, checked by hand or against the reference's published numbers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from polymodal.config import ImageConfig
from polymodal.errors import ConfigError
from polymodal.media_plan import Box, Size, plan_image, select_best_resolution, unpad_box
from tests.media_plan.source_boxes import tile_source_box

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
TOKENS = Size(24, 24)


def config(how: str, **settings: Any) -> ImageConfig:
    base: dict[str, Any] = {"tile_size": (336, 336), "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
    return ImageConfig(**{**base, "image_aspect_ratio": how, **settings})


def anyres(merge: str = "spatial_unpad", **settings: Any) -> ImageConfig:
    return config("anyres", **{"image_grid_pinpoints": PINPOINTS, "mm_patch_merge_type": merge, **settings})


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [
        (336, 336, 1176),
        (672, 672, 2928),
        (480, 640, 2340),
        (640, 480, 2352),
        (333, 500, 1464),
        (200, 1200, 1452),
        (1200, 200, 1512),
    ],
)
def test_llava_next_counts(height: int, width: int, count: int) -> None:
    assert plan_image(Size(height, width), anyres(), TOKENS).num_tokens == count


def test_anyres_plan_in_full() -> None:
    plan = plan_image(Size(480, 640), anyres(), TOKENS)
    assert plan.canvas == Size(672, 672)
    assert plan.grid == Size(2, 2)
    assert plan.content_box == Box(84, 0, 504, 672)
    assert (plan.overview, plan.num_tiles) == ("first", 5)
    assert (plan.overview_box, plan.overview_frame) == (Box(0, 0, 336, 336), None)
    assert plan.kept == Box(6, 0, 36, 48)
    assert plan.unpadded == Size(36, 48)
    assert plan.newline
    assert plan.num_tokens == 576 + 36 * (48 + 1)
    assert not plan.scaled_to_fit


def test_anyres_merges() -> None:
    # 480x640 on a 2x2 grid: 5 tiles of 576 tokens, and no newlines but with unpad.
    for merge in ("flat", "spatial"):
        plan = plan_image(Size(480, 640), anyres(merge), TOKENS)
        assert (plan.num_tokens, plan.newline) == (5 * 576, False)
    assert plan_image(Size(480, 640), anyres("flat"), TOKENS).kept is None
    assert plan_image(Size(480, 640), anyres("spatial"), TOKENS).kept == Box(0, 0, 48, 48)


def test_anyres_max_shrinks() -> None:
    grid = tuple((h * 384, w * 384) for h in range(1, 7) for w in range(1, 7))
    image = anyres(tile_size=(384, 384), image_grid_pinpoints=grid, anyres_max=9)
    plan = plan_image(Size(2304, 2304), image, Size(27, 27))
    assert plan.kept == Box(0, 0, 162, 162)
    assert plan.unpadded == Size(81, 81)  # 6x6 tiles of 27x27, halved to the worth of 9 tiles
    assert plan.num_tokens == 729 + 81 * 82
    small = plan_image(Size(384, 384), image, Size(27, 27))
    assert small.unpadded == Size(27, 27)
    assert small.num_tokens == 729 + 27 * 28


def test_anyres_of_a_hairline_keeps_the_overview() -> None:
    # The reference's own rounding leaves no row of the canvas; the global view still shows the image.
    plan = plan_image(Size(1, 6000), anyres(), TOKENS)
    assert plan.kept is not None
    assert plan.kept.height == 0
    assert plan.num_tokens == 576


def test_height_and_width_are_not_swapped() -> None:
    tall = plan_image(Size(1000, 300), anyres(), TOKENS)
    wide = plan_image(Size(300, 1000), anyres(), TOKENS)
    assert (tall.canvas, wide.canvas) == (Size(1008, 336), Size(336, 1008))
    assert select_best_resolution(Size(1000, 300), [Size(336, 1008), Size(1008, 336)]) == Size(1008, 336)
    assert unpad_box(Size(24, 48), Size(100, 400)) == Box(6, 0, 12, 48)
    assert unpad_box(Size(48, 24), Size(400, 100)) == Box(0, 6, 48, 12)


def test_squash() -> None:
    plan = plan_image(Size(300, 500), config("squash"), TOKENS)
    assert (plan.content_box, plan.frame) == (Box(0, 0, 336, 336), None)
    assert (plan.num_tiles, plan.num_tokens) == (1, 576)


def test_pad_frames_the_image_in_source_pixels() -> None:
    plan = plan_image(Size(300, 501), config("pad"), TOKENS)
    assert plan.frame == Box(100, 0, 501, 501)
    assert plan.content_box == Box(0, 0, 336, 336)
    assert plan_image(Size(501, 300), config("pad"), TOKENS).frame == Box(0, 100, 501, 501)
    assert plan_image(Size(50, 50), config("pad"), TOKENS).frame is None


def test_pad_to_a_tile_that_is_not_square() -> None:
    plan = plan_image(Size(100, 100), config("pad", tile_size=(100, 300)), TOKENS)
    assert plan.frame == Box(0, 100, 100, 300)


def test_pad_resizes_first_where_the_frame_would_be_huge() -> None:
    plan = plan_image(Size(10, 60_000), config("pad"), TOKENS)
    assert plan.frame is None
    assert plan.content_box == Box(167, 0, 1, 336)


def test_crop() -> None:
    assert plan_image(Size(300, 500), config("crop"), TOKENS).content_box == Box(0, -112, 336, 560)
    # DINOv2: short side to 256, centre 224.
    dino = config("crop", tile_size=(224, 224), resize_short_side=256)
    assert plan_image(Size(500, 301), dino, TOKENS).content_box == Box(-100, -16, 425, 256)
    # Resized below the tile: the crop is padded, the odd pixel going before the image.
    small = config("crop", tile_size=(224, 224), resize_short_side=101)
    assert plan_image(Size(300, 300), small, TOKENS).content_box == Box(62, 62, 101, 101)


def test_slice_at_natural_size() -> None:
    plan = plan_image(Size(400, 1000), config("slice"), TOKENS)
    assert (plan.grid, plan.content_box) == (Size(2, 3), Box(0, 0, 400, 1000))
    assert (plan.overview, plan.num_tiles, plan.num_tokens) == ("last", 7, 7 * 576)
    assert not plan.scaled_to_fit


def test_slice_scales_to_fit_and_says_so() -> None:
    plan = plan_image(Size(3000, 4000), config("slice", max_tiles=6), TOKENS)
    assert plan.scaled_to_fit
    assert (plan.grid, plan.content_box) == (Size(2, 3), Box(0, 0, 672, 896))
    one = plan_image(Size(3000, 4000), config("slice", max_tiles=1), TOKENS)
    assert (one.grid, one.overview, one.scaled_to_fit) == (Size(1, 1), "none", True)


def test_slice_of_a_small_image_is_one_tile_without_thumbnail() -> None:
    plan = plan_image(Size(20, 30), config("slice", overview_aspect_ratio="pad"), TOKENS)
    assert (plan.num_tiles, plan.overview, plan.scaled_to_fit) == (1, "none", False)
    assert plan.frame == Box(5, 0, 30, 30)
    # Never a centre crop: that would drop a part.
    assert plan_image(Size(20, 30), config("slice", overview_aspect_ratio="crop"), TOKENS).frame is not None


def test_slice_without_thumbnail() -> None:
    plan = plan_image(Size(400, 1000), config("slice", thumbnail=False), TOKENS)
    assert (plan.overview, plan.num_tiles) == ("none", 6)


def test_tile_source_box() -> None:
    plan = plan_image(Size(480, 640), anyres(), TOKENS)
    assert tile_source_box(plan, 0) == Box(0, 0, 480, 640)
    assert tile_source_box(plan, 1) == Box(0, 0, 240, 320)
    assert tile_source_box(plan, 4) == Box(240, 320, 240, 320)
    padded = plan_image(Size(300, 500), config("pad"), TOKENS)
    assert tile_source_box(padded, 0) == Box(0, 0, 300, 500)
    with pytest.raises(IndexError, match="5 tiles"):
        tile_source_box(plan, 5)


@pytest.mark.parametrize(
    ("image", "line"),
    [
        (config("anyres"), "needs image_grid_pinpoints"),
        (config("anyres", image_grid_pinpoints=((336, 500),)), "336x500 is no multiple"),
        (anyres("flat", anyres_max=9), "needs mm_patch_merge_type: spatial_unpad"),
        (config("pad", mm_patch_merge_type="spatial"), "mm_patch_merge_type is set"),
        (config("slice", anyres_max=9), "anyres_max is set"),
        (config("squash", image_grid_pinpoints=PINPOINTS), "image_grid_pinpoints is set"),
    ],
)
def test_settings_that_cannot_work_are_refused(image: ImageConfig, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        plan_image(Size(100, 200), image, TOKENS)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="image size must be at least 1x1, got 0x5"):
        plan_image(Size(0, 5), config("pad"), TOKENS)
    with pytest.raises(ConfigError, match="tokens per tile"):
        plan_image(Size(5, 5), config("pad"), Size(0, 1))


def test_media_plan_imports_nothing_heavy() -> None:
    code = (
        "import sys, polymodal.media_plan;"
        "print(sorted({'torch', 'numpy', 'PIL', 'pydantic', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_of_several_images_is_padded_to_a_tile_and_ends_with_a_newline() -> None:
    rules = anyres(several_images="pad")
    assert plan_image(Size(480, 640), rules, TOKENS) == plan_image(Size(480, 640), anyres(), TOKENS)
    plan = plan_image(Size(480, 640), rules, TOKENS, alone=False)
    assert (plan.num_tiles, plan.num_tokens, plan.newline, plan.overview) == (1, 24 * 24 + 1, True, "none")
    assert plan.frame == Box(80, 0, 640, 640)
    assert plan_image(Size(480, 640), anyres(), TOKENS, alone=False).num_tokens == 2340
    with pytest.raises(ConfigError, match="several_images is set but image_aspect_ratio is 'pad'"):
        plan_image(Size(480, 640), config("pad", several_images="pad"), TOKENS)


NATIVE = {"image_aspect_ratio": "native", "tile_size": (224, 224), "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}


@pytest.mark.parametrize(
    "source, tokens, expected",
    [
        (Size(224, 224), Size(16, 16), Size(16, 16)),
        (Size(300, 420), Size(16, 16), Size(21, 30)),  # at its own scale
        (Size(301, 419), Size(8, 8), Size(11, 15)),  # two patches a side to a token
        (Size(1000, 2000), Size(16, 16), Size(22, 45)),  # scaled down to four tiles: 22.6 and 45.3 rounded, then cut
        (Size(20, 40), Size(16, 16), Size(6, 11)),  # scaled up to a quarter of a tile
        (Size(3, 100_000), Size(16, 16), Size(1, 1024)),  # thinner than a token, longer than there is room
    ],
)
def test_native_keeps_the_shape(source: Size, tokens: Size, expected: Size) -> None:
    plan = plan_image(source, ImageConfig(**NATIVE), tokens)
    assert plan.tokens == expected and plan.num_tokens == expected.area
    assert plan.tile == Size(expected.height * 224 // tokens.height, expected.width * 224 // tokens.width)


@pytest.mark.parametrize(
    "changes, tokens, said",
    [
        ({"tile_size": (384, 384)}, Size(27, 27), "384x384 is not cut evenly into 27x27"),
        ({"native_max_pixels": 100}, Size(16, 16), "native_max_pixels 100: one token is of 14x14 pixels"),
        ({"image_aspect_ratio": "pad", "native_max_pixels": 1000}, Size(16, 16), "only 'native' uses it"),
        ({"anyres_max": 4}, Size(16, 16), "only 'anyres' uses it"),
    ],
)
def test_native_refuses(changes: dict[str, Any], tokens: Size, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_image(Size(100, 100), ImageConfig(**{**NATIVE, **changes}), tokens)


def test_native_bounds_the_wrong_way_round() -> None:
    with pytest.raises(ConfigError, match="native_min_pixels 200 is more than native_max_pixels 100"):
        ImageConfig(**NATIVE, native_min_pixels=200, native_max_pixels=100)
