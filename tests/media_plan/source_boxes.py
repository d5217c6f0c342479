"""Which part of an image a tile shows, worked back from its plan: what plans and tiles are tested against."""

from __future__ import annotations

from polymodal.media_plan import Box, ImagePlan


def tile_source_box(plan: ImagePlan, index: int) -> Box:
    """Find the part of the image that a tile shows, in source pixels."""
    if not 0 <= index < plan.num_tiles:
        raise IndexError(f"tile {index} of an image with {plan.num_tiles} tiles")
    on_grid = index - (plan.overview == "first")
    if 0 <= on_grid < plan.grid.area:
        row, column = divmod(on_grid, plan.grid.width)
        box, frame = plan.content_box, plan.frame
        top, left = row * plan.tile.height, column * plan.tile.width
    else:
        assert plan.overview_box is not None
        box, frame, top, left = plan.overview_box, plan.overview_frame, 0, 0
    place = frame or Box(0, 0, plan.source.height, plan.source.width)
    y0, y1 = _span(top - box.top, plan.tile.height, place.height, box.height, place.top, plan.source.height)
    x0, x1 = _span(left - box.left, plan.tile.width, place.width, box.width, place.left, plan.source.width)
    return Box(y0, x0, y1 - y0, x1 - x0)


def _span(start: int, length: int, frame: int, content: int, offset: int, source: int) -> tuple[int, int]:
    """Take a span of resized pixels back to source pixels along one axis."""
    low = min(max(start * frame // content - offset, 0), source)
    high = min(max(-(-(start + length) * frame // content) - offset, 0), source)
    return low, max(low, high)
