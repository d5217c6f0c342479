"""Pure integers: how a video becomes frames and tokens, and how many frames fit; beside `media_plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from polymodal.errors import ConfigError
from polymodal.media_plan import Size, VideoPlan, ceil_div, plan_tile, refuse_empty

if TYPE_CHECKING:
    from polymodal.config import ImageConfig, VideoConfig


def plan_video(source: Size, times: Sequence[float], video: VideoConfig, image: ImageConfig, tokens: Size) -> VideoPlan:
    """Plan a video of frames that the projector would turn into `tokens` each."""
    for what, size in (("frame size", source), ("tokens per tile", tokens)):
        refuse_empty(what, size)
    frame = plan_tile(source, image, Size(*image.tile_size), tokens, video.frame_aspect_ratio)
    frames, per_frame = temporal_output(len(times), video, tokens)
    old, num_tokens = _with_old_frames(frames, per_frame, video)
    stride = video.old_frames.stride if video.old_frames is not None and old else (1, 1, 1)
    return VideoPlan(
        frame=frame, times=tuple(times), frames=frames, tokens=per_frame, num_tokens=num_tokens, old=old, stride=stride
    )


def _with_old_frames(frames: int, tokens: Size, video: VideoConfig) -> tuple[int, int]:
    """How many frames are pooled as old ones, and the tokens of all."""
    if (rule := video.old_frames) is None or frames <= rule.keep:
        return 0, frames * tokens.area
    t, h, w = rule.stride
    if tokens.height == 1 < tokens.width and (h, w) != (1, 1):
        raise ConfigError(
            f"video.old_frames.stride {rule.stride}: the projector's tokens lie in no grid; use (t, 1, 1)"
        )
    old = frames - rule.keep
    pooled = ceil_div(old, t) * ceil_div(tokens.height, h) * ceil_div(tokens.width, w)
    return old, pooled + rule.keep * tokens.area


def temporal_output(frames: int, video: VideoConfig, tokens: Size) -> tuple[int, Size]:
    """What comes out of a temporal encoder and the projector behind it: frames, and tokens of each."""
    temporal = video.temporal
    if video.tokens_per_frame is not None:
        tokens = Size(1, min(video.tokens_per_frame, tokens.area))
    if temporal is None:
        return frames, tokens
    if temporal.type == "spatio_temporal_pool":
        t, h, w = temporal.stride or (2, 2, 2)
        # A projector that keeps no grid gives as many tokens whatever it sees.
        kept = tokens if (h, w) == (1, 1) else Size(ceil_div(tokens.height, h), ceil_div(tokens.width, w))
        return ceil_div(frames, t), kept
    joined = temporal.type == "mean" or (temporal.attention is not None and temporal.attention.pool == "mean")
    return (1 if joined else frames), tokens


def frames_within(wanted: int, video: VideoConfig, tokens: Size) -> int:
    """The most frames, up to `wanted` and `max_frames`, whose tokens are within the video's budget."""
    wanted = min(wanted, video.max_frames)
    if video.max_tokens is None:
        return wanted
    fits = (
        count
        for count in range(wanted, 0, -1)
        if _with_old_frames(*temporal_output(count, video, tokens), video)[1] <= video.max_tokens
    )
    most = next(fits, 0)
    if not most:
        raise ConfigError(f"video.max_tokens {video.max_tokens} is less than the tokens of one frame; raise it")
    return most
