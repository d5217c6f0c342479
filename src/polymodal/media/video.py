"""Frames of a video: which to take is planned first, as plain numbers, and only those are decoded.

    frames = sample_frames("film.mp4", num_frames=8)
    frames.array.shape, frames.times            # (8, H, W, 3) uint8, seconds from the first frame

The same in two steps, for whoever has to know how many frames there will be before any is decoded:

    plan = plan_frames("film.mp4", fps=2, max_frames=64, max_side=448)
    frames = read_frames("film.mp4", plan)

Frames are numbered from 0 in the order in which they are shown, come out upright (rotation in the file is applied) and
with square pixels, and are the ones that decoding the whole file would give at these numbers.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage

from polymodal.errors import ConfigError, MediaError
from polymodal.media.source import isolated
from polymodal.media.video_containers import open_video
from polymodal.media.video_file import FrameTable, VideoFile, VideoLimits
from polymodal.messages import Source

LIMITS = VideoLimits()
"""What a video may cost unless the caller says otherwise."""

MAX_FRAMES = 768
"""The most frames that one plan takes unless the caller says otherwise."""

MOST_SHOWN = 256
"""The most frames of a video that are put before a person."""


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video without decoding it."""

    height: int  # Of the frames that come out: upright, square pixels
    width: int
    rotation: int  # Degrees clockwise that they were turned by: 0, 90, 180 or 270
    duration: float | None  # Seconds; None where the file does not say
    frames: int | None  # None where the file does not say
    rate: float | None  # Frames a second, on average
    variable: bool | None  # Whether frames are shown for unequal times; None where they were not counted
    audio: bool  # Whether there is sound


@dataclass(frozen=True)
class FramePlan:
    """Which frames of a video are taken; made before any is decoded."""

    indices: tuple[int, ...]  # From 0, in the order in which they come out; may repeat
    total: int  # Frames of the video
    height: int  # Of each frame that comes out
    width: int
    times: tuple[float, ...] | None = None  # Seconds; None where the file's own count of frames was taken


@dataclass(frozen=True)
class Frames:
    """Decoded frames; a sequence of images, and one array."""

    array: np.ndarray  # uint8 [T, H, W, 3]
    times: np.ndarray  # float64 [T]: seconds from the video's first frame
    indices: tuple[int, ...]  # Which frames these are, from 0

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[PILImage.Image]:
        return map(PILImage.fromarray, self.array)

    def __getitem__(self, index: int) -> PILImage.Image:
        return PILImage.fromarray(self.array[index])

    @property
    def images(self) -> list[PILImage.Image]:
        """The frames as Pillow images."""
        return list(self)

    def _repr_html_(self) -> str:
        """The frames with their times, as a notebook shows them."""
        from polymodal.utils.html import data_url

        shown = [int(place) for place in np.linspace(0, len(self) - 1, min(len(self), MOST_SHOWN))]
        small = [(place, PILImage.fromarray(self.array[place])) for place in shown]
        for _, image in small:
            image.thumbnail((192, 192))
        style = "display:inline-block;margin:2px;font:12px sans-serif;text-align:center"
        figures = (
            f'<div style="{style}"><img src="{data_url(image, "jpeg")}"><br>{self.times[place]:.2f} s</div>'
            for place, image in small
        )
        size = f"{len(self)} frames of {self.array.shape[2]} × {self.array.shape[1]} pixels"
        return f"<div>{''.join(figures)}</div><p>{size}</p>"


@isolated
def probe(source: Source, *, count: bool = True, limits: VideoLimits = LIMITS) -> VideoInfo:
    """What a video is; `count=False` reads its headers alone, else its packets are counted, which decodes nothing."""
    with open_video(source, limits) as video:
        height, width = video.size
        if not count:
            return VideoInfo(
                height, width, video.rotation, video.duration, video.claimed, video.rate, None, video.audio
            )
        table = video.table()
        total = len(table.times)
        gaps = np.diff(table.times)
        uneven = bool(len(gaps)) and np.ptp(gaps) > max(2.5 * table.tick, 0.05 * float(np.median(gaps)))
        rate = total / table.duration if table.duration else video.rate
        return VideoInfo(height, width, video.rotation, table.duration, total, rate, bool(uneven), video.audio)


@isolated
def plan_frames(
    source: Source,
    num_frames: int | None = None,
    *,
    fps: float | None = None,
    times: Sequence[float] | None = None,
    key_frames: bool = False,
    segment: tuple[float, float | None] | None = None,
    max_frames: int = MAX_FRAMES,
    max_side: int | None = None,
    limits: VideoLimits = LIMITS,
) -> FramePlan:
    """Say which frames of a video to take, without decoding them.

    Args:
        source: The video: a path, bytes, a `data:` URL, or a place in an archive.
        num_frames: As many, evenly spread, the first and the last among them (`np.linspace`, rounded down; a video of
            fewer frames repeats some); 8 where nothing else is asked for.
        fps: Instead: the frame shown at 0, 1/fps, 2/fps, ... seconds.
        times: Instead: the frames shown at these seconds, in this order.
        key_frames: Instead: the frames that the file stores whole.
        segment: Only frames that are first shown at or after its start and before its end, in seconds; an end of None
            is the video's.
        max_frames: The most that are taken. `fps` and `key_frames` are thinned out evenly to it; the others refused.
        max_side: Frames with a longer side are scaled down to it, which bounds the memory they take.
        limits: What the video may cost.

    Returns:
        The plan.

    Raises:
        MediaError: The file is no video that can be read, or beyond a limit.
        ConfigError: The arguments contradict each other or lie outside the video.
    """
    with open_video(source, limits) as video:
        return _plan(video, num_frames, fps, times, key_frames, segment, max_frames, max_side)


@isolated
def read_frames(source: Source, plan: FramePlan, *, limits: VideoLimits = LIMITS) -> Frames:
    """Decode the frames of a plan, and little else.

    A frame that is damaged is replaced by its nearest neighbour, with a warning. A plan made from the file's own count
    is spread anew where the file turns out to hold another number of frames.

    Args:
        source: The video that the plan was made for.
        plan: Which frames.
        limits: What the video may cost.

    Returns:
        As many frames as the plan has.

    Raises:
        MediaError: The file is no video that can be read, not the one that was planned, or beyond a limit.
    """
    with open_video(source, limits) as video:
        return _read(video, plan)


@isolated
def sample_frames(
    source: Source,
    num_frames: int | None = None,
    *,
    fps: float | None = None,
    times: Sequence[float] | None = None,
    key_frames: bool = False,
    segment: tuple[float, float | None] | None = None,
    max_frames: int = MAX_FRAMES,
    max_side: int | None = None,
    limits: VideoLimits = LIMITS,
) -> Frames:
    """Take frames out of a video: eight, evenly spread, or as the arguments say.

    The file is read by seeking and never held in memory; only what leads up to a wanted frame is decoded.

    Args:
        source: The video: a path, bytes, a `data:` URL, or a place in an archive.
        num_frames: As many, evenly spread, the first and the last among them (`np.linspace`, rounded down; a video of
            fewer frames repeats some); 8 where nothing else is asked for.
        fps: Instead: the frame shown at 0, 1/fps, 2/fps, ... seconds.
        times: Instead: the frames shown at these seconds, in this order.
        key_frames: Instead: the frames that the file stores whole.
        segment: Only frames that are first shown at or after its start and before its end, in seconds; an end of None
            is the video's.
        max_frames: The most that are taken. `fps` and `key_frames` are thinned out evenly to it; the others refused.
        max_side: Frames with a longer side are scaled down to it, which bounds the memory they take.
        limits: What the video may cost.

    Returns:
        The frames: `array` (uint8 [T, H, W, 3], RGB), `images`, `times` (seconds from the first frame), `indices`.

    Raises:
        MediaError: The file is no video that can be read, or beyond a limit.
        ConfigError: The arguments contradict each other or lie outside the video.
    """
    with open_video(source, limits) as video:
        return _read(video, _plan(video, num_frames, fps, times, key_frames, segment, max_frames, max_side))


def _plan(
    video: VideoFile,
    num_frames: int | None,
    fps: float | None,
    times: Sequence[float] | None,
    key_frames: bool,
    segment: tuple[float, float | None] | None,
    max_frames: int,
    max_side: int | None,
) -> FramePlan:
    ways = {"num_frames": num_frames, "fps": fps, "times": times, "key_frames": key_frames or None}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{video.name}: give one of num_frames, fps, times and key_frames, not {' and '.join(given)}")
    if not given:
        num_frames = 8
    asked = len(times) if times is not None else num_frames
    if max_frames < 1 or (asked is not None and not 1 <= asked <= max_frames):
        raise ConfigError(f"{video.name}: {asked} frames are asked for; from 1 to {max_frames} can be (max_frames)")
    if max_side is not None and max_side < 1:
        raise ConfigError(f"{video.name}: max_side is {max_side}; it must be 1 or more pixels")
    if fps is not None and not (0 < fps < math.inf):
        raise ConfigError(f"{video.name}: fps is {fps}; it must be a number above 0")
    scale = min(1.0, (max_side or math.inf) / max(video.size))
    height, width = (max(1, round(side * scale)) for side in video.size)
    if num_frames is not None and segment is None and video.claimed:
        return FramePlan(_spread(0, video.claimed - 1, num_frames), video.claimed, height, width)
    table = video.table()
    first, last = _segment(table, segment, video.name)
    if num_frames is not None:
        indices = _spread(first, last, num_frames)
    elif times is not None:
        indices = _shown_at(table, np.array(times, np.float64), f"{video.name}: times")
    elif fps is not None:
        begin = segment[0] if segment else 0.0
        end = table.times[last + 1] if last + 1 < len(table.times) else table.duration
        if segment and segment[1] is not None:
            end = min(end, segment[1])
        amount = max(1, math.ceil((end - begin) * fps - 1e-6))
        if amount > max_frames:
            indices = _spread(first, last, max_frames)
        else:
            indices = tuple(
                max(first, i) for i in _shown_at(table, begin + np.arange(amount) / fps, f"{video.name}: fps")
            )
    else:
        keys = np.flatnonzero(table.keys)
        keys = keys[(keys >= first) & (keys <= last)]
        if not len(keys):
            raise ConfigError(f"{video.name}: no key frame in the segment {segment}; take a longer one, or num_frames")
        picks = _spread(0, len(keys) - 1, min(len(keys), max_frames))
        indices = tuple(int(keys[pick]) for pick in picks)
    return FramePlan(indices, len(table.times), height, width, tuple(float(table.times[i]) for i in indices))


def _spread(first: int, last: int, number: int) -> tuple[int, ...]:
    """Evenly spread numbers, both ends among them."""
    return tuple(np.linspace(first, last, number, dtype=int).tolist())


def _shown_at(table: FrameTable, times: np.ndarray, name: str) -> tuple[int, ...]:
    """The frames that are shown at these seconds."""
    wrong = times[~((times >= 0) & (times <= table.duration + table.tick))]
    if len(wrong):
        raise ConfigError(f"{name}: {wrong[0]:g} seconds lie outside the video, which lasts {table.duration:.3f}")
    return tuple(np.maximum(np.searchsorted(table.times, times + table.tick / 2, side="right") - 1, 0).tolist())


def _segment(table: FrameTable, segment: tuple[float, float | None] | None, name: str) -> tuple[int, int]:
    """The first and the last frame of a segment."""
    if segment is None:
        return 0, len(table.times) - 1
    start, end = segment[0], segment[1] if segment[1] is not None else math.inf
    if not 0 <= start < end:
        raise ConfigError(f"{name}: segment is {segment}; it must be (start, end) in seconds, start before end")
    if start > table.duration:
        raise ConfigError(f"{name}: segment starts at {start:g} seconds, the video lasts {table.duration:.3f}")
    slack = table.tick / 2
    first, after = np.searchsorted(table.times, [start - slack, end - slack])
    if first >= after:  # nothing begins in it: what is shown all the while
        return (max(int(after) - 1, 0),) * 2
    return int(first), int(after) - 1


def _read(video: VideoFile, plan: FramePlan) -> Frames:
    total, indices = plan.total, plan.indices
    if not indices or not all(0 <= index < total for index in indices):
        raise ConfigError(f"{video.name}: a plan of frames {indices[:8]} cannot be, of {total}")
    if video.claimed != total or not video.locate(indices):
        total = len(video.table().times)
    if total != plan.total:
        if plan.times is not None:
            raise MediaError(f"{video.name}: has {total} frames, {plan.total} were planned; it has changed, plan again")
        indices = _spread(0, total - 1, len(indices))
    size = len(indices) * plan.height * plan.width * 3
    if size > video.limits.output:
        raise MediaError(
            f"{video.name}: {len(indices)} frames of {plan.width}x{plan.height} take {size:,} bytes, at most "
            f"{video.limits.output:,} are allowed; give max_side, or fewer frames"
        )
    array = np.empty((len(indices), plan.height, plan.width, 3), np.uint8)
    found: dict[int, tuple[int, int]] = {}  # wanted -> (the one that came out, its first row)
    for number, out, pixels in video.frames(indices):
        if pixels.shape[:2] != (plan.height, plan.width):
            image = PILImage.fromarray(np.ascontiguousarray(pixels))
            pixels = np.asarray(image.resize((plan.width, plan.height), PILImage.Resampling.BICUBIC))
        found[number] = (out, indices.index(number))
        array[found[number][1]] = pixels
    if not found:
        raise MediaError(f"{video.name}: none of the frames asked for can be decoded; it is damaged, give a whole file")
    outs = []
    for row, index in enumerate(indices):
        nearest = index if index in found else min(found, key=lambda other: abs(other - index))
        out, place = found[nearest]
        if place != row:
            array[row] = array[place]
        outs.append(out)
    if lost := sum(out != index for out, index in zip(outs, indices)):
        warnings.warn(
            f"{video.name}: {lost} of {len(indices)} frames are damaged; their neighbours stand for them", stacklevel=3
        )
    return Frames(array, np.array([video.seconds(out) for out in outs]), tuple(outs))
