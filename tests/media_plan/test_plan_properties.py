"""What holds for the plan of any image, 1x1 and hairlines included."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from polymodal.config import ImageConfig
from polymodal.media_plan import Box, ImagePlan, Size, plan_image
from tests.media_plan.source_boxes import tile_source_box

SIDES = st.integers(1, 6000)
SIZES = st.one_of(
    st.builds(Size, SIDES, SIDES), st.builds(Size, st.integers(1, 3), SIDES), st.builds(Size, SIDES, st.integers(1, 3))
)
TILES = st.one_of(
    st.builds(Size, st.integers(1, 400), st.integers(1, 400)), st.integers(1, 400).map(lambda side: Size(side, side))
)
TOKENS = st.builds(Size, st.integers(1, 28), st.integers(1, 28))
OVERVIEWS = st.sampled_from(["squash", "pad", "crop"])


def config(how: str, tile: Size, **changes: Any) -> ImageConfig:
    return ImageConfig(
        image_aspect_ratio=how,  # type: ignore[arg-type]
        tile_size=(tile.height, tile.width),
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        **changes,
    )


def overlaps(box: Box, canvas: Size) -> bool:
    return box.top < canvas.height and box.left < canvas.width and box.bottom > 0 and box.right > 0


def inside(box: Box, canvas: Size) -> bool:
    return box.top >= 0 and box.left >= 0 and box.bottom <= canvas.height and box.right <= canvas.width


def check_any(plan: ImagePlan, source: Size, tile: Size, tokens: Size) -> None:
    assert (plan.source, plan.tile, plan.tokens) == (source, tile, tokens)
    assert plan.canvas == Size(plan.grid.height * tile.height, plan.grid.width * tile.width)
    assert plan.num_tiles == plan.grid.area + (plan.overview_box is not None)
    assert (plan.overview == "none") == (plan.overview_box is None)
    assert overlaps(plan.content_box, plan.canvas)
    for frame in (plan.frame, plan.overview_frame):
        if frame is not None:
            assert 0 <= frame.top <= frame.height - source.height
            assert 0 <= frame.left <= frame.width - source.width


def covered(plan: ImagePlan, tiles: range) -> int:
    """Count source pixels in the union of the tiles' parts (rows x columns, since tiles lie on a grid)."""
    boxes = [tile_source_box(plan, index) for index in tiles]
    rows = {y for box in boxes if box.size.area for y in range(box.top, box.bottom)}
    columns = {x for box in boxes if box.size.area for x in range(box.left, box.right)}
    return len(rows) * len(columns)


@given(SIZES, TILES, TOKENS, st.sampled_from(["squash", "pad", "crop"]))
def test_one_tile(source: Size, tile: Size, tokens: Size, how: str) -> None:
    plan = plan_image(source, config(how, tile), tokens)
    check_any(plan, source, tile, tokens)
    assert (plan.num_tiles, plan.num_tokens) == (1, tokens.area)
    if how != "crop":
        assert inside(plan.content_box, plan.canvas)
        assert tile_source_box(plan, 0) == Box(0, 0, source.height, source.width)
    elif tile.height == tile.width:  # a crop fills a square tile
        box = plan.content_box
        assert max(box.top, box.left) <= 0
        assert min(box.bottom, box.right) >= tile.height


@given(SIZES, TOKENS, st.integers(1, 12), st.booleans(), OVERVIEWS)
@settings(max_examples=60)
def test_slices_cover_the_image(source: Size, tokens: Size, most: int, thumbnail: bool, overview: str) -> None:
    tile = Size(336, 280)
    image = config("slice", tile, max_tiles=most, thumbnail=thumbnail, overview_aspect_ratio=overview)
    plan = plan_image(source, image, tokens)
    check_any(plan, source, tile, tokens)
    assert plan.grid.area <= most
    assert inside(plan.content_box, plan.canvas)
    assert covered(plan, range(plan.grid.area)) == source.area
    assert plan.num_tokens == plan.num_tiles * tokens.area
    assert (plan.overview == "last") == (thumbnail and plan.grid.area > 1)
    natural = -(-source.height // 336) * -(-source.width // 280)
    assert plan.scaled_to_fit == (natural > most)
    if plan.grid.area > 1:
        if not plan.scaled_to_fit:
            assert plan.content_box == Box(0, 0, source.height, source.width)
        # No tile is only padding.
        assert all(tile_source_box(plan, index).size.area for index in range(plan.grid.area))


@given(SIZES, TOKENS, st.sampled_from(["flat", "spatial", "spatial_unpad"]), OVERVIEWS, st.integers(1, 12) | st.none())
@settings(max_examples=100)
def test_anyres(source: Size, tokens: Size, merge: str, overview: str, most: int | None) -> None:
    tile = Size(336, 336)
    image = config(
        "anyres",
        tile,
        image_grid_pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008), (1344, 1344)),
        mm_patch_merge_type=merge,
        overview_aspect_ratio=overview,
        anyres_max=most if merge == "spatial_unpad" else None,
    )
    plan = plan_image(source, image, tokens)
    check_any(plan, source, tile, tokens)
    assert inside(plan.content_box, plan.canvas)
    assert covered(plan, range(1, plan.num_tiles)) == source.area
    field = Size(plan.grid.height * tokens.height, plan.grid.width * tokens.width)
    if merge == "flat":
        assert plan.kept is None
        assert plan.unpadded is None
        assert plan.num_tokens == plan.num_tiles * tokens.area
        return
    assert plan.kept is not None
    assert plan.unpadded is not None
    assert inside(plan.kept, field)
    assert plan.unpadded.height <= plan.kept.height
    assert plan.unpadded.width <= plan.kept.width
    rows, columns = plan.unpadded.height, plan.unpadded.width
    assert plan.num_tokens == tokens.area + rows * columns + plan.newline * rows
    # The same number of tokens is taken from either side.
    assert plan.kept.top == field.height - plan.kept.bottom
    assert plan.kept.left == field.width - plan.kept.right
    if merge == "spatial":
        assert plan.kept == Box(0, 0, field.height, field.width)
    if image.anyres_max is not None:
        assert rows * columns <= 1.21 * image.anyres_max * tokens.area + 1e-9


@settings(max_examples=500)
@given(source=SIZES, cell=st.builds(Size, st.integers(1, 32), st.integers(1, 32)), tokens=TOKENS, data=st.data())
def test_native_plans_keep_to_their_bounds(source: Size, cell: Size, tokens: Size, data: st.DataObject) -> None:
    tile = tokens * cell
    most = data.draw(st.none() | st.integers(cell.area, 200 * cell.area))
    least = data.draw(st.none() | st.integers(1, most or 4 * tile.area))
    newline = data.draw(st.booleans())
    rules = {"mm_patch_merge_type": "spatial_unpad"} if newline else {}
    image = config("native", tile, native_min_pixels=least, native_max_pixels=most, **rules)
    plan = plan_image(source, image, tokens)
    highest = most or 4 * tile.area
    assert plan.num_tiles == 1 and plan.tile == plan.canvas == plan.content_box.size == plan.tokens * cell
    assert plan.tile.area <= highest
    assert plan.num_tokens == plan.tokens.height * (plan.tokens.width + newline)
    assert plan.scaled_to_fit == (source.area > highest)
    # Neither side is further from the image's own shape than rounding to whole tokens makes it.
    scale = 1.0
    lowest = least or min(tile.area // 4, highest)
    if source.area > highest:
        scale = (highest / source.area) ** 0.5
    elif source.area < lowest:
        scale = (lowest / source.area) ** 0.5
    rows, columns = source.height * scale / cell.height, source.width * scale / cell.width
    if rows >= 1 and columns >= 1:
        assert abs(plan.tokens.height - rows) <= 1 and abs(plan.tokens.width - columns) <= 1
