"""Pure integers: how an image of a given size becomes tiles and tokens. No torch, no Pillow.

A plan is made once, by the processor, and carried along; the pixel code, the model, the packer and the cost estimate
only read it. Five ways to fit an image are planned: "squash", "pad", "crop" (one tile), "slice" (tiles at the
image's own scale, plus a thumbnail) and "anyres" (LLaVA-NeXT, arXiv:2407.07895; `anyres_max` is LLaVA-OneVision,
arXiv:2408.03326).

AnyRes counts exactly as the reference does, rounding included: the reference works in floating point, so the same
floating-point steps are taken here and turned into integers once. "slice" differs from Idefics and InternVL in that
the image is never stretched: it keeps its own scale and the rest of the last tiles is filled with the background;
an image that asks for more than `max_tiles` is scaled down as a whole, and the plan says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from polymodal.config import AspectRatio, PatchMerge
from polymodal.errors import ConfigError

if TYPE_CHECKING:
    from polymodal.config import ImageConfig


@dataclass(frozen=True, order=True)
class Size:
    """Height and width, always in this order; pixels, patches or tiles as the name of the variable says."""

    height: int
    width: int

    @property
    def area(self) -> int:
        """Height times width."""
        return self.height * self.width


@dataclass(frozen=True)
class Box:
    """A rectangle from its top left corner; in pixels, or in tokens where the name of the variable says so."""

    top: int
    left: int
    height: int
    width: int

    @property
    def size(self) -> Size:
        """Height and width."""
        return Size(self.height, self.width)

    @property
    def bottom(self) -> int:
        """The first row below the box."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """The first column right of the box."""
        return self.left + self.width


@dataclass(frozen=True)
class ImagePlan:
    """Everything integer about one image's way into the sequence."""

    # Pixels. The image is laid on its `frame` where it has one (padding comes before resizing, as LLaVA-1.5 does),
    # the result is resized to `content_box` and laid on a `canvas`, and the canvas is cut row-major into `grid` tiles
    # of `tile` pixels. One more tile, made the same way from `overview_frame` and `overview_box`, shows the whole
    # image: first (`overview="first"`, LLaVA-NeXT's global view) or last (`overview="last"`, a thumbnail).
    # Tokens. Each tile gives `tokens` (rows, columns). With `merge="flat"` the sequence is all tiles' tokens one tile
    # after the other, in the order of the tiles, then a newline embedding where `newline`. Otherwise the model, by
    # integers alone,
    # 1. joins the grid's tiles to one field of `grid.height * tokens.height` rows by `grid.width * tokens.width`
    #    columns;
    # 2. keeps the part `kept` of that field;
    # 3. where `unpadded` is not `kept`'s size, resizes the part to `unpadded` (bilinear);
    # 4. where `newline`, ends each row with the newline embedding;
    # 5. reads it row by row, after the overview tile's tokens.

    source: Size  # The image's size in pixels, after EXIF orientation
    tile: Size  # What the encoder takes, in pixels
    canvas: Size  # `grid` times `tile`, in pixels
    # Where the resized image (or frame) lies on the canvas; may stick out (centre crop: negative top or left)
    content_box: Box
    grid: Size  # Rows and columns of tiles cut from the canvas
    overview: Literal["none", "first", "last"]  # Whether and where one more tile shows the whole image
    tokens: Size  # Projected tokens per tile, as a grid (rows, columns); `Size(1, Q)` where they have no spatial order
    # How tile tokens are laid in the sequence: "flat" one tile after the other; "spatial" the tiles' rows joined
    # across the canvas; "spatial_unpad" the same with the rows and columns that hold only padding taken away and a
    # newline token ending each row (as in LLaVA, plain "spatial" has no newlines)
    merge: PatchMerge
    # Rows and columns of tokens that the grid's tiles come to in the sequence, newlines left out: `kept`'s size, or
    # less where anyres_max_N shrinks it; None for "flat"
    unpadded: Size | None
    scaled_to_fit: bool  # The image asked for more tiles than allowed and was scaled down to fit
    num_tokens: int  # Positions the image takes in the sequence
    # The rectangle that the image is laid on before it is resized: `height` and `width` are the frame's, `top` and
    # `left` the image's place in it, all in source pixels. None: the image itself is resized
    frame: Box | None = None
    overview_box: Box | None = None  # As `content_box`, on the overview tile; None where there is no overview
    overview_frame: Box | None = None  # As `frame`, for the overview tile
    # The part of the joined tiles' token field that is kept, in tokens; the whole field unless `merge ==
    # "spatial_unpad"`; None for "flat". An image thinner than one token row may keep 0 rows, as in the reference:
    # its overview still shows it
    kept: Box | None = None
    newline: bool = False  # Each row ends with a newline token; with `merge="flat"`, the whole image does

    @property
    def num_tiles(self) -> int:
        """Tiles the encoder sees: the grid, and the overview where there is one."""
        return self.grid.area + (self.overview != "none")


def plan_image(source: Size, image: ImageConfig, tokens: Size, *, alone: bool = True) -> ImagePlan:
    """Plan one image."""
    tile = Size(*image.tile_size)
    _positive("image size", source)
    _positive("tile_size", tile)
    _positive("tokens per tile", tokens)
    if image.image_aspect_ratio == "anyres":
        if image.several_images == "pad" and not alone:
            return _plan_padded(source, image, tile, tokens)
        return _plan_anyres(source, image, tile, tokens)
    _refuse_anyres_settings(image)
    if image.image_aspect_ratio == "slice":
        return _plan_slice(source, image, tile, tokens)
    frame, content = fit_tile(source, tile, image.image_aspect_ratio, image.resize_short_side, image.max_pixels)
    return _plan_flat(source, tile, tokens, grid=Size(1, 1), frame=frame, content=content)


def fit_tile(
    source: Size, tile: Size, how: AspectRatio, short_side: int | None, max_pixels: int
) -> tuple[Box | None, Box]:
    """Fit a whole image to one tile."""
    # "pad" surrounds the image in source pixels and resizes after, as LLaVA-1.5 does. Where the frame would have
    # more than `max_pixels` (an image thousands of times as long as it is high), the image is resized first
    # instead: the same layout, without the memory.
    whole = Box(0, 0, tile.height, tile.width)
    if how == "squash":
        return None, whole
    if how == "pad":
        frame = Size(
            max(source.height, _ceil_div(source.width * tile.height, tile.width)),
            max(source.width, _ceil_div(source.height * tile.width, tile.height)),
        )
        if frame == source:
            return None, whole
        if frame.area > max_pixels:
            return None, _centre(_fit_inside(source, tile), tile)
        place = _centre(source, frame)
        return Box(place.top, place.left, frame.height, frame.width), whole
    short = min(tile.height, tile.width) if short_side is None else short_side
    if short < 1:
        raise ConfigError(f"resize_short_side must be at least 1, got {short}")
    if source.width <= source.height:
        resized = Size(int(short * source.height / source.width), short)
    else:
        resized = Size(short, int(short * source.width / source.height))
    # Floor division of a negative number rounds away from zero: the reference pads the same way.
    top, left = -((resized.height - tile.height) // 2), -((resized.width - tile.width) // 2)
    return None, Box(top, left, resized.height, resized.width)


def _plan_flat(
    source: Size,
    tile: Size,
    tokens: Size,
    *,
    grid: Size,
    content: Box,
    frame: Box | None = None,
    overview_box: Box | None = None,
    overview_frame: Box | None = None,
    scaled_to_fit: bool = False,
) -> ImagePlan:
    """Finish a plan whose tiles follow one another, thumbnail last."""
    return ImagePlan(
        source=source,
        tile=tile,
        canvas=Size(grid.height * tile.height, grid.width * tile.width),
        content_box=content,
        grid=grid,
        overview="none" if overview_box is None else "last",
        tokens=tokens,
        merge="flat",
        unpadded=None,
        scaled_to_fit=scaled_to_fit,
        num_tokens=(grid.area + (overview_box is not None)) * tokens.area,
        frame=frame,
        overview_box=overview_box,
        overview_frame=overview_frame,
    )


def _plan_slice(source: Size, image: ImageConfig, tile: Size, tokens: Size) -> ImagePlan:
    """Cut the image into tiles at its own scale, or at the largest scale that `max_tiles` allows."""
    if image.max_tiles < 1:
        raise ConfigError(f"max_tiles must be at least 1, got {image.max_tiles}")
    content = source
    scaled = _tiles_needed(source, tile).area > image.max_tiles
    if scaled:
        content = _scale_to_tiles(source, tile, image.max_tiles)
    grid = _tiles_needed(content, tile)
    # A tile that is the whole image must not be a centre crop: nothing may be dropped.
    whole: AspectRatio = "squash" if image.overview_aspect_ratio == "squash" else "pad"
    if grid.area == 1:
        frame, box = fit_tile(source, tile, whole, None, image.max_pixels)
        return _plan_flat(source, tile, tokens, grid=grid, frame=frame, content=box, scaled_to_fit=scaled)
    view: tuple[Box | None, Box | None] = (None, None)
    if image.thumbnail:
        view = fit_tile(source, tile, image.overview_aspect_ratio, image.resize_short_side, image.max_pixels)
    return _plan_flat(
        source,
        tile,
        tokens,
        grid=grid,
        content=Box(0, 0, content.height, content.width),
        overview_box=view[1],
        overview_frame=view[0],
        scaled_to_fit=scaled,
    )


def _scale_to_tiles(source: Size, tile: Size, max_tiles: int) -> Size:
    """Give the largest size of the same shape that needs at most `max_tiles` tiles; fewer tiles where that ties."""
    best = Size(1, 1)
    for rows in range(1, max_tiles + 1):
        grid = Size(rows, max_tiles // rows)
        fitted = _fit_inside(source, Size(grid.height * tile.height, grid.width * tile.width))
        better = (fitted.area, -_tiles_needed(fitted, tile).area) > (best.area, -_tiles_needed(best, tile).area)
        if better:
            best = fitted
    return best


def _plan_anyres(source: Size, image: ImageConfig, tile: Size, tokens: Size) -> ImagePlan:
    """Fit the image to the best pinpoint, add a global view first, and count tokens as LLaVA-NeXT does."""
    canvas = select_best_resolution(source, _pinpoints(image, tile))
    grid = Size(canvas.height // tile.height, canvas.width // tile.width)
    content = _centre(_fit_canvas(source, canvas), canvas)
    overview_frame, overview_box = fit_tile(
        source, tile, image.overview_aspect_ratio, image.resize_short_side, image.max_pixels
    )
    field = Size(grid.height * tokens.height, grid.width * tokens.width)
    merge = image.mm_patch_merge_type
    kept = unpad_box(field, source) if merge == "spatial_unpad" else Box(0, 0, field.height, field.width)
    laid = kept.size
    if image.anyres_max is not None:
        if merge != "spatial_unpad" or image.anyres_max < 1:
            raise ConfigError(
                "anyres_max must be at least 1 and needs mm_patch_merge_type: spatial_unpad, "
                f"got {image.anyres_max} with {merge}"
            )
        laid = _shrink(kept.size, tokens, image.anyres_max)
    newline = merge == "spatial_unpad"
    return ImagePlan(
        source=source,
        tile=tile,
        canvas=canvas,
        content_box=content,
        grid=grid,
        overview="first",
        tokens=tokens,
        merge=merge,
        unpadded=None if merge == "flat" else laid,
        scaled_to_fit=content.height < source.height or content.width < source.width,
        num_tokens=tokens.area + laid.height * (laid.width + newline),
        overview_box=overview_box,
        overview_frame=overview_frame,
        kept=None if merge == "flat" else kept,
        newline=newline,
    )


def _plan_padded(source: Size, image: ImageConfig, tile: Size, tokens: Size) -> ImagePlan:
    """Pad the image to one tile, as LLaVA-OneVision does with each of several images; a newline ends it."""
    frame, content = fit_tile(source, tile, "pad", None, image.max_pixels)
    plan = _plan_flat(source, tile, tokens, grid=Size(1, 1), frame=frame, content=content)
    newline = image.mm_patch_merge_type == "spatial_unpad"
    return replace(plan, newline=newline, num_tokens=plan.num_tokens + newline)


def select_best_resolution(source: Size, pinpoints: Sequence[Size]) -> Size:
    """Choose LLaVA-NeXT's canvas: the most pixels of the image kept, then the fewest wasted, then the first."""

    def rank(canvas: Size) -> tuple[int, int]:
        scale = min(canvas.width / source.width, canvas.height / source.height)
        kept = min(int(source.width * scale) * int(source.height * scale), source.area)
        return kept, kept - canvas.area

    return max(pinpoints, key=rank)


def unpad_box(field: Size, source: Size) -> Box:
    """Find the tokens of a canvas that show the image, as LLaVA-NeXT does."""
    if source.width / source.height > field.width / field.height:
        # Rounding to 7 digits undoes floating-point noise before the cut; the reference does exactly this.
        rows = int(round(source.height * (field.width / source.width), 7))
        pad = (field.height - rows) // 2
        return Box(pad, 0, field.height - 2 * pad, field.width)
    columns = int(round(source.width * (field.height / source.height), 7))
    pad = (field.width - columns) // 2
    return Box(0, pad, field.height, field.width - 2 * pad)


def tile_source_box(plan: ImagePlan, index: int) -> Box:
    """Find the part of the image that a tile shows, for drawing tiles on the image."""
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
    low = start * frame // content - offset
    high = _ceil_div((start + length) * frame, content) - offset
    low, high = min(max(low, 0), source), min(max(high, 0), source)
    return low, max(low, high)


def _shrink(kept: Size, tokens: Size, max_tiles: int) -> Size:
    """Shrink a token field to about `max_tiles` tiles' worth, as LLaVA-OneVision does above 1.1 times the side."""
    ratio = math.sqrt(kept.area / (max_tiles * tokens.area))
    if ratio <= 1.1:
        return kept
    return Size(int(kept.height // ratio), int(kept.width // ratio))


def _fit_canvas(source: Size, canvas: Size) -> Size:
    """Resize to fit a canvas, fractions rounded up, as LLaVA-NeXT does."""
    scale_width, scale_height = canvas.width / source.width, canvas.height / source.height
    if scale_width < scale_height:
        return Size(min(math.ceil(source.height * scale_width), canvas.height), canvas.width)
    return Size(canvas.height, min(math.ceil(source.width * scale_height), canvas.width))


def _fit_inside(source: Size, room: Size) -> Size:
    """Resize to fit a room exactly on one side, the other rounded to the nearest pixel and at least 1."""
    if source.width * room.height > room.width * source.height:
        height = (2 * source.height * room.width + source.width) // (2 * source.width)
        return Size(min(max(height, 1), room.height), room.width)
    width = (2 * source.width * room.height + source.height) // (2 * source.height)
    return Size(room.height, min(max(width, 1), room.width))


def _centre(inner: Size, outer: Size) -> Box:
    """Centre one rectangle in another, the odd pixel going to the bottom and right."""
    top, left = (outer.height - inner.height) // 2, (outer.width - inner.width) // 2
    return Box(top, left, inner.height, inner.width)


def _tiles_needed(content: Size, tile: Size) -> Size:
    return Size(_ceil_div(content.height, tile.height), _ceil_div(content.width, tile.width))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _pinpoints(image: ImageConfig, tile: Size) -> list[Size]:
    """Read and check the pinpoints."""
    if not image.image_grid_pinpoints:
        raise ConfigError("image_aspect_ratio: anyres needs image_grid_pinpoints, and none are given")
    pinpoints = [Size(height, width) for height, width in image.image_grid_pinpoints]
    for point in pinpoints:
        _positive("image_grid_pinpoints", point)
        if point.height % tile.height or point.width % tile.width:
            raise ConfigError(
                f"image_grid_pinpoints: {point.height}x{point.width} is no multiple of "
                f"the tile {tile.height}x{tile.width} (height x width)"
            )
    return pinpoints


def _refuse_anyres_settings(image: ImageConfig) -> None:
    """Refuse settings that only "anyres" reads, so that none is ignored in silence."""
    unset: dict[str, object] = {
        "image_grid_pinpoints": (),
        "anyres_max": None,
        "mm_patch_merge_type": "flat",
        "several_images": "alike",
    }
    for name, value in unset.items():
        if getattr(image, name) != value:
            raise ConfigError(
                f"{name} is set but image_aspect_ratio is {image.image_aspect_ratio!r}; only 'anyres' uses it"
            )


def _positive(what: str, size: Size) -> None:
    if size.height < 1 or size.width < 1:
        raise ConfigError(f"{what} must be at least 1x1, got {size.height}x{size.width} (height x width)")
