"""Frames, and a sound where there is one, to a file: MP4 (H.264, AAC), WebM (VP9, Opus) or GIF (no sound).

PyAV encodes in memory, and the file appears whole or not at all. What does not fit together is made to, and said: odd
sides get a row or column more, since the codecs halve the colours' resolution; where the sound is longer, the last
frame stays; where it is shorter, silence follows.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image as PILImage

from polymodal.errors import ConfigError, MediaError, first_line
from polymodal.utils.files import write_bytes

LEAST_FPS, MOST_FPS = 0.01, 240
MOST_FRAMES = 100_000
LARGEST = 8192
"""Pixels of a side."""


class _Codecs(NamedTuple):
    container: str
    video: str
    options: dict[str, str]
    audio: str
    rates: tuple[int, ...]  # Samples a second that the audio codec takes; others are resampled to the last of them


_AAC = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
FORMATS = {
    ".mp4": _Codecs("mp4", "libx264", {"crf": "18"}, "aac", _AAC),
    ".webm": _Codecs("webm", "libvpx-vp9", {"crf": "24", "b": "0", "cpu-used": "5"}, "libopus", (48000,)),
    ".gif": _Codecs("gif", "", {}, "", ()),
}
"""Each ending of a video's file and what is written under it."""


def check_format(path: Path) -> str:
    """The ending of a video's file, which says what is written."""
    if (ending := path.suffix.lower()) not in FORMATS:
        raise ConfigError(f"{path}: a video's file ends in {', '.join(FORMATS)}")
    return ending


def write_video(
    path: str | Path,
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float,
    sound: np.ndarray | None = None,
    sample_rate: int = 16_000,
) -> float:
    """Write a video.

    Args:
        path: The file; .mp4 is H.264 and AAC, .webm VP9 and Opus, .gif has no sound.
        frames: uint8 [T, H, W, 3], or the frames one by one.
        fps: Frames a second.
        sound: float32 [S], full scale from -1 to 1; None for a silent video.
        sample_rate: The sound's samples a second.

    Returns:
        How long the video is, in seconds.

    Raises:
        ConfigError: An ending, rate or shape that no video has.
        MediaError: There is no frame, or the codec refuses.
        PolymodalError: The file cannot be written.
    """
    path = Path(path)
    ending = check_format(path)
    if not LEAST_FPS <= fps <= MOST_FPS:
        raise ConfigError(f"{path}: {fps} frames a second; it must be a number from {LEAST_FPS} to {MOST_FPS}")
    rate = Fraction(fps).limit_denominator(1001)
    if sound is not None:
        sound = _checked_sound(np.asarray(sound), sample_rate, path)
    checked = _checked_frames(iter(frames), path)
    if ending == ".gif":
        data, count = _gif(checked, rate, path, sound)
    else:
        data, count = _encoded(checked, rate, sound, sample_rate, FORMATS[ending], path)
    write_bytes(path, data)
    return float(count / rate)


def _checked_sound(sound: np.ndarray, rate: int, path: Path) -> np.ndarray:
    if sound.ndim != 1 or not np.issubdtype(sound.dtype, np.floating):
        raise ConfigError(f"{path}: the sound is {sound.dtype} {list(sound.shape)}; it must be float32 [S]")
    if not (isinstance(rate, int | np.integer) and 1000 <= rate <= 768_000):
        raise ConfigError(f"{path}: the sound has {rate} samples a second; it must be from 1,000 to 768,000")
    if not np.isfinite(sound).all():
        raise MediaError(f"{path}: the sound holds samples that are no numbers; make it again")
    return sound.astype(np.float32).clip(-1, 1)


def _checked_frames(frames: Iterator[Any], path: Path) -> Iterator[np.ndarray]:
    """The frames, all of one size, with even sides where the file needs them."""
    first: tuple[int, ...] | None = None
    for number, frame in enumerate(frames, 1):
        frame = np.asarray(frame)
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
            raise ConfigError(f"{path}: frame {number} is {frame.dtype} {list(frame.shape)}, not uint8 [H, W, 3]")
        if first is None:
            first = frame.shape
            if max(first) > LARGEST:
                raise ConfigError(
                    f"{path}: frames of {first[1]} × {first[0]} pixels, at most {LARGEST:,} a side; scale"
                )
        if frame.shape != first:
            raise ConfigError(f"{path}: frame {number} is {list(frame.shape)} and the first {list(first)}; scale them")
        if number > MOST_FRAMES:
            raise ConfigError(f"{path}: more than {MOST_FRAMES:,} frames; write several videos")
        yield frame
    if first is None:
        raise MediaError(f"{path}: there is no frame to write")


def _encoded(
    frames: Iterator[np.ndarray],
    rate: Fraction,
    sound: np.ndarray | None,
    sample_rate: int,
    codecs: _Codecs,
    path: Path,
) -> tuple[bytes, int]:
    """Encode; frames and sound take turns, as players read them."""
    first = next(frames)
    height, width = (side + side % 2 for side in first.shape[:2])
    if (height, width) != first.shape[:2]:
        warnings.warn(
            f"{path}: {first.shape[1]} × {first.shape[0]} pixels, and the codec needs even sides; its edge is repeated "
            f"to {width} × {height}",
            stacklevel=3,
        )
    # A twentieth of a frame more of sound is cut off.
    wanted = 0 if sound is None else math.ceil(len(sound) / sample_rate * rate - Fraction(1, 20))
    buffer, count, shown = io.BytesIO(), 0, 0
    try:
        with av.open(buffer, "w", format=codecs.container) as container:
            video = container.add_stream(codecs.video, rate=rate, options=codecs.options)
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            audio = None
            if sound is not None:
                taken = sample_rate if sample_rate in codecs.rates else codecs.rates[-1]
                audio = container.add_stream(codecs.audio, rate=taken, layout="mono")
                resampler = av.AudioResampler(audio.codec_context.format, "mono", taken)
            for number, (frame, own) in enumerate(_held(itertools.chain([first], frames), wanted)):
                padded = np.pad(frame, ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0)), "edge")
                picture = av.VideoFrame.from_ndarray(padded, format="rgb24")
                picture.pts, picture.time_base = number, 1 / rate
                container.mux(video.encode(picture))
                count, shown = number + 1, shown + own
                if audio is not None and sound is not None:
                    begin, end = (round(at / rate * sample_rate) for at in (number, number + 1))
                    piece = np.zeros(end - begin, np.float32)
                    piece[: len(sound[begin:end])] = sound[begin:end]
                    _mux_sound(container, audio, resampler, piece, begin, sample_rate)
            container.mux(video.encode())
            if audio is not None:
                for made in resampler.resample(None):
                    container.mux(audio.encode(made))
                container.mux(audio.encode())
    except av.error.FFmpegError as error:
        raise MediaError(f"{path}: {codecs.video} and {codecs.audio} refuse ({first_line(error)})") from error
    if sound is not None:
        _say_lengths(path, shown / rate, Fraction(len(sound), sample_rate), 1 / rate)
    return buffer.getvalue(), count


def _held(frames: Iterator[np.ndarray], wanted: int) -> Iterator[tuple[np.ndarray, bool]]:
    """The frames, then the last one again until there are as many as are wanted; whether each is one of the own."""
    number = 0
    for frame in frames:
        yield frame, True
        number += 1
    for _ in range(number, wanted):
        yield frame, False


def _mux_sound(container: Any, audio: Any, resampler: Any, piece: np.ndarray, start: int, rate: int) -> None:
    """Encode a piece of the sound."""
    if not len(piece):
        return
    frame = av.AudioFrame.from_ndarray(piece[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
    for made in resampler.resample(frame):
        container.mux(audio.encode(made))


def _say_lengths(path: Path, shown: Fraction, heard: Fraction, tick: Fraction) -> None:
    """Say so where frames and sound end more than a frame apart."""
    if abs(shown - heard) > tick:
        how = "the last frame stays until it ends" if heard > shown else "silence follows it"
        warnings.warn(
            f"{path}: the frames take {float(shown):.2f} s and the sound {float(heard):.2f} s; {how}", stacklevel=4
        )


def _gif(frames: Iterator[np.ndarray], rate: Fraction, path: Path, sound: np.ndarray | None) -> tuple[bytes, int]:
    """An animated GIF, which has hundredths of a second, and players show none faster than 50 a second."""
    if sound is not None:
        warnings.warn(f"{path}: a GIF has no sound, so it is left out; write .mp4 or .webm", stacklevel=3)
    if rate > 50:
        raise ConfigError(f"{path}: a GIF has at most 50 frames a second; write .mp4 or .webm")
    images = [PILImage.fromarray(frame) for frame in frames]
    ends = [round(1000 * (number + 1) / rate / 10) * 10 for number in range(len(images))]
    durations = [end - before for before, end in zip([0, *ends], ends)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return buffer.getvalue(), len(images)
