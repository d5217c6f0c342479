"""The media of one sample on paper: how many frames, windows, tiles and tokens they take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polymodal.config import ModelConfig, VideoConfig
from polymodal.errors import ConfigError
from polymodal.media.audio import open_audio
from polymodal.media_plan import AudioWindow, ImagePlan, Size, plan_audio, plan_image
from polymodal.messages import Audio, Document, Image, Video, user
from polymodal.processing.media_parts import expand, plan_sample
from polymodal.video_plan import frames_within, plan_video

RATE, HOP = 16_000, 160
"""Samples a second, and between two frames of a spectrogram."""
MOST_FRAMES = 1_000_000
"""Frames of a video on paper, at most."""


@dataclass(frozen=True)
class PaperVideo:
    """A video that need not exist: so many frames, or so long; or a file."""

    frames: int | None = None
    seconds: float | None = None
    size: Size | None = None  # Of a frame, which makes no difference to its tokens; the tile's where None
    file: Path | None = None
    num_frames: int | None = None  # What is asked for; the model's own choice where neither is
    fps: float | None = None


@dataclass(frozen=True)
class VideoUse:
    """What a video takes."""

    wanted: int  # Frames that were asked for
    frames: int  # Those that the model takes
    limit: str  # What keeps it from taking the others, as a key and its value; empty where it takes them
    tokens: int  # Positions
    tokens_of_all: int  # Positions that all wanted frames would take


@dataclass(frozen=True)
class SoundUse:
    """What a sound takes."""

    seconds: float
    windows: int
    longest: int  # Frames of the longest window
    tokens: int  # Positions


@dataclass(frozen=True)
class Media:
    """What all media of a sample take."""

    images: tuple[tuple[Size, ImagePlan], ...]  # Pages of documents among them
    videos: tuple[VideoUse, ...]
    sounds: tuple[SoundUse, ...]

    @property
    def tokens(self) -> int:
        """Positions."""
        seen = sum(plan.num_tokens for _, plan in self.images) + sum(video.tokens for video in self.videos)
        return seen + sum(sound.tokens for sound in self.sounds)

    @property
    def tiles(self) -> int:
        """Tiles that the vision encoder sees."""
        return sum(plan.num_tiles for _, plan in self.images) + sum(use.frames for use in self.videos)

    def own_shapes(self, config: ModelConfig) -> tuple[Size, ...]:
        """The pixels of each image, where images keep their shape."""
        keeps = config.image is not None and config.image.image_aspect_ratio == "native"
        return tuple(plan.tile for _, plan in self.images) if keeps else ()


def plan_media(
    images: Sequence[Size],  # Pages among them
    videos: Sequence[PaperVideo],
    sounds: Sequence[float | Path],  # Seconds, or a file
    documents: Sequence[Path],
    config: ModelConfig,
    tokens: Size | None,  # Of a tile
    window: AudioWindow | None,
) -> Media:
    """Plan the media of a sample as the processor will."""
    asked = [Video(clip.file, num_frames=clip.num_frames, fps=clip.fps) for clip in videos if clip.file is not None]
    parts = expand([user(*map(Document, documents), *asked)], config)[0].media
    files = [part for part in parts if isinstance(part, Video)]
    pages = [part.source for part in parts if isinstance(part, Image)]
    sizes = [*images, *(Size(page.height, page.width) for page in pages)]  # type: ignore[union-attr]
    heard = [*sounds, *(part.source for part in parts if isinstance(part, Audio))]  # of videos
    if (sizes or videos) and (config.image is None or tokens is None):
        raise ConfigError("this model has no vision encoder; leave images, videos and documents out")
    alone = len(sizes) == 1
    placed = [(size, plan_image(size, config.image, tokens, alone=alone)) for size in sizes]  # type: ignore[arg-type]
    used = [_video(clip, config, tokens, files) for clip in videos]
    return Media(tuple(placed), tuple(used), tuple(_sound(each, config, window) for each in heard))


def _video(clip: PaperVideo, config: ModelConfig, tokens: Size | None, files: list[Video]) -> VideoUse:
    video, rules = config.video, config.image
    assert rules is not None and tokens is not None
    if video is None:
        raise ConfigError(
            "this model was not made for videos; a plan may add what it would need, such as video.max_frames=64"
        )
    size = clip.size or Size(*rules.tile_size)
    if clip.file is not None:
        found = plan_sample(files.pop(0), video, rules, tokens)
        wanted, size = len(found.indices), Size(found.height, found.width)
    else:
        wanted = _wanted(clip, video)
    if wanted > MOST_FRAMES:
        raise ConfigError(f"a video of {wanted:.4g} frames: at most {MOST_FRAMES:,} are planned; take fewer of them")
    frames = frames_within(wanted, video, tokens)
    key = "max_frames" if frames == video.max_frames else "max_tokens"
    limit = f"video.{key} {getattr(video, key)}"
    took, all_of_it = (plan_video(size, [0.0] * n, video, rules, tokens).num_tokens for n in (frames, wanted))
    return VideoUse(wanted, frames, limit if frames < wanted else "", took, all_of_it)


def _wanted(clip: PaperVideo, video: VideoConfig) -> int:
    if clip.frames is not None:
        return clip.frames
    fps = clip.fps or (video.fps if clip.num_frames is None else None)
    if fps is None:
        return clip.num_frames or video.num_frames
    return max(1, math.ceil((clip.seconds or 0) * fps - 1e-6))


def _sound(sound: object, config: ModelConfig, window: AudioWindow | None) -> SoundUse:
    if config.audio is None or window is None:
        raise ConfigError("this model has no audio encoder; leave sounds out")
    most = config.audio.max_seconds
    if isinstance(sound, float | int):
        samples = max(1, round(sound * RATE))
    else:
        samples = len(open_audio(sound, video=True, max_seconds=most).samples)  # type: ignore[arg-type]
    if samples > most * RATE:
        raise ConfigError(f"a sound of {samples / RATE:g} s: the model takes {most:g} s at most (audio.max_seconds)")
    whole = window.max_frames * HOP
    frames = [-(-min(whole, samples - begin) // HOP) for begin in range(0, samples, whole)]
    return SoundUse(samples / RATE, len(frames), max(frames), plan_audio(frames, window).num_tokens)
