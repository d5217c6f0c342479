"""A sound of any format to one channel of floats, resampled, with limits that hold while it is decoded.

    sound = open_audio("speech.mp3")
    sound.samples, sound.sample_rate            # float32 [L], mostly -1 to 1, and 16000

ffmpeg reads through a file object of ours and may open nothing else: formats that name other files (playlists, concat
lists) are not on the list, and no protocol is allowed. A file is decoded a packet at a time, so memory holds the result
and little more, whatever a header claims. Channels are averaged (ffmpeg's own mixture to mono weighs them by their
place in a room). A gap inside a recording is not filled.

Damage: a few packets that cannot be decoded, as files from the web have, are left out with a warning. More of them, or
an end before the length that the header gives, are refused; MP3, Ogg and AAC give none, and end where they end. A
header that gives more than the longest sound allowed, or gigabytes, is not believed: programs that write into a pipe
cannot know the length and put the largest number there is.
"""

import base64
import contextlib
import io
import warnings
import wave
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image as PILImage

from polymodal.errors import ConfigError, MediaError
from polymodal.media.image import what_is_it
from polymodal.media.source import describe, isolated
from polymodal.media.window import Window, guarded, open_window, reason
from polymodal.messages import Source

MAX_SECONDS = 1800.0
"""The longest sound unless the caller says otherwise."""
MAX_FILE = 2 * 2**30
"""The largest file, in bytes, unless the caller says otherwise; from a path it is never held in memory."""
MAX_DECODED = 4 * 2**30
"""Bytes of all channels, at the file's own rate, that are decoded at most: half an hour of six channels at 96 kHz."""
RATES = (1_000, 768_000)
"""Samples a second that a file may have, and that may be asked for."""
MAX_CHANNELS = 64

CONTAINERS = "wav,w64,mp3,ogg,flac,aac,aiff,au,caf,amr,amrnb,amrwb,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,asf"
"""What ffmpeg opens, by its own names; none of them names other files."""
CODECS = (
    "mp3,mp3float,libopus,opus,vorbis,libvorbis,flac,aac,aac_latm,alac,ac3,eac3,amrnb,amrwb,libopencore_amrnb,"
    "libopencore_amrwb,adpcm_ms,adpcm_ima_wav,gsm,gsm_ms,wmav1,wmav2"
)
"""What is decoded, besides every PCM."""

_PACKETS = 500  # a second; of the smallest that Opus has there are 400
_EXACT = {"w64", "flac", "au", "mov,mp4,m4a,3gp,3g2,mj2"}  # formats whose header counts the samples
_SLACK, _SLACK_BYTES = 0.2, 64  # seconds and bytes that a header may be wrong by
_PLACEHOLDER = 2**31 - 2**24  # bytes that only a program claims that does not know the length
_LISTS = (b"#extm3u", b"ffconcat", b"<mpd", b"[playlist]", b"v=0\r\n", b"v=0\n")


@dataclass(frozen=True)
class Sound:
    """A decoded sound."""

    samples: np.ndarray  # float32 [L], one channel
    sample_rate: int  # Samples a second
    source_rate: int  # What the file had
    source_channels: int

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / self.sample_rate

    def _repr_html_(self) -> str:
        """A player of its first minute, as a notebook shows it."""
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setparams((1, 2, self.sample_rate, 0, "NONE", ""))
            file.writeframes((self.samples[: 60 * self.sample_rate].clip(-1, 1) * 32767).astype("<i2").tobytes())
        url = f"data:audio/wav;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
        return f'<audio controls src="{url}"></audio><p>{self.seconds:.2f} seconds at {self.sample_rate:,} Hz</p>'


@isolated
def open_audio(
    source: Source,
    *,
    sample_rate: int = 16_000,
    video: bool = False,
    track: int = 0,
    segment: tuple[float | None, float | None] = (None, None),
    max_seconds: float = MAX_SECONDS,
    limit: int = MAX_FILE,
    name: str | None = None,
) -> Sound:
    """Decode a sound: WAV, MP3, Ogg (Opus, Vorbis), FLAC, M4A, and what else ffmpeg knows.

    Args:
        source: The file: a path, bytes, a `data:` URL, or a place in an archive.
        sample_rate: Samples a second of the result.
        video: Also take the sound of a video.
        track: Which sound of a file that has several, from 0.
        segment: Only from its start to before its end, in seconds; None for the sound's own.
        max_seconds: The longest result. A sound of which a segment is taken may last half an hour, or that if longer.
        limit: The largest file, in bytes.
        name: What error lines call it.

    Returns:
        One channel, the mean of the file's, as float32; full scale is -1 to 1, and a float file may go beyond.

    Raises:
        MediaError: It is no sound that can be read, is damaged or cut off, or beyond a limit.
        ConfigError: An argument makes no sense.
    """
    if not RATES[0] <= sample_rate <= RATES[1]:
        raise ConfigError(f"sample_rate is {sample_rate}; it must be from {RATES[0]:,} to {RATES[1]:,}")
    if not 0 < max_seconds <= 86_400:
        raise ConfigError(f"max_seconds is {max_seconds}; it must be above 0 and at most 86,400, a day")
    if isinstance(source, PILImage.Image):
        raise MediaError(f"{name or describe(source)}: is an image, not a sound; give a sound file")
    name = name or describe(source, "sound")
    with guarded(name, "sound", "cut it"), contextlib.ExitStack() as stack:
        window = open_window(source, limit, name, limit)
        stack.enter_context(window.file)
        container = stack.enter_context(_open_container(window, name))
        longest = max_seconds if segment == (None, None) else max(max_seconds, MAX_SECONDS)
        sound = _decode(container, _stream(container, video, track, name), sample_rate, longest, name)
    return sound if segment == (None, None) else _cut(sound, segment, max_seconds, name)


def _cut(sound: Sound, segment: tuple[float | None, float | None], max_seconds: float, name: str) -> Sound:
    """A piece of a sound."""
    start, end = segment[0] or 0.0, sound.seconds if segment[1] is None else segment[1]
    first, last = (round(max(second, 0.0) * sound.sample_rate) for second in (start, end))
    piece = sound.samples[first:last]
    if not len(piece) or len(piece) > max_seconds * sound.sample_rate:
        raise MediaError(
            f"{name}: from {start:g} to {end:g} seconds there are {len(piece) / sound.sample_rate:g} of sound; ask for "
            f"some, and for at most {max_seconds:g}"
        )
    return replace(sound, samples=piece)


def _open_container(file: Window, name: str) -> Any:
    """Let ffmpeg read the headers."""
    import av

    head = file.read(4096)
    file.seek(0)
    if (claimed := _claimed(head)) is not None and file.size + _SLACK_BYTES < claimed < _PLACEHOLDER:
        raise MediaError(f"{name}: {file.size:,} of {claimed:,} bytes; it was cut off, give a whole file")
    if (other := _not_a_sound(head)) is not None:
        raise MediaError(f"{name}: {other}")
    codecs = [CODECS, *(codec for codec in av.codec.codecs_available if codec.startswith("pcm_"))]
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none", "codec_whitelist": ",".join(codecs)}
    try:
        return av.open(
            file, mode="r", container_options=options, metadata_errors="ignore", buffer_size=2**16, io_open=_refuse
        )
    except av.FFmpegError as error:
        known = head[:4] in (b"RIFF", b"OggS", b"fLaC", b"FORM") or head[4:8] == b"ftyp" or head[:3] == b"ID3"
        what = "is damaged or cut off" if known else "is not a sound that can be read"
        raise MediaError(f"{name}: {what} ({reason(error)}); give a whole WAV, MP3, Ogg, FLAC or M4A file") from None


def _stream(container: Any, video: bool, track: int, name: str) -> Any:
    """The sound to take."""
    import av

    cover = av.stream.Disposition.attached_pic
    if not video and any(not stream.disposition & cover for stream in container.streams.video):
        raise MediaError(f"{name}: is a video, not a sound; take its sound with video=True")
    streams = container.streams.audio
    if not streams:
        raise MediaError(f"{name}: has no sound; give a file with an audio track")
    if not 0 <= track < len(streams):
        raise ConfigError(f"{name}: has {len(streams)} audio tracks, 0 to {len(streams) - 1}; track is {track}")
    stream, codec = streams[track], streams[track].codec_context
    if codec is None or not (codec.name in CODECS.split(",") or codec.name.startswith("pcm_")):
        known = codec.name if codec is not None else "unknown"
        raise MediaError(f"{name}: its codec ({known}) is not one that is decoded here; convert it to WAV or FLAC")
    _check(codec.sample_rate or RATES[0], codec.layout.nb_channels if codec.layout else 1, name)
    return stream


def _decode(container: Any, stream: Any, sample_rate: int, max_seconds: float, name: str) -> Sound:
    """Decode, average and resample, packet by packet."""
    most = int(max_seconds * sample_rate) + 1
    pieces: list[np.ndarray] = []
    length = decoded = packets = lost = channels = rate = 0
    seconds = 0.0  # at the file's own rate
    resampler: Any = None

    def keep(frames: list[Any]) -> None:
        nonlocal length
        for frame in frames:
            pieces.append(frame.to_ndarray()[0].copy())
            length += len(pieces[-1])

    for samples, its_rate, size in _samples(container, stream, int(_PACKETS * (max_seconds + 2)), name):
        packets += 1
        if samples is None:
            lost += 1
            continue
        _check(its_rate, len(samples), name)
        decoded, seconds = decoded + size, seconds + samples.shape[1] / its_rate
        if seconds > max_seconds:
            raise MediaError(
                f"{name}: lasts longer than {max_seconds:,.0f} seconds, which is the most allowed; cut it, or give "
                "max_seconds"
            )
        if decoded > MAX_DECODED:
            raise MediaError(
                f"{name}: more than {MAX_DECODED:,} bytes of sound in all its channels; save it with fewer channels or "
                "at a lower rate"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            mono = samples.mean(axis=0, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise MediaError(f"{name}: has samples that are no numbers (NaN or infinite); write the file again")
        if resampler is not None and its_rate != rate:  # links of an Ogg chain may differ
            keep(resampler.resample(None))
            resampler = None
        resampler = resampler or _resampler(sample_rate)
        rate, channels = its_rate, max(channels, len(samples))
        keep(resampler.resample(_frame(mono, rate)))
    if resampler is not None:
        keep(resampler.resample(None))
    claimed = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
    exact = container.format.name in _EXACT
    if not length or lost > 2 + packets // 20:
        what = "has no samples" if not lost else f"{lost} of {packets} packets cannot be decoded"
        raise MediaError(f"{name}: {what}; it is damaged or empty, give a whole file")
    if exact and seconds + _SLACK < claimed <= max_seconds:
        raise MediaError(
            f"{name}: ends after {seconds:.2f} of {claimed:.2f} seconds; it was cut off, give a whole file"
        )
    if lost:
        warnings.warn(f"{name}: {lost} of {packets} packets are damaged and were left out", stacklevel=3)
    joined = np.concatenate(pieces)[:most]
    if not np.isfinite(joined).all():
        raise MediaError(f"{name}: has samples too large to be resampled; write the file again")
    return Sound(joined, sample_rate, rate, channels)


def _samples(container: Any, stream: Any, most: int, name: str) -> Iterator[tuple[np.ndarray | None, int, int]]:
    """Samples [channels, n] of each frame, their rate and bytes; None for a packet that cannot be decoded."""
    import av

    packets = container.demux(stream)
    for _ in range(most):
        try:
            packet = next(packets)
            frames = packet.decode()
        except (StopIteration, av.error.EOFError):
            return
        except av.FFmpegError:
            yield None, 0, 0
            continue
        for frame in frames:
            if frame.samples:
                values = frame.to_ndarray()
                yield _floats(values, frame), frame.sample_rate, values.nbytes
    raise MediaError(f"{name}: is cut into more than {most:,} pieces; convert it to WAV or FLAC")


def _floats(values: np.ndarray, frame: Any) -> np.ndarray:
    """Samples as floats [channels, n]; what is packed comes as one row."""
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128) / 128
    if values.dtype.kind == "i":
        return values / np.array(2.0 ** (8 * values.itemsize - 1), np.float32 if values.itemsize < 4 else np.float64)
    return values


def _resampler(rate: int) -> Any:
    import av

    return av.AudioResampler(format="fltp", layout="mono", rate=rate)


def _frame(mono: np.ndarray, rate: int) -> Any:
    """One channel as ffmpeg has it."""
    import av

    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(mono[None]), format="fltp", layout="mono")
    frame.sample_rate = rate
    return frame


def _check(rate: int, channels: int, name: str) -> None:
    """Refuse what no recording has."""
    if not RATES[0] <= rate <= RATES[1]:
        raise MediaError(f"{name}: has {rate:,} samples a second, from {RATES[0]:,} to {RATES[1]:,} are read")
    if not 1 <= channels <= MAX_CHANNELS:
        raise MediaError(f"{name}: has {channels} channels, from 1 to {MAX_CHANNELS} are read")


def _claimed(head: bytes) -> int | None:
    """The size that the header of a WAV or AIFF gives the file; ffmpeg takes what is there for the whole."""
    order: Any = {b"RIFF": "little", b"FORM": "big"}.get(head[:4])
    return None if order is None else 8 + int.from_bytes(head[4:8], order)


def _not_a_sound(head: bytes) -> str | None:
    """Say what a file is, where its first bytes leave no doubt that it is something else."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_LISTS) or (text.startswith(b"<?xml") and b"<mpd" in text):
        return "is a playlist, which names other files; give the sound file itself"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")) or head[8:12] == b"WEBP":
        return "is an image, not a sound"
    said = what_is_it(head, "a sound")
    return said if "image" in said or "document" in said or "page" in said or "pointer" in said else None


def _refuse(*_: Any, **__: Any) -> Any:
    """Open nothing: a sound that names other files does not get them."""
    raise OSError("a sound may not open other files")
