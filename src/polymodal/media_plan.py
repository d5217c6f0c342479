"""Pure integers: how an image or a sound becomes tiles and tokens; imports nothing heavy. `video_plan` has videos.

A plan is made once, by the processor, and carried along; the pixel code, the model, the packer and the cost estimate
only read it. Six ways to fit an image are planned: "squash", "pad", "crop" (one tile), "slice" (tiles at the
image's own scale, plus a thumbnail), "anyres" (LLaVA-NeXT, arXiv:2407.07895; `anyres_max` is LLaVA-OneVision,
arXiv:2408.03326) and "native" (one tile of the image's own shape, as NaFlex of SigLIP 2 takes it, arXiv:2502.14786).

AnyRes counts exactly as the reference does, rounding included: the reference works in floating point, so the same
floating-point steps are taken here and turned into integers once. "slice" differs from Idefics and InternVL in that
the image is never stretched: it keeps its own scale and the rest of the last tiles is filled with the background;
an image that asks for more than `max_tiles` is scaled down as a whole, and the plan says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from polymodal.errors import ConfigError
from polymodal.utils.html import notebook_view

if TYPE_CHECKING:
    from polymodal.config import AspectRatio, ImageConfig, PatchMerge


@dataclass(frozen=True, order=True)
class Size:
    """Height and width, always in this order; pixels, patches or tiles as the name of the variable says."""

    height: int
    width: int

    @property
    def area(self) -> int:
        """Height times width."""
        return self.height * self.width

    def __mul__(self, inner: Size) -> Size:
        return Size(self.height * inner.height, self.width * inner.width)


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


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """Everything integer about one image's way into the sequence."""

    # Pixels: the image is laid on its `frame` where it has one (padding comes before resizing, as in LLaVA-1.5), the
    # result is resized to `content_box` and laid on a `canvas`, and the canvas is cut row by row into `grid` tiles of
    # `tile` pixels. One more tile, made so from `overview_frame` and `overview_box`, shows the whole image.
    # Tokens: each tile gives `tokens`. With `merge="flat"` the sequence is the tiles' tokens, one tile after the other,
    # then a newline embedding where `newline`; `kept` and `unpadded` are None. Otherwise the model
    # 1. joins the grid's tiles to one field of `grid` times `tokens`;
    # 2. keeps the part `kept` of that field;
    # 3. resizes that part to `unpadded` (bilinear), where it has another size;
    # 4. ends each row with the newline embedding, where `newline`;
    # 5. reads it row by row, after the overview's tokens.

    source: Size  # The image's size in pixels, after EXIF orientation
    tile: Size  # What the encoder takes, in pixels
    canvas: Size  # `grid` times `tile`, in pixels
    content_box: Box  # The resized image on the canvas, in pixels; sticks out of it for "crop" (negative top or left)
    grid: Size  # Rows and columns of tiles
    overview: Literal["none", "first", "last"] = "none"  # LLaVA-NeXT's global view is first, a thumbnail last
    tokens: Size  # Projected tokens per tile, as (rows, columns); `Size(1, Q)` where they have no spatial order
    merge: PatchMerge = "flat"  # "spatial_unpad" cuts padding away and ends rows with newlines
    unpadded: Size | None = None  # The grid's tokens, no newlines: `kept`'s, or fewer by anyres_max
    scaled_to_fit: bool = False  # The image asked for more tiles than allowed and was scaled down
    num_tokens: int  # Positions in the sequence
    frame: Box | None = None  # Height and width of the frame, top and left of the image in it, in source pixels
    overview_box: Box | None = None  # As `content_box`, on the overview tile
    overview_frame: Box | None = None  # As `frame`, of the overview tile
    kept: Box | None = None  # In tokens; of an image thinner than a token row 0 rows may be kept, as in the reference
    newline: bool = False  # Each row ends with a newline token; with `merge="flat"`, the whole image does

    _repr_html_ = notebook_view

    @property
    def num_tiles(self) -> int:
        """Tiles the encoder sees: the grid, and the overview where there is one."""
        return self.grid.area + (self.overview != "none")


@dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """Everything integer about one video's way into the sequence, and when its frames are."""

    frame: ImagePlan  # Of each frame: one tile
    times: tuple[float, ...]  # Seconds of each frame from the video's first
    frames: int  # What comes out of the temporal encoder
    tokens: Size  # Projected tokens of each of those
    num_tokens: int  # Positions in the sequence
    old: int = 0  # The first so many of those become means of blocks of frames, rows and columns of tokens
    stride: tuple[int, int, int] = (1, 1, 1)  # The size of such a block

    _repr_html_ = notebook_view

    @property
    def num_tiles(self) -> int:
        """Tiles the vision encoder sees."""
        return len(self.times)


@dataclass(frozen=True, kw_only=True)
class AudioPlan:
    """Everything integer about one sound's way into the sequence."""

    frames: tuple[int, ...]  # Of each window: the spectrogram's frames that have sound in them
    tokens: tuple[int, ...]  # Of each window: what the encoder makes of those
    num_tokens: int  # Positions in the sequence
    num_tiles: int = 0  # The vision encoder sees none

    _repr_html_ = notebook_view


MediaPlan: TypeAlias = ImagePlan | VideoPlan | AudioPlan


@dataclass(frozen=True)
class AudioWindow:
    """What an audio encoder takes at once, and what it makes of it."""

    mel_bins: int  # Bands of the spectrogram
    max_frames: int  # The longest window, in frames of 10 ms
    frames_per_token: int


def plan_audio(frames: Sequence[int], window: AudioWindow) -> AudioPlan:
    """Plan a sound whose windows have so many frames."""
    tokens = tuple(ceil_div(count, window.frames_per_token) for count in frames)
    return AudioPlan(frames=tuple(frames), tokens=tokens, num_tokens=sum(tokens))


def plan_image(source: Size, image: ImageConfig, tokens: Size, *, alone: bool = True) -> ImagePlan:
    """Plan an image that the encoder turns into `tokens` a tile; `alone` where its conversation has no other image."""
    tile = Size(*image.tile_size)
    for what, size in (("image size", source), ("tokens per tile", tokens)):
        refuse_empty(what, size)
    how = image.image_aspect_ratio
    _refuse_settings_of_others(image)
    if how == "anyres":
        if alone or image.several_images == "alike":
            return _plan_anyres(source, image, tile, tokens)
        newline = image.mm_patch_merge_type == "spatial_unpad"
        return plan_tile(source, image, tile, tokens, "pad", newline=newline)
    if how == "native":
        return _plan_native(source, image, tile, tokens)
    return _plan_slice(source, image, tile, tokens) if how == "slice" else plan_tile(source, image, tile, tokens, how)


def plan_tile(
    source: Size,
    image: ImageConfig,
    tile: Size,
    tokens: Size,
    how: AspectRatio,
    *,
    newline: bool = False,
    scaled_to_fit: bool = False,
) -> ImagePlan:
    """Make the whole image one tile."""
    frame, content = fit_tile(source, tile, how, image.resize_short_side, image.max_pixels)
    return ImagePlan(
        source=source,
        tile=tile,
        canvas=tile,
        content_box=content,
        grid=Size(1, 1),
        tokens=tokens,
        scaled_to_fit=scaled_to_fit,
        num_tokens=tokens.area + newline,
        frame=frame,
        newline=newline,
    )


def fit_tile(
    source: Size, tile: Size, how: AspectRatio, short_side: int | None, max_pixels: int
) -> tuple[Box | None, Box]:
    """Fit a whole image to one tile: its frame, where it has one, and its place on the tile."""
    whole = Box(0, 0, tile.height, tile.width)
    if how == "squash":
        return None, whole
    if how == "pad":
        frame = Size(
            max(source.height, ceil_div(source.width * tile.height, tile.width)),
            max(source.width, ceil_div(source.height * tile.width, tile.height)),
        )
        if frame == source:
            return None, whole
        # Of an image thousands of times as long as it is high: the same layout without the memory of the frame.
        if frame.area > max_pixels:
            return None, _centre(_fit_inside(source, tile), tile)
        place = _centre(source, frame)
        return Box(place.top, place.left, frame.height, frame.width), whole
    short = min(tile.height, tile.width) if short_side is None else short_side
    if source.width <= source.height:
        resized = Size(int(short * source.height / source.width), short)
    else:
        resized = Size(short, int(short * source.width / source.height))
    # Floor division of a negative number rounds away from zero: the reference pads the same way.
    top, left = -((resized.height - tile.height) // 2), -((resized.width - tile.width) // 2)
    return None, Box(top, left, resized.height, resized.width)


def _plan_slice(source: Size, image: ImageConfig, tile: Size, tokens: Size) -> ImagePlan:
    """Cut the image into tiles at its own scale, or at the largest scale that `max_tiles` allows."""
    scaled = _tiles_needed(source, tile).area > image.max_tiles
    content = _scale_to_tiles(source, tile, image.max_tiles) if scaled else source
    grid = _tiles_needed(content, tile)
    if grid.area == 1:
        # A tile that is the whole image must not be a centre crop: nothing may be dropped.
        whole: AspectRatio = "squash" if image.overview_aspect_ratio == "squash" else "pad"
        return plan_tile(source, image, tile, tokens, whole, scaled_to_fit=scaled)
    frame, box = _fit_overview(source, image, tile) if image.thumbnail else (None, None)
    return ImagePlan(
        source=source,
        tile=tile,
        canvas=grid * tile,
        content_box=Box(0, 0, content.height, content.width),
        grid=grid,
        overview="last" if image.thumbnail else "none",
        tokens=tokens,
        scaled_to_fit=scaled,
        num_tokens=(grid.area + image.thumbnail) * tokens.area,
        overview_box=box,
        overview_frame=frame,
    )


def _scale_to_tiles(source: Size, tile: Size, max_tiles: int) -> Size:
    """Give the largest size of the same shape that needs at most `max_tiles` tiles; fewer tiles where that ties."""
    best = Size(1, 1)
    for rows in range(1, max_tiles + 1):
        grid = Size(rows, max_tiles // rows)
        fitted = _fit_inside(source, grid * tile)
        if (fitted.area, -_tiles_needed(fitted, tile).area) > (best.area, -_tiles_needed(best, tile).area):
            best = fitted
    return best


def _plan_anyres(source: Size, image: ImageConfig, tile: Size, tokens: Size) -> ImagePlan:
    """Fit the image to the best pinpoint, add a global view first, and count tokens as LLaVA-NeXT does."""
    canvas = select_best_resolution(source, _pinpoints(image, tile))
    grid = Size(canvas.height // tile.height, canvas.width // tile.width)
    content = _centre(_fit_canvas(source, canvas), canvas)
    frame, box = _fit_overview(source, image, tile)
    field = grid * tokens
    merge, most = image.mm_patch_merge_type, image.anyres_max
    newline = merge == "spatial_unpad"
    kept = unpad_box(field, source) if newline else Box(0, 0, field.height, field.width)
    laid = kept.size
    if most is not None:
        if not newline:
            raise ConfigError(f"anyres_max needs mm_patch_merge_type: spatial_unpad, got {most} with {merge}")
        laid = _shrink(kept.size, tokens, most)
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
        overview_box=box,
        overview_frame=frame,
        kept=None if merge == "flat" else kept,
        newline=newline,
    )


def _plan_native(source: Size, image: ImageConfig, tile: Size, tokens: Size) -> ImagePlan:
    """Keep the image's shape and, within bounds, its scale, rounded to whole tokens; it is one tile of its own size."""
    cell, least, most = native_bounds(image, tile, tokens)
    if not least <= source.area <= most:
        scale = math.sqrt((most if source.area > most else least) / source.area)
    else:
        scale = 1.0
    rows, columns = source.height * scale / cell.height, source.width * scale / cell.width
    grid = Size(max(1, round(rows)), max(1, round(columns)))
    if grid.area * cell.area < least and math.ceil(rows) * math.ceil(columns) * cell.area <= most:
        grid = Size(math.ceil(rows), math.ceil(columns))
    if grid.area * cell.area > most:  # by rounding; of an image thinner than a token the long side is cut
        room = most // cell.area
        grid = Size(max(1, math.floor(rows)), max(1, math.floor(columns)))
        grid = Size(min(grid.height, room), min(grid.width, room))
    shape, merge = grid * cell, image.mm_patch_merge_type
    newline, flat = merge == "spatial_unpad", merge == "flat"
    return ImagePlan(
        source=source,
        tile=shape,
        canvas=shape,
        content_box=Box(0, 0, shape.height, shape.width),
        grid=Size(1, 1),
        tokens=grid,
        merge=merge,
        unpadded=None if flat else grid,
        scaled_to_fit=scale < 1,
        num_tokens=grid.height * (grid.width + newline),
        kept=None if flat else Box(0, 0, grid.height, grid.width),
        newline=newline,
    )


def native_bounds(image: ImageConfig, tile: Size, tokens: Size) -> tuple[Size, int, int]:
    """Of "native": the pixels of a token, and the fewest and the most pixels of an image."""
    if tile.height % tokens.height or tile.width % tokens.width:
        raise ConfigError(
            f"image_aspect_ratio: native steps by whole tokens, and tile_size {tile.height}x{tile.width} is not cut "
            f"evenly into {tokens.height}x{tokens.width} of them (height x width)"
        )
    cell = Size(tile.height // tokens.height, tile.width // tokens.width)
    most = image.native_max_pixels or max(4 * tile.area, image.native_min_pixels or 1)
    if most < cell.area:
        raise ConfigError(f"native_max_pixels {most:,}: one token is of {cell.height}x{cell.width} pixels; raise it")
    return cell, image.native_min_pixels or min(tile.area // 4, most), most


def _fit_overview(source: Size, image: ImageConfig, tile: Size) -> tuple[Box | None, Box]:
    return fit_tile(source, tile, image.overview_aspect_ratio, image.resize_short_side, image.max_pixels)


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
    return Size(ceil_div(content.height, tile.height), ceil_div(content.width, tile.width))


def ceil_div(a: int, b: int) -> int:
    """Divide, rounding up."""
    return -(-a // b)


def _pinpoints(image: ImageConfig, tile: Size) -> list[Size]:
    """Read and check the pinpoints."""
    if not image.image_grid_pinpoints:
        raise ConfigError("image_aspect_ratio: anyres needs image_grid_pinpoints, and none are given")
    pinpoints = [Size(height, width) for height, width in image.image_grid_pinpoints]
    for point in pinpoints:
        if point.height % tile.height or point.width % tile.width:
            raise ConfigError(
                f"image_grid_pinpoints: {point.height}x{point.width} is no multiple of "
                f"the tile {tile.height}x{tile.width} (height x width)"
            )
    return pinpoints


def _refuse_settings_of_others(image: ImageConfig) -> None:
    """Refuse settings that another way alone reads, so that none is ignored in silence."""
    how, given = image.image_aspect_ratio, type(image).model_fields
    owners = {"image_grid_pinpoints": ("anyres",), "anyres_max": ("anyres",), "several_images": ("anyres",),
              "mm_patch_merge_type": ("anyres", "native"), "native_min_pixels": ("native",),
              "native_max_pixels": ("native",)}  # fmt: skip
    for name, users in owners.items():
        if how not in users and getattr(image, name) != given[name].default:
            used = " and ".join(map(repr, users))
            raise ConfigError(
                f"{name} is set but image_aspect_ratio is {how!r}; only {used} use{'s' * (len(users) < 2)} it"
            )


def refuse_empty(what: str, size: Size) -> None:
    """Refuse a size without a pixel."""
    if size.height < 1 or size.width < 1:
        raise ConfigError(f"{what} must be at least 1x1, got {size.height}x{size.width} (height x width)")
