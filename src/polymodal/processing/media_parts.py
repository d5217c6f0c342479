"""An image, video or sound of a conversation, opened and planned: what `Processor` puts into the sequence.

`open_media` turns each part into an `Opened`: its plan, its tiles or windows, and the key that says whether two are the
same. What a part is made of is decided before, by `expand`: a document is its pages, a video its frames and, where it
is wanted, its sound.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch
from PIL import Image as PILImage

from polymodal.config import ImageConfig, ModelConfig, VideoConfig
from polymodal.errors import PolymodalError
from polymodal.media.audio import Sound, open_audio
from polymodal.media.image import open_image
from polymodal.media.video import FramePlan, Frames, plan_frames, probe, read_frames
from polymodal.media_plan import AudioWindow, ImagePlan, MediaPlan, Size, plan_audio, plan_image
from polymodal.messages import Audio, Image, Media, Message, Part, Video
from polymodal.processing.audio_features import audio_features
from polymodal.processing.document_pages import expand_documents
from polymodal.processing.image_transform import make_tiles, tile_bytes
from polymodal.video_plan import frames_within, plan_video

MOST_DETAIL = 4
"""Frames are decoded at no more than so many tiles a side, which bounds their memory."""

NO_EARS = "this model has no audio encoder; leave the sound out"

Pixels = bool | Literal["uint8"]


@dataclass(frozen=True)
class Opened:
    """A medium on its way into a sequence."""

    plan: MediaPlan
    key: str  # A hash of its content and of the rules that make it ready
    decoded: PILImage.Image | Frames | Sound  # What it is, for a person to look at
    tiles: Callable[[Pixels], torch.Tensor] | None = None  # [n, 3, H, W] of an image or a video
    windows: torch.Tensor | None = None  # [W, F, L] of a sound


def expand(messages: Sequence[Message], config: ModelConfig) -> list[Message]:
    """Turn documents into their pages, and videos into frames and what is said and heard with them."""
    return [
        replace(message, parts=tuple(new for part in message.parts for new in _with_sound(part, config)))
        for message in expand_documents(messages)
    ]


def _with_sound(part: Part, config: ModelConfig) -> tuple[Part, ...]:
    if not isinstance(part, Video) or config.video is None:
        return (part,)
    wanted = config.video.audio and config.audio is not None if part.audio is None else part.audio
    sound = (Audio(part.source, part.start, part.end),) if wanted and probe(part.source, count=False).audio else ()
    return (part, *sound)


def only_image(parts: Sequence[Part]) -> bool:
    """Whether a conversation has no two images, pages among them; a video or a sound beside one changes nothing."""
    return sum(isinstance(part, Image) for part in parts) <= 1


def open_media(
    part: Media, config: ModelConfig, tokens: Size | None, window: AudioWindow | None, *, alone: bool
) -> Opened:
    """Decode and plan one medium; refuse what the model cannot take."""
    if isinstance(part, Audio):
        return _sound(part, config, window)
    if config.image is None or tokens is None:
        raise PolymodalError(f"this model has no vision encoder; leave the {type(part).__name__.lower()} out")
    if isinstance(part, Image):
        return _image(part, config.image, tokens, alone)
    if config.video is None:
        raise PolymodalError(
            "this model was not made for videos; give images of it, or train one with a `video` section"
        )
    assert isinstance(part, Video)  # documents are pages by now
    return _video(part, config.video, config.image, tokens)


def _image(part: Image, rules: ImageConfig, tokens: Size, alone: bool) -> Opened:
    image = open_image(part.source, background=rules.background, max_pixels=rules.max_pixels)
    plan = plan_image(Size(image.height, image.width), rules, tokens, alone=alone)

    return Opened(plan, image_key(image, rules, alone=alone), image, partial(_tiles, [image], plan, rules))


def _video(part: Video, video: VideoConfig, rules: ImageConfig, tokens: Size) -> Opened:
    frames = sample(part, video, rules, tokens)
    height, width = frames.array.shape[1:3]
    plan = plan_video(Size(height, width), frames.times.tolist(), video, rules, tokens)
    digest = hashlib.sha256(_rules(rules) + video.model_dump_json(include={"frame_aspect_ratio"}).encode())
    digest.update(f"video {frames.array.shape} {plan.times}".encode())
    digest.update(frames.array.tobytes())
    return Opened(plan, digest.hexdigest(), frames, partial(_tiles, frames, plan.frame, frame_rules(rules, video)))


def _tiles(  # -> [n, 3, H, W]
    images: Iterable[PILImage.Image], plan: ImagePlan, rules: ImageConfig, pixels: Pixels
) -> torch.Tensor:
    """The tiles of images that have one plan."""
    make = tile_bytes if pixels == "uint8" else make_tiles
    made = [make(image, plan, rules) for image in images]
    return torch.from_numpy(made[0] if len(made) == 1 else np.concatenate(made))


def frame_rules(rules: ImageConfig, video: VideoConfig) -> ImageConfig:
    """The image rules of a video's frames, which are one tile each."""
    return rules.model_copy(update={"image_aspect_ratio": video.frame_aspect_ratio})


def sample(part: Video, video: VideoConfig, rules: ImageConfig, tokens: Size) -> Frames:
    """The frames of a video that a model sees: those that the part asks for, else its own choice."""
    return read_frames(part.source, plan_sample(part, video, rules, tokens))


def plan_sample(part: Video, video: VideoConfig, rules: ImageConfig, tokens: Size) -> FramePlan:
    """Which frames these are; none is decoded."""
    asked = {"num_frames": part.num_frames, "fps": part.fps, "times": part.times}
    ways = {name: value for name, value in asked.items() if value is not None}
    if part.key_frames:
        ways["key_frames"] = True
    most = frames_within(video.max_frames, video, tokens)
    if not ways:
        ways = {"num_frames": min(video.num_frames, most)} if video.fps is None else {"fps": video.fps}
    segment = None if part.start is None and part.end is None else (part.start or 0.0, part.end)
    side = MOST_DETAIL * max(rules.tile_size)
    return plan_frames(part.source, **ways, segment=segment, max_frames=most, max_side=side)  # type: ignore[arg-type]


def _sound(part: Audio, config: ModelConfig, window: AudioWindow | None) -> Opened:
    if config.audio is None or window is None:
        missing = config.audio and f"{config.audio.audio_tower} is not installed; run `polymodal fetch` once"
        raise PolymodalError(f"this model's audio encoder {missing}" if missing else NO_EARS)
    segment = (part.start, part.end)
    sound = open_audio(part.source, video=True, segment=segment, max_seconds=config.audio.max_seconds)
    found = audio_features(sound.samples, mel_bins=window.mel_bins, window=window.max_frames / 100)
    plan = plan_audio(found.frames.tolist(), window)
    digest = hashlib.sha256(f"sound {window} {len(sound.samples)}".encode() + sound.samples.tobytes())
    # Padding is masked in the encoder, so what is longer than the longest window need not be carried.
    return Opened(plan, digest.hexdigest(), sound, windows=found.features[..., : max(plan.frames)])


def image_key(image: PILImage.Image, rules: ImageConfig, *, alone: bool = True) -> str:
    """Hash a decoded image together with the rules that turn it into tiles."""
    digest = hashlib.sha256(_rules(rules))
    if not alone and rules.several_images != "alike":
        digest.update(b"one of several ")
    digest.update(f"{image.mode} {image.height} {image.width} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=16)
def _rules(rules: ImageConfig) -> bytes:
    # Younger than caches that people have; where they change tiles, `image_key` or the layout's name says so.
    younger = {"several_images"}
    if rules.image_aspect_ratio != "native":
        younger |= {"native_min_pixels", "native_max_pixels"}
    return rules.model_dump_json(exclude=younger).encode()
