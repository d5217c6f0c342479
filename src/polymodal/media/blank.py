"""Media with nothing in them, otherwise as their originals: grey videos and silence, for controls of evaluations."""

import io
import wave
from fractions import Fraction

import numpy as np

from polymodal.errors import MediaError
from polymodal.media.audio import open_audio
from polymodal.media.video import LIMITS
from polymodal.media.video_containers import open_video
from polymodal.messages import Source

GREY = (128, 128, 128)
_RATE = 16_000  # samples a second of silence
_MOST = 2**26  # bytes of a grey video that may be frames stored whole


def silence(source: Source, segment: tuple[float | None, float | None] = (None, None)) -> bytes:
    """A WAV of nothing that lasts as long as a sound, or a piece of it."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes(bytes(2 * len(open_audio(source, sample_rate=_RATE, video=True, segment=segment).samples)))
    return buffer.getvalue()


def grey_video(source: Source, sound: bool | None = False) -> bytes:
    """A video of as many grey frames, as large, shown at the same times; with `sound`, a silence as long as its own."""
    # None: a silence where its sound can be read, since whether it is heard is the model's choice.
    import av

    with open_video(source, LIMITS) as video:
        (height, width), table = video.size, video.table()
        length = 0 if sound is False or not video.audio else _samples(source, needed=bool(sound))
    tick = Fraction(table.tick).limit_denominator(10**6)
    shown = np.rint(table.times / float(tick)).astype(np.int64).tolist()
    # Two frames are encoded, a whole one and one that changes nothing, and written again and again.
    encoder = av.CodecContext.create("qtrle", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, "rgb24", tick  # type: ignore[attr-defined]
    frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), GREY, np.uint8), format="rgb24")
    made = []
    for number in range(2):
        frame.pts = number
        made += [bytes(packet) for packet in encoder.encode(frame)]  # type: ignore[attr-defined]
    whole, same = made
    keys = np.flatnonzero(table.keys)
    wholes = {0, *keys[:: 1 + len(keys) * len(whole) // _MOST].tolist()}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as file:
        stream = file.add_stream("qtrle", rate=Fraction(1) / tick)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = width, height, "rgb24", tick
        track = file.add_stream("pcm_s16le", rate=_RATE, layout="mono") if length else None
        for number, pts in enumerate(shown):
            packet = av.Packet(whole if number in wholes else same)
            packet.stream, packet.time_base, packet.is_keyframe = stream, tick, number in wholes
            packet.pts = packet.dts = pts
            end = shown[number + 1] if number + 1 < len(shown) else round(table.duration / float(tick))
            packet.duration = max(1, end - pts)
            file.mux(packet)
        if track is not None:
            zeros = np.zeros((1, length), np.int16)
            for start in range(0, zeros.shape[1], 2**16):
                part = av.AudioFrame.from_ndarray(zeros[:, start : start + 2**16], format="s16", layout="mono")
                part.sample_rate, part.pts, part.time_base = _RATE, start, Fraction(1, _RATE)
                file.mux(track.encode(part))
    return buffer.getvalue()


def _samples(source: Source, *, needed: bool) -> int:
    """How many samples a video's sound has; 0 where it cannot be read and need not be."""
    try:
        return len(open_audio(source, sample_rate=_RATE, video=True).samples)
    except MediaError:
        if needed:
            raise
        return 0
