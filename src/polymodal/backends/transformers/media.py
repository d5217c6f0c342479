"""Videos and sounds as a processor of transformers takes them: frames with their metadata, samples at its rate."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from polymodal.media.audio import open_audio
from polymodal.media.video import LIMITS, Frames, plan_frames, probe, read_frames
from polymodal.messages import Audio, Video

FRAMES = 8
"""Frames of a video where neither the part nor the processor says how many."""
MOST_FRAMES = 768
"""Frames that a processor's own frames a second may come to, where it sets no limit."""
_SLACK = 0.5  # seconds that a processor may leave out of a sound and still have heard it


def video_content(part: Video, processor: ProcessorMixin) -> dict[str, Any]:
    """A video as a part of a chat: its frames (uint8 [T, H, W, 3]) and what is known of them."""
    info = probe(part.source)
    frames = _frames(part, getattr(processor, "video_processor", None))
    height, width = frames.array.shape[1:3]
    rate = info.rate or 24.0
    indices, times = list(frames.indices), frames.times
    if np.abs(np.array(indices) / rate - times).max() > 0.5 / rate:  # a variable rate: count milliseconds instead
        rate, indices = 1000.0, np.rint(1000 * times).astype(int).tolist()
    lasts = info.duration or len(indices) / rate
    span = min(lasts, part.end or lasts) - (part.start or 0.0)  # seconds that the frames are spread over
    return {
        "type": "video",
        "video": frames.array,
        "metadata": {
            "total_num_frames": max(1, round(span * rate)),
            "fps": rate,
            "duration": span,
            "frames_indices": indices,
            "height": height,
            "width": width,
        },
    }


def _frames(part: Video, chooser: Any) -> Frames:
    """The frames that the part asks for, else the processor."""
    num_frames, fps, least, most = part.num_frames, part.fps, 1, MOST_FRAMES
    if num_frames is None and fps is None and part.times is None and not part.key_frames:
        num_frames, fps = getattr(chooser, "num_frames", None), getattr(chooser, "fps", None)
        if num_frames or not fps:
            num_frames, fps = num_frames or FRAMES, None
        least, most = getattr(chooser, "min_frames", None) or least, getattr(chooser, "max_frames", None) or most
    segment = None if part.start is None and part.end is None else (part.start or 0.0, part.end)
    plan_of = partial(plan_frames, part.source, segment=segment, max_frames=most)
    asked: dict[str, Any] = {
        "num_frames": num_frames, "fps": fps, "times": part.times, "key_frames": part.key_frames,
    }  # fmt: skip
    plan = plan_of(**asked)
    if fps and len(plan.indices) < least:
        asked = {"num_frames": least}
        plan = plan_of(**asked)
    size = 3 * len(plan.indices) * plan.height * plan.width
    if size > LIMITS.output:  # the processor scales them down in any case
        side = int(max(plan.height, plan.width) * (LIMITS.output / size) ** 0.5)
        plan = plan_of(**asked, max_side=side)
    return read_frames(part.source, plan)


def sound_of(part: Audio | Video, processor: ProcessorMixin) -> np.ndarray:
    """The samples of a sound, or of a video's, at the rate that the processor wants; float32 [L]."""
    extractor = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
    rate = int(getattr(extractor, "sampling_rate", 16_000))
    return open_audio(part.source, sample_rate=rate, video=True, segment=(part.start, part.end)).samples


def settle(made: dict[str, Any], parts: Sequence[Mapping[str, Any]], processor: ProcessorMixin) -> None:
    """Put right what a processor cannot know or does without a word: seconds a frame, and the end of a long sound."""
    videos = [part["metadata"] for part in parts if part["type"] == "video"]
    if "video_second_per_grid" in made:  # Qwen2.5-Omni's own takes one rate for all
        frames = [v["total_num_frames"] / v["fps"] / len(v["frames_indices"]) for v in videos]
        made["video_second_per_grid"] = processor.video_processor.temporal_patch_size * torch.tensor(frames)
    sounds = [sound for part in parts for key in ("audio", "sound") if (sound := part.get(key)) is not None]
    extractor = getattr(processor, "feature_extractor", None)
    hop, rate = (int(getattr(extractor, name, None) or 0) for name in ("hop_length", "sampling_rate"))
    masks = [v for k, v in made.items() if k.endswith("mask") and k != "attention_mask" and getattr(v, "ndim", 0) == 2]
    for mask in masks if sounds and hop and rate else ():
        heard = torch.as_tensor(mask).sum(-1) * hop / rate
        lasts = torch.tensor([len(sound) / rate for sound in sounds])
        if len(heard) == len(lasts) and bool((heard < lasts - _SLACK).any()):
            warnings.warn(
                f"of a sound of {float(lasts.max()):.1f} seconds the model hears the first {float(heard.max()):.1f}; "
                "cut it and ask about each piece",
                stacklevel=2,
            )


def parts_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message of a chat; none of one that is a plain text."""
    return [] if isinstance(message["content"], str) else list(message["content"])
