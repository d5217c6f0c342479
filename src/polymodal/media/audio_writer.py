"""A sound as a file: WAV, FLAC, MP3, Ogg with Opus, AAC or bare samples; faster or slower at the same pitch.

PyAV encodes in memory.
"""

import io
from typing import Any, NamedTuple

import av
import numpy as np

from polymodal.errors import ConfigError, MediaError, first_line

_AAC = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


class Form(NamedTuple):
    """What a sound is written as."""

    kind: str  # Its media type
    container: str
    codec: str
    rates: tuple[int, ...] = ()  # Samples a second that the codec takes; others are resampled to the last; () for any


SOUNDS = {
    "wav": Form("audio/wav", "wav", "pcm_s16le"),
    "flac": Form("audio/flac", "flac", "flac"),
    "mp3": Form("audio/mpeg", "mp3", "libmp3lame", (8000, 11025, 12000, 16000, 22050, 32000, 44100, 48000, 24000)),
    "opus": Form("audio/ogg", "ogg", "libopus", (8000, 12000, 16000, 24000, 48000)),
    "aac": Form("audio/aac", "adts", "aac", _AAC),
    "pcm": Form("audio/pcm", "s16le", "pcm_s16le", (24_000,)),  # as OpenAI's: 16 bits, little-endian
}
"""By the names that OpenAI's API has for them."""
SPEEDS = (0.25, 4.0)


def encode_sound(samples: np.ndarray, sample_rate: int, form: str, speed: float = 1.0) -> bytes:  # float32 [S]
    """Write a sound of one channel, full scale -1 to 1, in one of `SOUNDS`."""
    if not SPEEDS[0] <= speed <= SPEEDS[1]:
        raise ConfigError(f"speed is {speed:g}; it must be from {SPEEDS[0]:g} to {SPEEDS[1]:g}")
    if not len(samples):
        raise MediaError("there is no sound to write")
    kind = SOUNDS[form]
    rate = sample_rate if sample_rate in kind.rates or not kind.rates else kind.rates[-1]
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", kind.container) as file:
            stream: Any = file.add_stream(kind.codec, rate=rate, layout="mono")
            for frame in _frames(np.asarray(samples, np.float32).clip(-1, 1), sample_rate, speed):
                file.mux(stream.encode(frame))  # which resamples, and cuts into the codec's own frames
            file.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise MediaError(f"the sound cannot be written as {form} ({first_line(error)})") from None
    return buffer.getvalue()


def _frames(samples: np.ndarray, rate: int, speed: float) -> Any:
    """The sound as ffmpeg has it, a second at a time."""
    graph = av.filter.Graph()
    last = graph.add_abuffer(sample_rate=rate, format="fltp", layout="mono")
    entry, left = last, speed
    while left != 1.0:
        step = max(left, 0.5)  # the slowest that ffmpeg stretches at once
        left = left / step
        after = graph.add("atempo", f"{step:.4f}")
        last.link_to(after)
        last = after
    end = graph.add("abuffersink")
    last.link_to(end)
    graph.configure()
    for start in [*range(0, len(samples), rate), None]:
        frame = None
        if start is not None:
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + rate].copy(), "fltp", "mono")
            frame.sample_rate, frame.pts = rate, start
        entry.push(frame)
        while True:
            try:
                made: Any = end.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                break
            made.pts = None
            yield made
