"""Sounds of every format to one channel of floats; files are made here, by PyAV or byte by byte."""

from __future__ import annotations

import io
import random
import time
import warnings
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polymodal.errors import ConfigError, MediaError, PolymodalError
from polymodal.media import audio
from polymodal.media.audio import open_audio
from polymodal.messages import FileSlice
from tests.media.makers import opus, wav

av = pytest.importorskip("av")

NOISE = (np.random.default_rng(0).standard_normal(16_000) * 3000).astype("<i2")
SINE = (np.sin(2 * np.pi * 440 * np.arange(3 * 16_000) / 16_000) / 2).astype(np.float32)
FORMATS = [
    ("mp3", "libmp3lame", 16_000),
    ("ogg", "libopus", 48_000),
    ("flac", "flac", 16_000),
    ("ipod", "aac", 16_000),
    ("ipod", "alac", 16_000),
    ("adts", "aac", 16_000),
    ("webm", "libopus", 48_000),
    ("aiff", "pcm_s16be", 16_000),
    ("caf", "pcm_s16le", 16_000),
    ("w64", "pcm_s16le", 16_000),
    ("wav", "pcm_s24le", 16_000),
]


def encoded(form: str, codec: str, samples: np.ndarray, rate: int = 16_000, video: bool = False) -> bytes:
    """A mono sound [L] in any format, beside four frames of video where asked for."""
    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        if video:
            picture = container.add_stream("mpeg4", rate=4)
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        size = stream.codec_context.frame_size or 0
        fit = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate, frame_size=size)
        for piece in (*fit.resample(frame), *fit.resample(None)):
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
        if video:
            for _ in range(4):
                container.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
            container.mux(picture.encode(None))
    return out.getvalue()


def decoded(data: bytes, rate: int) -> np.ndarray:
    """What PyAV itself makes of a file, in one go."""
    with av.open(io.BytesIO(data)) as container:
        fit = av.AudioResampler(format="flt", layout="mono", rate=rate)
        frames = [out for frame in container.decode(audio=0) for out in fit.resample(frame)]
        return np.concatenate([frame.to_ndarray()[0] for frame in (*frames, *fit.resample(None))])


def test_a_wav_is_the_numbers_that_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "noise.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(NOISE.tobytes())
    sound = open_audio(path)
    assert sound.samples.dtype == np.float32 and sound.sample_rate == 16_000 and sound.seconds == 1
    assert np.array_equal(sound.samples, NOISE / np.float32(32768))
    data = path.read_bytes()
    (tmp_path / "two.tar").write_bytes(b"x" * 100 + data + b"x" * 100)
    for source in (str(path), data, path.as_uri(), FileSlice(tmp_path / "two.tar", 100, len(data), "noise.wav")):
        assert np.array_equal(open_audio(source).samples, sound.samples)


@pytest.mark.parametrize(
    ("data", "kind", "tolerance"),
    [
        ((NOISE // 256 + 128).astype(np.uint8), 1, 1 / 128),
        (NOISE.astype("<i4") * 2**16, 1, 0),
        ((NOISE / 32768).astype("<f4"), 3, 0),
        ((NOISE / 32768).astype("<f8"), 3, 0),
    ],
)
def test_every_depth_has_the_same_scale(data: np.ndarray, kind: int, tolerance: float) -> None:
    assert np.abs(open_audio(wav(data, kind=kind)).samples - NOISE / 32768).max() <= tolerance


@pytest.mark.parametrize("channels", [2, 3, 6, 64])
def test_channels_are_averaged(channels: int) -> None:
    data = np.random.default_rng(channels).integers(-32768, 32767, (4000, channels)).astype("<i2")
    sound = open_audio(wav(data, channels=channels))
    assert sound.source_channels == channels
    np.testing.assert_allclose(sound.samples, (data / 32768).mean(1), atol=1e-6)


@pytest.mark.parametrize(("form", "codec", "rate"), FORMATS)
def test_every_format_equals_a_plain_decode(form: str, codec: str, rate: int) -> None:
    data = encoded(form, codec, SINE, rate)
    sound = open_audio(data, sample_rate=rate)
    assert (sound.source_rate, sound.source_channels) == (rate, 1)
    np.testing.assert_allclose(sound.samples, decoded(data, rate), atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 192_000, 768_000])
def test_resampling_keeps_a_tone_and_its_place(rate: int) -> None:
    wave_at = lambda rate: np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate) / 2  # noqa: E731
    sound = open_audio(wav(wave_at(rate).astype("<f4"), rate, kind=3))
    assert sound.source_rate == rate and abs(len(sound.samples) - 8000) <= 1
    np.testing.assert_allclose(sound.samples[100:7900], wave_at(16_000)[100:7900], atol=2e-3)


def test_the_sound_of_a_video_is_an_option() -> None:
    data = encoded("mp4", "aac", SINE, video=True)
    with pytest.raises(MediaError, match="is a video, not a sound; take its sound with video=True"):
        open_audio(data)
    np.testing.assert_allclose(open_audio(data, video=True).samples, decoded(data, 16_000), atol=1e-6)
    with pytest.raises(ConfigError, match="has 1 audio tracks, 0 to 0; track is 1"):
        open_audio(data, video=True, track=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wav(NOISE[:0]), "has no samples"),
        (wav(NOISE, 1), "has 1 samples a second, from 1,000 to 768,000 are read"),
        (wav(NOISE, 0), "is damaged or cut off"),
        (wav(NOISE, 1_000_000), "has 1,000,000 samples a second"),
        (wav(np.tile(NOISE, 65), channels=65), "has 65 channels, from 1 to 64"),
        (wav(np.full(900, np.nan, "<f4"), kind=3), "NaN or infinite"),
        (wav(np.array([0, 0, -np.inf] * 300, "<f8"), kind=3), "NaN or infinite"),
        (wav(NOISE)[:20_000], "20,000 of 32,044 bytes; it was cut off"),
        (wav(NOISE, claim=64_000), "32,044 of 64,044 bytes; it was cut off"),
        (encoded("flac", "flac", SINE)[:15_000], "of 3.00 seconds; it was cut off"),
        (encoded("ipod", "aac", SINE)[:9000], "is damaged or cut off"),
        (b"#EXTM3U\n/etc/passwd\n", "is a playlist"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "is a playlist"),
        (b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n", "is a playlist"),
        (b"\x89PNG\r\n\x1a\n" + bytes(60), "is an image, not a sound"),
        (b"%PDF-1.4\n", "is a PDF document, not a sound"),
        (b"hello" * 100, "is not a sound that can be read"),
        (b"", "is empty"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(data: bytes, message: str) -> None:
    with pytest.raises(MediaError, match=message) as caught:
        open_audio(data, name="a.wav")
    assert str(caught.value).startswith("a.wav: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("claim", [2**32 - 1, 4_000_000_000, 0])
def test_a_header_that_cannot_know_its_length_is_not_believed(claim: int) -> None:
    assert np.array_equal(open_audio(wav(NOISE, claim=claim)).samples, NOISE / np.float32(32768))


@pytest.mark.parametrize("text", [b"#EXTM3U\n#EXTINF:1,\n{}\n", b"\n\n #EXTM3U\n{}", b"[playlist]\nFile1={}\n"])
def test_a_list_of_files_does_not_get_them(text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.wav").write_bytes(wav(NOISE))
    (tmp_path / "list.wav").write_bytes(text.replace(b"{}", str(tmp_path / "secret.wav").encode()))
    with pytest.raises(MediaError, match="is a playlist"):
        open_audio(tmp_path / "list.wav")
    monkeypatch.setattr(audio, "_LISTS", (b"none",))  # without that look ffmpeg itself has to refuse
    with pytest.raises(MediaError, match="is not a sound"):
        open_audio(tmp_path / "list.wav")


def test_a_small_file_of_long_silence_stops_at_the_limit() -> None:
    bomb = opus(1200)
    assert len(bomb) < 300_000
    start = time.monotonic()
    with pytest.raises(MediaError, match="lasts longer than 60 seconds, which is the most allowed; cut it, or give"):
        open_audio(bomb, max_seconds=60)
    assert time.monotonic() - start < 5
    assert open_audio(opus(30), max_seconds=60).seconds == pytest.approx(30, abs=0.1)


def test_a_file_of_single_samples_stops_at_the_limit() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for number in range(12_000):
            packet = av.Packet(b"\0\0")
            packet.pts = packet.dts = number
            packet.time_base, packet.stream = Fraction(1, 16_000), stream
            container.mux(packet)
    with pytest.raises(MediaError, match="is cut into more than 1,500 pieces"):
        open_audio(out.getvalue(), max_seconds=1)
    assert len(open_audio(out.getvalue()).samples) == 12_000


def test_limits_of_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(wav(NOISE))
    with pytest.raises(MediaError, match="32,044 bytes, at most 1,000 are allowed"):
        open_audio(path, limit=1000)
    monkeypatch.setattr(audio, "MAX_DECODED", 20_000)
    with pytest.raises(MediaError, match="more than 20,000 bytes of sound in all its channels"):
        open_audio(path)


@pytest.mark.parametrize("options", [{"sample_rate": 0}, {"sample_rate": 10**6}, {"max_seconds": 0}])
def test_arguments_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        open_audio(wav(NOISE), **options)


def test_damaged_packets_are_left_out_with_a_warning_or_refused() -> None:
    data = bytearray(encoded("mp3", "libmp3lame", SINE))
    whole = open_audio(bytes(data)).seconds
    data[4000:4300] = bytes(300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert whole - 0.3 < open_audio(bytes(data)).seconds <= whole
    data[500:] = random.Random(0).randbytes(len(data) - 500)
    with pytest.raises(MediaError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_audio(bytes(data))


@pytest.mark.filterwarnings("ignore")
def test_random_damage_gives_a_sound_or_one_line() -> None:
    chance = random.Random(7)
    seeds = [encoded(form, codec, SINE[:8000], rate) for form, codec, rate in FORMATS] + [wav(NOISE[:4000])]
    start = time.monotonic()
    for _ in range(240):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 12)):
            place = min(int(chance.expovariate(1 / 200)) if chance.random() < 0.7 else chance.randrange(10**6), 10**6)
            place %= len(data)
            data[place : place + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 4))
        if chance.random() < 0.3:
            del data[chance.randrange(1, len(data)) :]
        try:
            sound = open_audio(bytes(data), max_seconds=20)
        except PolymodalError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
        else:
            assert 0 < sound.seconds <= 20 and np.isfinite(sound.samples).all()
    assert time.monotonic() - start < 60
