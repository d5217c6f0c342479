"""Tiles show what the plan says, and nothing is lost on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from polymodal.config import ImageConfig
from polymodal.media_plan import Size, plan_image
from polymodal.processing.image_transform import make_tiles, normalise, pad_colour, tile_bytes, tile_images
from tests.media_plan.source_boxes import tile_source_box

TOKENS = Size(4, 4)
PINPOINTS = ((32, 64), (64, 32), (64, 64))


def rules(how: str, **settings: Any) -> ImageConfig:
    base: dict[str, Any] = {"tile_size": (32, 32), "image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.3, 0.4)}
    if how == "anyres":
        base["image_grid_pinpoints"] = PINPOINTS
    return ImageConfig(**{**base, "image_aspect_ratio": how, **settings})


def noise(height: int, width: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


def bytes_of(image: PILImage.Image, config: ImageConfig) -> np.ndarray:
    return tile_bytes(image, plan_image(Size(image.height, image.width), config, TOKENS), config)


@given(
    st.sampled_from(["squash", "pad", "crop", "slice", "anyres"]),
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from(["squash", "pad", "crop"]),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
@settings(max_examples=150, deadline=None)
def test_as_many_tiles_as_planned(how: str, height: int, width: int, overview: str, tile: tuple[int, int]) -> None:
    if how == "anyres":
        tile = (32, 32)
    config = rules(how, overview_aspect_ratio=overview, tile_size=tile)
    image = noise(height, width)
    plan = plan_image(Size(height, width), config, TOKENS)
    images = tile_images(image, plan, config)
    assert len(images) == plan.num_tiles
    assert {(p.mode, p.height, p.width) for p in images} == {("RGB", *tile)}
    tiles = make_tiles(image, plan, config)
    assert tiles.shape == (plan.num_tiles, 3, *tile)
    assert tiles.dtype == np.float32
    assert tiles.flags["C_CONTIGUOUS"]


def test_slices_put_together_are_the_image() -> None:
    image = noise(70, 90)
    tiles = bytes_of(image, rules("slice", max_tiles=9, background=(1, 2, 3)))
    assert tiles.shape == (10, 3, 32, 32)
    canvas = tiles[:9].reshape(3, 3, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(96, 96, 3)
    np.testing.assert_array_equal(canvas[:70, :90], np.asarray(image))
    assert (canvas[70:] == (1, 2, 3)).all()
    assert (canvas[:, 90:] == (1, 2, 3)).all()
    thumbnail = np.asarray(image.resize((32, 32), PILImage.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(tiles[9], thumbnail)


def test_a_slice_limit_scales_instead_of_dropping() -> None:
    """A mark in the last corner of the image is still there, in the last tile of the grid."""
    image = PILImage.new("RGB", (400, 300))
    image.paste((255, 255, 255), (350, 250, 400, 300))
    config = rules("slice", max_tiles=4, thumbnail=False)
    plan = plan_image(Size(300, 400), config, TOKENS)
    assert plan.scaled_to_fit
    tiles = tile_bytes(image, plan, config)
    box = plan.content_box
    bottom, right = (box.height - 1) % 32, (box.width - 1) % 32
    assert tiles[-1, :, bottom, right].min() > 200


def test_padding_colours() -> None:
    wide = PILImage.new("RGB", (64, 32), (9, 9, 9))
    mean = [127, 102, 76]
    assert list(pad_colour(rules("pad"))) == mean
    assert bytes_of(wide, rules("pad"))[0, :, 0, 0].tolist() == mean
    assert bytes_of(wide, rules("pad", pad_color=(1, 2, 3)))[0, :, 0, 0].tolist() == [1, 2, 3]
    assert bytes_of(wide, rules("crop", resize_short_side=8))[0, :, 0, 0].tolist() == [0, 0, 0]
    assert bytes_of(wide, rules("slice", overview_aspect_ratio="pad"))[2, :, 0, 0].tolist() == [255, 255, 255]
    # 3x64 goes to the 32x64 canvas of AnyRes: black above, and the overview padded with the mean.
    hair = bytes_of(PILImage.new("RGB", (64, 3), (9, 9, 9)), rules("anyres", overview_aspect_ratio="pad"))
    assert hair[0, :, 0, 0].tolist() == mean
    assert hair[1, :, 0, 0].tolist() == [0, 0, 0]
    assert hair[1, :, 16, 16].tolist() == [9, 9, 9]


def test_a_huge_frame_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of 4x40000 pads to the same layout without 1.6 billion pixels."""
    made: list[int] = []
    new = PILImage.new

    def watched(mode: str, size: tuple[int, int], *rest: Any) -> PILImage.Image:
        made.append(size[0] * size[1])
        return new(mode, size, *rest)

    image = PILImage.new("RGB", (40_000, 4), (200, 200, 200))
    monkeypatch.setattr(PILImage, "new", watched)
    tile = bytes_of(image, rules("pad"))[0]
    assert max(made) <= 64_000_000
    assert tile[:, 15, 16].tolist() == [200, 200, 200]
    assert tile[:, 0, 0].tolist() == [127, 102, 76]
    long = bytes_of(new("RGB", (1, 9000), (7, 8, 9)), rules("crop", tile_size=(224, 224)))[0]
    assert long.reshape(3, -1).T.tolist() == [[7, 8, 9]] * 224**2


def test_source_boxes_point_at_what_the_tiles_show() -> None:
    """Paint each tile's part of the source; that tile shows mostly the paint."""
    for how in ("pad", "squash", "crop", "slice", "anyres"):
        config = rules(how, background=(0, 0, 0), pad_color=(0, 0, 0))
        plan = plan_image(Size(70, 90), config, TOKENS)
        for index in range(plan.num_tiles):
            box = tile_source_box(plan, index)
            image = PILImage.new("RGB", (90, 70))
            image.paste((255, 255, 255), (box.left, box.top, box.right, box.bottom))
            shown = tile_bytes(image, plan, config)[index]
            outside = PILImage.new("RGB", (90, 70), (255, 255, 255))
            outside.paste((0, 0, 0), (box.left, box.top, box.right, box.bottom))
            rest = tile_bytes(outside, plan, config)[index]
            assert shown.max() == 255
            # What lies outside the box can only seep in through the filter at the edges, or is padding.
            content = (shown == 255).all(axis=0)
            assert content.any()
            assert (rest[:, content] < 30).all()


def test_normalise() -> None:
    config = rules("squash")
    tiles = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    expected = (tiles / 255 - np.reshape(config.image_mean, (3, 1, 1))) / np.reshape(config.image_std, (3, 1, 1))
    np.testing.assert_allclose(normalise(tiles, config), expected, atol=1e-6)


def test_a_plan_of_another_image_is_refused() -> None:
    config = rules("pad")
    plan = plan_image(Size(10, 20), config, TOKENS)
    with pytest.raises(ValueError, match="plan is of an image of"):
        make_tiles(noise(20, 10), plan, config)
    with pytest.raises(ValueError, match="expected an RGB image, got mode L"):
        make_tiles(noise(10, 20).convert("L"), plan, config)
